"""RubricEM: a judge's evolving rubrics reward each stage of a response and the student's reflections on it.

arXiv:2605.10899.
"""

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from opd.against import Reference
from opd.divergences import ForwardKL
from opd.judged import LAMBDA, StageReturn, StageScore
from opd.method import Match, Method, PolicyGradient
from opd.questions import REFLECT, REMEMBER, Reflect, Stages
from opd.rewards import One
from opd.rollouts import OnPolicy
from opd.surrogates import Clipped

TAGS = ("<structured_plan>", "<state_evaluation>", "<rubric_review>|<writing_plan>", "<answer>")


@dataclass(frozen=True)
class JudgedRollouts:
    """Filter that keeps the trained tokens of rollouts that a judge scored."""

    def __call__(self, judged: Bool[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
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
    The student also generates reflections on one rollout per prompt.  They are judged and trained on one step later.
    The best reflection is added to the prompt when the same question returns (matched by exact text; the paper also
    matches similar questions by embedding).  A reflection's reward is a single verdict; the paper's Algorithm 1
    averages two, within an episode and across episodes.  The KL term is the expected gradient of KL3: KL(reference ||
    student) over the whole vocabulary instead of the sampled token.  The paper does not give its clip range.

    Args:
        per_prompt: Number of rollouts per prompt.
        beta: Weight of the KL to the --reference (empty: the initial student).  0 turns it off.
        clip: Clip the ratio to the sampling policy to 1 +- clip.
        tags: Tags that open each stage, the answer's tag last.  a|b matches either tag.
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
    paid = PolicyGradient(One(), transforms=(StageScore(), StageReturn(matrix)), surrogate=Clipped(clip, clip))
    near = (Match(ForwardKL(), coef=beta, against=Reference()),) if beta else ()
    again = Reflect(reflections, reflect_temperature, window, reflect, remember) if reflections else None
    return Method(
        (paid, *near),
        rollouts=OnPolicy(per_prompt),
        filters=(JudgedRollouts(),),
        asks=Stages(tags, caps, references, column, questions, again),
    )
