"""JSON that came from a file or a server, `parse(text)`: whatever is wrong with it is a ValueError."""

import json
import re
from collections.abc import Callable
from typing import Any

HALF = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
DEEPEST = 64  # lists and objects inside one another: recursive readers, some of them in C, cannot overflow the stack
TOO_DEEP = f"it is nested more than {DEEPEST} deep"


def parse(text: str | bytes, *, parse_float: Callable[[str], Any] = float) -> Any:
    """Parse JSON.  Raises ValueError for text that is not JSON, is nested more than DEEPEST deep, or has surrogates."""
    text = text.decode() if isinstance(text, bytes) else text
    try:
        value = json.loads(text, parse_float=parse_float)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    check(value, text)
    return value


def check(value: object, text: str) -> None:
    """Raise ValueError for a value, parsed from a text, that is nested too deep or has surrogates."""
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise ValueError(TOO_DEEP)
    if HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it has half of a pair of surrogates, which is no character") from error


def _depth(value: object) -> int:
    """Return how many lists and objects lie inside one another."""
    depth, level = 0, [value]
    while level := [x for x in level if isinstance(x, list | dict)]:
        depth += 1
        level = [child for x in level for child in (x.values() if isinstance(x, dict) else x)]
    return depth
