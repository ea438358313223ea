"""Requests to a language model that judges: escaped texts in the prompt, and a JSON form as the answer.

A form is a pydantic class.  Its docstrings are part of the JSON schema that is sent, so they must not change.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from opd.core.sampling import Prompt
from opd.data.verifiers.extract import without_thinking
from opd.teachers.judges.judge_prompts import filled
from opd.teachers.text.text_models import Failure, TextRequest, TextSampling
from opd.teachers.text.text_teacher import TextTeacher

F = TypeVar("F", bound=BaseModel)
ANSWER_CHARACTERS = 1_000_000  # longest answer that is parsed; forms have some thousands
AGAIN = "That was not as asked ({why}). Return the one json object and nothing else."
_TAG = re.compile(
    r"<(?=/|(reference|answer|stage)\s+number\b|(question|rubric|criteria|attempt|reflection)\b)", re.IGNORECASE
)


@dataclass(frozen=True)
class ListBounds:
    """Constraints on a list in a form: its length, and the values of one field of its items.

    The list has `shortest` to `longest` items.  The first items have the given `values` of `field`, in order.  In each
    later item the field has one of `later_values`, if any are given.
    """

    shortest: int
    longest: int
    field: str = ""
    values: tuple[int, ...] = ()
    later_values: tuple[int, ...] = ()


Bounds = Mapping[str, ListBounds]  # by the name of the list's field in the form


def schema(form: type[BaseModel], bounds: Bounds) -> str:
    """Return the JSON schema of a form, without additional properties and with constraints on its lists.

    Servers and engines with constrained decoding use it.  `parse` validates every answer again.
    """
    root = form.model_json_schema()
    definitions = root.get("$defs", {})
    for part in (*definitions.values(), root):
        part["additionalProperties"] = False
        for name in part["properties"].keys() & bounds.keys():
            field, bound = part["properties"][name], bounds[name]
            field |= {"minItems": bound.shortest, "maxItems": bound.longest}
            if bound.field:
                item = definitions[field["items"]["$ref"].rpartition("/")[2]]
                field["prefixItems"] = [_with(item, bound.field, {"const": value}) for value in bound.values]
                if bound.later_values:
                    field["items"] = _with(item, bound.field, {"enum": list(bound.later_values)})
    return json.dumps(root)


def _with(item: dict, name: str, value: object) -> dict:
    return {**item, "properties": {**item["properties"], name: value}}


@dataclass(frozen=True)
class FormModel:
    """A language model that fills in forms.  If an answer is not valid, it gets the reason and a second try."""

    model: TextTeacher
    max_tokens: int
    schemas: bool = False  # whether decoding is constrained to the form's JSON schema
    prompts: Mapping[str, str] = field(default_factory=dict)  # the user's, by name, in the place of embedded ones

    def request(self, name: str, embedded: str, **values: object) -> str:
        """Return a request: the user's prompt of that name, or the embedded one, with the values in their places."""
        return filled(self.prompts[name], values) if name in self.prompts else embedded.format(**values)

    def fill(
        self,
        requests: Sequence[str],
        form: type[F],
        check: Callable[[int, F], str],
        seed: int,
        *,
        temperature: float,
        bounds: Callable[[int], Bounds] = lambda i: {},
    ) -> list[F | Failure]:
        """Return the filled forms.  An answer that is not valid is requested once more.

        `check(i, form)` returns an error message, or an empty string if form i is right.  `bounds(i)` constrains the
        lists in the schema of form i.
        """
        schemas = [schema(form, bounds(i)) if self.schemas else "" for i in range(len(requests))]
        sampling = TextSampling(1, self.max_tokens, temperature, "--judge-tokens")
        turns: list[tuple[dict[str, str], ...]] = [({"role": "user", "content": text},) for text in requests]
        rejected: list[list[TextRequest]] = [[] for _ in requests]
        results: list[F | Failure] = [Failure("no answer") for _ in requests]
        for _ in range(2):
            open_requests = [i for i, result in enumerate(results) if isinstance(result, Failure)]
            questions = [TextRequest(Prompt(messages=turns[i]), schema=schemas[i]) for i in open_requests]
            answers = self.model.texts(questions, sampling, seed)
            for i, question, texts in zip(open_requests, questions, answers, strict=True):
                if not texts:
                    continue
                filled, reason = parse(texts[0], form, partial(check, i))
                results[i] = Failure(reason) if filled is None else filled
                if filled is None:
                    rejected[i].append(question)
                    again = {"role": "user", "content": AGAIN.format(why=reason)}
                    turns[i] = (*turns[i], {"role": "assistant", "content": texts[0]}, again)
        # Rejected answers leave the cache, so that a later run requests them from a repaired judge.
        failed = [i for i, result in enumerate(results) if isinstance(result, Failure)]
        self.model.forget([question for i in failed for question in rejected[i]], sampling, seed)
        return results

    def traffic(self) -> dict[str, float]:
        """Return the counters since the last call, under the names judge_*."""
        return {f"judge_{name.removeprefix('teacher_')}": x for name, x in self.model.traffic().items()}


def parse(text: str, form: type[F], check: Callable[[F], str]) -> tuple[F | None, str]:
    """Parse the form in a model's answer: return (form, ""), or (None, reason).

    Text and code fences around the json object are ignored, and so are commas before a closing bracket.
    """
    if len(text) > ANSWER_CHARACTERS:
        return None, f"{len(text)} characters"
    text = without_thinking(text)
    start, end = text.find("{"), text.rfind("}")
    if not 0 <= start < end:
        return None, "no json object"
    try:
        filled = form.model_validate_json(re.sub(r",(\s*[}\]])", r"\1", text[start : end + 1]))
    except ValidationError as error:
        first = error.errors()[0]
        return None, f"{'.'.join(map(str, first['loc'])) or 'json'}: {first['msg']}"
    reason = check(filled)
    return (None, reason) if reason else (filled, "")


def question_text(prompt: Prompt) -> str:
    """Return a prompt as the judge reads it: a single user turn without its role, else all turns with their roles.

    A turn ends with its tool calls, each as a line of JSON.
    """
    if not prompt.messages:
        return prompt.text
    first = prompt.messages[0]
    if len(prompt.messages) == 1 and first["role"] == "user":
        return first["content"]
    return "\n\n".join(f"{turn['role']}: {_turn_text(turn)}" for turn in prompt.messages)


def _turn_text(turn: Mapping[str, Any]) -> str:
    calls = [call.get("function", call) for call in turn.get("tool_calls") or ()]
    return "\n".join(filter(None, [turn["content"], *(json.dumps(call, ensure_ascii=False) for call in calls)]))


def escaped(text: str) -> str:
    """Escape a text: no closing tag remains, and no opening tag of those that a prompt of a judge uses."""
    return _TAG.sub("< ", text)


def one_line(text: str) -> str:
    """Return a criterion as one escaped line: a judge may quote an answer in it, and the answer may hold tags."""
    return " ".join(escaped(text).splitlines())


def tagged(name: str, escaped_texts: Iterable[str]) -> str:
    """Return texts, which are escaped so that none can open or close a tag, between numbered tags."""
    return "\n".join(f'<{name} number="{i}">\n{text}\n</{name}>' for i, text in enumerate(escaped_texts, 1))
