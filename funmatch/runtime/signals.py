"""Catches Ctrl-C and SIGTERM, so that a run stops between two steps."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

from funmatch.runtime.log import info


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run; all progress is saved.

    Attributes:
        number: the signal's number, which decides the exit code.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def catch_signals() -> Generator[list[int]]:
    """Yields a list to which the first Ctrl-C or SIGTERM is appended; a second one acts as without this block."""
    caught: list[int] = []
    # Python lets only the main thread set handlers; elsewhere the list stays empty.
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    # Remembered, since a notebook or a test runner has handlers of its own.
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: object) -> None:
        caught.append(number)
        # Restored at once, so that a run which hangs in its last step can still be ended by a second signal.
        restore()
        info("stopping after this step; interrupt again to stop immediately")

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield caught
    finally:
        # Again, after a first signal too: restoring twice changes nothing.
        restore()
