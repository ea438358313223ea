"""A worker process writes while the student trains: the same samples, none lost or repeated, no process left behind."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import opd
from opd.analysis.exact import World, measure
from opd.config import checks
from opd.config.engine import Speaker
from opd.config.plan import resolved
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.core.tensors import save_tensors
from opd.core.types import Batch, Rollout
from opd.losses.divergences import ForwardKL
from opd.losses.surrogates import TruncatedRatio
from opd.losses.terms import Match, Positions
from opd.losses.token_weights import TruncatedImportance
from opd.methods import METHODS
from opd.methods.method import Method
from opd.methods.npd import DeltaIFD
from opd.methods.rollout_policies.base import NOTHING
from opd.methods.rollout_policies.on_policy import OnPolicy
from opd.methods.rollout_policies.snapshot import Snapshot, measured_drift
from opd.models.student import Student
from opd.rollouts import buffer
from opd.rollouts.worker import client
from opd.teachers.local import LocalTeacher
from opd.training.build import open_session
from opd.training.checkpoint import load as load_state
from opd.training.forward_backward import Passes
from opd.training.run_folder import Run
from opd.training.trainer import Trainer
from tests.tiny_models import logged, small

close = torch.testing.assert_close


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Of both processes: bitwise claims are for equal thread counts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def config(pair, out, **changes):
    return small(pair, out, **{"steps": 6, "save_every": 3, "rollouts_every": 1, "doctor": False, **changes})


def prompts(pair):
    """Of a run."""
    told = config(pair, Path("unused"))
    told = replace(told, data=replace(told.data, source=told.prompts))
    return open_session(resolved(told)).prompts


def alike(a: Path, b: Path) -> None:
    """Two runs wrote the same numbers, rollouts, weights and optimizer state."""
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    trained = lambda run: [p.relative_to(run) for p in sorted(run.rglob("*.safetensors")) if p.stem != "draws"]
    files = trained(a)
    assert files == trained(b) and len(files) > 6
    for file in files:
        close(load_file(a / file), load_file(b / file), rtol=0, atol=0, equal_nan=True)


def versions(kept: dict[int, list[Rollout]]) -> dict[int, set[int]]:
    """Of the weights that wrote each draw."""
    return {draw: {r.version for r in drawn} for draw, drawn in kept.items()}


def workers(parent: int) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(parent).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                found += [process] if "opd.rollouts.worker.process" in process.cmdline() else []
    return found


def gone(processes, seconds: float = 10) -> bool:
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4, "per_prompt": 2, "method": METHODS["opd-zscore"]()}])
def test_a_worker_without_staleness_is_bitwise_the_synchronous_run(pair, tmp_path, changes):
    opd.train(config(pair, tmp_path / "here", **changes))
    opd.train(config(pair, tmp_path / "apart", worker=True, **changes))
    alike(tmp_path / "here", tmp_path / "apart")
    assert not workers(os.getpid()) and not list((tmp_path / "apart").glob(".worker*"))
    assert {"wait_s", "worker_busy", "queue_depth"} <= logged(tmp_path / "apart", "perf")[0].keys()


@pytest.fixture(scope="module")
def two_behind(pair, tmp_path_factory):
    """An undisturbed run whose rollouts are two steps old."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        out = tmp_path_factory.mktemp("two") / "run"
        return opd.train(config(pair, out, staleness=2, exact_staleness=True, save_every=1, keep=9))


def test_rollouts_are_of_the_weights_they_name(pair, two_behind):
    assert [r["staleness"] for r in logged(two_behind)] == [0, 1, 2, 2, 2, 2]
    assert logged(two_behind)[-1]["drift"] > logged(two_behind)[0]["drift"] == pytest.approx(0, abs=1e-9)

    asked = prompts(pair)

    def logp(folder, step):
        model = AutoModelForCausalLM.from_pretrained(folder)
        columns = load_file(two_behind / f"rollouts/step-{step:06d}.safetensors")
        out = []
        for prompt, ids, mask in zip(asked.batch(step, 8), columns["ids"], columns["mask"], strict=True):
            whole = torch.tensor([*prompt.ids, *ids[mask].tolist()])
            scores = model(whole[None]).logits[0, len(prompt.ids) - 1 : -1].log_softmax(-1)
            out.append(scores.gather(-1, ids[mask][:, None])[:, 0])
        return torch.cat(out).detach(), columns["sampler_logp"][columns["mask"]]

    for step in (3, 6):
        version = two_behind / f"checkpoints/step-{step - 3:06d}"
        close(*logp(version if version.is_dir() else pair[0], step), rtol=0, atol=1e-4)
    now, then = logp(two_behind / "checkpoints/step-000005", 6)
    assert (now - then).abs().max() > 1e-2


def test_a_killed_worker_changes_nothing(pair, tmp_path, two_behind):
    """Killed as it loads, and as it writes: each draw is written again with the weights it had begun with."""
    out, killed = tmp_path / "run", []

    def kill():
        for file in ("config.json", "rollouts/step-000002.jsonl"):
            while not ((out / file).exists() and workers(os.getpid())):
                time.sleep(0.005)
            for process in workers(os.getpid()):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)

    murderer = threading.Thread(target=kill)
    murderer.start()
    opd.train(config(pair, out, staleness=2, exact_staleness=True, save_every=1, keep=9))
    murderer.join()
    assert len(set(killed)) == 2 == logged(out, "perf")[-1]["worker_restarts"]
    alike(out, two_behind)


def test_repeated_deaths_end_in_one_line(pair, tmp_path, monkeypatch):
    def dying():
        ours, theirs = Pipe()
        theirs.close()
        return subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]), ours

    monkeypatch.setattr(client, "_start", dying)
    with pytest.raises(Refusal, match=r"3 times in a row .*exit status -9.*--resume") as error:
        opd.train(config(pair, tmp_path / "run", staleness=1))
    assert "\n" not in str(error.value) and not list((tmp_path / "run").glob(".worker*"))


def verified(pair, folder: Path, verifier: str):
    """A run with a verifier of the user's own."""
    lines = [json.dumps({"question": f"1 + {i}", "answer": "2"}) for i in range(8)]
    (folder / "p.jsonl").write_text("\n".join(lines))
    told = config(pair, folder / "run", staleness=1, prompts=str(folder / "p.jsonl"))
    return replace(told, data=replace(told.data, verifier=verifier, chat=False))


def test_what_the_worker_raises_is_one_line(pair, tmp_path, monkeypatch):
    """Its module lies where the trainer alone was told to look, and something prints before anything is imported."""
    (tmp_path / "grumpy.py").write_text("def score(response, answer):\n    raise KeyError('no such column')\n")
    (tmp_path / "sitecustomize.py").write_text("import os\nos.write(1, b'welcome to this machine')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Refusal) as error:
        opd.train(verified(pair, tmp_path, "grumpy:score"))
    assert str(error.value) == "the worker process failed: KeyError: 'no such column' (grumpy.py:2)"
    assert not workers(os.getpid()) and not list((tmp_path / "run").glob(".worker*"))


def test_a_verifier_that_the_worker_does_not_find_is_one_line(pair, tmp_path, monkeypatch):
    ghost = types.ModuleType("ghost")
    exec("def score(response, answer): return 1.0", vars(ghost))
    monkeypatch.setitem(sys.modules, "ghost", ghost)
    with pytest.raises(Refusal, match=r"^the worker process failed: ModuleNotFoundError: No module named 'ghost'"):
        opd.train(verified(pair, tmp_path, "ghost:score"))


def test_a_listener_that_fails_ends_the_run(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(client.WorkerBuffer, "_receive", lambda *_: [][1])
    with pytest.raises(Refusal, match=r"^the worker process: IndexError: list index out of range$"):
        opd.train(config(pair, tmp_path / "run", staleness=1))
    assert not workers(os.getpid()) and not list((tmp_path / "run").glob(".worker*"))


def test_processes_of_a_verifier_end_with_the_worker(pair, tmp_path, monkeypatch):
    """A fork of the worker holds its pipe open: neither the worker's death nor the trainer's waits for that."""
    pooled = """
        from concurrent.futures import ProcessPoolExecutor
        from functools import cache
        from multiprocessing import get_context

        pool = cache(lambda: ProcessPoolExecutor(1, get_context("fork")))

        def score(response, answer):
            return pool().submit(float, bool(response)).result()
    """
    (tmp_path / "pooled.py").write_text(textwrap.dedent(pooled))
    verified(pair, tmp_path, "pooled:score")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out, more = tmp_path / "run", ["--steps", "500", "--verifier", "pooled:score", "--no-chat"]
    args = command(pair, out, *more)
    args[args.index("--prompts") + 1] = str(tmp_path / "p.jsonl")
    run = launch(args)
    wait_for(out / "rollouts" / "step-000001.jsonl", run)
    (worker,) = (p for p in workers(run.pid) if p.ppid() == run.pid)
    family = [worker, *worker.children(recursive=True)]
    assert len(family) > 1
    worker.kill()
    assert gone(family)
    done = len(list((out / "rollouts").glob("step-*.jsonl")))
    wait_for(out / "rollouts" / f"step-{done + 4:06d}.jsonl", run)
    family = psutil.Process(run.pid).children(recursive=True)
    assert len(family) > 1
    run.kill()
    run.wait(30)
    assert gone(family) and not list(out.glob(".worker*"))


def command(pair, out: Path, *more: str) -> list[str]:
    student, teacher = pair
    flags = f"--student {student} --teacher {teacher} --prompts embedded:ledger-short --out {out} --batch 8 --no-doctor"
    flags += " --max-new-tokens 16 --lr 1e-2 --rollouts-every 1 --staleness 2"
    return [sys.executable, "-m", "opd", "train", *flags.split(), *more, "vopd"]


def launch(args: list[str]) -> subprocess.Popen:
    return subprocess.Popen(args, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(path: Path, run: subprocess.Popen, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


def test_killed_and_resumed_is_bitwise_where_staleness_is_exact(pair, tmp_path, two_behind):
    out, same = tmp_path / "run", ["--exact-staleness", "--save-every", "1", "--keep", "9", "--steps", "6"]
    cut = launch(command(pair, out, *same))
    wait_for(out / "checkpoints" / "step-000003", cut)
    children = workers(cut.pid)
    assert children
    cut.send_signal(signal.SIGKILL)
    cut.wait(30)
    assert gone(children) and not list(out.glob(".worker*"))  # an orphan sees its pipe close, and cleans up
    kept = load_state(out / "checkpoints/step-000003").rollouts
    assert versions(kept) == {4: {1}, 5: {2}, 6: {3}}
    again = launch(command(pair, out, *same, "--resume"))
    assert again.wait(120) == 0, again.stderr.read()
    alike(out, two_behind)


def test_ctrl_c_saves_the_queue_and_leaves_nobody(pair, tmp_path):
    """At most two steps behind: what was written before the interruption is what the resumed run trains on."""
    out = tmp_path / "run"
    run = launch(command(pair, out, "--steps", "500", "--save-every", "400"))
    wait_for(out / "rollouts" / "step-000003.jsonl", run)
    children = workers(run.pid)
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 130 and gone(children) and not list(out.glob(".worker*"))
    (saved,) = (out / "checkpoints").iterdir()
    step = int(saved.name[-6:])
    kept = load_state(saved).rollouts
    assert set(kept) <= {step + 1, step + 2, step + 3}
    (out / "config.json").write_text((out / "config.json").read_text().replace('"steps": 500', f'"steps": {step + 4}'))
    again = launch(command(pair, out, "--steps", str(step + 4), "--save-every", "400", "--resume"))
    assert again.wait(120) == 0, again.stderr.read()
    for draw, drawn in kept.items():
        columns = load_file(out / f"rollouts/step-{draw:06d}.safetensors")
        assert [columns["ids"][i, : len(r.ids)].tolist() for i, r in enumerate(drawn)] == [list(r.ids) for r in drawn]
    seen = [r["step"] for r in logged(out)]
    assert seen == list(range(1, step + 5)) and all(r["staleness_max"] <= 2 for r in logged(out))
    # Every step had its own prompts, in the order of a synchronous run.
    asked = prompts(pair)
    for s in seen:
        texts = logged(out / "rollouts", f"step-{s:06d}")
        assert [t["answer"] for t in texts] == [p.prompt.answer for p in asked.batch(s, 8)]


@pytest.fixture
def _threads(monkeypatch, _one_thread):
    """Nobody is told how many, and they are as before in the end."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_queue_is_bounded(pair, tmp_path, _threads):
    told = config(pair, tmp_path / "run", staleness=2, steps=50)
    told = replace(told, data=replace(told.data, source=told.prompts))
    plan, run = resolved(told), Run(tmp_path / "run")
    run.start({}, "", 0)
    (run.folder / ".worker-0-1").mkdir()  # of a trainer that was killed together with its worker
    loop = Trainer(open_session(plan), run)
    with contextlib.closing(loop.rollout_source):
        torch.set_num_threads(4)
        source = loop.rollout_source.open(0, NOTHING, {}, print)
        source._wait(lambda: len(source.batches) == 3)
        time.sleep(0.3)
        assert sorted(source.batches) == [1, 2, 3] and not source.waiting and source.running is None
        loop.step(1, NOTHING)
        source._wait(lambda: len(source.batches) == 3)
        time.sleep(0.3)
        assert versions(source.batches) == {2: {0}, 3: {0}, 4: {1}}
        assert [p.name for p in source.setup.folder.iterdir()] == ["step-000001.safetensors"]
        assert [p.name for p in run.folder.glob(".worker*")] == [f".worker-0-{os.getpid()}"]
        assert torch.get_num_threads() == source.setup.threads == 2
    assert torch.get_num_threads() == 4


def test_several_processes_have_a_worker_each(pair, tmp_path):
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    two += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    out = tmp_path / "run"
    env = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    run = subprocess.Popen(
        [*two, "-m", *command(pair, out, "--steps", "500", "--save-every", "400", "--quiet")[2:]],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(out / "rollouts" / "step-000003.jsonl", run)
    (second,) = (p for p in psutil.Process(run.pid).children() if p.environ().get("RANK") == "1")
    second.send_signal(signal.SIGINT)  # only one of them hears it, and both stop after the same step
    assert run.wait(120) == 1, run.stderr.read()[-2000:]  # torchrun's code for processes that exit with 130
    last = logged(out)[-1]["step"]
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{last:06d}"]
    assert all(r["staleness_max"] <= 2 for r in logged(out))
    for step in (1, 2, 3):
        texts = logged(out / "rollouts", f"step-{step:06d}")
        assert [t["index"] for t in texts] == list(range(8))
    assert not list(out.glob(".worker*"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"staleness": 1, "method": METHODS["trb"]()}, "--staleness 1: rollouts of Blend.*the student alone"),
        ({"worker": True, "method": METHODS["kat"]()}, "--worker: rollouts of StopOnAgreement"),
        ({"staleness": 1, "method": METHODS["gkd"](share=0.5)}, "--staleness 1: rollouts of Mixture"),
        ({"exact_staleness": True}, "--exact-staleness: --staleness is 0"),
        ({"worker_device": "cpu"}, "--worker-device cpu: there is no worker"),
        ({"staleness": -1}, "--staleness -1: must be 0 or more"),
        (
            {"method": METHODS["npd"](), "sampling": Sampling(temperature=0.6)},
            "--temperature 0.6, .* Snapshot.*the draw",
        ),
        ({"method": METHODS["npd"](), "sampling": Sampling(top_k=5)}, "--top-k 5, "),
        ({"method": METHODS["npd"](), "loss_temperature": 2.0}, "--loss-temperature 2.0: Snapshot"),
        ({"staleness": 1, "worker_device": "cuda:7"}, "worker-device cuda:7: this machine has no such device"),
    ],
)
def test_what_older_weights_cannot_write_is_refused(pair, tmp_path, changes, says):
    with pytest.raises(Refusal, match=says) as error:
        opd.train(config(pair, tmp_path / "run", **changes))
    assert "\n" not in str(error.value)


def test_policy_gradients_without_a_ratio_are_warned_of(pair, tmp_path):
    told = lambda **changes: checks.warnings(resolved(config(pair, tmp_path, staleness=2, **changes)))
    assert any("--importance-cap" in line for line in told())
    assert not told(importance_cap=2.0)
    assert not told(method=METHODS["opd-full"]()) and not told(method=METHODS["gkd"]())
    likelihood = METHODS["npd"]().terms[0]
    assert likelihood.corrected() and not told(method=replace(METHODS["opd"](), terms=(likelihood,)))


@pytest.mark.parametrize("name", ["ropd", "rubricem", "omniopd"])
def test_what_a_judge_pays_is_no_likelihood(pair, tmp_path, name):
    """A reward on tokens that other weights drew: warned of, weighed by the cap, also where another engine writes."""
    method = METHODS[name](reflections=0) if name == "rubricem" else METHODS[name]()
    told = lambda **changes: config(pair, tmp_path, method=method, **changes)
    assert any("--importance-cap" in line for line in checks.warnings(resolved(told(staleness=2))))
    capped = told(staleness=2, importance_cap=1.5)
    assert not any("--importance-cap" in line for line in checks.warnings(resolved(capped)))
    for run, cap in ((capped, 1.5), (told(speaker=Speaker(engine="vllm")), 2.0)):
        paid = resolved(run).method.terms[0]
        assert paid.surrogate == TruncatedRatio(cap) or TruncatedImportance(cap) in paid.weights


def test_draws_of_a_checkpoint_come_back(tmp_path):
    notes = {"staleness": 1.0, "beta": (0.5, 0.25)}
    whole = Rollout(
        prompt_ids=(), teacher_prompt_ids=(), ids=(3, 4), sampler_logp=(-0.1, -1e-9), index=6, group=3, stopped=True,
        outcome=0.5, notes=notes, version=6,
    )  # fmt: skip
    other = replace(whole, ids=(5,), sampler_logp=(-7.5,), notes={"staleness": 2.0, "beta": (1.0,)}, index=7, version=7)
    kept = {9: [whole, other], 11: [replace(whole, version=8)]}
    save_tensors(buffer.to_tensors(kept), tmp_path / "draws.safetensors")
    saved = buffer.from_tensors(load_file(tmp_path / "draws.safetensors"))
    assert saved == kept
    # The workers of two processes may be a step apart.
    assert [r.notes["staleness"] for r in buffer.with_staleness(saved[9], 9)] == [2.0, 1.0]
    assert buffer.from_tensors({}) == {} == buffer.to_tensors({})
    assert buffer.without_prompts([dataclasses.replace(whole, prompt_ids=(1,))], 3) == [replace(whole, version=3)]


def test_off_policy_tokens_have_the_gradient_of_the_divergence(float64):
    """Every token of three contexts, weighed by an older student: the expected gradient is that of KL(p || q) now."""
    logits, teacher, old = torch.randn(3, 3, 5)
    logits.requires_grad_()
    m, total = METHODS["async-opd"](), 0
    for y in range(5):
        ids = torch.full((3, 1), y)
        at = Positions(ids, logits[:, None].log_softmax(-1), teacher[:, None].log_softmax(-1))
        mu = old.log_softmax(-1)[:, [y]]
        batch = measure(m, at, sampler_logp=mu)
        for targets in (m.prepare(batch), m.prepare(replace(batch, scores=()))):  # measured first, or in the head pass
            loss = m.loss(at, targets)
            total = total + 3 * (mu.exp() * loss).sum() / 2
    p, q = logits.log_softmax(-1), teacher.log_softmax(-1)
    (found,) = torch.autograd.grad(total, logits)
    (wanted,) = torch.autograd.grad((p.exp() * (p - q)).sum(), logits)
    close(found, wanted)


def test_the_advantage_is_of_the_weights_being_trained(float64):
    """What the rollouts' writer thought of them is in the ratio alone: targets of a local method hold no advantage."""
    m = METHODS["async-opd"]()
    assert m.local()
    world = World.random(vocab=4, steps=2)
    ids = world.sequences()
    batch = world.measure(m, ids, sampler_logp=torch.full(ids.shape, -1.0))
    (target,) = m.prepare(replace(batch, scores=(), student_logp=None))
    assert target.advantage is None and (target.old == -1).all()
    moved = replace(world, student=(world.student.detach() + torch.randn_like(world.student)).requires_grad_())
    at = moved.positions(ids)
    p, q = at.sampled(at.student_logp), at.sampled(at.teacher_logp)
    close(m.loss(at, (target,)), target.weight * -(p + 1).exp() * (q - p))


def test_the_shares_of_processes_cover_a_draw():
    for count in (1, 5, 8):
        for processes in (1, 2, 3, 4):
            parts = [list(range(count))[buffer.share(count, i, processes)] for i in range(processes)]
            assert [i for part in parts for i in part] == list(range(count))


def test_a_cycle_of_snapshots():
    """Four epochs over three batches, a refresh after two, written by hand."""
    who = Snapshot(pool=3, epochs=4, refresh=(2,), drift=1.0)
    pools = [*[range(1, 4)] * 6, *[range(7, 10)] * 6, range(13, 16)]
    assert [who.batches(s, NOTHING) for s in range(1, 14)] == pools
    batches = [list(who.open_batches(s, NOTHING)) for s in (1, 2, 7, 12, 13)]
    assert batches == [[1, 2, 3], [], [7, 8, 9], [], [13, 14, 15]]
    assert [who.prompt_step(d) for d in (1, 2, 3, 7, 8, 9, 13)] == [1, 2, 3, 1, 2, 3, 4]
    drifted = {"snapshot": torch.tensor(5)}  # in the second epoch: batch 2 of the pool comes first
    assert [who.batches(s, drifted) for s in range(4, 8)] == [range(1, 4), range(5, 7), range(5, 7), range(7, 10)]
    assert [who.oldest_valid(s, NOTHING) for s in (2, 6, 7)] == [1, 1, 7] and who.oldest_valid(5, drifted) == 7
    assert list(who.open_batches(5, drifted)) == [5, 6] and [who.prompt_step(d) for d in (5, 6)] == [2, 3]
    plain = OnPolicy()
    assert [*plain.batches(5, NOTHING), *plain.open_batches(5, NOTHING), plain.prompt_step(5)] == [5] * 3


NPD = METHODS["npd"](pool=2, epochs=2, refresh=1, tau=5.0)


def test_a_pool_is_written_by_a_snapshot_and_survives_a_checkpoint(pair, tmp_path):
    """Two batches, an epoch each by two snapshots; in a worker, and resumed in the middle of an epoch, all the same."""
    here = opd.train(config(pair, tmp_path / "here", method=NPD, keep=9, steps=7))
    assert [r["staleness"] for r in logged(here)] == [0, 1, 0, 1, 0, 1, 0]
    assert all(r["weighted_1"] == 1 >= r["admitted"] > 0 for r in logged(here))
    opd.train(config(pair, tmp_path / "apart", method=NPD, keep=9, steps=7, worker=True))
    alike(here, tmp_path / "apart")
    for run in (here, tmp_path / "apart"):
        assert versions(load_state(run / "checkpoints/step-000003").rollouts) == {3: {2}, 4: {2}}
    for step in (6, 7):
        shutil.rmtree(tmp_path / f"apart/checkpoints/step-{step:06d}")
    opd.train(config(pair, tmp_path / "apart", method=NPD, keep=9, steps=7, resume=True))  # without a worker now
    alike(here, tmp_path / "apart")


def test_rollouts_without_their_prompts(pair, tmp_path):
    """Cross entropies from the second token on: the writer's, then the teacher's, by plain forward passes."""
    out = opd.train(config(pair, tmp_path / "run", method=NPD, steps=2))
    columns = load_file(out / "rollouts/step-000002.safetensors")
    for name, folder in zip(("student_alone", "teacher_alone"), pair, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for ids, mask, found in zip(columns["ids"], columns["mask"], columns[name], strict=True):
            y = ids[mask]
            with torch.no_grad():
                wanted = model(y[None], labels=y[None]).loss if len(y) > 1 else torch.tensor(0.0)
            close(found, wanted, rtol=1e-4, atol=1e-5)


def test_delta_ifd_by_hand(float64):
    """IFD 0.5 of the student; of the teacher 0.4 (below), 1.0 (inside), 2.0 (above), and a response of one token."""
    mask = torch.tensor([[True, True]] * 3 + [[True, False]])
    alone = torch.tensor([2.0, 2.0, 2.0, 0.0])
    student = torch.tensor([[-0.5, -1.5]] * 4)
    teacher = torch.tensor([[-0.8, -0.8], [-1.0, -3.0], [-4.0, -4.0], [-1.0, -1.0]])
    kept = DeltaIFD()(student, teacher, alone, alone, mask)
    assert kept.tolist() == [[False] * 2, [True] * 2, [False] * 2, [False] * 2]
    edge = DeltaIFD(0.0, 0.5)(student, teacher, alone, alone, mask)
    assert edge.any(1).tolist() == [False, True, False, False]


@dataclasses.dataclass(frozen=True)
class OddGroups:
    """A filter that drops every other prompt."""

    def __call__(self, group, mask):
        return mask & (group % 2 == 1)[:, None]


@pytest.mark.parametrize("kept", [2 << 30, 0], ids=["teacher remembered", "asked again"])
def test_what_a_filter_drops_is_measured_and_not_trained(pair, tmp_path, monkeypatch, kept):
    """The same run as one that takes all rows to the student and its teacher again, at weight 0."""
    monkeypatch.setattr("opd.training.forward_backward.CACHE_BYTES", kept)
    method = Method((Match(ForwardKL()),), rollouts=Snapshot(2, 2, (1,), 9.0), filters=(OddGroups(),))
    through, heard = {True: 0, False: 0}, 0
    forward, hidden = Student.forward, LocalTeacher.hidden

    def counted(self, at, frozen, method, targets, *rest, **more):
        through[targets is not None] += int(at.trained.any(1).sum())
        return forward(self, at, frozen, method, targets, *rest, **more)

    def asked(self, rollouts, *rest):
        nonlocal heard
        heard += len(rollouts)
        return hidden(self, rollouts, *rest)

    monkeypatch.setattr(Student, "forward", counted)
    monkeypatch.setattr(LocalTeacher, "hidden", asked)
    some = opd.train(config(pair, tmp_path / "some", method=method, steps=3, micro_batch_tokens=100))
    looks = 3 * 8 + 3 * 8  # measured, and shown with saved rollouts
    assert (through[False], through[True]) == (looks, 3 * 4) and heard == (3 * 8 if kept else looks + 3 * 4)
    monkeypatch.setattr(Passes, "_rows_with_weight", lambda self, targets: None)
    every = opd.train(config(pair, tmp_path / "every", method=method, steps=3, micro_batch_tokens=100))
    assert through[True] == 3 * 4 + 3 * 8
    for one, other in zip(logged(some), logged(every), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-7, nan_ok=True)
    for file in sorted((some / "rollouts").glob("*.safetensors")):
        x, y = load_file(file), load_file(every / "rollouts" / file.name)
        assert x.keys() == y.keys()
        for name in x:
            close(x[name], y[name], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_rows_without_a_trained_token_go_nowhere(pair, tmp_path, monkeypatch):
    """Of responses that do not end nothing is trained; where none ends a step is one dummy row of no loss."""
    through, forward = [], Student.forward

    def counted(self, at, *rest, likeliest=0):
        if not likeliest:
            through.append(len(at.ids))
        return forward(self, at, *rest, likeliest=likeliest)

    monkeypatch.setattr(Student, "forward", counted)
    run = opd.train(config(pair, tmp_path / "run", truncated="drop", sampling=Sampling(max_new_tokens=48), steps=4))
    ended = [round(8 * row["stopped"]) for row in logged(run)]
    assert 0 < sum(ended) < 4 * 8 and sum(through) == sum(max(1, n) for n in ended)
    through.clear()
    run = opd.train(config(pair, tmp_path / "none", truncated="drop", sampling=Sampling(max_new_tokens=1), steps=1))
    assert through == [1] and logged(run)[0]["loss"] == 0 == logged(run)[0]["grad_norm"] == logged(run)[0]["stopped"]


def test_a_student_that_drifts_is_asked_again(pair, tmp_path):
    """A bound so small that any drift breaks it, a step after it was made; step 4 has a snapshot anyway."""
    method = METHODS["npd"](pool=3, epochs=2, refresh=1, drift=1e-6, tau=5.0)
    found = logged(opd.train(config(pair, tmp_path / "run", method=method, steps=5)))
    assert [r["staleness"] for r in found] == [0, 1, 0, 0, 1]
    apart = opd.train(config(pair, tmp_path / "apart", method=method, steps=5, worker=True))
    assert logged(apart) == found
    loose = logged(
        opd.train(config(pair, tmp_path / "loose", method=replace(method, rollouts=Snapshot(3, 2, (1,), 9.0))))
    )
    assert [r["staleness"] for r in loose] == [0, 1, 2, 0, 1, 2]


def test_drift_is_the_kl_to_who_wrote(float64):
    """Summed over the vocabulary under the writer's probabilities it is KL(student || writer), in both its forms."""
    p, mu = torch.randn(2, 6).log_softmax(-1)
    columns = {"group": torch.tensor([0]), "source": torch.tensor([0]), "outcome": torch.zeros(1)}
    columns["stopped"] = torch.tensor([False])
    found = sum(
        mu[v].exp()
        * measured_drift(
            Batch(
                ids=torch.tensor([[v]]),
                mask=torch.tensor([[True]]),
                student_logp=p[None, [v]],
                sampler_logp=mu[None, [v]],
                **columns,
            )
        )
        for v in range(6)
    )
    close(found, (p.exp() * (p - mu)).sum())
