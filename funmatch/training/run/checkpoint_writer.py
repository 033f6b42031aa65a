"""Checkpoints that are written beside the training, in the order in which they were asked for."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

WAITING = 2
"""Checkpoints that may wait to be written: each is a copy of the student and its optimizer in memory."""


class CheckpointWriter:
    """Writes one thing after another in a thread of its own.

    What fails is raised where the next thing is asked for, or at the end; nothing more is written after it.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, "checkpoints")
        self.waiting: deque[Future[None]] = deque()
        self.failed = False

    def submit(self, write: Callable[[], object]) -> None:
        """Has something written; waits where too much waits already."""

        def written() -> None:
            if not self.failed:
                self.failed = True  # until it has not
                write()
                self.failed = False

        self._await(WAITING - 1)
        self.waiting.append(self.pool.submit(written))

    def flush(self) -> None:
        """Waits until all is written."""
        self._await(0)

    def _await(self, most: int) -> None:
        while self.waiting and (len(self.waiting) > most or self.waiting[0].done()):
            self.waiting.popleft().result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.pool.shutdown()  # waits
        if kind is None:
            self.flush()
