"""RubricEM: a judge's evolving rubrics pay each stage of a response, and the student's reflections on it.

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
    """The trained tokens of the rollouts that a judge scored."""

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

    --judge (empty: the teacher) contrasts a prompt's rollouts and writes criteria for each stage, beside those it kept;
    it marks every rollout by them, and those whose marks vary least go.  Of one rollout a prompt the student writes
    reflections: judged, trained on one step later, the best read again with the same question (by its exact text; the
    paper also looks for like questions by embedding).  One verdict is a reflection's worth; the paper's Algorithm 1
    takes the mean of two, within an episode and across episodes.  The KL is that of KL3's expected gradient,
    KL(reference || student), over the whole vocabulary instead of the sampled token.  The clip's width is not
    published.

    Args:
        per_prompt: rollouts of a prompt.
        beta: weight of the KL to the --reference (empty: the student as it was); 0 is none.
        clip: the ratio to the sampling policy is clipped to 1 +- clip.
        tags: what opens each stage, the answer's last; a|b is either.
        returns: what each later stage's score is worth to a stage, row by row of the matrix; empty is the paper's, for
            four stages.
        caps: criteria kept of each stage.
        references: answers of the teacher that the judge contrasts, too; the paper has none.
        column: column of the prompts with criteria of the answer that stay.
        questions: questions whose criteria and notes are remembered.
        reflections: reflections on one rollout of each prompt; 0 is none.
        reflect_temperature: sampling temperature of the reflections.
        window: batches of prompts that come, and then come again; 0: none comes again for the notes' sake.
        reflect: how a reflection is asked for, with {prompt} and {response} in it.
        remember: how a prompt is written with its note, with {prompt} and {reflection} in it.
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
