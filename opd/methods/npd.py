"""NPD: fit a filtered pool of rollouts that a snapshot of the student generated.  arXiv:2605.05940."""

from dataclasses import dataclass

from opd.losses.divergences import BucketForwardKL, Support
from opd.losses.rewards import One
from opd.losses.shapes import Mask, PerRollout, PerToken
from opd.losses.terms import Match, PolicyGradient
from opd.losses.token_weights import row_mean
from opd.methods.method import Method
from opd.methods.rollout_policies.snapshot import Snapshot


@dataclass(frozen=True)
class DeltaIFD:
    """Filter that keeps rollouts with low <= IFD_T - IFD_S <= high, IFD = CE(y | x) / CE(y).  arXiv:2605.05940.

    CE are means over tokens, in nats: CE_T under the teacher, CE_S under the weights that generated the rollout.  Below
    the window, the student is less confident in its rollout than the teacher is.  Above the window, the rollout is
    improbable under the teacher.  A rollout of one token has no CE(y) and is removed.
    """

    low: float = 0.0
    high: float = 0.8

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: the window of Delta-IFD needs low < high")

    def __call__(
        self,
        sampler_logp: PerToken,
        teacher_logp: PerToken,
        student_alone: PerRollout,
        teacher_alone: PerRollout,
        mask: Mask,
    ) -> Mask:
        delta = row_mean(sampler_logp, mask) / student_alone - row_mean(teacher_logp, mask) / teacher_alone
        passes = (delta >= self.low) & (delta <= self.high) & (student_alone > 0) & (teacher_alone > 0)
        return mask & passes[:, None]


def npd(
    weight: float = 0.9,
    k: int = 10,
    tau: float = 0.8,
    pool: int = 16,
    epochs: int = 10,
    refresh: int = 5,
    drift: float = 0.1,
    filtered: bool = True,
) -> Method:
    """Likelihood and top-k forward KL on a snapshot's rollouts that pass Delta-IFD.  NPD, arXiv:2605.05940.

    No code is published; this follows the abstract and notes on the paper.  Choices made here: the tokens outside the
    top k form one class, because without it the teacher itself would not be a minimum.  IFD is a ratio of mean cross
    entropies (2308.12032), not of perplexities; the unconditional pass starts at the first token of y.  The filter's
    student is the snapshot that generated the rollouts.  The pool size is ours, and so is an additional snapshot when
    the student has drifted.  Rollouts are not packed: rows of similar length share a micro-batch (docs/performance.md).
    With --worker, rollouts are generated in the background.

    The teacher scores a rollout once, when it enters the pool.  Its log-probs of the response and of its top k stay
    with the rollout, in main memory and in checkpoints: 8 (k + 1) bytes per token.  A teacher that moves (--teacher
    ema:RATE) is thus the one of that time.  Each step trains on --batch rollouts that pass the filter, or on all of a
    pool that has fewer.  Steps take them in order, and after the last the first again: if a share s passes, a pass over
    them takes s times --pool steps.  If none passes, the run ends with a message.

    Args:
        weight: Weight of the KL, in (0, 1].  The likelihood of the rollout has weight 1 - weight.
        k: Number of the teacher's most probable tokens in the KL.
        tau: Largest Delta-IFD of a rollout that is kept.
        pool: Number of rollout batches in a pool, and of steps in an epoch.
        epochs: Epochs on the prompts of a pool before the next prompts are used.
        refresh: Number of epochs after which a new snapshot generates the rollouts again.
        drift: KL of the student to the snapshot, in nats per token, above which a new snapshot is taken immediately.
        filtered: Apply the Delta-IFD filter.  Off keeps all rollouts.
    """
    if not 0 < weight <= 1:
        raise ValueError(f"weight={weight}: the share of the KL lies in (0, 1]")
    data = (PolicyGradient(One(), coef=1 - weight),) if weight < 1 else ()
    match = Match(BucketForwardKL(Support(k, "teacher")), coef=weight)
    admits = DeltaIFD(0.0, tau) if filtered else None
    return Method((*data, match), rollouts=Snapshot(pool, epochs, (refresh,), drift, admits=admits))
