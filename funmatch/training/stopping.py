"""Decides after each step, on all processes alike, whether a run saves and goes on, or saves and stops."""

import signal
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from funmatch.runtime import distributed
from funmatch.runtime.signals import Interrupted, Requests
from funmatch.runtime.time_limit import TimeLimit, TimeLimitReached
from funmatch.training.run.checkpoints import CheckpointWriter
from funmatch.training.run.recorder import Recorder

GO_ON, SAVE, OUT_OF_TIME, SIGNAL, FAILED = 0, 1, 2, 1 << 8, 1 << 16
"""Reasons, the weightiest last: the processes agree on the largest. A signal's number is added to its reason; `FAILED`
stands for an `on_event` that failed."""
SAVES = 3
"""Saves that may have to be waited for at the end: two that are queued, and the last one."""
FORGETTING = 0.95
"""The longest of recent steps counts, an earlier one less by this factor with each step."""


class Stopping:
    """Watches signals, the time limit and the recorder of one run.

    Attributes:
        step_seconds: of the slowest recent step.
        evaluation_seconds: of the slowest evaluation; assumed before the first.
    """

    def __init__(self, limit: TimeLimit, records: Recorder, writer: CheckpointWriter) -> None:
        self.limit, self.records, self.writer = limit, records, writer
        self.requests, self.saves = Requests(), 0
        self.step_seconds, self.evaluation_seconds = 0.0, limit.first
        self.since, self.paused = time.monotonic(), 0.0

    def begin(self, requests: Requests) -> None:
        """Begins to measure steps.

        Args:
            requests: what signals ask for.
        """
        self.limit.announce()
        self.requests, self.saves = requests, requests.saves
        self.since, self.paused = time.monotonic(), 0.0

    def agree(self, *, evaluates_next: bool) -> int:
        """Returns the weightiest reason of all processes, after a step.

        Args:
            evaluates_next: whether an evaluation follows the next step.
        """
        now = time.monotonic()
        # Without evaluations and saves, which count by themselves.
        self.step_seconds = max(self.step_seconds * FORGETTING, now - self.since - self.paused)
        self.since, self.paused = now, 0.0
        # One that stopped alone would leave the others waiting for its gradients.
        return distributed.all_reduce_max(self._own_reason(evaluates_next=evaluates_next))

    def _own_reason(self, *, evaluates_next: bool) -> int:
        if self.records.failure:
            return FAILED
        if self.requests.stop:
            return SIGNAL + self.requests.stop
        saving = self.limit.first if self.writer.seconds is None else SAVES * self.writer.seconds
        needed = 2 * self.step_seconds + saving
        if self.limit.left < needed + self.evaluation_seconds * evaluates_next:
            return OUT_OF_TIME
        if self.requests.saves > self.saves:
            self.saves = self.requests.saves
            return SAVE
        return GO_ON

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """Measures an evaluation."""
        began = time.monotonic()
        with self.pausing():
            yield
        self.evaluation_seconds = max(time.monotonic() - began, self.evaluation_seconds * FORGETTING)

    @contextmanager
    def pausing(self) -> Generator[None]:
        """Leaves the time of the block out of the step's."""
        began = time.monotonic()
        yield
        self.paused += time.monotonic() - began

    def interrupt(self, reason: int, step: int, steps: int, folder: Path) -> NoReturn:
        """Ends the run before its end, after saving.

        Raises:
            Exception: what `on_event` raised, in the process where it failed.
            TimeLimitReached: the time limit is near.
            Interrupted: a signal arrived, or `on_event` failed in another process.
        """
        saved = f"saved step {step} of {steps} in {folder}" if step < steps else f"saved all {steps} steps in {folder}"
        self.records.raise_failure(saved)
        purpose = "to resume" if step < steps else "to finish it"
        if reason == OUT_OF_TIME:
            # Also where only another process found the time too short.
            raise TimeLimitReached(self.limit.sentence(saved))
        # Processes without the failure end as by a signal.
        number = signal.SIGTERM if reason == FAILED else reason - SIGNAL
        raise Interrupted(number, f"{saved}; run the same command again {purpose}")
