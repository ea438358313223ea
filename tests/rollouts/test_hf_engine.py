"""Sampling: the right distribution, the engine's own log-probs, the same tokens in whatever company."""

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from opd.core.rng import uniform
from opd.core.sampling import Sampling
from opd.head.kernels import quantile as draws
from opd.head.kernels.quantile import quantile
from opd.rollouts.engines.base import GenerateRequest
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.kv_cache import Cache, Stream
from opd.rollouts.engines.sampling import draw, truncate
from tests.tiny_models import tiny

PROMPTS = [[1, 5, 9], [1, 7], [1, 5, 9], [1, 20, 30, 40, 50, 60], [1, 7], [1, 8, 8]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(tiny(tmp_path_factory.mktemp("m"), seed=0)).eval()


def engine(model, **options):
    return HFEngine(model, model.config.vocab_size, (2,), **options)


def generate(e, prompts=PROMPTS, index=None, sampling=Sampling(max_new_tokens=24)):
    return e.generate(GenerateRequest(prompts, sampling, seed=3, step=5, index=index or range(len(prompts))))


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
    noise = torch.from_numpy(uniform(0, 0, np.arange(n), 0))
    ids, logp = (x.flatten() for x in draw(logits.expand(n // 2, -1), sampling, noise.view(-1, 2), torch.tensor([9])))
    seen = torch.bincount(ids, minlength=10) / n
    assert ((seen - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()
    torch.testing.assert_close(logp, p.log()[ids])
    assert torch.equal(truncate(logits.log_softmax(-1), Sampling()), logits.log_softmax(-1))


def test_a_stop_token_is_drawn_at_the_probability_of_its_class():
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(1))
    noise = torch.from_numpy(uniform(0, 0, np.arange(1000), 0))[:, None]
    ids, logp = (x[:, 0] for x in draw(logits.expand(1000, -1), Sampling(), noise, torch.tensor([3, 8])))
    whole = logits.softmax(-1)[0, [3, 8]].sum().log()
    assert torch.isin(ids, torch.tensor([3, 8])).any()
    torch.testing.assert_close(
        logp[torch.isin(ids, torch.tensor([3, 8]))], whole.expand((ids == 3).sum() + (ids == 8).sum())
    )


# Places that are filled again


ARCHITECTURES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "sliding": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5}),
    "absolute positions": ("GPT2Config", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}),
    "positions by distance": ("BloomConfig", {"n_head": 4, "n_layer": 2}),
}


def other(name):
    kind, options = ARCHITECTURES[name]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.3,
        **options,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("options", [{"rows": 3}, {"rows": 4, "compact": 0.6}, {"rows": 2, "compact": 1.0}])
def test_whoever_takes_a_place_writes_what_it_writes_alone(name, options):
    """Prompts of 1 to 14 tokens and responses of 1 to 24 pass through few places; each is also written alone."""
    e = HFEngine(other(name), 60, (2, 7, 11, 19, 23), **options)
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 60, (n,), generator=g).tolist() for n in (3, 1, 14, 2, 9, 1, 5, 12, 1, 4, 7)]
    prompts += prompts[2:5]
    found = generate(e, prompts)
    assert len({len(s.ids) for s in found}) > 2
    for i, sample in enumerate(found):
        (alone,) = generate(e, prompts[i : i + 1], index=[i])
        assert sample.ids == alone.ids and sample.stopped == alone.stopped
        torch.testing.assert_close(torch.tensor(sample.logp), torch.tensor(alone.logp), rtol=1e-4, atol=1e-4)


def test_a_cache_that_takes_no_rows_is_filled_once_it_is_empty(model, monkeypatch):
    wanted = generate(engine(model))
    monkeypatch.setattr(Cache, "splices", lambda self: False)
    assert [s.ids for s in generate(engine(model, rows=2))] == [s.ids for s in wanted]


def test_a_prompt_is_read_once_for_all_its_rollouts(model, monkeypatch):
    """Five rollouts of each of three prompts, through four places."""
    prompts, read, prefilled = [p for p in PROMPTS[1:4] for _ in range(5)], [], Stream._prefilled
    monkeypatch.setattr(Stream, "_prefilled", lambda self, some: read.extend(some) or prefilled(self, some))
    found = generate(engine(model, rows=4), prompts)
    assert sorted(read) == sorted(map(tuple, PROMPTS[1:4]))
    monkeypatch.undo()
    assert [s.ids for s in found] == [s.ids for s in generate(engine(model), prompts)]


def test_columns_are_given_back(model, monkeypatch):
    """However many responses pass through a place, the cache is as wide as the longest row that is there."""
    widths, read = [], Stream.read
    monkeypatch.setattr(Stream, "read", lambda self: widths.append((self.rows.width, self.rows.length)) or read(self))
    generate(engine(model, rows=2, compact=1.0), PROMPTS * 3)
    assert len(widths) > 3 * 24
    assert max(width for width, _ in widths) < 6 + 24
    assert all(width == int(length.max()) for width, length in widths)


# The draw


def quantiles(z, temperature):
    """float64, by the definition."""
    p = (z.double() / temperature).softmax(-1)
    return p, p.cumsum(-1)


@pytest.fixture(params=["C", "torch"])
def way(request, monkeypatch):
    if request.param == "C" and draws._compiled() is None:
        pytest.skip("no C compiler here")
    if request.param == "torch":
        monkeypatch.setattr(draws, "_compiled", lambda: None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
@pytest.mark.parametrize("width", [2048, 3001, 49152])
def test_the_drawn_token_holds_the_quantile_in_float64(width, temperature):
    z = torch.randn(40, width) * torch.logspace(-2, 1.5, 40)[:, None]
    z[::7, 5:900] = -torch.inf
    u = torch.rand(40, 3, dtype=torch.float64)
    p, cdf = quantiles(z, temperature)
    ids, whole = quantile(z, u, temperature)
    upper = cdf.gather(-1, ids)
    assert ((upper - p.gather(-1, ids) <= u + 1e-12) & (u <= upper + 1e-12)).all()
    torch.testing.assert_close(whole, (z.double() / temperature).logsumexp(-1), rtol=1e-14, atol=1e-13)


@pytest.mark.usefixtures("way")
def test_the_ends_of_the_unit_interval():
    z = torch.full((4, 5000), -torch.inf)
    z[:, 7], z[:, 4000] = 0.0, 1.0
    at = lambda z, *noise: quantile(z, torch.tensor(noise, dtype=torch.float64)[:, None])[0][:, 0].tolist()
    most = 1 - 2.0**-53
    assert at(z, 0.0, most, 0.2689, 0.2690) == [7, 4000, 7, 4000]
    flat = torch.zeros(2, 4096)
    assert at(flat, 0.5, most) == [2048, 4095]
    far = torch.zeros(1, 4096)
    far[0, 1:] = -400.0  # beyond fp32's smallest number: exp(-400) is none of its own
    assert at(far, most) in ([0], [4095])


@pytest.mark.skipif(draws._compiled() is None, reason="no C compiler here")
def test_both_ways_draw_the_same_tokens():
    for k in range(20):
        z, u = torch.randn(64, 4096 + 37 * k)[:, : 4096 + k] * (0.2 + k), torch.rand(64, 3, dtype=torch.float64)
        found, twin = draws._in_c(z, u, 0.7), draws.in_torch(z, u, 0.7)
        assert torch.equal(found[0], twin[0])
        torch.testing.assert_close(found[1], twin[1], rtol=1e-14, atol=1e-13)


@pytest.mark.usefixtures("way")
def test_frequencies_over_a_large_vocabulary():
    """Chi-square of 20,000 counter-based draws, tokens gathered into classes of like mass."""
    z = torch.randn(1, 2500, generator=torch.Generator().manual_seed(3)) * 2
    n, (p, _) = 20_000, quantiles(z, 1.0)
    seen = torch.zeros(2500)
    for part in np.arange(n).reshape(20, -1):
        ids, _ = quantile(z.expand(len(part), -1), torch.from_numpy(uniform(1, 2, part, 3))[:, None])
        seen += torch.bincount(ids[:, 0], minlength=2500)
    group = (p[0].cumsum(0) * 99.999).long()
    expected = torch.zeros(100, dtype=torch.float64).index_add(0, group, p[0] * n)
    observed = torch.zeros(100, dtype=torch.float64).index_add(0, group, seen.double())
    some = expected > 0
    chi = ((observed - expected).square() / expected)[some].sum()
    freedom = int(some.sum()) - 1
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5
