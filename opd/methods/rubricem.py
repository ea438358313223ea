"""RubricEM: a judge's evolving rubrics reward stages of a response and reflections on it.  arXiv:2605.10899."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from opd.losses.advantages import group_centred
from opd.losses.divergences import ForwardKL
from opd.losses.rewards import One
from opd.losses.shapes import Mask, PerToken
from opd.losses.surrogates import Clipped
from opd.losses.target_distribution import Reference
from opd.losses.terms import Match, PolicyGradient
from opd.losses.token_weights import segment_means
from opd.methods.method import Method
from opd.methods.questions import REFLECT, REMEMBER, Reflect, Stages
from opd.methods.rollout_policies.on_policy import OnPolicy


@dataclass(frozen=True)
class StageScore:
    """x times a judge's score of the stage that contains the token, 0 without a score.  RubricEM, arXiv:2605.10899."""

    def __call__(
        self, x: PerToken, stage: Int[Tensor, "B T"], stage_scores: Float[Tensor, "B K"], mask: Mask
    ) -> PerToken:
        scores = stage_scores.to(x.dtype).nan_to_num(0.0)
        return x.where(mask, 0) * scores.gather(1, stage.where(mask, 1) - 1)


# Credit matrix.  Row k: how much the scores of plan, research, review and answer count for stage k.  RubricEM.
LAMBDA = ((1.0, 0.4, 0.6, 0.8), (0.0, 1.0, 0.4, 0.8), (0.0, 0.0, 1.0, 0.8), (0.0, 0.0, 0.0, 1.0))


@dataclass(frozen=True)
class StageReturn:
    """The group advantage of a stage's return, given to all tokens of the stage.  RubricEM, arXiv:2605.10899, SS-GRPO.

    G_k = sum_{j >= k} matrix_kj R_j, R_j the mean of x over the trained tokens of stage j, 0 without any.
    A_k = (G_k - mean) / (std + eps), over the rollouts of the group that have tokens of stage k.  x may be any reward.
    """

    matrix: tuple[tuple[float, ...], ...] = LAMBDA
    eps: float = 1e-6

    def __post_init__(self) -> None:
        k = len(self.matrix)
        if not k or any(len(row) != k for row in self.matrix):
            raise ValueError(f"matrix={self.matrix}: a row and a column for each stage")
        if any(x for i, row in enumerate(self.matrix) for x in row[:i]):
            raise ValueError(f"matrix={self.matrix}: 0 below the diagonal, for no stage earns what came before it")

    def __call__(self, x: PerToken, stage: Int[Tensor, "B T"], group: Int[Tensor, " B"], mask: Mask) -> PerToken:
        # In float64: a small deviation would amplify rounding differences between rows of equal returns.
        means, counts = segment_means(x.double(), stage, mask, len(self.matrix))
        returns = means[:, 1:] @ torch.tensor(self.matrix).double().T
        is_there = counts[:, 1:] > 0
        columns = zip(returns.unbind(1), is_there.unbind(1), strict=True)
        advantages = torch.stack([group_centred(x, group, among, self.eps) for x, among in columns], 1)
        return advantages.gather(1, stage.where(mask, 1) - 1).to(x.dtype).where(mask, 0)


TAGS = ("<structured_plan>", "<state_evaluation>", "<rubric_review>|<writing_plan>", "<answer>")


@dataclass(frozen=True)
class JudgedRollouts:
    """Filter that keeps the trained tokens of rollouts that a judge scored."""

    def __call__(self, judged: Bool[Tensor, " B"], mask: Mask) -> Mask:
        return mask & judged[:, None]


def rubricem(
    per_prompt: int = 8,
    beta: float = 0.001,
    clip: float = 0.2,
    tags: tuple[str, ...] = TAGS,
    returns: tuple[float, ...] = (),
    caps: tuple[int, ...] = (3, 2, 2, 3),
    references: int = 0,
    column: str = "rubric",
    questions: int = 4096,
    reflections: int = 8,
    reflect_temperature: float = 0.7,
    window: int = 3,
    reflect: str = REFLECT,
    remember: str = REMEMBER,
) -> Method:
    """Group advantage of each stage's return, from a judge's rubrics that evolve.  RubricEM, arXiv:2605.10899, SS-GRPO.

    --judge (empty: the teacher) compares a prompt's rollouts and writes criteria for each stage, in addition to the
    criteria kept from earlier.  It marks every rollout by all of them; the criteria whose marks vary least are dropped.
    A missing stage scores 0, and a stage is compared with the same stage of the rollouts that have it.
    The student also generates reflections on one rollout per prompt.  They are judged and trained on one step later.
    The best reflection is added to the prompt when the same question returns (matched by exact text; the paper also
    matches similar questions by embedding).  A reflection's reward is a single verdict; the paper's Algorithm 1
    averages two, within an episode and across episodes.  The KL term is the expected gradient of KL3: KL(reference ||
    student) over the whole vocabulary instead of the sampled token.  The paper does not give its clip range.

    Args:
        per_prompt: Number of rollouts per prompt.
        beta: Weight of the KL to the --reference (empty: the initial student).  0 turns it off.
        clip: Clip the ratio to the sampling policy to 1 +- clip.
        tags: Tags that open each stage, the answer's tag last.  a|b matches either tag.  The prompts must tell the
            student to write them: --preset paper sets a --system for the default tags.
        returns: Credit matrix, row by row: how much each later stage's score counts for a stage.  Empty is the paper's
            matrix for four stages.
        caps: Number of criteria kept for each stage.
        references: Number of teacher answers that the judge also compares.  The paper uses none.
        column: Prompt column with criteria for the answer that are never dropped.
        questions: Number of questions whose criteria and notes are remembered.
        reflections: Number of reflections on one rollout of each prompt.  0 turns them off.
        reflect_temperature: Sampling temperature of the reflections.
        window: Number of prompt batches that are repeated together, so that the notes are used.  0 repeats none.
        reflect: Template of the reflection request; contains {prompt} and {response}.
        remember: Template of a prompt with its note; contains {prompt} and {reflection}.
    """
    stages = len(tags)
    if returns and len(returns) != stages**2:
        raise ValueError(f"returns={returns}: {stages**2} numbers for {stages} stages, row by row")
    if not returns and stages != len(LAMBDA):
        raise ValueError(f"tags={tags}: the paper's returns are for {len(LAMBDA)} stages; give --returns, too")
    matrix = tuple(returns[i * stages : (i + 1) * stages] for i in range(stages)) if returns else LAMBDA
    reward = PolicyGradient(One(), transforms=(StageScore(), StageReturn(matrix)), surrogate=Clipped(clip, clip))
    anchor = (Match(ForwardKL(), coef=beta, against=Reference()),) if beta else ()
    reflection = Reflect(reflections, reflect_temperature, window, reflect, remember) if reflections else None
    return Method(
        (reward, *anchor),
        rollouts=OnPolicy(per_prompt),
        filters=(JudgedRollouts(),),
        asks=Stages(tags, caps, references, column, questions, reflection),
    )
