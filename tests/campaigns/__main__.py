"""Run campaigns and print a table of what was tried, survived, refused and lost: `python -m tests.campaigns --help`."""

import argparse
import datetime
import importlib
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

CAMPAIGNS = {  # module -> attempts of `make soak`, and of the short version; 8640 is a day at a request every 10 s
    "kills": (300, 6),
    "two_trainers": (20, 2),
    "damaged_checkpoints": (300, 8),
    "damaged_reads": (300, 30),
    "damaged_answers": (300, 36),
    "full_disks": (60, 3),
    "prompt_files": (500, 30),
    "hostile_folders": (60, 4),
    "command_lines": (5000, 100),
    "serve": (500, 40),
    "serve_replay": (8640, 200),
    "numbers": (400, 6),
}


def main() -> int:
    """Run the campaigns; return 1 if any attempt was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"campaigns, of {', '.join(CAMPAIGNS)}; default: all")
    parser.add_argument("--short", action="store_true", help="few attempts of each")
    parser.add_argument("--count", type=int, help="attempts of each, instead of its own number")
    parser.add_argument("--seed", type=int, default=datetime.date.today().toordinal(), help="default: another each day")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in CAMPAIGNS]:
        parser.error(f"{unknown[0]}: unknown campaign")
    table = Table("campaign", "tried", "survived", "refused", "lost", "seconds", title=f"seed {args.seed}")
    lost = 0
    for name in args.names or CAMPAIGNS:
        campaign, began = importlib.import_module(f"tests.campaigns.{name}"), time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"{name}-") as folder:
            counts = campaign.run(Path(folder), args.count or CAMPAIGNS[name][args.short], args.seed)
        for line in counts.details:
            print(f"lost in {name}: {line}", file=sys.stderr, flush=True)
        row = (counts.tried, counts.survived, counts.refused, counts.lost, round(time.monotonic() - began))
        table.add_row(name.replace("_", " "), *map(str, row))
        print(name, *row, file=sys.stderr, flush=True)
        lost += counts.lost
    Console().print(table)
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
