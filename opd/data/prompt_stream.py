"""The prompt stream of a run: shuffled prompts as token ids for each model, with its chat template and context."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase as Tokenizer

from opd.config.plan import Plan
from opd.core.errors import Refusal, suggestion
from opd.core.sampling import Prompt
from opd.core.types import RIGHT, Rollout
from opd.data import prompts
from opd.data.prompts import Rendered, short
from opd.data.tasks.answers import value_text
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
    optional: bool = False  # True: held-out prompts, whose rows may lack --context and be of some routes only

    @property
    def source(self) -> str:
        """The flag that names these prompts with its value, for messages."""
        config = self.plan.config
        return f"--eval-prompts {config.eval_prompts}" if self.optional else f"--prompts {config.prompts}"

    def batch(self, step: int, count: int) -> list[Rendered]:
        """Return the prompts of a step, a pure function of (seed, step); each epoch is a new shuffled pass."""
        n, first = len(self.task.prompts), (step - 1) * count
        return [self.render(self._order(i // n)[i % n]) for i in range(first, first + count)]

    def check(self, count: int = 256) -> None:
        """Refuse prompts that are too long, not repeatable or without a teacher, before the run starts.

        It renders the `count` longest rows; with --context, those whose prompt and context together are longest.
        """
        self._check_routes()
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
                    f"{self.source}: the chat template renders row {row} differently each time, so no "
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
        route = self._route(prompt)
        teacher = route if route in self.teacher_tokenizers else ""
        context = "" if self.plan.context in ("", "peer") else self._context(row)
        teacher_ids = self.teacher_ids(prompt, teacher, context) if context or config.teacher_prompt == "own" else ids
        longest = max(len(ids), len(teacher_ids))
        if longest > self.room:
            raise Refusal(
                f"{self.source}: row {row} ({short(prompt.question())}) has {longest} tokens, and the models' context "
                f"of {self.context} leaves {self.room} for a prompt beside {config.sampling.max_new_tokens} new "
                "tokens; shorten the row, or lower --max-new-tokens"
            )
        return Rendered(prompt, ids, teacher_ids, teacher)

    @cached_property
    def route_counts(self) -> Counter[str]:
        """The number of rows with each value in --route-column; of a generator, among its first rows."""
        rows = self.task.prompts
        known = rows[:256] if isinstance(rows, LazyPrompts) and not rows.lengths else rows
        return Counter(map(self._route, known))

    def _route(self, prompt: Prompt) -> str:
        """Return the value of a prompt in --route-column; "" if it is missing."""
        return value_text(prompt.columns.get(self.plan.config.route_column))

    def _check_routes(self) -> None:
        """Refuse a --route that no training prompt has, and, without --teacher, a prompt without a route."""
        config, columns = self.plan.config, self.task.prompts[0].columns
        if not config.route:
            return
        counts, column = self.route_counts, config.route_column
        place = f"--route-column {column}"
        if column not in columns and not self.optional:
            there = f"{suggestion(column, columns)}; there are {', '.join(columns) or 'none'}"
            raise Refusal(f"{place}: {self.source} has no such column beside prompt and answer{there}")
        listed = ", ".join(map(repr, sorted(filter(None, counts))[:20])) or "nothing"
        for name in filter(None, self.teacher_tokenizers):
            if name not in counts and not self.optional:
                raise Refusal(
                    f"--route {name}: no row of {self.source} has that name in {place}"
                    f"{suggestion(name, counts)}; the column has {listed}; correct the name, or leave the route out"
                )
        others = {value: count for value, count in counts.items() if value not in self.teacher_tokenizers}
        if others and "" not in self.teacher_tokenizers:
            value = max(others, key=lambda name: others[name])
            what = f"{value!r} there, and no --route has that name" if value else "nothing there"
            raise Refusal(
                f"{place}: {others[value]} of {counts.total()} rows of {self.source} have {what}"
                f"{suggestion(value, self.teacher_tokenizers)}; add --route {value or 'NAME'}=MODEL, or --teacher "
                "MODEL for all prompts without a route"
            )

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
