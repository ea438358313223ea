"""A run whose steps the benchmark takes: `opened(Trained(...).run(folder, method)) -> Loop`."""

from dataclasses import dataclass
from pathlib import Path

from opd.config import Train
from opd.methods import METHODS
from opd.runs import Run
from opd.session import open_session
from opd.steps import Loop
from opd.tasks.task import Data
from opd.types import Sampling


@dataclass(frozen=True)
class Trained:
    """What is trained."""

    student: str = "embedded:student"
    """Hub id, folder, GGUF file or embedded model."""
    teacher: str = "embedded:teacher"
    """The same, of the teacher."""
    prompts: str = "embedded:ledger"
    """Prompts."""
    batch: int = 32
    """Rollouts of a step, one a prompt."""
    max_new_tokens: int = 256
    """Longest response."""

    def run(self, folder: Path, method: str) -> Train:
        """fp32, and so long that no step saves rollouts but the first."""
        return Train(
            student=self.student,
            teacher=self.teacher,
            prompts=self.prompts,
            data=Data(source=self.prompts),
            out=folder,
            method=METHODS[method](),
            batch=self.batch,
            steps=1_000_000,
            rollouts_every=1_000_000,
            lr=1e-5,
            sampling=Sampling(max_new_tokens=self.max_new_tokens),
            precision="fp32",
            teacher_precision="fp32",
            quiet=True,
        )


def opened(config: Train) -> Loop:
    """Opened like `opd train` opens a run."""
    method, run = config.resolved(), Run(config.out)
    run.start({}, repr(method), 0)
    return Loop(config, method, open_session(config, method, None), run)
