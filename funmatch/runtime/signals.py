"""Ctrl-C and SIGTERM, heard between two steps."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager

from funmatch.runtime.log import info


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop; everything up to here is saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def catch_signals() -> Generator[list[int]]:
    """Gives a list that the first Ctrl-C or SIGTERM is put into; a second one acts as if nobody listened."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # only the main thread may listen
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def listen(number: int, _frame: object) -> None:
        caught.append(number)
        restore()
        info("stopping after this step; once more to stop at once")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, listen)
    try:
        yield caught
    finally:
        restore()
