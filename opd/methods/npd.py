"""NPD: a pool of rollouts by a snapshot of the student, filtered, then fitted as data.  arXiv:2605.05940."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from opd.divergences import BucketForwardKL, Support
from opd.method import Match, Method, PolicyGradient
from opd.rewards import One
from opd.rollouts import Snapshot
from opd.weights import row_mean


@dataclass(frozen=True)
class DeltaIFD:
    """The trained tokens of rollouts with low <= IFD_T - IFD_S <= high, IFD = CE(y | x) / CE(y).  arXiv:2605.05940.

    CE are means over tokens: the teacher's, and those of the weights that wrote.  Below, the student trusts its rollout
    less than the teacher does; above, the teacher finds it improbable.  A rollout of one token has no CE(y), and goes.
    """

    low: float = 0.0
    high: float = 0.8

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"low={self.low}, high={self.high}: the window of Delta-IFD needs low < high")

    def __call__(
        self,
        sampler_logp: Float[Tensor, "B T"],
        teacher_logp: Float[Tensor, "B T"],
        student_alone: Float[Tensor, " B"],
        teacher_alone: Float[Tensor, " B"],
        mask: Bool[Tensor, "B T"],
    ) -> Bool[Tensor, "B T"]:
        delta = row_mean(sampler_logp, mask) / student_alone - row_mean(teacher_logp, mask) / teacher_alone
        kept = (delta >= self.low) & (delta <= self.high) & (student_alone > 0) & (teacher_alone > 0)
        return mask & kept[:, None]


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

    Read of its abstract and of notes on it, for no code is out.  Ours: the rest beside the top k is one class, without
    which the teacher itself is no minimum; IFD is a ratio of mean cross entropies (2308.12032; not of perplexities),
    y alone being read from its first token on; the generating snapshot is the student of the filter; the pool's size;
    a snapshot more where the student has drifted, beside the one refresh.  Nothing is packed: rows of like length go
    through the models together (docs/performance.md).  --worker writes in the background.

    Args:
        weight: of the KL; the likelihood of the rollout has the rest.
        k: tokens of the KL, the teacher's most probable.
        tau: the largest Delta-IFD that is kept.
        pool: rollout batches of an epoch.
        epochs: passes over a pool's prompts before the next prompts come.
        refresh: passes after which the student writes anew.
        drift: KL of the student to the snapshot, nats a token, beyond which it writes anew at once.
        filtered: off keeps all rollouts.
    """
    if not 0 < weight <= 1:
        raise ValueError(f"weight={weight}: the share of the KL lies in (0, 1]")
    data = (PolicyGradient(One(), coef=1 - weight),) if weight < 1 else ()
    match = Match(BucketForwardKL(Support(k, "teacher")), coef=weight)
    filters = (DeltaIFD(0.0, tau),) if filtered else ()
    return Method((*data, match), rollouts=Snapshot(pool, epochs, (refresh,), drift), filters=filters)
