"""Catches Ctrl-C and SIGTERM, so that a run stops between two steps."""

import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from funmatch.runtime.log import info

TOGETHER_SECONDS = 1.0
"""Two different signals within this time are one request to stop."""


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
    """Yields a list to which the first Ctrl-C or SIGTERM is appended; a second one acts as without this block.

    Another signal within a second of the first is the same request: what ends a job may send both.
    """
    caught: list[int] = []
    # Python lets only the main thread set handlers; elsewhere the list stays empty.
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    # Remembered, since a notebook or a test runner has handlers of its own.
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    first = 0.0

    def handle(number: int, _frame: object) -> None:
        nonlocal first
        if caught:
            if time.monotonic() - first > TOGETHER_SECONDS:
                restore()
                signal.raise_signal(number)
            return
        caught.append(number)
        first = time.monotonic()
        # Restored at once, so that a run which hangs in its last step can still be ended by the same signal. Not the
        # other one: it may have arrived already, and Python then finds no handler and reports a race condition.
        signal.signal(number, previous[signal.Signals(number)])
        info("finishing this step, then saving; press Ctrl-C again to quit now")

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
