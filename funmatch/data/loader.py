"""Makes the batches of a split: training views as a pure function of the step, and central views in order."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from funmatch.data.batch import Batch
from funmatch.data.cache.device_store import DeviceStore
from funmatch.data.cache.stores import CachedSplit
from funmatch.ops import randaugment
from funmatch.ops.boxes import box_sampler
from funmatch.ops.crops import central_view, crop_of_resized_flip, crop_resize_flip
from funmatch.ops.mixing import draw_cutmix_boxes
from funmatch.ops.sampling import CUTMIX_STREAM, RANDAUGMENT_STREAM, StepSample, sample_step, step_generator
from funmatch.ops.view_spec import MILD, ViewSpec
from funmatch.runtime.prefetch import prefetch_map
from funmatch.runtime.timing import timed

Lookup = Callable[[int, int, np.ndarray], Tensor | None]
"""Teacher logits that are known beforehand: (step, first row, image of each row) to (rows, classes), or None."""


class Batches(Protocol):
    """Training batches by step: those of a `Loader`, or of one with a teacher."""

    @property
    def size(self) -> int:
        """Images in this process's batch."""
        ...

    def batch_at(self, step: int) -> Batch: ...

    def unsharded(self) -> "Batches":
        """The same batches whole, as one process alone would see them."""
        ...


@dataclass(frozen=True)
class Loader:
    """Training batches of a split.

    Attributes:
        split: the images.
        spec: what decides the views.
        rank, world_size: which of how many equal slices of the global batch is ours.
        teacher_sides: image sizes at which teachers are shown crops, pixels.
    """

    split: CachedSplit
    spec: ViewSpec
    rank: int = 0
    world_size: int = 1
    teacher_sides: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return self.spec.batch // self.world_size

    def unsharded(self) -> "Loader":
        return replace(self, rank=0, world_size=1)

    def sample(self, step: int) -> StepSample:
        """The draws of the whole global batch."""
        spec = self.spec
        boxes = box_sampler(spec.crop, min_area=spec.min_area, side=spec.side, resize=spec.resize)
        return sample_step(
            spec.seed, step, spec.batch, len(self.split), self.split.sizes,
            boxes=boxes, mixing=spec.mixup, flip=spec.crop != "whole", teacher_view=spec.own_teacher_view,
        )  # fmt: skip

    def batch_at(self, step: int, lookup: Lookup | None = None) -> Batch:
        """The batch of a step: the same whenever, wherever and in whichever order it is asked for.

        Args:
            lookup: asked first for the teacher's logits; where it knows them, no crops are cut for the teacher.
        """
        drawn = self.sample(step)
        # One row more than ours: the predecessor of our first, its partner in MixUp and CutMix.
        rows = np.arange(self.rank * self.size - 1, (self.rank + 1) * self.size) % self.spec.batch
        indices = drawn.indices[rows]
        first_row = self.rank * self.size
        known = lookup(step, first_row, indices[1:]) if lookup else None
        crops, teacher_crops = self._crops(step, drawn, rows, () if known is not None else self.teacher_sides)
        lam, boxes = self._mixing(step, drawn.lam, rows[1:])
        return Batch(crops, self.split.labels(indices), lam, known, teacher_crops, boxes, step, first_row)

    def _crops(
        self, step: int, drawn: StepSample, rows: np.ndarray, teacher_sides: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The student's crops, and the teacher's at each side (None for the student's own)."""
        spec, indices = self.spec, drawn.indices[rows]
        others = () if spec.own_teacher_view else tuple(side for side in teacher_sides if side != spec.side)
        # All sides are cut at once, so that an image is decoded once.
        cut = self._cut(indices, drawn.boxes[rows], drawn.flips[rows], (spec.side, *others))
        if spec.randaugment:
            ops, strengths = randaugment.draw_operations(
                step_generator(spec.seed, step, RANDAUGMENT_STREAM), spec.batch, *spec.randaugment
            )
            cut = [randaugment.apply_operations(each, ops[rows], strengths[rows]) for each in cut]
        by_side: dict[int, Tensor | None] = dict(zip((spec.side, *others), cut, strict=True))
        by_side[spec.side] = None
        if drawn.teacher_view and teacher_sides:
            boxes, flips = (each[rows] for each in drawn.teacher_view)
            by_side = dict(zip(teacher_sides, self._cut(indices, boxes, flips, teacher_sides), strict=True))
        return cut[0], tuple(by_side[side] for side in teacher_sides)

    def _mixing(self, step: int, lam: float | np.ndarray, rows: np.ndarray) -> tuple[float | Tensor, Tensor | None]:
        """λ of MixUp and boxes of CutMix for our rows of the global batch."""
        spec, boxes = self.spec, None
        if spec.cutmix:
            rng, each = step_generator(spec.seed, step, CUTMIX_STREAM), spec.mixup.per_image
            drawn, lam = draw_cutmix_boxes(
                rng, spec.batch, spec.cutmix, lam, per_image=each, with_mixup=spec.mixup.a > 0
            )
            boxes = torch.from_numpy(drawn[rows] if each else drawn).float()
        return lam if isinstance(lam, float) else torch.from_numpy(lam[rows]).float(), boxes

    def _cut(self, indices: np.ndarray, boxes: np.ndarray, flips: np.ndarray, sides: tuple[int, ...]) -> list[Tensor]:
        """Crops of images, (rows, 3, side, side) at each side, cut on the device where the pixels lie."""
        from_image, native = self.spec.crop not in MILD, self.spec.native
        if isinstance(self.split.store, DeviceStore):
            return self.split.store.crops(self.split.index[indices], boxes, flips, sides, alone=from_image)
        if from_image:
            images, boxes = self.split.read_boxes(indices, boxes)
            return [crop_resize_flip(images, boxes, flips, side, native=native) for side in sides]
        images = self.split.images(indices)
        return [crop_of_resized_flip(images, boxes, flips, side, native=native) for side in sides]


def prefetch(
    batches: Batches, start: int, stop: int, *, workers: int = 1, finish: Callable[[Batch], Batch] | None = None
) -> Generator[Batch]:
    """The batches of steps `start` … `stop` − 1 in order, made ahead by threads.

    Args:
        workers: threads; each keeps to one core, beside those that the model uses.
        finish: what else is done to a batch in its thread, such as a copy into pinned memory.
    """

    def make(step: int) -> Batch:
        with timed("views"):
            batch = batches.batch_at(step)
            return finish(batch) if finish else batch

    return prefetch_map(make, start, stop, workers)


def central_batches(
    split: CachedSplit, side: int, short_side: int, batch: int, *, squash: bool = False, workers: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split once through in order, as evaluation sees it.

    Args:
        side: of the views, pixels.
        short_side: to which images are resized before the central square is cut, pixels.
        batch: images at a time.
        squash: resize both sides to `short_side`.
        workers: threads that decode ahead, where images have to be decoded.

    Yields:
        views (n, 3, side, side) float32 in [0, 1], and labels (n,) int64.
    """

    def make(number: int) -> tuple[Tensor, Tensor]:
        indices = np.arange(number * batch, min((number + 1) * batch, len(split)))
        if isinstance(split.store, DeviceStore):
            return split.store.central(split.index[indices], short_side, side, squash=squash), split.labels(indices)
        images = split.images(indices)
        views = torch.stack([central_view(image, short_side, side, squash=squash) for image in images])
        return views.contiguous(memory_format=torch.channels_last), split.labels(indices)

    count = -(-len(split) // batch)
    return prefetch_map(make, 0, count, workers) if split.store.decodes else map(make, range(count))
