"""TrOPD: policy gradient where the teacher would accept the token, forward KL elsewhere.  arXiv:2606.01249."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from opd.losses.baselines import top
from opd.losses.divergences import kl
from opd.losses.rewards import One, Trusted
from opd.losses.shapes import Mask, OverVocabulary, PerPosition, PerToken
from opd.losses.terms import Match, PolicyGradient
from opd.methods.method import Method
from opd.methods.rollout_policies.on_policy import OnPolicy
from opd.methods.rollout_policies.teacher_prefix import TeacherPrefix


@dataclass(frozen=True)
class RawForwardKL:
    """sum q log(q/p) over the teacher's top k, not renormalised: not stationary where the models agree.  Eq. 3."""

    k: int = 64

    def __call__(self, student_logp: OverVocabulary, teacher_logp: OverVocabulary) -> PerPosition:
        ids = top(self.k, teacher_logp)
        return kl(teacher_logp.gather(-1, ids), student_logp.gather(-1, ids))


@dataclass(frozen=True)
class Outlier:
    """1 - min(q/p, 1) at the sampled token: the chance that the teacher rejects it.  Its mean is TV(p, q).  Eq. 6."""

    def __call__(self, student_logp: PerToken, teacher_logp: PerToken, mask: Mask) -> PerToken:
        return -(teacher_logp - student_logp).where(mask, math.inf).clamp(max=0).expm1()


@dataclass(frozen=True)
class Accepted:
    """Weight 1 if a random coin accepts the sampled token, which has probability min(q/p, 1); else 0.  Eq. 6."""

    def __call__(self, student_logp: PerToken, teacher_logp: PerToken, coin: PerToken, mask: Mask) -> PerToken:
        return (coin < 1 - Outlier()(student_logp, teacher_logp, mask)).to(student_logp.dtype)


@dataclass(frozen=True)
class Rejected:
    """Weight 1 - `Accepted`, computed from the same coin."""

    def __call__(self, student_logp: PerToken, teacher_logp: PerToken, coin: PerToken, mask: Mask) -> PerToken:
        return 1 - Accepted()(student_logp, teacher_logp, coin, mask)


@dataclass(frozen=True)
class StudentTokens:
    """Weight 1 on the tokens that the student generated, 0 on the teacher's prefix."""

    def __call__(self, prefix: Int[Tensor, " B"], mask: Mask) -> PerToken:
        return 1 - PrefixTokens()(prefix, mask)


@dataclass(frozen=True)
class PrefixTokens:
    """Weight 1 on the teacher's prefix, 0 on the tokens that the student generated.  Eq. 8."""

    def __call__(self, prefix: Int[Tensor, " B"], mask: Mask) -> PerToken:
        positions = torch.arange(mask.shape[1], device=mask.device)
        return (positions < prefix[:, None]).to(torch.get_default_dtype())


def tropd(
    k: int = 64, per_prompt: int = 4, soft: bool = False, prefix: bool = True, length: int = 0, beta: float = 0.001
) -> Method:
    """Log-ratio reward where the teacher accepts the token, forward KL elsewhere.  TrOPD, arXiv:2606.01249, Eq. 5-9.

    Args:
        k: Number of the teacher's most probable tokens in the forward KL, which is not renormalised.
        per_prompt: Number of rollouts per prompt.
        soft: Replace the acceptance coin by its mean, min(q/p, 1): same expected gradient, less noise.
        prefix: Let the teacher generate the first tokens of each response, fewer at each step.  Off: the student
            generates all tokens.
        length: Length in tokens of the longest prefix, at the first step.  0 means --max-new-tokens.
        beta: Weight of the negative log-likelihood of the prefix.
    """
    outlier, student_tokens = RawForwardKL(k), (StudentTokens(),) if prefix else ()
    coin = (
        PolicyGradient(weights=(Accepted(), *student_tokens)),
        Match(outlier, weights=(Rejected(), *student_tokens)),
    )
    mean = (PolicyGradient(Trusted(), weights=student_tokens), Match(outlier, weights=(Outlier(), *student_tokens)))
    guided = (PolicyGradient(One(), weights=(PrefixTokens(),), coef=beta),) if prefix else ()
    policy = TeacherPrefix(length, per_prompt) if prefix else OnPolicy(per_prompt)
    return Method((*(mean if soft else coin), *guided), rollouts=policy)
