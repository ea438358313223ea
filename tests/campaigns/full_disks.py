"""Commands on a full or read-only disk, and with few file descriptors: the result, or a refusal; then it can go on.

A limit on the size of files (RLIMIT_FSIZE) stands for the full disk, because mounting one needs root.
"""

import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from tests.campaigns import Counts
from tests.campaigns.commands import MODELS, Outcome, run_command, train_run
from tests.campaigns.kills import LIMIT, SIZES

EVALUATION = "--limit 2 --max-new-tokens 4"


def _commands(run: Path, out: Path) -> dict[str, list[str]]:
    models = MODELS[:4]
    return {
        "train": ["train", *MODELS, *SIZES.split(), "--out", str(out), "--resume", "vopd"],
        "eval": ["eval", "--model", "embedded:student", *MODELS[4:], *EVALUATION.split(), "--out", f"{out}.json"],
        "report": ["report", str(run), "--out", f"{out}.html"],
        "figures": ["report", str(run), "--out", f"{out}.html", "--static", f"{out}-figures"],
        "inspect": ["inspect", str(run), "--out", f"{out}.html"],
        "prune": ["prune", "--model", "embedded:student", "--keep", "0", "--out", str(out)],
        "rock": ["rock", *models, *MODELS[4:], "--limit", "8", "--max-new-tokens", "24", "--out", f"{out}.json"],
    }


def _small_files(size: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a full disk is an error of `write`, and no signal
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def _few_descriptors(count: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def run(folder: Path, count: int, seed: int) -> Counts:
    """Run commands `count` times under a limit; what was refused must then succeed without it."""
    draw, counts = random.Random(seed), Counts()
    source = train_run(folder)
    for _ in range(count):
        place = folder / "place"
        place.mkdir()
        name, arguments = draw.choice(list(_commands(source, place / "out").items()))
        files = draw.random() < 0.7
        number = int(2 ** draw.uniform(13, 23)) if files else draw.randint(12, 80)
        what = f"{name}, {'files of at most' if files else 'at most'} {number} {'bytes' if files else 'descriptors'}"
        outcome = run_command(arguments, LIMIT, _small_files(number) if files else _few_descriptors(number))
        faults = [_fault(outcome)]
        if outcome.code:
            faults.append(_fault(run_command(arguments, LIMIT)))
        counts.add(what, "; then ".join(filter(None, faults)), refused=outcome.code == 2)
        shutil.rmtree(place)
    return counts


def _fault(outcome: Outcome) -> str:
    return f"{fault}: {outcome.last_line()}" if (fault := outcome.fault()) else ""
