"""How good a model is: avg@k, pass@k and their intervals, `evaluate(Evaluate(...)) -> Scores`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch

from opd import models, prompts
from opd.config import DTYPES, Evaluate
from opd.engines.hf import HFEngine
from opd.progress import loading
from opd.tasks.load import load
from opd.types import Refusal


@dataclass(frozen=True)
class Estimate:
    """A share, and its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of per-prompt shares with Wilson's interval at the effective number of prompts.

    The interval is over prompts, not samples: samples of one prompt are not independent.  Unlike the bootstrap it
    does not collapse when every share is 0 or 1.  Wilson, JASA 1927.
    """
    x = torch.tensor(values, dtype=torch.float64)
    n: float = len(x)
    m = float(x.mean())
    spread = float(x.var(correction=1)) if n > 1 else 0.0
    # Shares inside (0, 1) vary less than coins of the same mean: that is worth more prompts.
    n = max(n, m * (1 - m) / spread * n) if spread > 0 else n
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre, half = m + z * z / (2 * n), z * math.sqrt(m * (1 - m) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Estimate(
        m, max(0.0, (centre - half) / scale) if m > 0 else 0.0, min(1.0, (centre + half) / scale) if m < 1 else 1.0
    )


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Unbiased chance that one of k draws is right, from `samples` draws.  Chen et al., arXiv:2107.03374, Eq. 1."""
    if k > samples:
        raise ValueError(f"k={k}: pass@k needs at least k samples per prompt, and there are {samples}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


@dataclass(frozen=True)
class Scores:
    """Outcomes of k samples for each prompt, and what they came with."""

    outcomes: tuple[tuple[float, ...], ...]  # [prompts][k]
    lengths: tuple[int, ...]  # tokens, of every response
    stopped: tuple[bool, ...]

    def average(self) -> Estimate:
        """avg@k: the mean outcome."""
        return interval([sum(row) / len(row) for row in self.outcomes])

    def passing(self, k: int) -> Estimate:
        """pass@k; a response counts as right from an outcome of 1."""
        return interval([pass_at_k(sum(x >= 1 for x in row), len(row), k) for row in self.outcomes])

    def table(self) -> dict[str, object]:
        """All numbers, for json."""
        k = len(self.outcomes[0])
        rows = {f"avg@{k}": self.average()} | {f"pass@{j}": self.passing(j) for j in _powers(k) if k > 1}
        return {
            "prompts": len(self.outcomes),
            "samples": k,
            **{name: {"value": e.value, "low": e.low, "high": e.high} for name, e in rows.items()},
            "length": sum(self.lengths) / len(self.lengths),
            "stopped": sum(self.stopped) / len(self.stopped),
        }


def _powers(k: int) -> list[int]:
    return sorted({2**i for i in range(k.bit_length()) if 2**i <= k} | {k})


def evaluate(config: Evaluate) -> Scores:
    """Sample, verify, count.  Raises Refusal for what the user can mend."""
    for name in ("samples", "decode_rows"):
        if getattr(config, name) < 1:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least 1")
    config.sampling.check()
    if config.samples > 1 and config.sampling.temperature == 0:
        raise Refusal(f"--samples {config.samples}: greedy samples are all the same; add --temperature 0.6, say")
    with loading(config.model, quiet=False):
        source = models.locate(config.model, field="model", trust_remote_code=config.trust_remote_code)
    task = load(replace(config.data, source=config.prompts, seed=config.seed))
    if not task.scored:
        raise Refusal("--verifier none: nothing would be scored; name a verifier (math, numeric, exact, choice)")
    text = models.tokenizer(source, field="model")
    stop = prompts.stop_ids(models.generation_config(source), text)
    device = models.device(config.device, field="device")
    with loading(config.model, quiet=False):
        model = models.load(source, field="model", dtype=DTYPES[config.precision], device=device)
    models.small_threads(model)
    arguments = prompts.template_arguments(config.data.template_args)
    ids = [prompts.render(text, p, chat_template_kwargs=arguments, system="") for p in task.prompts]
    context = models.base(model).config.get_text_config().max_position_embeddings
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) + config.sampling.max_new_tokens > context:
        raise Refusal(
            f"--prompts {task.name}: prompt {longest} has {len(ids[longest])} tokens; with --max-new-tokens "
            f"{config.sampling.max_new_tokens} it passes the model's context of {context}; lower --max-new-tokens"
        )
    engine = HFEngine(model, len(text), stop, config.decode_rows)
    asked = [i for i in ids for _ in range(config.samples)]
    drawn = engine.generate(asked, config.sampling, seed=config.seed, step=0, index=range(len(asked)))
    say = lambda i: str(text.decode(list(drawn[i].ids), skip_special_tokens=True))
    outcomes = [task.verify(say(i), task.prompts[i // config.samples]) for i in range(len(asked))]
    k = config.samples
    return Scores(
        tuple(tuple(outcomes[i : i + k]) for i in range(0, len(outcomes), k)),
        tuple(len(s.ids) for s in drawn),
        tuple(s.stopped for s in drawn),
    )
