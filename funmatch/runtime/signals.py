"""Handles signals: they end a command in one line, and a run between two steps, after it has saved.

Two stages. From the program's start until its work begins, a signal ends it at once (`exit_on_signals`): nothing is
lost, and an exception inside the imports would come out as pages of traceback. Then it raises `Interrupted`
(`raise_on_signals`), so that half-written files are removed; inside `catch_signals` it only asks a run to stop.
"""

import os
import signal
import threading
import time
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from funmatch.runtime import env

TOGETHER_SECONDS = 1.0
"""Two different signals within this time are one request to stop."""
IMPORT_SECONDS = 0.05
"""Time after which a signal that arrived during an import is sent again."""
STOPPING = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXCPU, signal.SIGUSR1, signal.SIGUSR2,
)  # fmt: skip
"""Signals that stop a run: Ctrl-C; the end of a job, of a terminal, of processor time; what Slurm's --signal sends."""
ALWAYS = (signal.SIGINT, signal.SIGTERM)
"""Those that are handled whatever other handler there is; Ctrl-C is ignored in a shell's background, for one."""


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work; a run has saved all progress.

    Attributes:
        number: the signal's number, which decides the exit code.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number

    @property
    def exit_code(self) -> int:
        """The program's exit code: by convention 128 + the signal's number."""
        return 128 + self.number

    # IPython looks for a method of this name before it formats a traceback.
    def _render_traceback_(self) -> list[str]:
        """Returns what a notebook shows in place of a traceback: the message alone."""
        return [f"funmatch: {self}"]

    def with_message(self, message: str) -> "Interrupted":
        """Returns the same for a larger piece of work."""
        return Interrupted(self.number, message)


@dataclass
class Requests:
    """What signals have asked of a run.

    Attributes:
        stop: number of the first signal that asks it to stop; 0 before.
        saves: how many signals have asked it to save and continue.
    """

    stop: int = 0
    saves: int = 0


class SignalHandler:
    """Handles signals while a run takes its steps.

    Attributes:
        requests: what they ask for.
        previous: the handlers in whose place this one stands, by number.
        saving: the numbers that ask to save and continue.
    """

    def __init__(self, saving: Collection[str]) -> None:
        # Remembered, since a notebook or a test runner has handlers of its own.
        self.requests, self.previous, self.saving = Requests(), _replaceable(), _numbers(saving)
        self.first = 0.0

    def __call__(self, number: int, _frame: object) -> None:
        if number in self.saving:
            self.requests.saves += 1
            _say("saving after this step")
        elif self.requests.stop:
            # The system repeats it every second of processor time until the run has ended.
            if number != signal.SIGXCPU and time.monotonic() - self.first > TOGETHER_SECONDS:
                self.restore()
                signal.raise_signal(number)
        else:
            self.requests.stop = number
            self.first = time.monotonic()
            # Restored at once, so that a run which hangs in its last step can still be ended by the same signal. Not
            # the others: they may have arrived already, and Python then finds no handler and reports a race condition.
            if number != signal.SIGXCPU:
                signal.signal(number, self.previous[signal.Signals(number)])
            _say("finishing this step, then saving; press Ctrl-C again to quit now")

    def restore(self) -> None:
        """Restores the previous handlers."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextmanager
def catch_signals(saving: Collection[str] = ()) -> Generator[Requests]:
    """Yields what signals ask for; a second one acts as without this block.

    Another signal within a second of the first is the same request: what ends a job may send both.

    Args:
        saving: names of signals, such as usr1, that ask to save and continue instead of to stop.
    """
    handler = SignalHandler(saving)
    # Python lets only the main thread set handlers; elsewhere nothing is asked for.
    if threading.current_thread() is not threading.main_thread():
        yield handler.requests
        return
    for number in handler.previous:
        signal.signal(number, handler)
    try:
        yield handler.requests
    finally:
        # Again, after a first signal too: restoring twice changes nothing.
        handler.restore()


def _say(message: str) -> None:
    # Imported here, since this module is loaded before any other.
    from funmatch.runtime.log import info

    info(message)


def exit_on_signals() -> None:
    """Makes each signal end the program at once with one word, until its work begins."""
    if threading.current_thread() is threading.main_thread():
        for number in _replaceable():
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _exit)


def raise_on_signals(saving: Collection[str] = ()) -> None:
    """Makes each signal raise `Interrupted` from here on, where it would end the program at once.

    Does nothing in a program of the user's, whose handlers stay.

    Args:
        saving: names of signals that do nothing outside of `catch_signals`, as there is nothing to save.
    """
    if threading.current_thread() is threading.main_thread():
        for number, handler in _replaceable().items():
            if handler is _exit:
                signal.signal(number, _pass if number in _numbers(saving) else _raise)


def _numbers(names: Collection[str]) -> set[int]:
    """Returns the numbers of signals such as usr1."""
    return {signal.Signals[f"SIG{name.upper()}"] for name in names}


def _replaceable() -> dict[signal.Signals, Any]:
    """Returns the handlers of the signals that we may handle, by number."""
    found: dict[signal.Signals, Any] = {}
    for number in STOPPING:
        handler = signal.getsignal(number)
        # SIG_IGN stays: nohup ignores SIGHUP, so that a run outlives its terminal. Other handlers stay, too.
        # None stands for one in C, which could not be restored.
        own = handler in (signal.SIG_DFL, _exit, _raise, _pass)
        if own or (number in ALWAYS and handler is not None):
            found[number] = handler
    return found


def _exit(number: int, _frame: FrameType | None = None) -> None:
    """Ends the program at once."""
    if env.is_main_process():
        os.write(2, b"stopped\n")
    # Not `sys.exit`: the exception would be raised inside the imports, or in the middle of leaving a block.
    os._exit(128 + number)


def _pass(_number: int, _frame: FrameType | None) -> None:
    """Does nothing."""


def _raise(number: int, frame: FrameType | None) -> None:
    """Raises `Interrupted` in the main thread; the next signal ends the program at once."""
    if _is_importing(frame):
        # An import that is interrupted fails with whatever error its library makes of that.
        again = threading.Timer(IMPORT_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
        return
    began = time.monotonic()

    def end(second: int, _frame: FrameType | None) -> None:
        if second == number or time.monotonic() - began > TOGETHER_SECONDS:
            _exit(second)

    for other in STOPPING:
        if signal.getsignal(other) is _raise:
            signal.signal(other, end)
    raise Interrupted(number, "stopped")


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
