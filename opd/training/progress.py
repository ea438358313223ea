"""Progress output: a bar on a terminal, plain lines elsewhere.  It also notes signals that ask the run to stop."""

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from opd.core.errors import printable
from opd.core.processes import is_main_process

LINE_EVERY = 15.0  # seconds between progress lines if stderr is not a terminal
AT_ONCE = {signal.SIGINT, signal.SIGTERM}  # signals that stop the run at once if they are repeated
AGAIN = 1.0  # seconds


@contextlib.contextmanager
def loading(*names: str, quiet: bool) -> Iterator[None]:
    """Show on a terminal which models are being loaded; print nothing elsewhere, or beside the main process."""
    console = Console(stderr=True, quiet=quiet or not is_main_process())
    status = (
        console.status(Text(f"loading {printable(', '.join(names))}"))
        if console.is_terminal
        else contextlib.nullcontext()
    )
    with status:
        yield


class StoppingColumn(ProgressColumn):
    """Tells that the run stops after the current step."""

    def __init__(self, progress: "Progress") -> None:
        super().__init__()
        self.progress = progress

    def render(self, task: Task) -> Text:
        return Text("stopping after this step; again to stop now without saving" if self.progress.signal else "")


class Progress:
    """Shows steps, main metrics and time left.

    The first SIGINT, SIGTERM or SIGUSR1 asks the run to stop after the current step.  A second SIGINT or SIGTERM, at
    least AGAIN seconds later, stops it at once: launchers send one twice.
    """

    def __init__(self, steps: int, start: int, *, quiet: bool) -> None:
        self.steps, self.quiet = steps, quiet
        self.signal, self.signal_time = 0, 0.0  # the first signal, and when it came
        self.console = Console(stderr=True, quiet=quiet)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[health]}"),
            StoppingColumn(self),
            console=self.console,
            disable=quiet or not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task("train", total=steps, completed=start, health="")
        self.last_line_time = 0.0
        self.warned: set[str] = set()

    def __enter__(self) -> "Progress":
        self.handlers = {name: signal.signal(name, self._note) for name in (*AT_ONCE, signal.SIGUSR1)}
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        for name, handler in self.handlers.items():
            signal.signal(name, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal.  A handler runs between any two instructions of the program, so it must do no more."""
        if not self.signal:
            self.signal, self.signal_time = number, time.monotonic()
        elif {number, self.signal} <= AT_ONCE and time.monotonic() - self.signal_time > AGAIN:
            raise KeyboardInterrupt

    def say(self, line: str) -> None:
        """Print a line that stays above the progress bar."""
        self.console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def warn(self, name: str, line: str) -> None:
        """Print a warning the first time that its name occurs."""
        if name not in self.warned:
            self.warned.add(name)
            self.say(f"warning: {name}: {line}")

    def stepped(self, step: int, numbers: dict[str, float]) -> None:
        """Show the metrics of a finished step."""
        titles = {"reverse_kl": "KL", "hidden_distance": "hidden", "agreement": "agreement", "verdict": "verdict"}
        main_metric = next((f"{title} {numbers[name]:.4f}" for name, title in titles.items() if name in numbers), "")
        health = (
            f"{main_metric}  |g| {numbers['grad_norm']:.2f}  length {numbers['length']:.0f}  stopped "
            f"{numbers['stopped']:.0%}  right {numbers['outcome']:.0%}"
        )
        self.bar.update(self.task, completed=step, health=health)
        if numbers["refused"]:
            self.say(f"step {step}: the gradient is not finite; the step is refused, the weights stay as they were")
        prints_line = time.monotonic() - self.last_line_time > LINE_EVERY or step == self.steps
        if self.bar.disable and not self.quiet and prints_line:
            self.last_line_time = time.monotonic()
            self.say(f"step {step}/{self.steps}  {health}")

    def evaluated(self, step: int, numbers: dict[str, float]) -> None:
        """Show the results of an evaluation."""
        line = ""
        for name, title in (("reverse_kl", "reverse KL"), ("log_ratio", "log ratio")):
            if f"eval_{name}" in numbers:
                line = f"{title} {numbers[f'eval_{name}']:.4f} +- {numbers[f'eval_{name}_se']:.4f} nats/token, "
        line += f"length {numbers['eval_length']:.0f}"
        if numbers["eval_stopped"] < 0.5:
            line += f", only {numbers['eval_stopped']:.0%} ended by themselves: raise --max-new-tokens"
        if "eval_accuracy" in numbers:
            value, low, high = (100 * numbers[f"eval_{name}"] for name in ("accuracy", "low", "high"))
            line = f"accuracy {value:.1f} % [{low:.1f}, {high:.1f}], {line}"
        self.say(f"step {step}: held-out {line}")
