"""A training run whose steps the benchmarks execute: `opened(Trained(...).run(folder, method)) -> Loop`."""

from dataclasses import dataclass
from pathlib import Path

from opd.config.data import Data
from opd.config.plan import resolved
from opd.config.train import Train
from opd.core.sampling import Sampling
from opd.methods import METHODS
from opd.training.build import open_session
from opd.training.run_folder import Run
from opd.training.trainer import Trainer


@dataclass(frozen=True)
class Trained:
    """Models, prompts and batch size of a training run."""

    student: str = "embedded:student"
    """Student model.  Hub id, folder, GGUF file or embedded model."""
    teacher: str = "embedded:teacher"
    """Teacher model.  Same kinds of name as --student."""
    prompts: str = "embedded:ledger"
    """Prompts.  Same kinds of name as for `opd train`."""
    batch: int = 32
    """Rollouts per step, 1 per prompt."""
    max_new_tokens: int = 256
    """Length limit of a response, in tokens."""

    def run(self, folder: Path, method: str) -> Train:
        """Return the configuration of the run: fp32, with saved rollouts only at the first step."""
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


def opened(config: Train) -> Trainer:
    """Open a run as `opd train` does."""
    plan, run = resolved(config), Run(config.out)
    run.start({}, repr(plan.method), 0)
    return Trainer(open_session(plan), run)
