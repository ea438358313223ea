"""Pools of rollouts (npd): scored once by a teacher that is counted, trained on in batches of survivors, resumed."""

import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import opd
from opd.config.plan import resolved
from opd.core.errors import Refusal
from opd.losses.divergences import ForwardKL
from opd.losses.terms import Match
from opd.methods import METHODS
from opd.methods.method import Method
from opd.methods.npd import DeltaIFD
from opd.methods.rollout_policies.snapshot import Snapshot
from opd.teachers.local import LocalTeacher
from opd.training.build import open_session
from opd.training.checkpoint import load as load_state
from tests.tiny_models import logged, small, started

close = torch.testing.assert_close
POOL, BATCH, K, TAU = 2, 8, 4, 0.2  # the window lets about two of three rollouts pass
SIZES = {"pool": POOL, "epochs": 3, "refresh": 1, "drift": 9.0, "k": K}
NPD, UNFILTERED = METHODS["npd"](**SIZES, tau=TAU), METHODS["npd"](**SIZES, filtered=False)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Of the trainer and of its worker: bitwise claims are for equal thread counts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def asked(monkeypatch):
    """How often the teacher, which is a real one, has read each (prompt, response)."""
    count, hidden = Counter(), LocalTeacher.hidden

    def counted(self, rollouts, *rest):
        count.update((r.teacher_prompt_ids, r.ids) for r in rollouts)
        return hidden(self, rollouts, *rest)

    monkeypatch.setattr(LocalTeacher, "hidden", counted)
    return count


def config(pair, out, **changes):
    return small(
        pair, out, **{"method": NPD, "rollouts_every": 1, "save_every": 1, "keep": 9, "doctor": False} | changes
    )


def trained(run: Path, step: int) -> list[tuple[int, ...]]:
    """The responses that a step trained on."""
    columns = load_file(run / f"rollouts/step-{step:06d}.safetensors")
    return [tuple(ids[mask].tolist()) for ids, mask in zip(columns["ids"], columns["mask"], strict=True)]


@dataclass(frozen=True)
class Candidate:
    """A rollout of the first pool, as plain forward passes score it."""

    ids: tuple[int, ...]
    delta: float  # Delta-IFD
    logp: torch.Tensor  # of the teacher, [T, V]


@pytest.fixture(scope="module")
def pool(pair, tmp_path_factory):
    """The run without the filter over the first pool, and its candidates, batch after batch."""
    run = opd.train(config(pair, tmp_path_factory.mktemp("pool") / "run", method=UNFILTERED, steps=POOL))
    settings = config(pair, run)
    prompts = open_session(resolved(replace(settings, data=replace(settings.data, source=settings.prompts)))).prompts
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for folder in pair)

    def scored(model, prompt, y):
        with torch.no_grad():
            logp = model(torch.tensor([[*prompt, *y]])).logits[0, :-1].log_softmax(-1)
        return logp[max(0, len(prompt) - 1) :]

    ifd = lambda model, prompt, y: (
        scored(model, prompt, y).gather(1, torch.tensor(y)[:, None]).mean()
        / scored(model, (), y).gather(1, torch.tensor(y[1:])[:, None]).mean()
    )
    out = []
    for step in range(1, POOL + 1):
        for prompt, y in zip(prompts.batch(step, BATCH), trained(run, step), strict=True):
            delta = float(ifd(teacher, prompt.teacher_ids, y) - ifd(student, prompt.ids, y))
            out.append(Candidate(y, delta, scored(teacher, prompt.teacher_ids, y)))
    return run, out


def test_the_teacher_scores_each_rollout_of_a_pool_once(pair, tmp_path, asked, pool):
    method = replace(NPD, rollouts=replace(NPD.rollouts, refresh=()))
    run = opd.train(config(pair, tmp_path / "run", method=method, steps=POOL * 3))
    assert [r["staleness"] for r in logged(run)] == [0, 1, 2, 3, 4, 5]  # three epochs
    candidates = Counter(c.ids for c in pool[1])
    for prompted in (True, False):  # for its log-probs, and for the unconditional part of Delta-IFD
        assert Counter(ids for prompt, ids in asked.elements() if bool(prompt) == prompted) == candidates


def test_a_batch_holds_survivors_in_order_and_after_the_last_the_first(pair, tmp_path, pool):
    survivors = [c.ids for c in pool[1] if 0 <= c.delta <= TAU]
    assert BATCH < len(survivors) < POOL * BATCH, "a pool that shows nothing: choose another window"
    method = replace(NPD, rollouts=replace(NPD.rollouts, refresh=()))
    run = opd.train(config(pair, tmp_path / "run", method=method, steps=4))
    wanted = [survivors[i % len(survivors)] for i in range(4 * BATCH)]
    assert [ids for step in range(1, 5) for ids in trained(run, step)] == wanted
    assert [line["index"] for line in logged(run / "rollouts", "step-000003")] == [*range(BATCH)]
    for row in logged(run):
        assert row["weighted_0"] == row["weighted_1"] == 1 and row["admitted"] == len(survivors) / (POOL * BATCH)


def test_kept_scores_are_the_teachers(pool):
    """Of the response's tokens and of the four that the teacher likes most, 8 bytes for each in the pool."""
    run, candidates = pool
    stored = load_state(run / f"checkpoints/step-{POOL:06d}").rollouts
    rollouts = [r for number in sorted(stored) for r in stored[number]]
    for r, c in zip(rollouts, candidates, strict=True):
        ids, logp = torch.tensor(r.teacher_scores.ids), torch.tensor(r.teacher_scores.logp)
        assert r.ids == c.ids and len(ids) == len(logp) == len(c.ids) * (1 + K)
        assert r.teacher_scores.ids.itemsize == r.teacher_scores.logp.itemsize == 4
        sampled = torch.tensor(c.ids)[:, None]
        assert (ids.view(-1, 1 + K)[:, :1] == sampled).all()
        wanted = torch.cat((c.logp.gather(1, sampled), c.logp.topk(K).values), 1)
        close(logp.view(-1, 1 + K), wanted, rtol=1e-4, atol=1e-4)
        close(c.logp.gather(1, ids.view(-1, 1 + K).long()), wanted, rtol=1e-4, atol=1e-4)


def test_kept_scores_give_the_loss_of_the_whole_teacher(pair, tmp_path, monkeypatch):
    """The first step has the same loss and gradient as one in which the teacher's hidden states are there."""
    kept = opd.train(config(pair, tmp_path / "kept", steps=1))
    monkeypatch.setattr(Method, "keeps_scores", lambda self: False)
    whole = opd.train(config(pair, tmp_path / "whole", steps=1))
    (a,), (b,) = logged(kept), logged(whole)
    assert "reverse_kl" in b and "reverse_kl" not in a  # which reads the whole vocabulary
    for name in ("loss", "grad_norm", "teacher_logp", "drift", "admitted"):
        assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("method", "worker", "new"),
    [
        (NPD, False, {1: 16, 2: 16, 3: 0}),
        (NPD, True, {1: 16, 2: 16, 3: 0}),
        (UNFILTERED, False, {1: 8 + 16, 2: 16, 3: 8}),  # each batch is scored at its first step
    ],
    ids=["filtered", "worker", "unfiltered"],
)
def test_a_run_stopped_within_a_pool_resumes_byte_for_byte(pair, tmp_path, asked, method, worker, new):
    """The second pool begins at step 3.  What was scored before the stop is not scored again: `new` rollouts are."""
    whole = opd.train(config(pair, tmp_path / "whole", method=method, steps=5, worker=worker))
    for stop, count in new.items():
        cut = tmp_path / f"cut-{stop}"
        shutil.copytree(whole, cut)
        for step in range(stop + 1, 6):
            shutil.rmtree(cut / f"checkpoints/step-{step:06d}")
        asked.clear()
        opd.train(config(pair, cut, method=method, steps=5, worker=worker, resume=True))
        assert sum(bool(prompt) for prompt, _ in asked.elements()) == count
        same(whole, cut)


def same(a: Path, b: Path) -> None:
    """Two runs wrote the same bytes: metrics, rollouts, weights, optimizer and what is kept of the pool."""
    files = [Path("metrics.jsonl"), *(p.relative_to(a) for p in sorted(a.rglob("*.safetensors")))]
    assert len(files) > 9 and any(file.stem == "draws" for file in files)
    for file in files:
        assert (a / file).read_bytes() == (b / file).read_bytes(), file


def test_two_processes_share_a_pool(pair, tmp_path, pool):
    """They train on the survivors of one process, and resume byte for byte."""
    survivors = [c.ids for c in pool[1] if 0 <= c.delta <= TAU]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = ["train", "--student", str(pair[0]), "--teacher", str(pair[1]), "--prompts", "embedded:ledger-short"]
    sizes = f"--steps 4 --batch {BATCH} --max-new-tokens 16 --lr 1e-2 --save-every 1 --keep 9 --rollouts-every 1"
    command += [*sizes.split(), "--no-doctor", "--quiet"]
    method = f"npd --pool {POOL} --epochs 3 --refresh 2 --drift 9 --k {K} --tau {TAU}".split()
    started([*command, "--out", str(whole), *method], 2)
    wanted = [survivors[i % len(survivors)] for i in range(4 * BATCH)]
    assert [ids for step in range(1, 5) for ids in trained(whole, step)] == wanted
    shutil.copytree(whole, cut)
    for step in (2, 3, 4):
        shutil.rmtree(cut / f"checkpoints/step-{step:06d}")
    started([*command, "--out", str(cut), "--resume", *method], 2)
    same(whole, cut)


@pytest.mark.parametrize(("batches", "count"), [(2, 2), (1, 1)])
def test_a_pool_smaller_than_a_batch_is_trained_on_whole(pair, tmp_path, batches, count, pool):
    """In two updates, if it has two rollouts."""
    survivors = [c.ids for c in pool[1][: batches * BATCH] if 0 <= c.delta <= 0.1]
    assert len(survivors) == count
    method = METHODS["npd"](**SIZES | {"pool": batches}, tau=0.1, weight=1.0)
    run = opd.train(config(pair, tmp_path / "run", method=method, steps=batches, updates=2))
    assert all(row["grad_norm"] > 0 for row in logged(run))
    assert trained(run, 1) == survivors[-1:]  # of the last update


def test_a_pool_without_survivors_ends_the_run_in_words(pair, tmp_path):
    method = METHODS["npd"](**SIZES, tau=1e-9)
    with pytest.raises(Refusal, match=r"step 1 .* none of the 16 rollouts of its pool passes DeltaIFD.*--no-filtered"):
        opd.train(config(pair, tmp_path / "run", method=method, steps=9))


def test_a_method_on_whole_distributions_asks_the_teacher_again(pair, tmp_path, asked):
    """Top-k scores do not suffice for it, so nothing is kept but the verdicts, taken once."""
    snapshot = Snapshot(POOL, 3, (), 9.0, admits=DeltaIFD(0.0, TAU))
    method = Method((Match(ForwardKL()),), rollouts=snapshot)
    run = opd.train(config(pair, tmp_path / "run", method=method, steps=2))
    assert all(r["reverse_kl"] > 0 and r["weighted"] == 1 and 0 < r["admitted"] < 1 for r in logged(run))
    state = load_state(run / "checkpoints/step-000002").rollouts
    assert all(r.teacher_scores is None and r.notes["admitted"] in (0, 1) for part in state.values() for r in part)
    counts = Counter(ids for prompt, ids in asked.elements() if not prompt)
    assert set(counts.values()) == {1} and sum(counts.values()) == POOL * BATCH


def test_a_teacher_without_numbers_is_refused_as_the_pool_is_scored(pair, tmp_path, monkeypatch):
    """NaN passes no window; without the check it would read as a pool without survivors."""
    hidden = LocalTeacher.hidden

    def broken(self, *rest):
        out = hidden(self, *rest)
        return replace(out, states=out.states * torch.nan)

    monkeypatch.setattr(LocalTeacher, "hidden", broken)
    with pytest.raises(Refusal, match="no number as log-prob"):
        opd.train(config(pair, tmp_path / "run", steps=1))


def test_what_a_pool_cannot_have_is_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="reads student_logp, unknown when a rollout enters"):
        Snapshot(admits=lambda student_logp, mask: mask)
    with pytest.raises(Refusal, match=r"--context peer: .* Snapshot"):
        opd.train(config(pair, tmp_path / "run", context="peer", per_prompt=2))
