"""Ends work before a time limit: that of `--time-limit`, or that of a Slurm job."""

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from funmatch.runtime import env
from funmatch.runtime.log import info
from funmatch.runtime.signals import Interrupted
from funmatch.runtime.text import duration, parse_seconds

SLURM = "SLURM_JOB_END_TIME"
"""Slurm's variable with the end of a job, in seconds since 1970."""
MARGIN = 0.01
"""Share of the limit that is kept free, within `MARGIN_SECONDS`: for the disk, and for the program to end."""
MARGIN_SECONDS = (2.0, 60.0)
FIRST_SECONDS = 10.0
"""Assumed for what has not been measured yet, such as the first save; at most a tenth of the limit."""

_began = env.STARTED


class TimeLimitReached(Interrupted):
    """The time limit is near; a run has saved all progress, and the same command or call resumes it."""

    def __init__(self, message: str) -> None:
        super().__init__(0, message)

    @property
    def exit_code(self) -> int:
        """0, since the work ended as it was asked to."""
        return 0

    def with_message(self, message: str) -> "TimeLimitReached":
        """Returns the same for a larger piece of work."""
        return TimeLimitReached(message)


@contextmanager
def counted_from_here() -> Generator[None]:
    """Counts time limits from the beginning of the block, not from the program's start: in a call from Python."""
    global _began
    before, _began = _began, time.monotonic()
    try:
        yield
    finally:
        _began = before


@dataclass(frozen=True)
class TimeLimit:
    """The time at which all must be saved.

    Attributes:
        end: by `time.monotonic()`; infinite where there is no limit.
        total: seconds from the start to the end.
        name: where the limit comes from, for messages.
    """

    end: float = float("inf")
    total: float = float("inf")
    name: str = "no limit"

    @property
    def margin(self) -> float:
        """Seconds that are kept free before the end."""
        least, most = MARGIN_SECONDS
        return min(most, max(least, MARGIN * self.total))

    @property
    def left(self) -> float:
        """Seconds until the end, without the margin."""
        return self.end - self.margin - time.monotonic()

    @property
    def first(self) -> float:
        """Seconds to assume for what has not been measured yet."""
        return min(FIRST_SECONDS, self.total / 10)

    def announce(self) -> None:
        """Says once when the work will stop, if there is a limit."""
        if self.end < float("inf"):
            _announce(self.name, self.end)

    def check_left(self, seconds: float, done: str) -> None:
        """Raises `TimeLimitReached` unless there is time for work that takes some seconds.

        Args:
            done: what is done and where, for the message.
        """
        if self.left < seconds:
            raise TimeLimitReached(self.sentence(done))

    def sentence(self, done: str) -> str:
        """Returns why the work stops, what is done and how to resume."""
        return f"{self.name} is nearly reached: {done}; run the same command again to resume"


@dataclass
class StartTime:
    """The time that a run takes before its first step and after its last one, as measured on finished runs.

    Attributes:
        seconds: the longest; 0 before the first run.
    """

    seconds: float = 0.0

    def add(self, whole: float, training: float) -> None:
        """Adds a finished run.

        Args:
            whole: seconds from its start to its end.
            training: seconds of its steps. Of a run that was resumed, they include those of earlier starts.
        """
        self.seconds = max(self.seconds, whole - training)


def find_limit(requested: str | None) -> TimeLimit:
    """Returns the limit that ends first: the requested one, from the start of the program, or the Slurm job's."""
    limits = []
    if requested is not None:
        seconds = parse_seconds(requested)
        limits.append(TimeLimit(_began + seconds, seconds, f"the time limit of {duration(seconds)}"))
    if (end := _slurm_end()) is not None:
        limits.append(TimeLimit(end, end - env.STARTED, "the end of the Slurm job"))
    return min(limits, key=lambda limit: limit.end, default=TimeLimit())


def _slurm_end() -> float | None:
    """Returns the end of the Slurm job by `time.monotonic()`; None outside a job."""
    try:
        end = float(os.environ[SLURM]) - time.time() + time.monotonic()
    except (KeyError, ValueError):
        return None
    # A shell that outlived its job, e.g. in a terminal multiplexer, still has the variable.
    return end if env.STARTED < end < float("inf") else None


@cache
def _announce(name: str, end: float) -> None:
    info(f"{name} is reached in {duration(max(0.0, end - time.monotonic()))}; everything is saved before it")
