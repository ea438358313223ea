"""Re-scoring: what a method says about another's rollouts is what it says where it trains on them itself."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import opd
from opd.analysis.rescore import (
    OWN_METHOD,
    batch_of,
    compare_pulls,
    most_different,
    own_targets,
    parse_method,
    ranks,
    rescore,
    targets_of,
)
from opd.cli import main
from opd.config.commands import Rescore
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.core.types import Batch
from opd.methods import METHODS
from tests.tiny_models import tiny

TOLD = ("opd", "vopd", "poweropd", "reopold", "opd-zscore", "topd", "fire", "iw-opd", "scope", "entropy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of one step from the same weights and noise: their rollouts are the same, their methods are not."""
    root = tmp_path_factory.mktemp("runs")
    student, teacher = tiny(root / "student", seed=1), tiny(root / "teacher", seed=2, width=48)

    def run(name):
        if not (root / name).exists():
            opd.train(
                opd.Train(
                    student=str(student),
                    teacher=str(teacher),
                    prompts="embedded:ledger-short",
                    steps=1,
                    batch=8,
                    per_prompt=4,
                    sampling=Sampling(max_new_tokens=16),
                    quiet=True,
                    out=root / name,
                    method=METHODS[name](),
                )
            )
        return root / name

    return run


def columns(folder):
    return load_file(folder / "rollouts/step-000001.safetensors")


@pytest.mark.parametrize("by", ["vopd", "opd-full"])
@pytest.mark.parametrize("name", TOLD)
def test_a_method_says_of_anothers_rollouts_what_it_says_of_its_own(folder, by, name):
    theirs, mine = columns(folder(by)), columns(folder(name))
    assert torch.equal(theirs["ids"], mine["ids"])
    known = parse_method((folder(by) / "method.txt").read_text())
    targets, lacks = targets_of(METHODS[name](), batch_of(theirs), known, own_targets(theirs))
    assert not lacks and len(targets) == len(own_targets(mine))
    for target, trained in zip(targets, own_targets(mine), strict=True):
        torch.testing.assert_close(target.weight, trained.weight, rtol=1e-5, atol=1e-7)
        counts = mine["mask"] & (trained.weight != 0)
        torch.testing.assert_close(target.advantage[counts], trained.advantage[counts], rtol=1e-4, atol=1e-5)


def test_what_the_vocabulary_alone_tells_is_not_guessed(folder):
    theirs = columns(folder("opd"))
    for name in ("reverse_kl", "teacher_entropy"):  # as with a teacher that says log q of these tokens alone
        del theirs[name]
    batch, own, known = batch_of(theirs), own_targets(theirs), METHODS["opd"]()
    for name, why in {
        "vopd": "reverse_kl",
        "vopd-topk": "vocabulary",
        "opd-optimal": "vocabulary",
        "opd-stratified": "vocabulary",
        "opd-full": "no advantage",
        "g-opd": "reference",
        "oprd": "hidden",
        "fire": "it reads teacher_entropy",
    }.items():
        targets, (lack,) = targets_of(METHODS[name](), batch, known, own)
        assert why in lack and all(t.advantage is None for t in targets), name


def test_scores_of_the_runs_own_terms_are_reused(folder):
    """A baseline on the top k cannot be computed from columns; that of the run itself was, and was saved."""
    theirs = columns(folder("vopd-topk"))
    known = parse_method((folder("vopd-topk") / "method.txt").read_text())
    assert known.terms == METHODS["vopd-topk"]().terms
    (target,), lacks = targets_of(known, batch_of(theirs), known, own_targets(theirs))
    assert not lacks and torch.equal(target.advantage, theirs["advantage.0"])
    assert targets_of(METHODS["vopd-topk"](k=3), batch_of(theirs), known, own_targets(theirs))[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_read_back_from_its_text(name):
    assert parse_method(repr(METHODS[name]())) == METHODS[name]()


def test_text_that_is_no_method_is_not_run():
    for text in (
        "__import__('os').getcwd()",
        "Method((Mine(),))",
        "LogRatio()",
        "Method(",
        "Method(terms=(open('x'),))",
    ):
        assert parse_method(text) is None


def test_agreement_by_numpy():
    a, b = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    found = compare_pulls(a, b, [])
    order = lambda x: np.argsort(np.argsort(x.numpy()))
    assert found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert found.spearman == pytest.approx(np.corrcoef(order(a), order(b))[0, 1])
    assert found.cosine == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)))
    assert found.opposed == pytest.approx(np.mean(np.sign(a.numpy()) != np.sign(b.numpy())))
    same = compare_pulls(a, 3 * a, [])
    assert same.pearson == pytest.approx(1) and same.spearman == pytest.approx(1) and same.opposed == 0
    assert compare_pulls(a, torch.ones_like(a), []).pearson is None


def test_ties_share_their_rank():
    assert ranks(torch.tensor([5.0, 1.0, 5.0, 0.0, 5.0])).tolist() == [4.0, 2.0, 4.0, 1.0, 4.0]


def test_the_tokens_furthest_apart_do_not_depend_on_scale():
    own, other = torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([7.0, 7.0, 7.0, 7.0])
    (found,) = most_different(own, other, 3)
    assert found == (2, pytest.approx(-1), pytest.approx(1))


def test_the_table(folder, capsys):
    run = folder("vopd")
    found = rescore(Rescore(run=run, tokens=3), {name: METHODS[name]() for name in ("vopd", "fire", "opd-full")})
    mine, text = found.methods["vopd"], {**json.loads((run / "rollouts/step-000001.tokens.json").read_text())}
    assert found.beside == OWN_METHOD and found.tokens == int(columns(run)["mask"].sum())
    assert mine.agreement.cosine == pytest.approx(1) and mine.agreement.opposed == 0 and not mine.agreement.tokens
    assert mine.terms == found.methods[OWN_METHOD].terms
    fire = found.methods["fire"]
    assert 0 < fire.kept < found.rollouts and fire.terms[0].effective < mine.terms[0].effective
    assert len(fire.agreement.tokens) == 3
    token = fire.agreement.tokens[0]
    assert token.text == text[str(int(columns(run)["ids"][token.rollout, token.position]))]
    assert found.methods["opd-full"].agreement is None and found.methods["opd-full"].lacks
    assert main(["rescore", str(run), "--method", "fire", "--method", "vopd-topk:k=2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["methods"]["fire"]["kept"] == fire.kept and "vocabulary" in told["methods"]["vopd-topk:k=2"]["lacks"][0]
    assert main(["rescore", str(run), "--method", "fire,scope"]) == 0
    shown = capsys.readouterr().out
    assert "where they differ most" in shown and f"{fire.kept}/8" in shown


def test_a_run_without_advantages_is_no_yardstick(folder):
    found = rescore(Rescore(run=folder("opd-full")), {"opd": METHODS["opd"](), "fire": METHODS["fire"]()})
    assert found.beside == "opd" and found.methods["fire"].agreement and found.methods[OWN_METHOD].lacks


def test_what_cannot_be_rescored_is_refused_in_one_line(folder, tmp_path, capsys):
    for args, told in (
        ([str(tmp_path)], "no saved rollouts"),
        ([str(folder("vopd")), "--step", "7"], "were saved at 1"),
        ([str(folder("vopd")), "--method", "vopdd"], "did you mean vopd"),
        ([str(folder("vopd")), "--tokens", "-1"], "0 or more"),
    ):
        assert main(["rescore", *args]) == 2
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1


def test_a_batch_is_what_was_saved(folder):
    found = columns(folder("fire"))
    batch = batch_of(found)
    assert {f.name for f in fields(Batch) if isinstance(getattr(batch, f.name), torch.Tensor)} <= set(found)
    with pytest.raises(Refusal):
        rescore(Rescore(run=folder("fire"), step=2), {})
    assert replace(batch).mask.equal(found["mask"])
