"""Train every method on the embedded pair with the same budget: `python scripts/compare.py --out outputs/compare`.

Each method trains with its embedded preset from the same start on the same prompts, and is evaluated on the same
held-out prompts.  Finished runs are not repeated.  The printed table is for `docs/choosing.md`.  With `--served` the
teacher runs as `opd serve` in another process, which returns log-probs, or text for methods with a text-only teacher.
"""

import contextlib
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from soak import serving

from opd.methods import METHODS

PAIR = "--student embedded:student --prompts embedded:ledger --eval-prompts embedded:ledger --preset embedded"
# Control for the methods with groups of 8 rollouts, which see an eighth of the prompts that the other methods see.
GROUPED = "opd --per-prompt 8"


@dataclass(frozen=True)
class Compare:
    """Settings of the comparison."""

    out: Path = Path("outputs/compare")
    """Folder that holds a run folder for each method and seed."""
    methods: tuple[str, ...] = (*METHODS, GROUPED)
    """Names of the methods to run, each may be followed by run flags.  Default: all, and the control."""
    seeds: int = 1
    steps: int = 20
    batch: int = 32
    problems: int = 256
    """Number of held-out problems, decoded greedily."""
    served: bool = False
    """Run the teacher as `opd serve` in another process.  Off by default."""


def main(config: Compare) -> None:
    """Run the missing methods and print the table."""
    server = serving("embedded:teacher", "--name", "teacher") if config.served else contextlib.nullcontext(("", None))
    with server as (url, _):
        for name in config.methods:
            for seed in range(config.seeds):
                folder = config.out / f"{name.replace(' --', '-').replace(' ', '-')}-{seed}"
                if not (folder / "checkpoints" / f"step-{config.steps:06d}").is_dir():
                    _train(config, name, seed, folder, url)
                print(_row(name, seed, folder), flush=True)


def _train(config: Compare, name: str, seed: int, folder: Path, url: str) -> None:
    name, *flags = shlex.split(name)
    method = METHODS[name]()
    address = f"openai:teacher@{url}/v1" if method.asks else url
    teacher = [] if method.teacher else ["--teacher", address if url else "embedded:teacher"]
    size = f"--steps {config.steps} --batch {config.batch} --eval-every {config.steps} --eval-limit {config.problems}"
    rocks = []
    if name == "rock-freeze":
        file = config.out / "rocks.json"
        if not file.is_file():
            pair = "--student embedded:student --teacher embedded:teacher --prompts embedded:ledger"
            _opd(["rock", *pair.split(), "--top", "8", "--max-new-tokens", "256", "--out", str(file)])
        rocks = ["--tokens", str(file)]
    run = [
        *PAIR.split(),
        *teacher,
        *size.split(),
        "--seed",
        str(seed),
        "--save-every",
        "1000",
        "--resume",
        "--quiet",
        *flags,
    ]
    _opd(["train", *run, "--out", str(folder), name, *rocks])


def _opd(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "opd", *arguments], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr.strip().splitlines()[-1], file=sys.stderr, flush=True)


def _row(name: str, seed: int, folder: Path) -> str:
    """Return a line of the table."""
    if not (folder / "metrics.jsonl").is_file():
        return f"| `{name}` | {seed} | did not run | | | |"
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [row for row in logged if "eval_accuracy" in row]
    spent = [json.loads(line) for line in (folder / "perf.jsonl").read_text().splitlines()]
    seconds = sum(row["seconds"] for row in spent if "evaluate_s" not in row)
    right = f"{100 * last['eval_accuracy']:.1f} % [{100 * last['eval_low']:.1f}, {100 * last['eval_high']:.1f}]"
    of = "log_ratio" if "eval_log_ratio" in last else "reverse_kl"  # log_ratio: log-prob servers
    kl = " | ".join(f"{row[f'eval_{of}']:.3f}" if f"eval_{of}" in row else "" for row in (first, last))
    return f"| `{name}` | {seed} | {right} | {kl} | {last['eval_length']:.0f} | {seconds:.0f} |"


if __name__ == "__main__":
    main(tyro.cli(Compare, description=__doc__))
