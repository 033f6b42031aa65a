"""Writes the checkpoints of a run in the background, and restores the newest one."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from funmatch.runtime import distributed, env, transfers
from funmatch.training.run import checkpoint
from funmatch.training.run.state import TrainState
from funmatch.training.student.build import Student

WAITING = 2
"""Checkpoints that may wait to be written: each is a copy of the student and its optimizer in memory."""


class CheckpointWriter:
    """Writes checkpoints in a background thread, in the order in which they are submitted.

    The error of a failed write is raised at the next submit, or at the end; nothing is written after it.

    Attributes:
        seconds: of the slowest write; None before the first.
    """

    def __init__(self) -> None:
        # A single thread: a write removes older checkpoints or copies one, so the order matters.
        self.pool = ThreadPoolExecutor(1, "checkpoints")
        self.waiting: deque[Future[None]] = deque()
        self.failed = False
        self.seconds: float | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Queues a function that writes; waits while `WAITING` others are queued."""
        self._await(WAITING - 1)
        self.waiting.append(self.pool.submit(self._write, write))

    def flush(self) -> None:
        """Waits until everything is written."""
        self._await(0)

    def _write(self, write: Callable[[], object]) -> None:
        if self.failed:  # a later checkpoint may rely on what was not written
            return
        began = time.monotonic()
        try:
            write()
        except BaseException:
            self.failed = True
            raise
        self.seconds = max(self.seconds or 0.0, time.monotonic() - began)

    def _await(self, most: int) -> None:
        while self.waiting and (len(self.waiting) > most or self.waiting[0].done()):
            # Those that are done too: `result` raises their error, so a full disk ends the run soon.
            self.waiting.popleft().result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self.pool.shutdown()  # waits
        # After an error of the block that one is raised, not a write's.
        if kind is None:
            self.flush()


class Checkpoints:
    """The checkpoints of a run: taken from a student and its optimizer, written in the background by the main process.

    Attributes:
        writer: the thread that writes; entered by the trainer.
    """

    def __init__(
        self, folder: Path, student: Student, scaler: torch.amp.GradScaler, *, needs_best: bool = False
    ) -> None:
        """Opens the checkpoints in a folder; `needs_best` is that of `checkpoint.restore`."""
        self.folder, self.student, self.scaler, self.needs_best = folder, student, scaler, needs_best
        self.writer = CheckpointWriter()

    def restore(self) -> TrainState | None:
        """Loads the newest checkpoint into the student, its optimizer and the scaler; returns None if there is none."""
        net, optimizer, others = self.student.classifier.net, self.student.optimizer, self.student.others
        # One process first: it removes what a kill left half-written, and the others must not read that.
        state = distributed.main_process_first(
            lambda: checkpoint.restore(self.folder, net, optimizer, others, needs_best=self.needs_best)
        )
        if state:
            self.scaler.load_state_dict(state.scaler)
        return state

    def save(self, state: TrainState) -> None:
        """Submits a checkpoint to the writer."""
        if env.is_main_process():
            net, others = self.student.classifier.net, self.student.others
            tensors = transfers.snapshot(checkpoint.tensors_of(net, self.student.optimizer, others))
            self.writer.submit(lambda: checkpoint.save(self.folder, tensors, state))

    def save_best(self, step: int, scores: Mapping[str, Any]) -> None:
        """Submits the student to the writer as the best on validation."""
        # A snapshot, since the next step changes the weights while the writer still works.
        tensors = transfers.snapshot(checkpoint.student_tensors(self.student.classifier.net))
        self.writer.submit(partial(checkpoint.save_best, self.folder, step, tensors, dict(scores)))

    def load_best(self, step: int) -> None:
        """Loads the student that was the best on validation."""
        checkpoint.load_best(self.folder, step, self.student.classifier.net)

    def keep_stable(self, step: int) -> None:
        """Protects the checkpoint of a step, from which the run can be extended."""
        if env.is_main_process():
            self.writer.submit(partial(checkpoint.keep_stable, self.folder, step))

    def flush(self) -> None:
        """Waits until all checkpoints are written, on every process."""
        self.writer.flush()
        # A process that exits first makes the launcher stop the others, and the main one may still be writing.
        distributed.barrier()
