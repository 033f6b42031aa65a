"""Answers the one question of distillation, "what are the teacher's logits for this batch?", from wherever they lie."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from funmatch.data.batch import Batch
from funmatch.data.loader import Loader
from funmatch.models.ensemble import TeacherEnsemble
from funmatch.runtime import transfers
from funmatch.runtime.log import info
from funmatch.runtime.prefetch import SharedCache
from funmatch.runtime.timing import timed
from funmatch.training.teachers.tape import Tape

BEHIND = 2
"""Steps after which logits of an accelerator are written to a tape: by then they have arrived, and nobody waits."""
Views = Mapping[int, Tensor]
"""A batch's teacher views, (n, 3, side, side) by their side."""


class TeacherSource(Protocol):
    """Where a run's teacher logits come from."""

    def lookup(self, step: int, first_row: int, images: np.ndarray) -> Tensor | None:
        """Logits (rows, classes) that are known without any view, or None; called by the threads that make batches.

        Args:
            first_row: place of the first row in the global batch.
            images: number of each row's image in the training split.
        """
        ...

    def logits(self, batch: Batch, views: Views, *, record: bool = True) -> Tensor:
        """Logits (n, classes) of a batch of which `lookup` knew nothing; `record` them, where that is done."""
        ...

    def flush(self) -> None:
        """Finishes what is being recorded."""
        ...


@dataclass(frozen=True)
class Live:
    """Asks the teachers, at every step."""

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
    """Looks up what fixed teachers answer to an image, whatever the student is shown of it.

    Attributes:
        table: logits of each image of the training split, (images, classes).
    """

    table: Tensor

    def lookup(self, step: int, first_row: int, images: np.ndarray) -> Tensor | None:  # noqa: ARG002
        return self.table[torch.from_numpy(images)]

    def logits(self, batch: Batch, views: Views, *, record: bool = True) -> Tensor:  # noqa: ARG002
        raise AssertionError("a fixed teacher's logits are looked up when the batch is made")

    def flush(self) -> None:
        pass


@dataclass(frozen=True)
class Shared:
    """Asks another source once for all students that are trained side by side."""

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
    """Reads a tape, and records there what it has to ask another source.

    Logits that were just computed are rounded as the tape rounds them: recording and replaying train alike.

    Attributes:
        full: what to do when the disk is full: stop the run, or go on without recording.
        waiting: (step, first row, logits on their way to the CPU), not written yet.
    """

    tape: Tape
    source: TeacherSource
    full: Literal["stop", "go-on"]
    waiting: deque[tuple[int, int, transfers.HostCopy]] = field(default_factory=deque)

    def lookup(self, step: int, first_row: int, images: np.ndarray) -> Tensor | None:
        return self.tape.read(step, first_row, len(images))

    def logits(self, batch: Batch, views: Views, *, record: bool = True) -> Tensor:
        half, classes = self.tape.layout.packed(self.source.logits(batch, views, record=record))
        if record and self.tape.recording:
            copy = transfers.copy_to_host(half) if classes is None else transfers.copy_to_host(half, classes)
            self.waiting.append((batch.step, batch.first_row, copy))
            self._write_all_but(0 if half.device.type == "cpu" else BEHIND)
        return self.tape.layout.unpacked(half, classes)

    def flush(self) -> None:
        self._write_all_but(0)

    def _write_all_but(self, latest: int) -> None:
        while len(self.waiting) > latest:
            step, first_row, copy = self.waiting.popleft()
            half, *classes = copy.wait()
            self.write(step, first_row, half, classes[0] if classes else None)

    def write(self, step: int, first_row: int, half: Tensor, classes: Tensor | None) -> None:
        """Writes rows; an `OSError` ends the recording, and the run too unless it may go on without."""
        if not self.tape.recording:
            return
        try:
            self.tape.write(step, first_row, half, classes)
        except OSError as error:
            if self.full == "stop":
                raise
            self.tape.recording = False
            why = error.strerror or error
            info(f"WARNING: {why}; the run continues, and the tape {self.tape.folder} ends at step {step}")


@dataclass(frozen=True)
class DistillLoader:
    """Training batches that bring the teacher's logits along where these are known beforehand.

    Attributes:
        loader: makes the views.
        source: is asked first; views for the teacher are made only where it knows nothing.
        shared: keeps batches for other students that are trained side by side on the same views.
    """

    loader: Loader
    source: TeacherSource
    shared: SharedCache | None = None

    @property
    def size(self) -> int:
        return self.loader.size

    def batch_at(self, step: int) -> Batch:
        """The batch of a step; see `Loader.batch_at`."""
        if self.shared is None:
            return self.loader.batch_at(step, self.source.lookup)
        key = (step, self.loader.rank, self.loader.world_size)
        return self.shared(key, lambda: self.loader.batch_at(step, self.source.lookup))

    def unsharded(self) -> "DistillLoader":
        return replace(self, loader=self.loader.unsharded())
