"""Makes training batches as a pure function of the step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from funmatch.data.cache.device_store import DeviceStore
from funmatch.data.cache.stores import CachedSplit
from funmatch.ops import sampling
from funmatch.ops.augment import augment_crops
from funmatch.ops.crops import crop_of_resized_flip, crop_resize_flip
from funmatch.ops.mixing import own_weight
from funmatch.ops.mixtures import policies
from funmatch.ops.order import BalancedOrder, Order, SharedOrder
from funmatch.ops.view_spec import MILD, ViewSpec
from funmatch.runtime.chunks import even_chunks

Lookup = Callable[[int, int, np.ndarray], Tensor | None]
"""Looks up teacher logits that need no views: (step, first row, image of each row) to (rows, classes), or None."""


@dataclass(frozen=True)
class Batch:
    """This process's rows of the global batch of one step.

    Attributes:
        crops: the student's crops, (1 + n, 3, side, side) float32 in [0, 1]; row 0 is the predecessor of row 1 in the
            global batch, its MixUp and CutMix partner.
        labels: (1 + n,) int64, -1 for no label.
        lam: MixUp weight of the image itself, in [0, 1]: one, or one per image, (n,) float32.
        teacher_logits: (n, classes) where they were looked up or computed ahead; else None.
        teacher_crops: one for each of the loader's `teacher_sides`, shaped as `crops`; None stands for `crops`, so
            that the teacher sees the very same pixels as the student.
        cutmix_boxes: (1 or n, 4) float32 as `mixing.cutmix` takes them, or None.
        step: the step.
        first_row: place of row 1 in the global batch.
    """

    crops: Tensor
    labels: Tensor
    lam: float | Tensor
    teacher_logits: Tensor | None = None
    teacher_crops: tuple[Tensor | None, ...] = ()
    cutmix_boxes: Tensor | None = None
    step: int = 0
    first_row: int = 0

    def __len__(self) -> int:
        """Number of images of which there are views: n."""
        return len(self.labels) - 1

    @property
    def own_weight(self) -> float | Tensor:
        """Weight of a view's own label, one or (n,): λ, less what CutMix covers."""
        return own_weight(self.lam, self.cutmix_boxes, self.crops.shape[-1])

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Returns the batch with a function applied to each tensor."""

        def changed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return replace(
            self,
            crops=change(self.crops),
            labels=change(self.labels),
            lam=change(self.lam) if isinstance(self.lam, Tensor) else self.lam,
            teacher_logits=changed(self.teacher_logits),
            teacher_crops=tuple(map(changed, self.teacher_crops)),
            cutmix_boxes=changed(self.cutmix_boxes),
        )

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch on a device."""
        # Without waiting, which has an effect for pinned memory only; the device's own queue keeps the order.
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self, device: torch.device) -> "Batch":
        """Returns the batch in pinned memory, which an accelerator copies asynchronously; on a CPU the batch itself.

        Args:
            device: the accelerator that will read it.
        """
        if device.type == "cpu":
            return self
        # The current device is per thread: a new thread would pin for, and create a context on, the first accelerator.
        with torch.accelerator.device_index(device.index):
            return self.map_tensors(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    def pieces(self, size: int | None) -> Iterator[tuple["Batch", float]]:
        """Splits the batch evenly into micro-batches of at most `size` images; yields each and its share of the batch.

        Each keeps the predecessor of its first image, so MixUp and CutMix pair the same images in any number of pieces.
        """
        for start, stop in pairwise(even_chunks(len(self), size)):
            rows, with_predecessor = slice(start, stop), slice(start, stop + 1)
            boxes = self.cutmix_boxes
            piece = replace(
                self,
                crops=self.crops[with_predecessor],
                labels=self.labels[with_predecessor],
                lam=self.lam[rows] if isinstance(self.lam, Tensor) else self.lam,
                teacher_logits=None if self.teacher_logits is None else self.teacher_logits[rows],
                teacher_crops=tuple(None if each is None else each[with_predecessor] for each in self.teacher_crops),
                cutmix_boxes=boxes if boxes is None or len(boxes) == 1 else boxes[rows],
                first_row=self.first_row + start,  # a tape stores the piece's logits at this place
            )
            yield piece, (stop - start) / len(self)


class Batches(Protocol):
    """Training batches by step: a `Loader`'s, or those of a loader with teacher logits."""

    @property
    def size(self) -> int:
        """Images in this process's batch."""
        ...

    def batch_at(self, step: int) -> Batch: ...

    def unsharded(self) -> "Batches":
        """Returns the same batches whole, as a single process would see them."""
        ...


@dataclass(frozen=True)
class Loader:
    """Training batches of a split.

    Attributes:
        split: the images.
        spec: what decides the views.
        rank, world_size: this process's slice of the global batch, and the number of slices.
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

    @cached_property
    def order(self) -> Order | None:
        """The order of the images, None for the shuffled one; sorted by class once, not at every step."""
        if self.spec.sources:
            return SharedOrder(self.spec.sources, self.spec.batch)
        return BalancedOrder(self.split.index["label"]) if self.spec.sampling == "balanced" else None

    def sample(self, step: int) -> sampling.StepSample:
        """Draws the choices of the whole global batch."""

        # Whole in every process: the draws must not depend on the number of processes.
        def draw(spec: ViewSpec) -> sampling.StepSample:
            shape = {"min_area": spec.min_area, "ratio": spec.ratio, "side": spec.side, "resize": spec.resize}
            boxes = sampling.box_sampler(spec.crop, **shape)
            return sampling.sample_step(
                spec.seed, step, spec.batch, len(self.split), self.split.sizes,
                boxes=boxes, mixing=spec.mixup, order=self.order, flip=spec.crop != "whole",
                teacher_view=spec.own_teacher_view,
            )  # fmt: skip

        return policies.sample(self.spec, step, draw) if self.spec.policies else draw(self.spec)

    def batch_at(self, step: int, lookup: Lookup | None = None) -> Batch:
        """Returns the batch of a step: the same in any process, at any time and in any order of calls.

        Args:
            lookup: called first for the teacher's logits; where it returns them, no crops are cut for the teacher.
        """
        drawn = self.sample(step)
        # One row more than ours: the predecessor of our first, its partner in MixUp and CutMix. That of the global
        # batch's first row is its last, hence the remainder.
        rows = np.arange(self.rank * self.size - 1, (self.rank + 1) * self.size) % self.spec.batch
        indices = drawn.indices[rows]
        first_row = self.rank * self.size
        logits = lookup(step, first_row, indices[1:]) if lookup else None
        crops, teacher_crops = self._crops(step, drawn, rows, () if logits is not None else self.teacher_sides)
        lam, boxes = self.mixing(step, drawn.lam, rows[1:])
        return Batch(crops, self.split.labels(indices), lam, logits, teacher_crops, boxes, step, first_row)

    def _crops(
        self, step: int, drawn: sampling.StepSample, rows: np.ndarray, teacher_sides: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Returns the student's crops, and the teacher's at each side (None for the student's own)."""
        spec, own = self.spec, self.spec.own_teacher_view
        if spec.augment is None:
            return self._crops_of(step, drawn, rows, teacher_sides)
        # Of the whole global batch, of which we take our rows: a function may draw for a batch as it likes.
        crops, others = self._crops_of(step, drawn, np.arange(-1, spec.batch) % spec.batch, teacher_sides)
        ours = slice(self.rank * self.size, (self.rank + 1) * self.size + 1)
        changed = [
            None if each is None else augment_crops(spec.augment, each, spec.seed, step, teachers_own=own)[ours]
            for each in others
        ]
        return augment_crops(spec.augment, crops, spec.seed, step)[ours], tuple(changed)

    def _crops_of(
        self, step: int, drawn: sampling.StepSample, rows: np.ndarray, teacher_sides: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Cuts the crops of some rows of the global batch, before an augmentation of the user; returns the same."""
        spec, indices = self.spec, drawn.indices[rows]
        others = () if spec.own_teacher_view else tuple(side for side in teacher_sides if side != spec.side)
        # All sides are cut at once, so that an image is decoded once.
        cut = self._cut(indices, drawn.boxes[rows], drawn.flips[rows], (spec.side, *others))
        if spec.policies or spec.randaugment:
            cut = policies.augment(spec, step, cut, rows)
        by_side: dict[int, Tensor | None] = dict(zip((spec.side, *others), cut, strict=True))
        # None rather than the crops: they are mixed once then, and teacher and student get the same tensor.
        by_side[spec.side] = None
        if drawn.teacher_view and teacher_sides:
            boxes, flips = (each[rows] for each in drawn.teacher_view)
            by_side = dict(zip(teacher_sides, self._cut(indices, boxes, flips, teacher_sides), strict=True))
        return cut[0], tuple(by_side[side] for side in teacher_sides)

    def mixing(self, step: int, lam: float | np.ndarray, rows: np.ndarray) -> tuple[float | Tensor, Tensor | None]:
        """Returns λ of MixUp and boxes of CutMix for some rows of the global batch; λ as `sample` has drawn it."""
        lam, boxes = policies.draw_mixing(self.spec, step, lam)
        ours = None if boxes is None else torch.from_numpy(boxes if len(boxes) == 1 else boxes[rows]).float()
        return lam if isinstance(lam, float) else torch.from_numpy(lam[rows]).float(), ours

    def _cut(self, indices: np.ndarray, boxes: np.ndarray, flips: np.ndarray, sides: tuple[int, ...]) -> list[Tensor]:
        """Returns crops of images, (rows, 3, side, side) at each side, cut on the device that holds the pixels."""
        from_image = self.spec.crop not in MILD
        if isinstance(self.split.store, DeviceStore):
            rows, method = self.split.index[indices], self.spec.resample
            return self.split.store.crops(rows, boxes, flips, sides, alone=from_image, method=method)
        cut = partial(
            crop_resize_flip if from_image else crop_of_resized_flip,
            native=self.spec.native,
            method=self.spec.resample,
        )
        if from_image:
            images, boxes = self.split.read_boxes(indices, boxes)
        else:
            # Whole images: mild crops blend in pixels beyond the box.
            images = self.split.images(indices)
        return [cut(images, boxes, flips, side) for side in sides]
