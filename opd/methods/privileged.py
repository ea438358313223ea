"""Self-distillation: the student's weights act as a teacher that sees additional context."""

from dataclasses import dataclass

from opd.losses.divergences import JSD, BucketForwardKL, BucketJSD, BucketKL, Divergence, ReverseKL, Support
from opd.losses.shapes import OverVocabulary, PerPosition
from opd.losses.terms import Match
from opd.methods.method import Method, Privileged
from opd.methods.rollout_policies.on_policy import OnPolicy

# Teacher prompts as published: OPSD, siyan-zhao/OPSD, data_collator.py (without --reason_first); SDFT,
# idanshen/Self-Distillation, main.py; SDPO, lasgroup/SDPO, verl/trainer/config/actor/actor.yaml (without feedback).
OPSD = (
    "{prompt}\n\nHere is a reference solution to this problem:\n{context}\n\n\nAfter understanding the reference "
    "solution and the rationale behind each step, now articulate your own step-by-step reasoning that derives the same "
    "final answer to the problem below:\n\nPlease reason step by step, and put your final answer within \\boxed{}."
)
SDFT = (
    "\n{prompt}\n\nThis is an example for a response to the question:\n{context}\n\n"
    "Now answer with a response of your own, including the thinking process.\n"
)
SDPO = "{prompt}\nCorrect solution:\n\n{context}\n\nCorrectly solve the original question."


@dataclass(frozen=True)
class ClippedForwardKL:
    """sum_v min(q log(q/p), bound), which limits each token's share.  OPSD, arXiv:2601.18734, official code."""

    bound: float = 0.05

    def __post_init__(self) -> None:
        if not self.bound > 0:
            raise ValueError(f"bound={self.bound}: the clip of one token's share of the KL is above 0")

    def __call__(self, student_logp: OverVocabulary, teacher_logp: OverVocabulary) -> PerPosition:
        q = teacher_logp.exp()
        return (q * (teacher_logp - student_logp).where(q > 0, 0)).clamp(max=self.bound).sum(-1)


def opsd(beta: float = 0.5, clip: float = 0.0) -> Method:
    """Self-distillation: the student with the solution in its context is the teacher.  OPSD, arXiv:2601.18734.

    The released runs use --teacher base, the weights before training.  The teacher's prompt is the released one, which
    asks for the answer in a box; --context-template replaces it.

    Args:
        beta: The teacher's share of the Jensen-Shannon mixture, inside (0, 1).
        clip: If above 0, use the forward KL and bound each vocabulary entry's share of it by this (official code:
            0.05).
    """
    divergence: Divergence = ClippedForwardKL(clip) if clip else JSD(beta)
    return Method((Match(divergence),), teacher=Privileged("self", "response", OPSD))


def sdft() -> Method:
    """Reverse KL to the base model (or --teacher ema:RATE) with a demonstration in context.  SDFT, arXiv:2601.19897."""
    return Method((Match(ReverseKL()),), teacher=Privileged("base", "response", SDFT))


def sdpo(k: int = 100, beta: float = 0.5, per_prompt: int = 8) -> Method:
    """Self-distillation from the averaged student, which sees a correct answer of the group.  SDPO, arXiv:2601.20802.

    The defaults follow the released configuration: a moving average of rate 0.05, and the answer without its thinking
    part.  The authors' runs on code use --k 20 --beta 1 --teacher ema:0.01 and add the verifier's feedback on each
    attempt to the context.  That feedback is not available here: --context COLUMN is the same for all attempts at a
    prompt.  The released clip of p / p_old is left out, because the ratio is 1 with one update per batch.  A rollout is
    not trained on if its group has no other correct rollout.

    Args:
        k: Number of the student's most probable tokens in the divergence.  The remaining tokens form one bucket.
        beta: The teacher's share of the Jensen-Shannon mixture.  1 is the reverse KL, 0 the forward KL.
        per_prompt: Number of rollouts per prompt.
    """
    support = Support(k, "student")
    ends: dict[float, Divergence] = {0.0: BucketForwardKL(support), 1.0: BucketKL(support)}
    term = Match(ends[beta] if beta in ends else BucketJSD(support, beta))
    return Method((term,), rollouts=OnPolicy(per_prompt), teacher=Privileged("ema:0.05", "peer", SDPO))
