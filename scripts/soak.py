"""Compare a long run under many faults with the same run without faults: `python scripts/soak.py --steps 300`.

The teacher is an `opd serve` process behind a proxy.  The proxy answers some requests with errors, late, incompletely
or with wrong content.  A worker process generates the rollouts.  Server, worker and trainer are killed (SIGKILL) at
fixed steps.  The script restarts server and trainer; the trainer restarts its worker.  Both runs must be equal bit for
bit: the metrics of each step, all sampled tokens and columns, and the final weights.  So each sample was trained on
exactly once.  The exit status is 0, or 1 with the first differences on standard output.

With `--method ropd`, the teacher and a judge generate text, each behind such a proxy.  The judge's json is malformed
for 1 in 3 questions at the first attempt and for 1 in 10 at every attempt.  The script checks that each sample was
either judged and has the advantage of its group, or was not judged and has no advantage.
"""

import argparse
import contextlib
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from scripts.grader import Babbler

FAULTS = ("500", "malformed", "drop", "slow", "429", "short", "other")
SCORED = ("/opd/hidden", "/v1/completions", "/inference/v1/generate")
WROTE, FAULTS_OF_TEXTS = "/v1/chat/completions", ("500", "drop", "slow", "429", "short")  # the client retries these
LATE = 6.0  # seconds until a slow answer; longer than the client's timeout
DEAD = 0.02  # seconds between two checks of the trainer


@contextlib.contextmanager
def serving(model: Path | str, *flags: str, port: int = 0, **env: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Start an `opd serve` process, yield its address and the process, and end it afterwards."""
    args = [sys.executable, "-m", "opd", "serve", str(model), "--port", str(port), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), process.stderr.read()
        yield line.split(" at ")[1].split()[0], process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)
        process.stdout.close()
        process.stderr.close()


class Proxy:
    """An HTTP proxy that forwards requests to `target`.

    `fault(path, n)` returns the kind of fault for the n-th request to a path, or None to forward it.  Paths that begin
    with an entry of `hide` get status 404.  `slow` is the delay of a slow answer, in seconds.
    """

    def __init__(
        self, target: str, fault: Callable[[str, int], str | None], hide: tuple[str, ...] = (), slow: float = 5.0
    ) -> None:
        self.target, self.fault, self.hide, self.slow = target, fault, hide, slow
        self.asked: dict[str, int] = {}
        self.lock = threading.Lock()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                with contextlib.suppress(ConnectionError):  # the client has given up
                    self.end_headers()
                    self.wfile.write(body)

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with proxy.lock:
                    n = proxy.asked[self.path] = proxy.asked.get(self.path, -1) + 1
                if self.path.startswith(proxy.hide or ("?",)):
                    return self.answer(404, b'{"error": {"message": "Not Found"}}', {})
                match proxy.fault(self.path, n):
                    case "500":
                        return self.answer(500, b"<h1>no</h1>", {})
                    case "429":
                        return self.answer(429, b'{"error": {"message": "slow down"}}', {})
                    case "slow":
                        time.sleep(proxy.slow)
                    case "drop":
                        return self.connection.shutdown(socket.SHUT_RDWR)
                    case "malformed":
                        return self.answer(200, b'{"choices": [', {"Content-Type": "application/json"})
                    case "other":
                        return self.answer(200, b'{"choices": [{"index": 0, "prompt_logprobs": [null]}]}', {})
                    case "short":
                        self.send_response(200)
                        self.send_header("Content-Length", "100000")
                        self.end_headers()
                        self.wfile.write(b"abc")
                        return self.connection.shutdown(socket.SHUT_RDWR)
                headers = {k: v for k, v in self.headers.items() if k.title() in ("Content-Type", "Authorization")}
                asked = urllib.request.Request(
                    proxy.target + self.path, body or None, headers=headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(asked, timeout=60) as found:
                        kept = {k: v for k, v in found.headers.items() if k.lower().startswith(("content-t", "x-"))}
                        self.answer(found.status, found.read(), kept)
                except urllib.error.HTTPError as error:
                    self.answer(error.code, error.read(), {})
                except (urllib.error.URLError, OSError):
                    self.answer(502, b"nobody there", {})

            do_GET = do_POST = pass_on

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@dataclass
class Plan:
    """A plan of faults: the steps at which a process is killed; 1 in `every` requests fails (0: none)."""

    server: list[int] = field(default_factory=list)
    worker: list[int] = field(default_factory=list)
    trainer: list[int] = field(default_factory=list)
    every: int = 0
    happened: Counter = field(default_factory=Counter)

    @classmethod
    def of(cls, steps: int, every: int, *, worker: bool = True) -> "Plan":
        """Create a plan with kills of server, worker and trainer that are spread over the run."""
        steps_at = lambda *shares: [max(1, round(share * steps)) for share in shares]
        return cls(steps_at(0.1, 0.45, 0.8), steps_at(0.2, 0.55, 0.9) if worker else [], steps_at(0.3, 0.66), every)

    def fault(self, path: str, n: int) -> str | None:
        """Return the fault of the n-th request to a path, or None, and count it."""
        kinds = FAULTS if path in SCORED else FAULTS_OF_TEXTS if path == WROTE else ()
        if not self.every or not kinds or n % self.every != self.every - 1:
            return None
        kind = kinds[(n // self.every) % len(kinds)]
        self.happened[kind] += 1
        return kind


def command(args: argparse.Namespace, teacher: str, judge: str, out: Path) -> list[str]:
    """Return the command line of the training run."""
    scored = ["--teacher", teacher, "--staleness", "1", "--exact-staleness", "--importance-cap", "2"]
    where = ["--teacher", f"openai:teacher@{teacher}/v1", "--judge", f"openai:judge@{judge}/v1"]
    written = [*where, "--limit", "40", "--judge-failures", "0.6"]
    of = {"vopd": (scored, ["vopd"]), "ropd": (written, ["ropd", "--references", "2", "--per-prompt", "4"])}
    flags, method = of[args.method]
    return [
        *(sys.executable, "-m", "opd", "train", "--student", args.student, *flags),
        *("--prompts", "embedded:ledger-short", "--preset", "embedded", "--lr", "1e-4", "--warmup", "0"),
        *("--steps", str(args.steps), "--batch", str(args.batch), "--max-new-tokens", str(args.tokens)),
        *("--save-every", str(args.save_every), "--rollouts-every", "1", "--teacher-timeout", "4"),
        *("--teacher-retries", "12", "--no-doctor", "--quiet", "--resume", "--out", str(out), *method),
    ]


def reached(out: Path) -> int:
    """Return the last step in the run's metrics.jsonl; 0 if the file has none."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    with contextlib.suppress(ValueError, IndexError):
        return int(json.loads(lines[-1])["step"])
    return 0


def worker_of(trainer: subprocess.Popen) -> psutil.Process | None:
    """Return the trainer's worker process, or None if it does not run."""
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(trainer.pid).children():
            if "opd.rollouts.worker.process" in child.cmdline():
                return child
    return None


def train(args: argparse.Namespace, out: Path, plan: Plan) -> float:
    """Run the training under a plan of faults and return its seconds; all processes are ended afterwards."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    port, start = free_port(), time.perf_counter()
    with contextlib.ExitStack() as stack, (out.parent / f"{out.name}.log").open("w") as log:
        serve = lambda: stack.enter_context(serving(args.teacher, "--name", "teacher", port=port))
        url, server = serve()
        proxy = stack.enter_context(Proxy(url, plan.fault, slow=LATE))
        judge = ""
        if args.method == "ropd":
            grader = stack.enter_context(Babbler())
            judge = stack.enter_context(Proxy(grader.url, plan.fault, slow=LATE)).url
            stack.callback(lambda: plan.happened.update(grader.babbled))
        begin = lambda: subprocess.Popen(command(args, proxy.url, judge, out), stdout=log, stderr=log)
        trainer = begin()
        stack.callback(lambda: trainer.kill())
        while trainer.poll() is None:
            time.sleep(DEAD)
            step = reached(out)
            if plan.server and step >= plan.server[0]:
                plan.server.pop(0)
                server.kill()
                server.wait(30)
                _, server = serve()
                plan.happened["server killed"] += 1
            if plan.worker and step >= plan.worker[0] and (worker := worker_of(trainer)) is not None:
                plan.worker.pop(0)
                worker.kill()
                plan.happened["worker killed"] += 1
            if plan.trainer and step >= plan.trainer[0]:
                plan.trainer.pop(0)
                trainer.kill()
                trainer.wait(30)
                trainer = begin()
                plan.happened["trainer killed"] += 1
        if trainer.returncode:
            raise SystemExit(f"soak: {out.name} ended with status {trainer.returncode}; see {log.name}")
    return time.perf_counter() - start


def account(a: Path, b: Path, steps: int, batch: int) -> Iterator[str]:
    """Yield the differences between two runs, and the samples that were not trained on exactly once."""
    for run in (a, b):
        trained = Counter(json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines())
        yield from (
            f"{run.name}: step {s} was logged {trained[s]} times" for s in range(1, steps + 1) if trained[s] != 1
        )
        for s in range(1, steps + 1):
            rows = (run / "rollouts" / f"step-{s:06d}.jsonl").read_text().splitlines()
            if sorted(json.loads(row)["index"] for row in rows) != list(range(batch)):
                yield f"{run.name}: step {s} did not train on samples 0 to {batch - 1}, each once"
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (a, b)]
    for first, second in zip(*lines, strict=True):
        if first != second:
            x, y = json.loads(first), json.loads(second)
            names = [name for name in x if x[name] != y.get(name)]
            yield f"step {x['step']}: {names[0]} is {x[names[0]]} in {a.name} and {y.get(names[0])} in {b.name}"
    for s in range(1, steps + 1):
        yield from _apart(*(run / "rollouts" / f"step-{s:06d}.safetensors" for run in (a, b)))
    last = f"checkpoints/step-{steps:06d}/model.safetensors"
    yield from _apart(a / last, b / last)


def judgements(run: Path, steps: int) -> Iterator[str]:
    """Yield the errors of a run with a judge.

    Each judged rollout must have its group-relative advantage, and the other rollouts none.
    """
    logged = [json.loads(line)["unjudged"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    for s in range(1, steps + 1):
        columns = load_file(run / "rollouts" / f"step-{s:06d}.safetensors")
        judged, group, mask, paid = (columns[name] for name in ("judged", "group", "mask", "advantage.0"))
        if (paid[~judged] != 0).any():
            yield f"{run.name}: step {s} trained on a rollout that was not judged"
        verdict, trained = columns["verdict"].double(), judged & mask.any(1)
        for g in group.unique():
            rows = trained & (group == g)
            wanted = (verdict - verdict[rows].mean())[rows][:, None] * mask[rows]
            if rows.any() and (paid[rows] * mask[rows] - wanted).abs().max() > 1e-6:
                yield f"{run.name}: step {s} paid group {int(g)} something else than its scores"
            if judged[group == g].unique().numel() > 1:
                yield f"{run.name}: step {s} judged a part of group {int(g)}"
        if abs(logged[s - 1] - float(1 - judged.float().mean())) > 1e-6:
            yield f"{run.name}: step {s} logged other judgements than it had"


def counted(run: Path, steps: int) -> dict[str, int]:
    """Count the samples of a run that a judge scored, and those without an advantage."""
    out: Counter[str] = Counter()
    for s in range(1, steps + 1):
        judged = load_file(run / "rollouts" / f"step-{s:06d}.safetensors")["judged"]
        out.update({"judged": int(judged.sum()), "without advantage": int((~judged).sum())})
    return dict(out)


def _apart(a: Path, b: Path) -> Iterator[str]:
    x, y, same = load_file(a), load_file(b), partial(torch.allclose, rtol=0, atol=0, equal_nan=True)
    for name in sorted(x.keys() | y.keys()):
        if name not in x or name not in y or x[name].shape != y[name].shape or not same(x[name], y[name]):
            yield f"{a.name}: {name} differs"


def soak(args: argparse.Namespace) -> list[str]:
    """Run both trainings and return the differences; print a summary as json."""
    texts = args.method == "ropd"
    root, plan = Path(args.out), Plan.of(args.steps, args.every, worker=not texts)
    hurt, calm = root / "faults", root / "calm"
    seconds = train(args, hurt, plan)
    quiet = train(args, calm, Plan())
    wire = [json.loads(line) for line in (hurt / "perf.jsonl").read_text().splitlines()]
    differences = list(account(hurt, calm, args.steps, args.batch))
    differences += [line for run in (hurt, calm) if texts for line in judgements(run, args.steps)]
    missed = [name for name in ("server", "worker", "trainer") if getattr(plan, name)]
    differences += [
        f"the run was over before the {name} was killed at step {getattr(plan, name)[0]}" for name in missed
    ]
    print(
        json.dumps(
            {
                "steps": args.steps,
                "samples": args.steps * args.batch,
                **(counted(hurt, args.steps) if texts else {}),
                "tokens": int(sum(json.loads(x)["tokens"] for x in (hurt / "metrics.jsonl").read_text().splitlines())),
                "faults": dict(sorted(plan.happened.items())),
                **({} if texts else {"retries": int(sum(row["teacher_retries"] for row in wire))}),
                "seconds": {"with faults": round(seconds, 1), "without": round(quiet, 1)},
                "differences": len(differences),
            }
        )
    )
    return differences


def settings(args: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--method", choices=("vopd", "ropd"), default="vopd")
    flags.add_argument("--steps", type=int, default=300)
    flags.add_argument("--batch", type=int, default=8, help="rollouts of a step")
    flags.add_argument("--tokens", type=int, default=32, help="longest response")
    flags.add_argument("--every", type=int, default=9, help="one scoring request in so many fails")
    flags.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    flags.add_argument("--student", default="embedded:student")
    flags.add_argument("--teacher", default="embedded:teacher")
    flags.add_argument("--out", default="outputs/soak")
    return flags.parse_args(args)


if __name__ == "__main__":
    differences = soak(settings(sys.argv[1:]))
    print("\n".join(differences[:20]), end="\n" if differences else "")
    sys.exit(1 if differences else 0)
