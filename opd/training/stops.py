"""When a run saves and when it ends early: by signals, --save-minutes and --time-limit."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from accelerate.utils import gather_object

from opd.config.train import Train

OUT_OF_TIME = 75  # exit code: EX_TEMPFAIL of sysexits.h, the same command again goes on


@dataclass
class Stops:
    """Tells after each step whether to save and whether to stop.  All processes get the same answer."""

    config: Train
    received: Callable[[], int]  # the signal that this process received; 0 for none
    started: float  # time.monotonic() at the start of the command
    longest_step: float = 0.0
    longest_save: float = 0.0

    def __post_init__(self) -> None:
        self.step_began = self.saved = time.monotonic()

    def after(self, step: int) -> tuple[bool, int]:
        """Return whether to save after a step, and the exit code with which the run then ends; 0 if it goes on."""
        now, config = time.monotonic(), self.config
        self.longest_step, self.step_began = max(self.longest_step, now - self.step_began), now
        next_end = now - self.started + self.longest_step + 2 * self.longest_save  # it may save before and after a step
        late = 0 < config.time_limit * 60 < next_end
        due = 0 < config.save_minutes * 60 <= now - self.saved
        # A signal may reach any process at any time, and clocks differ.
        answers = gather_object([(self.received(), late, due)])
        numbers = [number for number, _, _ in answers if number]
        if step == config.steps:
            return True, 0
        if not numbers and any(late for _, late, _ in answers):
            numbers = [signal.SIGUSR1]
        code = exit_code(numbers[0]) if numbers else 0
        return bool(code) or step % config.save_every == 0 or any(due for _, _, due in answers), code

    def after_save(self, seconds: float) -> None:
        """Note that a checkpoint took some seconds and is complete."""
        self.saved = self.step_began = time.monotonic()
        self.longest_save = max(self.longest_save, seconds)


def exit_code(number: int) -> int:
    """Return the exit code of a run that a signal stopped."""
    return OUT_OF_TIME if number == signal.SIGUSR1 else 128 + number
