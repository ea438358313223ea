"""The process of a check: `python -m benchmarks.gpu MODULE:FUNCTION [cpu]` prints its rows as the last line."""

import json
import sys
from importlib import import_module

from benchmarks.gpu.check import RESULT, CheckRow, NotRun


def answer(function: str, *, cpu: bool) -> list[CheckRow]:
    """Call a check and return its rows."""
    module, _, name = function.partition(":")
    try:
        return list(getattr(import_module(module), name)(cpu))
    except NotRun as reason:
        return [CheckRow(name, status="not run", what=str(reason))]


if __name__ == "__main__":
    found = answer(sys.argv[1], cpu="cpu" in sys.argv[2:])
    print(f"\n{RESULT}{json.dumps([vars(row) for row in found])}")
