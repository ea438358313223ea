"""Who is asked in a run: `Panel`, the same in every step; and what of a rollout they read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase as Tokenizer

from opd import prompts
from opd.tasks.answers import spoken
from opd.teachers.text import Gate, How, TextTeacher
from opd.types import Rollout

if TYPE_CHECKING:
    from opd.teachers.judge import Judge
    from opd.teachers.stages import StageJudge


@dataclass(frozen=True)
class Panel:
    """Who is asked in a run, and how: the same in every step."""

    teachers: Mapping[str, TextTeacher]  # by the names of --route; "" is --teacher
    judge: "Judge | StageJudge | None"  # for the methods that ask one
    gate: Gate  # of what a judge is asked for: groups, rollouts, reflections
    tokenizer: Tokenizer  # the student's
    most: int  # tokens of a teacher's longest answer
    seed: int

    def references(self, own: Mapping[int, Rollout], count: int, temperature: float) -> dict[int, list[str]]:
        """The answers of the teacher of each group, by the group; none where it failed."""
        out: dict[int, list[str]] = {key: [] for key in own}
        how = How(count, self.most, temperature, "--max-new-tokens")
        for name, teacher in self.teachers.items() if count else ():
            here = [key for key, r in own.items() if r.teacher == name]
            found = teacher.chat([own[key].prompt for key in here], how, self.seed)
            out |= dict(zip(here, found, strict=True))
        return out

    def part(self, rollout: Rollout, start: int, end: int) -> str:
        """A part of a response as a reader sees it."""
        return prompts.after(self.tokenizer, (*rollout.prompt_ids, *rollout.ids[:start]), rollout.ids[start:end])

    def whole(self, rollout: Rollout) -> str:
        """A response after its thinking."""
        return spoken(self.part(rollout, 0, len(rollout.ids)))
