"""The command line of the benchmarks: `python -m benchmarks PART [flags]`."""

import sys

from benchmarks.command import PARTS, run_part
from opd.cli.parse import asks_for_help, parse_flags, suggestion
from opd.core.errors import Refusal


def main(arguments: list[str]) -> int:
    """Run one part; return its exit code, or 2 where the command line is wrong."""
    name, *flags = arguments or ["--help"]
    if asks_for_help([name]):
        print("usage: python -m benchmarks PART [flags]\n")
        print("\n".join(f"  {name:13} {part.about}" for name, part in PARTS.items()))
        return 0
    try:
        if name not in PARTS:
            raise Refusal(f"{name}: no part of the benchmark{suggestion(name, PARTS)}; there are {', '.join(PARTS)}")
        part = PARTS[name]
        return run_part(
            parse_flags(part.settings(), flags, prog=f"python -m benchmarks {name}", description=part.about)
        )
    except Refusal as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
