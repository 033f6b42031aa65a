"""Where a step's time goes: parts of the program are named, and timed while somebody watches."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

Given = TypeVar("Given")
_watching: "StepTimer | None" = None
_within = threading.local()


class StepTimer:
    """The seconds of each named part, those of parts within it not counted.

    Attributes:
        seconds: of parts of the loop's own thread.
        beside: of parts of other threads, which cost a step nothing unless it waits for them.
    """

    def __init__(
        self, finish: Callable[[], object], label: Callable[[str], AbstractContextManager] = nullcontext
    ) -> None:
        """Begins to watch the loop of this thread.

        Args:
            finish: waits until the device has done what it was given, so that each part is told its own work.
            label: tells somebody else, such as a profiler, of each part.
        """
        self.finish, self.label, self.thread = finish, label, threading.get_ident()
        self.seconds: dict[str, float] = defaultdict(float)
        self.background_seconds: dict[str, float] = defaultdict(float)

    def add(self, name: str, seconds: float) -> None:
        (self.seconds if threading.get_ident() == self.thread else self.background_seconds)[name] += seconds

    def __enter__(self) -> "StepTimer":
        global _watching
        _watching = self
        return self

    def __exit__(self, *_: object) -> None:
        global _watching
        _watching = None


@contextmanager
def timed(name: str) -> Generator[None]:
    """Names a part of the program; costs nothing to speak of while nobody watches."""
    watch = _watching
    if watch is None:
        yield
        return
    inner = _within.__dict__.setdefault("seconds", [])  # what the parts within take, a number for each level
    inner.append(0.0)
    began = time.perf_counter()
    try:
        with watch.label(name):
            yield
    finally:
        if threading.get_ident() == watch.thread:
            watch.finish()
        took = time.perf_counter() - began
        watch.add(name, took - inner.pop())
        if inner:
            inner[-1] += took


def timed_iter(items: Iterable[Given], name: str) -> Iterator[Given]:
    """The same items; the time until each is there is a part of its own."""
    iterator = iter(items)
    while True:
        with timed(name):
            item = next(iterator, None)
        if item is None:
            return
        yield item
