"""Settings of `opd rock`: `Rock`, with those of its context filter, `Context`."""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from opd.config.data import Data
from opd.config.precision import Precision, default_precision
from opd.config.train import Train
from opd.core.disk import OutputFile
from opd.core.errors import Refusal, at_least, check_seed
from opd.core.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Context:
    """The paper's context filter, which its code does not have.  The paper gives no values: these are ours."""

    context_filter: bool = False
    """Rank by KL x the share of occurrences whose KL persists in contexts that recur (CCR)."""
    before: str = ""
    """The student before its distillation: KL that persists is high under both; empty: under --student alone."""
    high: float = 0.95
    """Quantile of a model's token KL at which it is high."""
    width: int = 5
    """Tokens to either side in a context, the mean of the student's final states there."""
    similar: float = 0.8
    """Cosine from which two contexts are similar."""
    recurs: float = 0.1
    """Share of a type's persistent occurrences that are similar to one that recurs."""

    def check(self) -> None:
        """Refuse impossible settings."""
        for name in ("high", "recurs"):
            if not 0 <= getattr(self, name) < 1:
                raise Refusal(f"--{name} {getattr(self, name)}: must lie in [0, 1)")
        if not -1 <= self.similar <= 1:
            raise Refusal(f"--similar {self.similar}: a cosine lies in [-1, 1]")
        if self.width < 0:
            raise Refusal(f"--width {self.width}: must be 0 or more")
        if self.before and not self.context_filter:
            raise Refusal(f"--before {self.before}: is read by the context filter alone; add --context-filter")


@dataclass(frozen=True, kw_only=True)
class Rock:
    """The frequent tokens whose KL stays large, and a control list, for `opd train ... rock-freeze`."""

    student: str
    """The model that speaks, best after a plain OPD run: hub id, folder, .gguf file, run folder, or embedded:NAME."""
    teacher: str
    """The model it is compared with, with the same vocabulary; same kinds of name."""
    prompts: str
    """Prompts: .jsonl, .parquet or .csv file, dataset folder, hub id, reasoning-gym:NAME, or embedded:NAME."""
    out: Path = Path("rocks.json")
    """The list; the control with as many occurrences goes beside it, as rocks-control.json."""
    overwrite: bool = False
    """Replace files that another command, or you, wrote; what is read is never replaced."""
    rollouts: int = 500
    """Student rollouts that are measured."""
    top: int = 100
    """Longest list, in types."""
    min_count: int = 2
    """Types that occur less often are left out."""
    consistency: Context = Context()
    data: Data = Data()
    sampling: Sampling = Sampling()
    precision: Precision = field(default_factory=default_precision)
    """Compute type of the student."""
    teacher_precision: Precision = field(default_factory=default_precision)
    """Type of the teacher's weights."""
    micro_batch_tokens: int = 8192
    """Padded tokens that go through a model at once; lower it when memory runs out."""
    decode_rows: int = 64
    """Responses decoded at once."""
    seed: int = 0
    """Seed of prompts and samples."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code."""
    quiet: bool = False
    """No progress output."""

    def files(self) -> tuple[OutputFile, OutputFile]:
        """Return the list, and its control."""
        control = self.out.parent / f"{self.out.stem}-control{self.out.suffix}"
        inputs = (self.student, self.teacher, self.prompts, self.consistency.before)
        file = lambda path: OutputFile(path=path, ours=_is_rock_list, overwrite=self.overwrite, inputs=inputs)
        return file(self.out), file(control)

    def check(self) -> None:
        """Refuse what cannot work before anything loads."""
        at_least(self, rollouts=1, top=1, min_count=1, micro_batch_tokens=1, decode_rows=1)
        check_seed(self.seed)
        self.sampling.check()
        self.consistency.check()
        for file in self.files():
            file.check()

    def run(self) -> Train:
        """Return the settings of a run, whose measuring pass is used."""
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name in Train.__dataclass_fields__}
        data = replace(self.data, source=self.prompts, seed=self.seed, verifier="none")  # answers are not looked at
        return Train(**{**shared, "data": data})


def _is_rock_list(path: Path) -> bool:
    """Return whether a file is a list, or the control of one, as `opd rock` writes it."""
    content = json.loads(path.read_text())
    return isinstance(content, dict) and {"ids", "coverage", "types", "corpus"} <= content.keys()
