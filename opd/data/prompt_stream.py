"""The prompt stream of a run: shuffled prompts as token ids for each model, with its chat template and context."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.config.plan import Plan
from opd.core.errors import Refusal
from opd.core.sampling import Prompt
from opd.core.types import RIGHT, Rollout
from opd.data import prompts
from opd.data.prompts import Rendered
from opd.data.tasks.task import LazyPrompts, Task
from opd.data.verifiers.extract import without_thinking


@dataclass(frozen=True)
class Prompts:
    """The prompts of a task, rendered for the student and its teachers."""

    task: Task
    tokenizer: Tokenizer
    teacher_tokenizers: Mapping[str, Tokenizer]  # by route name; "" is --teacher
    plan: Plan
    room: int  # longest prompt in tokens that leaves space for the longest response
    context: str  # the models' context, for messages
    optional: bool = False  # True: a row without --context is used without it; False: it is refused

    def batch(self, step: int, count: int) -> list[Rendered]:
        """Return the prompts of a step, a pure function of (seed, step); each epoch is a new shuffled pass."""
        n, first = len(self.task.prompts), (step - 1) * count
        return [self.render(self._order(i // n)[i % n]) for i in range(first, first + count)]

    def check(self, count: int = 256) -> None:
        """Refuse prompts that are too long or not repeatable, before the run starts; checks the `count` longest rows.

        With --context, these are the rows whose prompt and context together are longest.
        """
        task_prompts = self.task.prompts
        rows = range(len(task_prompts))
        if isinstance(task_prompts, LazyPrompts) and not task_prompts.lengths:
            rows = rows[:count]  # prompts of a generator have similar lengths: check the first rows
            lengths: Sequence[int] = [0] * len(rows)
        elif isinstance(task_prompts, LazyPrompts):
            lengths = task_prompts.lengths
        else:
            lengths = [len(f"{p.text}{p.messages}".encode()) for p in task_prompts]
        if self.plan.context not in ("", "peer"):
            lengths = [lengths[i] + len(self._context(i).encode()) for i in rows]
        for row in sorted(rows, key=lambda i: -lengths[i])[:count]:
            if self.render(row) != self.render(row):
                raise Refusal(
                    f"--prompts {self.task.name}: the chat template renders row {row} differently each time, so no "
                    "run could be repeated or resumed; set another chat_template"
                )

    def first(self, count: int) -> list[Rendered]:
        """Return the first `count` prompts, unshuffled."""
        return [self.render(i) for i in range(min(count, len(self.task.prompts)))]

    def _order(self, epoch: int) -> Sequence[int]:
        n = len(self.task.prompts)
        if n > 1 << 24:  # procedural streams of this size need no second epoch, and their order is already random
            return range(n)
        return np.random.default_rng([self.plan.config.seed, epoch]).permutation(n).tolist()

    def render(self, row: int) -> Rendered:
        """Return a prompt with its token ids for student and teacher.  Raises Refusal if it is too long."""
        prompt, config = self.task.prompts[row], self.plan.config
        ids = self.student_ids(prompt)
        route = str(prompt.columns.get(config.route_column, ""))
        teacher = route if route in self.teacher_tokenizers else ""
        context = "" if self.plan.context in ("", "peer") else self._context(row)
        teacher_ids = self.teacher_ids(prompt, teacher, context) if context or config.teacher_prompt == "own" else ids
        longest = max(len(ids), len(teacher_ids))
        if longest > self.room:
            raise Refusal(
                f"--prompts {self.task.name}: row {row} has {longest} tokens, and the models' context of "
                f"{self.context} leaves {self.room} for a prompt beside {config.sampling.max_new_tokens} new tokens; "
                "shorten the row, or lower --max-new-tokens"
            )
        return Rendered(prompt, ids, teacher_ids, teacher)

    def student_ids(self, prompt: Prompt) -> tuple[int, ...]:
        arguments = prompts.parse_template_arguments(self.plan.config.data.template_args)
        return prompts.render(self.tokenizer, prompt, chat_template_kwargs=arguments)

    def teacher_ids(self, prompt: Prompt, teacher: str, context: str) -> tuple[int, ...]:
        """Return the prompt's token ids for a teacher: its chat template, with the privileged context if not empty."""
        tokenizer = self.teacher_tokenizers[teacher]
        if context:
            prompt = prompts.fill_template(prompt, self.plan.context_template, context=context)
        arguments = prompts.used_arguments(
            tokenizer, prompts.parse_template_arguments(self.plan.config.data.template_args)
        )
        return prompts.render(tokenizer, prompt, chat_template_kwargs=arguments)

    def _context(self, row: int) -> str:
        prompt, name = self.task.prompts[row], self.plan.context
        values_by_name = {"response": prompt.response, "answer": prompt.answer, **prompt.columns}
        text = str(values_by_name.get(name) or "")
        if not text and not self.optional:
            available = ", ".join(sorted(k for k, v in values_by_name.items() if v))
            raise Refusal(
                f"--context {name}: row {row} of {self.task.name} has nothing there; it has {available or 'no columns'}"
            )
        return text

    def with_peers(self, rollouts: Sequence[Rollout], texts: Sequence[str]) -> list[Rollout]:
        """Give each teacher prompt a correct response to the same prompt as context.  SDPO, arXiv:2601.20802.

        It is the next correct response of the group, never the rollout's own response, and without its thinking.  If
        no such response fits, the rollout is masked and does not train.
        """
        correct_by_group: dict[int, list[int]] = {}
        for i, r in enumerate(rollouts):
            if r.outcome > RIGHT:
                correct_by_group.setdefault(r.group, []).append(i)
        out = []
        for i, r in enumerate(rollouts):
            peers = [j for j in correct_by_group.get(r.group, []) if j != i]
            peer = next((j for j in peers if j > i), peers[0] if peers else None)
            context = "" if peer is None else without_thinking(texts[peer])
            ids = self.teacher_ids(r.prompt, r.teacher, context) if context else ()
            if ids and len(ids) <= self.room:
                out.append(replace(r, teacher_prompt_ids=ids))
            else:
                out.append(replace(r, mask=(False,) * len(r.ids)))
        return out
