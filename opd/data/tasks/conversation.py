"""Conversations in a row, `parse_turns(value) -> turns`: chat messages and ShareGPT turns, with all their content."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from opd.core import json_text

Turn = Mapping[str, Any]
# Names of roles in ShareGPT data, with the role that chat templates know.
SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
_KEYS = tuple(re.compile(rf"""["']({names})["']\s*:""") for names in ("role|from", "content|value"))
FORM = 'is neither text nor a list of {"role": ..., "content": text}'


class Unusable(ValueError):
    """The reason why a value of a row is no conversation."""


def parse_turns(value: object) -> str | tuple[Turn, ...]:
    """Return a question: text, or chat turns with text in "content" and every other key that they have.

    The keys reach the chat template: tool_calls, tool_call_id, name, reasoning_content.  Turns may be text (JSON, or
    what Python prints), may be ShareGPT's from/value, and may have their content in text parts, which are joined.
    Raises Unusable with the turn.
    """
    if isinstance(value, str):
        turns = _turns_in(value)
        return value if turns is None else parse_turns(turns)
    if not isinstance(value, list | tuple):
        raise Unusable(f"{str(value)[:80]!r} {FORM}")
    return tuple(_turn(turn, i) for i, turn in enumerate(value))


def split_reply(turns: Sequence[Turn]) -> tuple[tuple[Turn, ...], Turn]:
    """Return the turns without a closing assistant turn, and that turn or an empty one."""
    if turns and turns[-1]["role"] == "assistant":
        return tuple(turns[:-1]), turns[-1]
    return tuple(turns), {"role": "assistant", "content": ""}


def without_nulls(value: Any) -> Any:
    """Return a nested value without its empty fields: a table gives each of its structs the fields of all of them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def parsed(text: str) -> Any:
    """Return the list or mapping that a text contains as JSON or as Python prints it; None for any other text."""
    if not (text.lstrip()[:1] in ("[", "{") and text.rstrip()[-1:] in ("]", "}")):
        return None
    for parse in (json_text.parse, ast.literal_eval):
        try:
            value = parse(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return value if isinstance(value, list | dict) else None
    return None


def _turns_in(text: str) -> list[Any] | None:
    """Return the turns that a text contains, or None for any other text.  Raises Unusable for turns with an error."""
    value = parsed(text)
    turns = [value] if isinstance(value, dict) else value
    if turns:
        keys = [turn.keys() if isinstance(turn, dict) else () for turn in turns]
        return turns if all({"role", "content"} <= {*k} or {"from", "value"} <= {*k} for k in keys) else None
    opening = re.match(r"\s*\[?\s*\{", text) and text.rstrip()[-1] in "]}"
    if value is None and opening and all(key.search(text) for key in _KEYS):
        raise Unusable(f"{text[:80]!r} looks like chat turns, and is neither JSON nor what Python prints")
    return None


def _turn(turn: object, i: int) -> Turn:
    if not isinstance(turn, Mapping):
        raise Unusable(f"turn {i}, {str(turn)[:80]!r}, {FORM}")
    fields = {key: value for key, value in turn.items() if value is not None}
    role = fields.pop("role", None) or fields.pop("from", None)
    content = fields.pop("content") if "content" in fields else fields.pop("value", None)
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise Unusable(
            f"turn {i} has the role {role!r}, and its keys are {', '.join(map(str, turn))}; the roles are "
            f"{', '.join((*ROLES, *SHAREGPT))}"
        )
    if fields.get("tool_calls"):
        fields["tool_calls"] = _tool_calls(fields["tool_calls"], i)
    if content is None and not fields.get("tool_calls"):
        raise Unusable(f"turn {i} ({role}) has no text content, and its keys are {', '.join(map(str, turn))}")
    return {"role": role, "content": _content(content, i), **fields}


def _tool_calls(calls: object, i: int) -> list[Mapping[str, Any]]:
    """Return the tool calls of a turn, which may be JSON text, as mappings with the name of a function."""
    calls = parsed(calls) if isinstance(calls, str) else calls
    listed: list[Any] = calls if isinstance(calls, list) else [None]
    functions = [call.get("function", call) if isinstance(call, Mapping) else None for call in listed]
    if any(not isinstance(f, Mapping) or "name" not in f for f in functions):
        raise Unusable(
            f'turn {i} has the tool_calls {str(calls)[:80]!r}, and not a list of {{"function": {{"name", ...}}}}'
        )
    return listed


def _content(content: object, i: int) -> str:
    """Return the text of a turn; text parts are joined as multimodal chat templates join them."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise Unusable(f"turn {i} has the content {str(content)[:80]!r}, which is not text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type") or "text" if isinstance(part, Mapping) else "text"
        if kind != "text" or not isinstance(text, str):
            kinds = kind if kind != "text" else f"text ({str(part)[:60]!r})"
            raise Unusable(f"turn {i} has a part of type {kinds}, and only text parts are supported; remove such rows")
        texts.append(text)
    return "".join(texts)
