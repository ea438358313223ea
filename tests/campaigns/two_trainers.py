"""Two trainers that want one run folder at random distances in time: one trains, the other is refused."""

import json
import random
import shutil
from pathlib import Path

from tests.campaigns import Counts
from tests.campaigns.commands import MODELS, run_command, start
from tests.campaigns.kills import LIMIT, SIZES

PAIRS = (
    ("vopd", "vopd"),
    ("--seed 0 vopd", "--seed 1 vopd"),
    ("vopd", "--resume vopd"),
    ("--resume vopd", "--resume vopd"),
)


def run(folder: Path, count: int, seed: int) -> Counts:
    """Start `count` pairs of trainers.  A pair survives if one run is whole and the other is refused."""
    draw, counts = random.Random(seed), Counts()
    calm = folder / "calm"
    done = run_command(_command(calm, "vopd"), LIMIT)
    assert done.code == 0, done.output
    for _ in range(count):
        out, flags = folder / "shared", draw.choice(PAIRS)
        first = start(_command(out, flags[0]))
        first.ended(draw.choice((0.0, draw.uniform(0, 1.2 * done.seconds))))
        second = start(_command(out, flags[1]))
        ends = [process.outcome(LIMIT) for process in (first, second)]
        faults = [fault for end in ends if (fault := end.fault())]
        steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        if steps != [1, 2, 3, 4]:
            faults.append(f"the logged steps are {steps}")
        if 0 not in [end.code for end in ends]:
            faults.append("no trainer ended its run")
        attempt = f"{' and '.join(flags)}: {[end.last_line() for end in ends]}"
        counts.add(attempt, "; ".join(faults), refused=False)
        shutil.rmtree(out)
    return counts


def _command(out: Path, flags: str) -> list[str]:
    return ["train", *MODELS, *SIZES.split(), "--out", str(out), *flags.split()]
