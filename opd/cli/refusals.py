"""Refusals: one line and exit code 2, also of a command that several processes run."""

import contextlib
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING

from opd.core.errors import printable
from opd.core.processes import clean_up, is_main_process, num_processes

if TYPE_CHECKING:
    from torch.distributed import TCPStore

CODE = 2  # exit code of a refusal


def refusing() -> Callable[[str], int]:
    """Return a function that ends the command with a refusal: it prints the message and returns the exit code.

    Several processes of torchrun, or of accelerate launch, end together, and the main one prints.
    """
    shares_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _JointRefusal().refuse if num_processes() > 1 and shares_store else _print


def _print(message: str) -> int:
    print(f"opd: {printable(message)}", file=sys.stderr, flush=True)
    return CODE


class _JointRefusal:
    """The first refusal of several processes, which ends all of them.

    The processes exchange it through the key-value store of their launcher.  A thread in each process waits for it and
    ends the process, because the main thread may wait in a collective for the process that refused.
    """

    def __init__(self) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a restart has the same store
        self.message, self.received, self.complete = (f"opd/{attempt}/{x}" for x in ("refusal", "received", "complete"))
        self.thread = Thread(target=self._wait, daemon=True)
        self.thread.start()

    def refuse(self, message: str) -> int:
        """Tell all processes, and end with them."""
        with contextlib.suppress(RuntimeError):  # without the launcher nobody is left to tell
            _store().compare_set(self.message, "", message)
            self.thread.join()
        return _print(message)

    def _wait(self) -> None:
        """Wait for a refusal, print it in the main process, and end this process when all others know of it."""
        with contextlib.suppress(RuntimeError):
            store = _store()
            store.wait([self.message], timedelta(days=365))
            message = store.get(self.message).decode()
            if is_main_process():
                _print(message)
            if store.add(self.received, 1) == num_processes():
                store.set(self.complete, "")
            try:
                # A process that ended before the others know would have the launcher kill them, with another code.
                store.wait([self.complete], timedelta(seconds=30))
            except RuntimeError:
                if not is_main_process():
                    _print(message)  # the main process may not have started
            clean_up()
            os._exit(CODE)


def _store() -> "TCPStore":
    """Return a connection to the key-value store of the launcher; a thread needs one that no other thread uses."""
    from torch.distributed import TCPStore  # takes seconds

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)
