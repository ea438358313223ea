"""Sampling: the right distribution, the engine's own log-probs, the same tokens in whatever company."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.engines.hf import HFEngine, draw, truncate
from opd.noise import uniform
from opd.types import Sampling
from tests.models_for_tests import tiny

PROMPTS = [[1, 5, 9], [1, 7], [1, 5, 9], [1, 20, 30, 40, 50, 60], [1, 7], [1, 8, 8]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(tiny(tmp_path_factory.mktemp("m"), seed=0)).eval()


def engine(model, **options):
    return HFEngine(model, model.config.vocab_size, (2,), **options)


def generate(e, prompts=PROMPTS, index=None, sampling=Sampling(max_new_tokens=24)):
    return e.generate(prompts, sampling, seed=3, step=5, index=index or range(len(prompts)))


def test_log_probs_are_the_models_own(model):
    for prompt, sample in zip(PROMPTS, generate(engine(model)), strict=True):
        whole = torch.tensor([prompt + list(sample.ids)])
        logp = model(whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = logp.gather(-1, torch.tensor(sample.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(sample.logp), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{"rows": 2}, {"compact": 0.0}, {"compact": 1.0}])
def test_company_does_not_change_a_response(model, options):
    """Batch size, dropped rows and prompt sharing are the engine's business; noise belongs to the rollout."""
    assert [s.ids for s in generate(engine(model, **options))] == [s.ids for s in generate(engine(model))]


def test_a_rollout_is_its_index_not_its_place(model):
    whole = generate(engine(model))
    one = generate(engine(model), PROMPTS[3:4], index=[3])
    assert one[0].ids == whole[3].ids
    assert whole[0].ids != whole[2].ids  # one prompt, two rollouts, two noises


def test_responses_end_at_a_stop_token_or_the_limit(model):
    for sample in generate(engine(model)):
        assert sample.stopped == (sample.ids[-1] == 2)
        assert 2 not in sample.ids[:-1]
        assert sample.stopped or len(sample.ids) == 24


def test_greedy_is_transformers_greedy(model):
    ours = generate(engine(model), PROMPTS[:1], sampling=Sampling(temperature=0.0, max_new_tokens=12))[0]
    theirs = model.generate(torch.tensor(PROMPTS[:1]), do_sample=False, max_new_tokens=12, pad_token_id=0)[0, 3:]
    assert list(ours.ids) == theirs.tolist()


def test_ids_beyond_the_vocabulary_are_never_drawn(model):
    cut = HFEngine(model, 12, (2,))
    assert max(max(s.ids) for s in generate(cut)) < 12


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.7), Sampling(top_p=0.8), Sampling(top_k=3), Sampling(top_k=4, top_p=0.9)],
)
def test_frequencies_and_log_probs_follow_the_tempered_truncated_distribution(sampling):
    """100,000 counter-based draws against probabilities computed by transformers' own warpers."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(1)) * 1.5
    z = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    z = TopKLogitsWarper(sampling.top_k)(None, z) if sampling.top_k else z
    z = TopPLogitsWarper(sampling.top_p)(None, z) if sampling.top_p < 1 else z
    p = z.softmax(-1)[0]
    n = 100_000
    ids, logp = draw(
        logits.expand(n, -1), sampling, torch.from_numpy(uniform(0, 0, np.arange(n), 0)), torch.tensor([9])
    )
    seen = torch.bincount(ids, minlength=10) / n
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()
    torch.testing.assert_close(logp, p.log()[ids])
    assert torch.equal(truncate(logits.log_softmax(-1), Sampling()), logits.log_softmax(-1))


def test_a_stop_token_is_drawn_at_the_probability_of_its_class():
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(1))
    ids, logp = draw(
        logits.expand(1000, -1), Sampling(), torch.from_numpy(uniform(0, 0, np.arange(1000), 0)), torch.tensor([3, 8])
    )
    whole = logits.softmax(-1)[0, [3, 8]].sum().log()
    assert torch.isin(ids, torch.tensor([3, 8])).any()
    torch.testing.assert_close(
        logp[torch.isin(ids, torch.tensor([3, 8]))], whole.expand((ids == 3).sum() + (ids == 8).sum())
    )
