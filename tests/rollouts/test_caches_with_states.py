"""Models whose cache holds convolution and recurrent states: every log-prob is that of a plain forward of its row."""

import pytest
import torch

from benchmarks.tiny_models import auto_class, tiny_config
from opd.core.errors import Refusal
from opd.core.sampling import Sampling
from opd.core.types import Rollout
from opd.models.batching import rows
from opd.models.forward import final_states
from opd.models.load import head
from opd.models.verify import verify_head
from opd.rollouts.engines.base import GenerateRequest
from opd.rollouts.engines.hf import HFEngine
from opd.rollouts.engines.verify_cache import verify_cache
from tests.rollouts.test_hf_engine import other

STATES = (
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "granitemoehybrid",
    "jamba",
    "bamba",
    "lfm2_moe",
    "nemotron_h",
    "olmo_hybrid",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "falcon_h1",
    "kimi_linear",
)
UNCUT = ("minimax", "deepseek_v4")  # caches of their own kinds: rows leave together
STOP = (2, 7, 11, 19, 23)


def model_of(kind):
    torch.manual_seed(1)
    return auto_class(kind).from_config(tiny_config(kind)).eval()


def plain_logp(model, prompt, ids):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def prompts_of_many_lengths():
    g = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 60, (n,), generator=g).tolist() for n in (3, 1, 14, 2, 9, 1, 5, 12, 1, 4, 7)]
    return prompts + prompts[2:5]


@pytest.mark.parametrize("kind", [*STATES, *UNCUT])
def test_the_sampler_gives_the_log_probs_of_a_plain_forward(kind):
    """Prompts of 1 to 14 tokens and responses of 1 to 16 pass through three rows."""
    model, prompts = model_of(kind), prompts_of_many_lengths()
    verify_head(model, field="student")
    verify_cache(model, field="student")
    engine = HFEngine(model, 145, STOP, rows=3)
    request = GenerateRequest(prompts, Sampling(max_new_tokens=16), seed=3, step=5, index=range(len(prompts)))
    samples = engine.generate(request)
    assert len({len(s.ids) for s in samples}) > 2
    for prompt, sample in zip(prompts, samples, strict=True):
        count = len(sample.ids) - sample.stopped  # the probability of a stop token is that of its class
        expected = plain_logp(model, prompt, list(sample.ids))
        torch.testing.assert_close(torch.tensor(sample.logp)[:count], expected[:count], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", [*STATES, *UNCUT])
def test_padding_does_not_change_what_trainer_and_teacher_score(kind):
    """Rows of 2 to 20 tokens in one micro-batch."""
    model = model_of(kind)
    rollouts = [
        Rollout(
            prompt_ids=tuple(range(5, 5 + n)),
            teacher_prompt_ids=(),
            ids=tuple(range(30, 30 + m)),
            sampler_logp=(),
            index=i,
            group=i,
            stopped=True,
        )
        for i, (n, m) in enumerate(((1, 1), (3, 9), (12, 8), (2, 2)))
    ]
    batch = rows(rollouts, [[True] * len(r.ids) for r in rollouts], teacher=False, device=torch.device("cpu"))
    model_head = head(model)
    with torch.no_grad():
        logits = torch.nn.functional.linear(final_states(model, batch), model_head.weight, model_head.bias)
    scored = (logits.float() * model_head.scale).log_softmax(-1).gather(-1, batch.ids[batch.trained][:, None])[:, 0]
    expected = torch.cat([plain_logp(model, r.prompt_ids, list(r.ids)) for r in rollouts])
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["rwkv", "xlstm", "recurrent_gemma", "reformer", "cpmant"])
def test_a_cache_that_changes_the_log_probs_is_refused(kind):
    with pytest.raises(Refusal, match=r"--student: \w+ (decodes with its cache to|cannot be decoded with its cache)"):
        verify_cache(model_of(kind), field="student")


def test_the_numbers_are_in_the_refusal(monkeypatch):
    """A model that forgets its positions once it has a cache."""
    model = other("llama")
    verify_cache(model, field="student")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **x: forward(**x))
    with pytest.raises(Refusal, match=r"differ by \d\.?\d* nats from those of its plain forward"):
        verify_cache(model, field="student")
