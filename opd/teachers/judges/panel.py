"""The text-only teachers and the judge of a run (`Panel`), and the text of a rollout that they read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.core.types import Rollout
from opd.data import prompts
from opd.data.verifiers.extract import without_thinking
from opd.teachers.text.text_teacher import Gate, How, TextTeacher

if TYPE_CHECKING:
    from opd.teachers.judges.rubric_judge import Judge
    from opd.teachers.judges.stage_judge import StageJudge


@dataclass(frozen=True)
class Panel:
    """The text-only teachers and the judge of a run, with their settings.  It does not change between steps."""

    teachers: Mapping[str, TextTeacher]  # by the name of --route; "" is --teacher
    judge: "Judge | StageJudge | None"  # for methods that need one
    gate: Gate  # failure limit of the judge, counted over groups, rollouts or reflections
    tokenizer: Tokenizer  # the student's
    most: int  # longest answer of a teacher, in tokens
    seed: int

    def references(self, own: Mapping[int, Rollout], count: int, temperature: float) -> dict[int, list[str]]:
        """Return `count` answers of the teacher for each group, by group; an empty list where the teacher failed.

        `own` has one rollout of each group.
        """
        out: dict[int, list[str]] = {key: [] for key in own}
        how = How(count, self.most, temperature, "--max-new-tokens")
        for name, teacher in self.teachers.items() if count else ():
            here = [key for key, r in own.items() if r.teacher == name]
            found = teacher.chat([own[key].prompt for key in here], how, self.seed)
            out |= dict(zip(here, found, strict=True))
        return out

    def part(self, rollout: Rollout, start: int, end: int) -> str:
        """Return the text of the response tokens [start, end)."""
        return prompts.continuation_text(
            self.tokenizer, (*rollout.prompt_ids, *rollout.ids[:start]), rollout.ids[start:end]
        )

    def whole(self, rollout: Rollout) -> str:
        """Return the text of a response after its reasoning (`</think>`)."""
        return without_thinking(self.part(rollout, 0, len(rollout.ids)))
