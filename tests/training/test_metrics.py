"""Numbers of a step, by hand and by enumeration; what a run says of itself while it trains."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch

import opd
from opd.cli import main
from opd.core.sampling import Prompt, Sampling
from opd.core.types import DATA, Batch
from opd.losses.terms import Target
from opd.training.alarms import Alarm
from opd.training.metrics import (
    advantages,
    by_task,
    by_third,
    effective_share,
    repetition,
    rollout_metrics,
    summary,
    top_k_overlap,
    weight_metrics,
)


def batch(**columns):
    """Two rollouts of seven and three tokens; padding holds nonsense."""
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    base = {"ids": torch.arange(14).view(2, 7), "sampler_logp": torch.full((2, 7), -1.0)}
    rows = {
        "group": torch.arange(2),
        "source": torch.zeros(2, dtype=torch.long),
        "stopped": torch.tensor([True, False]),
    }
    return Batch(mask=mask, outcome=torch.tensor([1.0, 0.0]), **base, **rows, **columns)


def test_thirds_of_each_response():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    column = torch.where(mask, torch.arange(21.0).view(3, 7), torch.nan)
    found = by_third(column, mask)
    # 0 1 | 2 3 | 4 5, then 8 | 9 | 10, then 14 alone, which is its own first third
    assert found == pytest.approx({"first": (0 + 1 + 8 + 14) / 4, "middle": (2 + 3 + 9) / 3, "last": (4 + 5 + 10) / 3})
    assert by_third(column, mask & False) == {}


def test_effective_share():
    assert effective_share(torch.ones(8)) == pytest.approx(1)
    assert effective_share(torch.tensor([5.0, 0, 0, 0])) == pytest.approx(1 / 4)
    assert effective_share(torch.tensor([1.0, 3.0])) == pytest.approx(16 / (2 * 10))
    assert effective_share(torch.zeros(3)) == 0.0
    mask = torch.tensor([[True, True, False]])
    found = weight_metrics((Target(torch.tensor([[1.0, 3.0, 9.0]]), None, None),), mask)
    assert found == {"weighted": 1.0, "effective": pytest.approx(0.8)}


def test_ratios_of_the_sampler():
    ratio = torch.tensor([[1.0, 2, 1, 2, 1, 2, 1], [4, 1, 1, 0, 0, 0, 0]])
    found = summary(batch(student_logp=ratio.log() - 1))
    n, total, squares = 10, 10 + 6, 7 + 9 + 18 - 0
    assert found["sampler_ess"] == pytest.approx(total**2 / (n * squares))
    assert summary(batch(student_logp=torch.full((2, 7), -1.0)))["sampler_ess"] == pytest.approx(1)


@pytest.mark.parametrize("other", [{"source": torch.tensor([0, DATA])}, {"prefix": torch.tensor([0, 3])}], ids=str)
def test_what_others_wrote_has_no_ratio(other):
    """The data's responses and a teacher's prefixes stand at log mu = 0: nothing is said of them."""
    logp = torch.tensor([[-1.5] * 7, [-3.0] * 7])
    sampler = torch.tensor([[-1.0] * 7, [0.0] * 7])
    mixed = replace(batch(student_logp=logp), sampler_logp=sampler, notes={"staleness": torch.ones(2)}, **other)
    kl = math.exp(-0.5) - 1 + 0.5
    assert summary(mixed)["sampler_ess"] == pytest.approx(1) and summary(mixed)["sampler_kl"] == pytest.approx(kl)
    assert summary(mixed)["sampler_ratio_max"] == pytest.approx(math.exp(-0.5))
    assert rollout_metrics(mixed)["drift"] == pytest.approx(1 - 1.5 * math.exp(-0.5))
    assert "drift" not in rollout_metrics(replace(mixed, source=torch.tensor([DATA, DATA])))


def test_tails_of_the_advantage():
    score = torch.linspace(-3, 1, 14).view(2, 7)
    local = Target(torch.ones(2, 7), None, None)
    found = advantages(batch(scores=(score,)), (local,))
    said = score[batch().mask]
    assert found["advantage_max"] == 3 and found["advantage_p1"] == pytest.approx(float(said.min()))
    assert found["advantage_p99"] == pytest.approx(float(said.max()))
    count = 1001
    many = Batch(
        ids=torch.zeros(1, count, dtype=torch.long),
        mask=torch.ones(1, count, dtype=torch.bool),
        group=torch.zeros(1, dtype=torch.long),
        source=torch.zeros(1, dtype=torch.long),
        stopped=torch.tensor([True]),
        outcome=torch.ones(1),
        sampler_logp=torch.zeros(1, count),
        scores=(torch.randperm(count)[None].float(),),
    )
    found = advantages(many, (Target(torch.ones(1, count), None, None),))
    assert (found["advantage_p1"], found["advantage_p99"]) == (10.0, 990.0)
    made = Target(torch.ones(2, 7), 5 * score, None)  # a group's, say: what the loss multiplies with
    assert advantages(batch(scores=(torch.ones(2, 7),)), (made,))["advantage_max"] == 15
    assert advantages(batch(scores=(None, None)), (local, local)) == {}


def test_entropies_apart():
    own, other = torch.full((2, 7), 0.5), torch.full((2, 7), 0.5)
    own[0, :5], other[1] = 0.9, 0.8
    found = summary(batch(student_entropy=own, teacher_entropy=other))
    assert found["entropy_gap"] == pytest.approx((5 * 0.4 + 3 * 0.3) / 10)


def test_repetition_counts_repeated_4_grams():
    ids = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    mask = torch.ones(2, 9, dtype=torch.bool)
    # The first row has the 4-grams 1234 2341 3412 4123 1234 2341: two of six stood before.
    assert repetition(ids, mask) == pytest.approx(1 / 6)
    assert repetition(ids, mask & torch.tensor([[False], [True]])) == 0
    ids = torch.randint(2, (3, 40))
    said = [["".join(map(str, row[i : i + 4].tolist())) for i in range(37)] for row in ids]
    again = [sum(gram in grams[:i] for i, gram in enumerate(grams)) / 37 for grams in said]
    assert repetition(ids, torch.ones(3, 40, dtype=torch.bool)) == pytest.approx(sum(again) / 3)


def test_overlap_of_the_likeliest():
    p, q = (torch.randn(2, 7, 11).log_softmax(-1) for _ in range(2))
    mask, k = batch().mask, 3
    ids = torch.cat((p.topk(k).indices, q.topk(k).indices), -1)
    found = top_k_overlap(ids, p.gather(-1, ids), q.gather(-1, ids), mask)
    shared = [set(p[b, t].topk(k).indices.tolist()) & set(q[b, t].topk(k).indices.tolist()) for b, t in mask.nonzero()]
    assert found["top3_overlap"] == pytest.approx(sum(map(len, shared)) / (k * len(shared)))
    for name, logp in (("student", p), ("teacher", q)):
        mass = [float(logp[b, t][list(both)].exp().sum()) for (b, t), both in zip(mask.nonzero(), shared, strict=True)]
        assert found[f"top3_{name}_mass"] == pytest.approx(sum(mass) / len(mass), rel=1e-5)
    assert top_k_overlap(ids, p.gather(-1, ids), torch.full(ids.shape, torch.nan), mask) == {}


def test_tasks_by_the_column_that_tells_them_apart():
    prompts = [
        Prompt(columns={"source": "one", "subject": "algebra"}),
        Prompt(columns={"source": "one", "subject": "sets"}),
    ]
    found = by_task(batch(reverse_kl=torch.tensor([[1.0] * 7, [2.0] * 7])), prompts)
    assert found == {
        "outcome.algebra": 1.0, "length.algebra": 7.0, "reverse_kl.algebra": 1.0,
        "outcome.sets": 0.0, "length.sets": 3.0, "reverse_kl.sets": 2.0,
    }  # fmt: skip
    assert by_task(batch(), [Prompt(), Prompt()]) == {}


def test_a_run_logs_them_and_prints_json(pair, tmp_path, capsys):
    flags = ["--student", str(pair[0]), "--teacher", str(pair[1]), "--prompts", "embedded:ledger-short"]
    flags += ["--out", str(tmp_path / "run"), "--no-doctor", "--quiet"]
    flags += ["--eval-prompts", "embedded:ledger-short", "--eval-limit", "4", "--json"]
    assert main(["train", *flags, "--steps", "3", "--batch", "4", "--max-new-tokens", "16", "vopd"]) == 0
    out, err = capsys.readouterr()
    assert out == (tmp_path / "run/metrics.jsonl").read_text() and err == ""
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 3]
    step = rows[1]
    for name in ("repetition", "sampler_ess", "entropy_gap", "advantage_p99", "top5_overlap", "reverse_kl_last"):
        assert step[name] == step[name], name
    assert step["sampler_ess"] == pytest.approx(1, abs=1e-3) and 0 < step["top5_overlap"] < 1
    assert 0 < rows[2]["top5_overlap"] < 1  # of one rollout: this step saves none
    assert step["grad_clipped"] == min(step["grad_norm"], 1)
    perf = json.loads((tmp_path / "run/perf.jsonl").read_text().splitlines()[1])
    assert perf["tokens_per_s.rollout"] == pytest.approx(step["tokens"] / perf["rollout_s"])
    assert perf["tokens_per_s.update"] == pytest.approx(step["tokens"] / perf["update_s"])


def run_of(pair, out, *, steps, longest):
    opd.train(
        opd.Train(
            student=str(pair[0]),
            teacher=str(pair[1]),
            prompts="embedded:ledger-short",
            out=out,
            steps=steps,
            batch=2,
            sampling=Sampling(max_new_tokens=longest),
            doctor=False,
        )
    )


def test_alarms_are_said_once_while_it_trains(pair, tmp_path, capsys, monkeypatch):
    looked = itertools.count()

    def rules(log):
        assert len(log.steps) == 10 * (1 + next(looked))  # the log as it is on disk
        return [Alarm("entropy collapse", "entropy fell", "lower --lr")]

    monkeypatch.setattr("opd.training.train.alarms", rules)
    run_of(pair, tmp_path / "run", steps=20, longest=4)
    err = capsys.readouterr().err
    assert next(looked) == 2
    assert err.count("entropy collapse") == 1 and "warning: entropy collapse: step 10, entropy fell; lower --lr" in err


def test_a_run_whose_responses_are_cut_says_so(pair, tmp_path, capsys):
    run_of(pair, tmp_path / "run", steps=10, longest=2)
    lines = capsys.readouterr().err.splitlines()
    (said,) = [line for line in lines if "truncated generations" in line]
    assert "raise --max-new-tokens" in said and not any("\x1b" in line for line in lines)
