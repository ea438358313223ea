"""Runs that are killed at random moments, some several times, and resumed: every file equals that of a calm run.

A variant is a line of VARIANTS, so a later part of the program adds itself there.
"""

import json
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from tests.campaigns import Counts
from tests.campaigns.commands import MODELS, Running, start, start_ranks

SIZES = (
    "--max-new-tokens 24 --batch 4 --steps 4 --save-every 1 --keep 2 --rollouts-every 2 --lr 1e-3 --quiet --no-doctor"
)
LIMIT = 300.0  # seconds after which a command hangs
NOT_COMPARED = ("perf.jsonl", "environment.json", "config.json", "answers.sqlite*")  # times, and names of folders


@dataclass(frozen=True)
class Variant:
    """A kind of run.  Its share of the kills follows from its weight."""

    name: str
    flags: str
    weight: float = 1.0
    processes: int = 1
    server: bool = False  # whether the teacher is an `opd serve` process, which is killed as well


VARIANTS = (
    Variant("vopd", "vopd", 4),
    Variant("evaluations", "--eval-prompts embedded:ledger-short --eval-limit 4 --eval-every 2 vopd", 2),
    Variant("LoRA", "--lora-rank 4 opd-zscore", 3),
    Variant("kat", "--schedule cosine kat --window 4 --floor 2 --ready 8 --buffer 20 --after 2", 3),
    Variant("npd", "npd --pool 2 --no-filtered", 2),
    Variant("gkd", "gkd --share 0.5", 2),
    Variant("ema teacher", "--teacher ema:0.1 --context answer opd", 2),
    Variant("groups with a judge", "--judge verifier --preset embedded --steps 4 --batch 8 ropd", 1),
    Variant("worker", "--staleness 1 --exact-staleness vopd", 1),
    Variant("two processes", "vopd", 1, processes=2),
    Variant("shards", "--shard vopd", 1, processes=2),
    Variant("server", "opd-full", 1, server=True),
)


def run(folder: Path, count: int, seed: int) -> Counts:
    """Kill runs until `count` signals have hit a living run; resume each until it ends, and compare its files."""
    draw, counts = random.Random(seed), Counts()
    references: dict[str, tuple[dict[str, bytes], float]] = {}
    schedule = draw.sample(VARIANTS, len(VARIANTS))  # each variant once, as far as `count` allows, then by weight
    while counts.tried < count:
        variant = schedule.pop() if schedule else draw.choices(VARIANTS, [v.weight for v in VARIANTS])[0]
        with _server() if variant.server else nullcontext() as server:
            if variant.name not in references:
                references[variant.name] = _reference(folder / "reference", variant, server)
            _kill_and_resume(folder / "killed", variant, server, references[variant.name], draw, counts)
    return counts


def _command(out: Path, variant: Variant, server: "Server | None") -> list[str]:
    teacher = ["--teacher", server.address, "--teacher-retries", "1"] if server else []
    return ["train", *MODELS, *SIZES.split(), "--out", str(out), *teacher, "--resume", *variant.flags.split()]


def _reference(out: Path, variant: Variant, server: "Server | None") -> tuple[dict[str, bytes], float]:
    """Return the files of a run that nothing disturbs, and its seconds."""
    began = time.monotonic()
    for process in start_ranks(_command(out, variant, server), variant.processes):
        done = process.outcome(LIMIT)
        assert done.code == 0, f"{variant.name}: {done.output}"
    files = _files(out)
    shutil.rmtree(out)
    return files, time.monotonic() - began


def _kill_and_resume(
    out: Path,
    variant: Variant,
    server: "Server | None",
    reference: tuple[dict[str, bytes], float],
    draw: random.Random,
    counts: Counts,
) -> None:
    """Start a run, kill it up to three times, let it end, and count the signals that hit it."""
    files, seconds = reference
    hits, faults = list[str](), list[str]()
    for attempt in range(draw.choice((1, 1, 1, 2, 3)) + 1):
        processes = start_ranks(_command(out, variant, server), variant.processes)
        number = draw.choices((signal.SIGKILL, signal.SIGTERM, signal.SIGINT), (8, 1, 1))[0]
        ends = hits and attempt and draw.random() < 0.5  # this attempt is not disturbed
        if not ends and _wait(processes[0], out, draw, seconds):
            hits.append(number.name)
            if server is not None and draw.random() < 0.5:
                server.restart()
                number = signal.SIGKILL if draw.random() < 0.5 else 0  # the trainer may survive that
            if number:
                victims = processes if number != signal.SIGKILL or draw.random() < 0.5 else [draw.choice(processes)]
                for process in victims:
                    process.kill(number)
                if number == signal.SIGKILL:
                    for process in processes:  # a launcher ends the others
                        process.kill(group=True)
        outcomes = [process.outcome(LIMIT) for process in processes]
        faults += [f for o in outcomes if (f := o.fault(-signal.SIGKILL, -signal.SIGTERM, 130, 143))]
        if outcomes[0].code == 0:
            break
    else:
        done = [process.outcome(LIMIT) for process in start_ranks(_command(out, variant, server), variant.processes)]
        faults += [o.fault() or o.last_line() for o in done if o.code]
    found = _files(out)
    if changed := sorted(name for name in {*found, *files} if found.get(name) != files.get(name)):
        faults.append(f"other files than the calm run: {', '.join(changed[:4])}")
    counts.tried += len(hits)
    if faults:
        counts.lost += max(1, len(hits))
        counts.tried += not hits
        counts.details.append(f"{variant.name}, {' '.join(hits) or 'no signal'}: {'; '.join(faults)}"[:500])
        shutil.move(out, out.with_name(f"lost-{len(counts.details)}"))
    else:
        counts.survived += len(hits)
        shutil.rmtree(out)


def _wait(process: Running, out: Path, draw: random.Random, seconds: float) -> bool:
    """Wait until a random moment of a run, in half of the cases one in which a checkpoint is written.

    Return whether the run lives.
    """
    if draw.random() < 0.5:
        return not process.ended(draw.uniform(0.05, 1.0) * seconds)
    part = out / "checkpoints" / f".part-{draw.randint(1, 4):06d}"
    end = time.monotonic() + 2 * seconds
    while not part.exists() and time.monotonic() < end:
        if process.ended():
            return False
        time.sleep(0.0005)
    return not process.ended(draw.uniform(0, 0.03))


def _files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files that a run must reproduce; there must be no others."""
    files = [p for p in folder.rglob("*") if p.is_file() and not any(map(p.match, NOT_COMPARED))]
    # The digests of shards differ with the order of their headers.
    files = [p for p in files if p.name != "state.json" or not p.with_name("shards").is_dir()]
    return {str(p.relative_to(folder)): _shard(p) if p.parent.name == "shards" else p.read_bytes() for p in files}


def _shard(path: Path) -> bytes:
    """Return the content of a safetensors file with its header in a fixed order; that of its metadata is random."""
    raw = path.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    return json.dumps(json.loads(raw[8:size]), sort_keys=True).encode() + raw[size:]


@dataclass
class Server:
    """An `opd serve` process of the embedded teacher."""

    port: int
    process: Running

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def restart(self) -> None:
        """Kill the server and start it again on the same port."""
        self.process.kill(group=True)
        self.process.outcome(30)
        self.process = _serve(self.port)


@contextmanager
def _server() -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(port, _serve(port))
    try:
        yield server
    finally:
        server.process.kill(group=True)
        server.process.outcome(30)


def _serve(port: int) -> Running:
    """Start the server and wait until it accepts connections."""
    process = start(["serve", "embedded:teacher", "--port", str(port)])
    for _ in range(600):
        with socket.socket() as client:
            if not client.connect_ex(("127.0.0.1", port)):
                return process
        assert not process.ended(0.1), process.outcome().output
    raise TimeoutError(f"no server on port {port}")
