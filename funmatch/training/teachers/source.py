"""Provides the teacher's logits of a batch: computed live, from a table, from a tape, or shared between students."""

from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from funmatch.data.loader import Batch, Loader
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.ops.mixing import mix_views
from funmatch.runtime import transfers
from funmatch.runtime.log import info
from funmatch.runtime.timing import timed
from funmatch.training.teachers.tape import Tape

T = TypeVar("T")
BEHIND = 2
"""Steps after which an accelerator's logits are written to a tape: by then they are on the host, and nothing waits."""
Views = Mapping[int, Tensor]
"""A batch's teacher views, (n, 3, side, side) by their side."""


def views_by_side(batch: Batch, sides: Sequence[int]) -> tuple[dict[int, Tensor], Tensor]:
    """Mixes a batch; returns the teachers' views, (n, 3, side, side) by side, and the student's."""
    teacher_views, student_view = mix_views(batch.crops, batch.teacher_crops, batch.lam, batch.cutmix_boxes)
    # A batch that brings its teacher's logits has no teacher crops.
    return dict(zip(sides, teacher_views, strict=True)) if teacher_views else {}, student_view


class TeacherSource(Protocol):
    """A source of teacher logits."""

    def lookup(self, step: int, first_row: int, images: np.ndarray) -> Tensor | None:
        """Returns logits (rows, classes) that need no views, or None; called by the threads that prepare batches.

        Args:
            first_row: index of the first row in the global batch.
            images: number of each row's image in the training split.
        """
        ...

    def logits(self, batch: Batch, views: Views, *, record: bool = True) -> Tensor:
        """Returns logits (n, classes) of a batch that `lookup` did not find; records them if there is a tape."""
        ...

    def flush(self) -> None:
        """Finishes what is being recorded."""
        ...


@dataclass(frozen=True)
class Live:
    """Computes the teachers at every step."""

    teachers: TeacherEnsemble
    temperature: float

    def lookup(self, step: int, first_row: int, images: np.ndarray) -> Tensor | None:  # noqa: ARG002
        return None

    def logits(self, batch: Batch, views: Views, *, record: bool = True) -> Tensor:  # noqa: ARG002
        with timed("teacher"):
            return self.teachers(views, self.temperature)

    def flush(self) -> None:
        pass


@dataclass(frozen=True)
class Fixed:
    """Looks up the logits of fixed teachers by image; they do not depend on the student's view.

    Attributes:
        table: logits of each image of the training split, (images, classes).
    """

    table: Tensor

    def lookup(self, step: int, first_row: int, images: np.ndarray) -> Tensor | None:  # noqa: ARG002
        # By image, not by step: a fixed teacher sees each image once, however the student's view is cropped.
        return self.table[torch.from_numpy(images)]

    def logits(self, batch: Batch, views: Views, *, record: bool = True) -> Tensor:  # noqa: ARG002
        raise AssertionError("a fixed teacher's logits are looked up when the batch is made")

    def flush(self) -> None:
        pass


class SharedCache:
    """Keeps the most recent results of expensive calls, for several threads that need the same ones.

    Args:
        size: number of results kept; the oldest is dropped.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.results: dict[Hashable, Future[Any]] = {}
        self.lock = Lock()

    def __call__(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Returns the result stored under a key, computing it on first use.

        Args:
            key: identifies the result.
            compute: called without arguments if the result is missing. Threads that need it meanwhile wait for it.

        Raises:
            whatever `compute` raises, in every thread that waits for this key.
        """
        mine: Future[T] = Future()
        # Only the bookkeeping is under the lock; results of different keys are computed at the same time.
        with self.lock:
            future = self.results.setdefault(key, mine)
            # The oldest first, since dicts keep the order of insertion. Whoever waits for it holds its future.
            while len(self.results) > self.size:
                del self.results[next(iter(self.results))]
        if future is mine:
            try:
                mine.set_result(compute())
            except BaseException as error:
                # Also for KeyboardInterrupt: the threads that wait would wait forever.
                mine.set_exception(error)
                raise
        return future.result()


@dataclass(frozen=True)
class Shared:
    """Computes another source once for all students that are trained side by side."""

    source: TeacherSource
    cache: SharedCache

    def lookup(self, step: int, first_row: int, images: np.ndarray) -> Tensor | None:
        return self.source.lookup(step, first_row, images)

    def logits(self, batch: Batch, views: Views, *, record: bool = True) -> Tensor:
        # A copy: the output of a captured graph is overwritten when the graph is replayed for the next batch.
        key = (batch.step, batch.first_row, len(batch))
        return self.cache(key, lambda: self.source.logits(batch, views, record=record).clone())

    def flush(self) -> None:
        self.source.flush()


@dataclass
class Taped:
    """Reads a tape, and records logits that it lacks from another source.

    Logits that were just computed are rounded as the tape rounds them: recording and replaying train alike.

    Attributes:
        full: what to do when the disk is full: stop the run, or continue without recording.
        waiting: (step, first row, logits on their way to the CPU), not written yet.
    """

    tape: Tape
    source: TeacherSource
    full: Literal["stop", "go-on"]
    waiting: deque[tuple[int, int, transfers.HostCopy]] = field(default_factory=deque)

    def lookup(self, step: int, first_row: int, images: np.ndarray) -> Tensor | None:
        return self.tape.read(step, first_row, len(images))

    def logits(self, batch: Batch, views: Views, *, record: bool = True) -> Tensor:
        # Through the tape's format and back even without recording: a replayed run must see the same numbers.
        half, classes = self.tape.layout.packed(self.source.logits(batch, views, record=record))
        if record and self.tape.recording:
            # Without waiting; written once the copy has arrived.
            copy = transfers.copy_to_host(half) if classes is None else transfers.copy_to_host(half, classes)
            self.waiting.append((batch.step, batch.first_row, copy))
            # Waiting for the newest copies would stall the accelerator until it has computed them.
            self._write_all_but(0 if half.device.type == "cpu" else BEHIND)
        return self.tape.layout.unpacked(half, classes)

    def flush(self) -> None:
        self._write_all_but(0)

    def _write_all_but(self, latest: int) -> None:
        while len(self.waiting) > latest:
            # The oldest first: its copy has most likely arrived, so waiting for it stalls nothing.
            step, first_row, copy = self.waiting.popleft()
            half, *classes = copy.wait()
            self.write(step, first_row, half, classes[0] if classes else None)

    def write(self, step: int, first_row: int, half: Tensor, classes: Tensor | None) -> None:
        """Writes rows; an `OSError` ends the recording, and the run too if `full` is stop."""
        # Another run may hold the tape, or the disk may be full: training continues without.
        if not self.tape.recording:
            return
        try:
            self.tape.write(step, first_row, half, classes)
        except OSError as error:
            if self.full == "stop":
                raise
            # Not retried: a full disk stays full, and each try would cost time at every step.
            self.tape.recording = False
            why = error.strerror or error
            info(f"WARNING: {why}; the run continues, and the tape {self.tape.folder} ends at step {step}")


@dataclass(frozen=True)
class DistillLoader:
    """Loads training batches, with the teacher's logits where the source has them without views.

    Attributes:
        loader: makes the views.
        source: the first to be looked up; the teacher's views are made only where it finds nothing.
        shared: keeps batches for other students that are trained side by side on the same views.
    """

    loader: Loader
    source: TeacherSource
    shared: SharedCache | None = None

    @property
    def size(self) -> int:
        return self.loader.size

    def batch_at(self, step: int) -> Batch:
        """Returns the batch of a step; see `Loader.batch_at`."""
        # Batches are shared whole, views and logits, so each is made once for all students.
        if self.shared is None:
            return self.loader.batch_at(step, self.source.lookup)
        # By rank too, since processes hold different rows of a step.
        key = (step, self.loader.rank, self.loader.world_size)
        return self.shared(key, lambda: self.loader.batch_at(step, self.source.lookup))

    def unsharded(self) -> "DistillLoader":
        """Returns a loader of whole global batches, whatever the number of processes."""
        # With the same cache: its keys hold rank and world size, so whole batches and slices do not mix.
        return replace(self, loader=self.loader.unsharded())
