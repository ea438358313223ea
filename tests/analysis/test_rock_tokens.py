"""`opd rock`: counts and KL against the definition, the lists by hand, a training run that freezes what was found."""

import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.analysis.exact import World
from opd.analysis.rock_tokens import (
    SHARES,
    Corpus,
    _contexts,
    _measure_corpus,
    consistency,
    control_types,
    is_above_quantile,
    rank,
    rock,
    stability,
)
from opd.cli import main
from opd.config.plan import resolved
from opd.config.rock import Context, Rock
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.core.types import call
from opd.losses.terms import Match
from opd.losses.token_weights import Frozen
from opd.methods.classic import opd_full
from opd.methods.method import Method
from opd.methods.rock import Released, rock_freeze
from opd.rollouts.batch import collate
from opd.training.build import open_session
from opd.training.run_folder import Run
from opd.training.trainer import Trainer
from tests.tiny_models import logged, tiny

tensor = torch.tensor
close = torch.testing.assert_close


# by hand


def test_the_score_is_the_summed_kl_of_the_token():
    corpus = Corpus(tensor([3, 1, 3, 0]), tensor([0.5, 2.0, 0.25, 9.0]), tensor([0, 0, 1, 1]))
    counts, sums = corpus.tally()
    assert counts.tolist() == [1, 1, 0, 2] and sums.tolist() == [9.0, 2.0, 0.0, 0.75]
    assert rank(counts, sums, top=2, min_count=1) == (0, 1)
    assert rank(counts, sums, top=2, min_count=2) == (3,)  # frequent enough, and fewer than asked
    assert rank(counts, sums, top=9, min_count=1) == (0, 1, 3)  # never a type that does not occur
    part = corpus.part(tensor([1]))
    assert part.ids.tolist() == [3, 0] and part.kl.tolist() == [0.25, 9.0]


def test_control_takes_the_nearest_frequencies_and_the_rest_of_the_total():
    #             rocks: 8 and 4;  free: 9  7  3  2  1  1
    counts = tensor([8, 4, 9, 7, 3, 2, 1, 1])
    # 8 -> 9 (log 9/8 < log 8/7), 3 are left; 4 -> 3, nothing is left.
    assert control_types(counts, (0, 1)) == (2, 4)
    # 4 -> 3 (log 4/3 < log 7/4, and 7 exceeds what is left); 1 is left.
    assert control_types(counts, (1,)) == (4, 6)


@pytest.mark.parametrize("seed", range(8))
def test_control_has_equal_total_occurrences(seed):
    """Zipf's frequencies: what is missing is less than any type that is left."""
    g = torch.Generator().manual_seed(seed)
    counts = (4000 / torch.arange(1, 2001) ** 0.9).round().long()
    rocks = torch.randperm(200, generator=g)[:30].tolist()
    control = control_types(counts, rocks)
    assert not set(control) & set(rocks) and len(set(control)) == len(control)
    missing = int(counts[rocks].sum() - counts[list(control)].sum())
    assert 0 <= missing < counts[[i for i in range(2000) if i not in (*rocks, *control)]].min()
    size = lambda ids: counts[list(ids)[: len(rocks)]].double().sort().values.log()
    assert (size(control) - size(rocks)).abs().median() < 0.5


def test_control_of_nearly_everything_is_what_remains():
    counts = tensor([100, 50, 3, 0, 2])
    assert set(control_types(counts, (0, 1))) == {2, 4}
    assert control_types(counts, (0, 1, 2, 4)) == ()


def test_stability_is_one_for_the_whole_and_falls_with_the_share():
    g = torch.Generator().manual_seed(0)
    ids = torch.distributions.Geometric(0.05).sample((4000,)).long()
    corpus = Corpus(ids, torch.rand(4000, generator=g).double(), torch.arange(200).repeat_interleave(20))
    found = stability(corpus, top=20, min_count=2, seed=0)
    assert tuple(found) == SHARES and found[1.0] == 1
    assert found[0.1] < found[0.6] < 1
    assert found == stability(corpus, top=20, min_count=2, seed=0)
    # Two rollouts, each with a token of its own: half of the corpus has one of the two.
    two = Corpus(tensor([0, 0, 1, 1]), torch.ones(4), tensor([0, 0, 1, 1]))
    assert stability(two, top=2, min_count=2, seed=0)[0.4] == 0.5


def test_high_is_from_the_quantile_on():
    kl = torch.randperm(100).double()
    assert sorted(kl[is_above_quantile(kl, 0.95)].tolist()) == [95, 96, 97, 98, 99]
    assert is_above_quantile(kl, 0.0).all()


def test_consistency_counts_occurrences_whose_context_recurs():
    """Type 0: three alike and one apart, of 8 occurrences; type 1: two apart, of 2; type 2: one; type 3: none."""
    a, b = [1.0, 0.0], [0.0, 1.0]
    ids = tensor([0, 0, 1, 0, 0, 1, 2])
    contexts = tensor([a, a, a, [2.0, 0.1], b, b, a])
    counts = tensor([8, 2, 5, 4])
    ratios = consistency(ids, contexts, counts, similar=0.8, share=0.1)
    close(ratios, tensor([3 / 8, 0, 0, 0]).double())
    # All others must be similar: each of the three has one that is not.
    close(consistency(ids, contexts, counts, similar=0.8, share=0.9), torch.zeros(4).double())
    close(consistency(ids, contexts, counts, similar=-1.0, share=0.9), tensor([4 / 8, 1, 0, 0]).double())


def test_consistency_in_blocks(monkeypatch):
    ids, contexts = torch.randint(3, (50,)), torch.randn(50, 4)
    whole = consistency(ids, contexts, ids.bincount(), similar=0.3, share=0.3)
    monkeypatch.setattr("opd.analysis.rock_tokens.BLOCK", 4)
    close(consistency(ids, contexts, ids.bincount(), similar=0.3, share=0.3), whole)
    assert 0 < whole.mean() < 1


# against the definition, on small models


def config(pair, out, **changes):
    whole = Rock(
        student=str(pair[0]),
        teacher=str(pair[1]),
        prompts="embedded:ledger-short",
        out=out,
        rollouts=20,
        top=10,
        sampling=Sampling(max_new_tokens=12),
        decode_rows=8,  # more than one round, the last of them cut
        micro_batch_tokens=256,
        quiet=True,
    )
    return replace(whole, **changes)


@pytest.fixture(scope="module")
def looked(pair, tmp_path_factory):
    how = config(pair, tmp_path_factory.mktemp("looked") / "rocks.json")
    session = open_session(resolved(replace(how.run(), method=Method())))
    loop = Trainer(session, Run(how.out))
    return how, loop, *_measure_corpus(how, loop)


def states(model, rollout):
    """(hidden states and log-probs that predict each response token) of one rollout, without batches or padding."""
    ids = tensor([[*rollout.prompt_ids, *rollout.ids]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logp = model.lm_head(hidden).double().log_softmax(-1)
    at = slice(len(rollout.prompt_ids) - 1, -1)
    return hidden[0, at], logp[0, at]


def test_counts_and_kl_are_those_of_the_full_softmax(pair, looked):
    _, loop, rollouts, corpus = looked
    student, teacher = (AutoModelForCausalLM.from_pretrained(name).eval() for name in pair)
    size = loop.session.vocabulary.size
    counts, sums = [0] * size, [0.0] * size
    for rollout in rollouts:
        (_, p), (_, q) = states(student, rollout), states(teacher, rollout)
        for token, kl in zip(rollout.ids, (p.exp() * (p - q)).sum(-1).tolist(), strict=True):
            counts[token] += 1
            sums[token] += kl
    got_counts, got_sums = corpus.tally()
    assert len(rollouts) == 20 and len({r.prompt_ids for r in rollouts}) > 10
    assert got_counts.tolist() == counts[: len(got_counts)] and sum(counts) == sum(got_counts.tolist())
    close(got_sums, tensor(sums[: len(got_sums)]).double(), rtol=1e-4, atol=1e-5)


def test_contexts_are_means_over_the_window(pair, looked):
    how, loop, rollouts, corpus = looked
    how = replace(how, consistency=Context(width=2))
    chosen = torch.rand(len(corpus.ids)) < 0.3
    batch = collate(rollouts, stop_token="train", truncated="train", seed=0, step=0)
    got = _contexts(how, loop, rollouts, batch, chosen)
    model = AutoModelForCausalLM.from_pretrained(pair[0]).eval()
    hidden = [states(model, r)[0] for r in rollouts]
    means = torch.cat([torch.stack([h[max(0, t - 2) : t + 3].mean(0) for t in range(len(h))]) for h in hidden])
    close(got, means[chosen], rtol=1e-4, atol=1e-5)


def test_files(pair, tmp_path, capsys):
    out = rock(config(pair, tmp_path / "deep" / "rocks.json"))
    found, control = (json.loads(p.read_text()) for p in (out, tmp_path / "deep" / "rocks-control.json"))
    types = found["types"]
    assert [t["id"] for t in types] == found["ids"] and len(found["ids"]) == 10
    assert [t["score"] for t in types] == sorted((t["score"] for t in types), reverse=True)
    assert all(t["score"] == pytest.approx(t["count"] * t["mean_kl"]) and t["count"] >= 2 for t in types)
    assert sum(t["count"] for t in types) == found["occurrences"] == pytest.approx(
        found["coverage"]["tokens"] * found["corpus"]["tokens"]
    )  # fmt: skip
    assert 0 < found["coverage"]["tokens"] < 1 and 0 < found["coverage"]["kl"] < 1
    assert not set(found["ids"]) & set(control["ids"])
    assert control["occurrences"] == pytest.approx(found["occurrences"], rel=0.02)
    assert found["stability"]["1.0"] == 1
    said = capsys.readouterr().out
    assert repr(types[0]["token"]) in said and f"{control['occurrences']} occurrences" in said


@pytest.mark.parametrize("before", [False, True])
def test_the_context_filter_ranks_by_persistence(pair, tmp_path, before):
    other = str(tiny(tmp_path / "another", seed=3)) if before else ""
    how = Context(context_filter=True, high=0.5, width=1, similar=0.2, before=other)
    found = json.loads(rock(config(pair, tmp_path / "a.json", consistency=how)).read_text())
    plain = json.loads(rock(config(pair, tmp_path / "b.json")).read_text())
    ratios = [t["consistency"] for t in found["types"]]
    assert all(0 <= r <= 1 for r in ratios) and 0 < sum(ratios) < len(ratios)
    for t in found["types"]:
        assert t["score"] == pytest.approx(t["count"] * t["mean_kl"] * t["consistency"])
    assert found["ids"] != plain["ids"] and found["corpus"] == plain["corpus"]


# then train


@pytest.mark.parametrize("flags", [(), ("--weight", "0.3"), ("--window", "2"), ("--released",)], ids=" ".join)
@pytest.mark.parametrize("name", ["rocks.json", "rocks-control.json"])
def test_rock_freeze_trains_with_either_list(pair, tmp_path, name, flags, capsys):
    models = ["--student", str(pair[0]), "--teacher", str(pair[1]), "--prompts", "embedded:ledger-short"]
    short = ["--max-new-tokens", "12", "--quiet"]
    assert main(["rock", *models, *short, "--rollouts", "16", "--top", "6", "--out", str(tmp_path / "rocks.json")]) == 0
    run = ["train", *models, *short, "--steps", "1", "--batch", "8", "--out", str(tmp_path / "run")]
    assert main([*run, "rock-freeze", "--tokens", str(tmp_path / name), *flags]) == 0
    (row,) = logged(tmp_path / "run")
    assert row["grad_norm"] > 0
    from safetensors.torch import load_file

    columns = load_file(tmp_path / "run" / "rollouts" / "step-000001.safetensors")
    listed = json.loads((tmp_path / name).read_text())["ids"]
    frozen = torch.isin(columns["ids"], tensor(listed))[columns["mask"].bool()].double().mean()
    assert 0 < frozen < 1


@pytest.mark.usefixtures("float64")
def test_the_released_weights_follow_the_listed_token_and_keep_their_sum():
    ids, mask = tensor([[5, 7, 5, 9], [7, 5, 1, 1]]), tensor([[True] * 4, [True, True, True, False]])
    # After the fives: places 1, 3 of the first row, 2 of the second; four of seven remain.
    want = tensor([[1.0, 0, 1, 0], [1, 1, 0, 0]]) * 7 / 4
    close(Released((5,))(ids, mask).where(mask, 0), want)
    close(Released((5,), 0.5)(ids, mask).where(mask, 0).sum(), tensor(7.0))
    close(Released((5,))(ids[:1, 1:3], mask[:1, 1:3]), tensor([[2 / 2, 2 / 2]]))  # a first token has none before
    alone = tensor([[False, True]])
    assert Released((1, 5))(tensor([[5, 1]]), alone)[alone].item() == 0  # nothing remains: not 0 / 0
    (term,) = rock_freeze(released=True).terms
    assert term == Match(weights=(Released(),))
    with pytest.raises(ValueError, match="window=3"):
        rock_freeze(window=3, released=True)


@pytest.mark.usefixtures("float64")
def test_the_released_loss_is_the_weighted_mean_over_the_weights():
    world = World.random(vocab=4, steps=3)
    ids = world.sequences()[:24]
    m = Method((Match(weights=(Released((1,), 0.2),)),))
    batch = world.measure(m, ids)
    (target,) = m.prepare(batch)
    weight = call(Frozen((1,), 0.2), batch)
    weight = torch.cat((torch.ones(24, 1), weight[:, :-1]), 1)
    close(target.weight, weight / weight.sum())
    close(world.gradient(Method((Match(weights=(Released(),)),)), ids), world.gradient(opd_full(), ids))


# what cannot work


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollouts": 0}, "--rollouts 0"),
        ({"top": 0}, "--top 0"),
        ({"min_count": 0}, "--min-count 0"),
        ({"consistency": Context(high=1.0)}, "--high 1.0"),
        ({"consistency": Context(similar=2.0)}, "--similar 2.0"),
        ({"consistency": Context(before="x")}, "add --context-filter"),
        ({"sampling": Sampling(max_new_tokens=0)}, "--max-new-tokens 0"),
    ],
)
def test_refused_before_anything_loads(pair, tmp_path, changes, says):
    with pytest.raises(Refusal, match=says) as caught:
        rock(config(("nowhere/s", "nowhere/t"), tmp_path / "rocks.json", **changes))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["rocks.json", "rocks-control.json"])
def test_files_are_not_overwritten_unasked(pair, tmp_path, name):
    (tmp_path / name).write_text("precious")
    with pytest.raises(Refusal, match=r"exists already, .* add --overwrite"):
        rock(config(pair, tmp_path / "rocks.json"))
    assert (tmp_path / name).read_text() == "precious"
    rock(config(pair, tmp_path / "rocks.json", overwrite=True))
    assert json.loads((tmp_path / name).read_text())["ids"]


def test_more_greedy_rollouts_than_prompts(pair, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "1+1?"}\n')  # no answer: nothing is verified
    greedy = {"prompts": str(file), "sampling": Sampling(temperature=0.0, max_new_tokens=4)}
    with pytest.raises(Refusal, match="--rollouts 20: there are 1 prompts"):
        rock(config(pair, tmp_path / "rocks.json", **greedy))
    rock(config(pair, tmp_path / "rocks.json", rollouts=1, min_count=1, **greedy))
    assert math.isfinite(json.loads((tmp_path / "rocks.json").read_text())["coverage"]["kl"])
