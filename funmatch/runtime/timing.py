"""Times the named parts of a step while a `StepTimer` is active, and costs nothing otherwise."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

T = TypeVar("T")
_active: "StepTimer | None" = None
_nested = threading.local()


class StepTimer:
    """Collects the seconds of each named part, without those of the parts nested in it.

    Attributes:
        seconds: of the parts that ran in the training loop's thread, by name.
        background_seconds: of the parts that ran in other threads; they delay a step only if it waits for them.
    """

    def __init__(
        self, finish: Callable[[], object], label: Callable[[str], AbstractContextManager] = nullcontext
    ) -> None:
        """Prepares to time the loop of the current thread.

        Args:
            finish: waits until the device has done its queued work, so that each part is charged with its own.
            label: gives a context for a part's name, e.g. `torch.profiler.record_function`.
        """
        self.finish, self.label, self.thread = finish, label, threading.get_ident()
        self.seconds: dict[str, float] = defaultdict(float)
        self.background_seconds: dict[str, float] = defaultdict(float)

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds to a part, in the table of the thread that calls."""
        table = self.seconds if threading.get_ident() == self.thread else self.background_seconds
        table[name] += seconds

    def __enter__(self) -> "StepTimer":
        # Module state rather than an argument: parts are named deep inside functions that need not know of profiling.
        global _active
        _active = self
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None


@contextmanager
def timed(name: str) -> Generator[None]:
    """Times the block as a part of the step, if a `StepTimer` is active.

    Args:
        name: of the part, as the profile prints it.
    """
    timer = _active  # read once: a worker thread may still be in its block when the timer ends
    if timer is None:
        yield
        return
    # One number for each open block of this thread: the seconds of the blocks nested in it, which it does not count.
    inner = _nested.__dict__.setdefault("seconds", [])
    inner.append(0.0)
    began = time.perf_counter()
    try:
        with timer.label(name):
            yield
    finally:
        # In `finally`, so that a part which fails does not leave its level behind for the parts around it.
        # Only the loop's own thread waits for the device; a worker would wait for work that is not its own.
        if threading.get_ident() == timer.thread:
            timer.finish()
        elapsed = time.perf_counter() - began
        timer.add(name, elapsed - inner.pop())
        if inner:
            inner[-1] += elapsed
