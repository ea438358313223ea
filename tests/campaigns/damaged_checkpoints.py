"""Stopped runs with a damaged file, resumed: the bytes of the calm run, or a refusal.

The newest checkpoint, the logs and the settings of a run are damaged; older checkpoints are whole.
"""

import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.campaigns import Counts
from tests.campaigns.commands import MODELS, run_command
from tests.campaigns.damaged_reads import DAMAGES
from tests.campaigns.kills import LIMIT, SIZES

VARIANTS = {
    "vopd": "vopd",
    "LoRA": "--lora-rank 4 vopd",
    "kat": "kat --window 4 --floor 2 --ready 8 --buffer 20 --after 2",
    "npd": "npd --pool 2 --no-filtered",
    "ema teacher": "--teacher ema:0.1 --context answer opd",
}
LAST, NEWEST = "checkpoints/step-000004", "checkpoints/step-000003"
RESULTS = (LAST, "metrics.jsonl")  # what the resumed run must reproduce


def _removed(run: Path) -> None:
    shutil.rmtree(run / NEWEST)


def _empty(run: Path) -> None:
    _removed(run)
    (run / NEWEST).mkdir()


def _swapped(run: Path) -> None:
    """Give the newest checkpoint the weights of the one before."""
    for path in (run / "checkpoints/step-000002").glob("*.safetensors"):
        shutil.copy(path, run / NEWEST / path.name)


def _a_file(run: Path) -> None:
    (run / "checkpoints/step-000007").write_text("")


def _a_link(run: Path) -> None:
    (run / "checkpoints/step-000008").symlink_to("nothing")


def _a_copy(run: Path) -> None:
    shutil.copytree(run / "checkpoints/step-000002", run / "checkpoints/step-000003.bak")


def _a_later_folder(run: Path) -> None:
    (run / "checkpoints/step-999999").mkdir()


def _half_written(run: Path) -> None:
    shutil.copytree(run / NEWEST, run / "checkpoints/.part-000004")


def _a_file_for_rollouts(run: Path) -> None:
    shutil.rmtree(run / "rollouts")
    (run / "rollouts").write_text("")


FOLDERS: tuple[Callable[[Path], None], ...] = (
    _removed, _empty, _swapped, _a_file, _a_link, _a_copy, _a_later_folder, _half_written, _a_file_for_rollouts,
)  # fmt: skip


def run(folder: Path, count: int, seed: int) -> Counts:
    """Damage a run `count` times, each time in one place, and resume it."""
    draw, counts = random.Random(seed), Counts()
    bases = {name: _base(folder / name.replace(" ", "-"), flags) for name, flags in VARIANTS.items()}
    attempts: list[tuple[str, str, Callable[[Path], None]]] = [
        (name, change.__name__, change) for name in VARIANTS for change in FOLDERS
    ]
    for name, base in bases.items():
        for path in base.rglob("*"):
            file = path.relative_to(base)
            if path.is_file() and (str(file).startswith(NEWEST) or len(file.parts) == 1):
                attempts += [(name, f"{file}, {kind}", _damage(file, kind, draw)) for kind in DAMAGES]
    draw.shuffle(attempts)
    for name, what, damage in itertools.islice(itertools.cycle(attempts), count):
        case = folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(bases[name], case, symlinks=True)
        damage(case)
        outcome = run_command(_command(case, VARIANTS[name]), LIMIT)
        fault = outcome.fault()
        if not fault and outcome.code == 0:
            wanted, found = _results(folder / "ends" / bases[name].name), _results(case)
            if changed := sorted(n for n in {*wanted, *found} if wanted.get(n) != found.get(n)):
                fault = f"other results: {', '.join(changed[:3])}"
        counts.add(f"{name}, {what}: {outcome.last_line()}", fault, refused=outcome.code == 2)
    return counts


def _damage(file: Path, kind: str, draw: random.Random) -> Callable[[Path], None]:
    return lambda run: DAMAGES[kind](run / file, draw)


def _command(out: Path, flags: str) -> list[str]:
    sizes = SIZES.replace("--keep 2", "--keep 3").split()
    return ["train", *MODELS, *sizes, "--out", str(out), "--resume", *flags.split()]


def _base(out: Path, flags: str) -> Path:
    """Return a run whose last checkpoint is missing, and keep a complete copy under `ends`."""
    done = run_command(_command(out, flags), LIMIT)
    assert done.code == 0, done.output
    shutil.copytree(out, out.parent / "ends" / out.name)
    shutil.rmtree(out / LAST)
    return out


def _results(run: Path) -> dict[str, bytes]:
    paths = (p for name in RESULTS for p in ((run / name).rglob("*") if (run / name).is_dir() else [run / name]))
    return {str(p.relative_to(run)): p.read_bytes() for p in paths if p.is_file()}
