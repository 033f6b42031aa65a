"""Batches as a function of the step, made a little ahead of the model by threads."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from funmatch.data.batch import Batch
from funmatch.data.cache.device_store import DeviceStore
from funmatch.data.cache.stores import CachedSplit
from funmatch.ops import randaugment
from funmatch.ops.crops import central_view, crop_of_resized_flip, crop_resize_flip
from funmatch.ops.mixing import draw_cutmix_boxes as cuts_of
from funmatch.ops.sampling import (
    CUTMIX_STREAM,
    RANDAUGMENT_STREAM,
    MixupOptions,
    StepSample,
    box_sampler,
    sample_step,
    step_generator,
)
from funmatch.runtime.prefetch import SharedCache, prefetch_map
from funmatch.runtime.timing import timed


@dataclass(frozen=True)
class Loader:
    """Training batches of a split.

    Attributes:
        split: the images.
        seed: of the run.
        batch: images in the *global* batch; may be larger than the split.
        side: of the crops, pixels.
        min_area: the smallest share of an image that a crop covers.
        rank, world: which of how many equal slices of the global batch is ours.
        crop: of `draws.boxes_of`.
        resize: the short side of which a mild crop is cut, pixels.
        mixing: how MixUp's λ is drawn.
        cutmix: the a of Beta(a, a), from which CutMix's λ is drawn; 0 is no CutMix.
        randaugment: operations on each image, and their magnitude; or None.
        teacher_sides: at which teachers are shown crops, pixels.
        own: whether these are drawn for themselves, not the student's.
        known: what is known beforehand of the teacher's answers: to each image of the split, (images, classes).
        told: what is known of them by step, first row and number of rows, (rows, classes), or None where nothing is.
        latest: where batches are kept for others who want the same.
        native: whether the CPU's own kernel cuts crops, where it can be had.
    """

    split: CachedSplit
    seed: int
    batch: int
    side: int
    min_area: float = 0.05
    rank: int = 0
    world: int = 1
    crop: str = "inception"
    resize: int = 0
    mixing: MixupOptions = MixupOptions()  # noqa: RUF009
    cutmix: float = 0.0
    randaugment: tuple[int, int] | None = None
    teacher_sides: tuple[int, ...] = ()
    own_teacher_view: bool = False
    known: Tensor | None = None
    told: Callable[[int, int, int], Tensor | None] | None = None
    latest: "SharedCache | None" = None
    native: bool = True

    def sample(self, step: int) -> StepSample:
        """The draws of the whole global batch."""
        boxes = box_sampler(self.crop, min_area=self.min_area, side=self.side, resize=self.resize)
        return sample_step(
            self.seed, step, self.batch, len(self.split), self.split.sizes,
            boxes=boxes, mixing=self.mixing, mirrored=self.crop != "whole", own=self.own_teacher_view,
        )  # fmt: skip

    def batch_at(self, step: int) -> Batch:
        """The batch of a step: the same whenever, wherever and in whichever order it is asked for."""
        if self.latest:
            return self.latest((step, self.rank, self.world), lambda: self.make_batch(step))
        return self.make_batch(step)

    def make_batch(self, step: int) -> Batch:
        """`batch_at`, made now."""
        drawn = self.sample(step)
        share = self.batch // self.world
        rows = np.arange(self.rank * share - 1, (self.rank + 1) * share) % self.batch
        indices = drawn.indices[rows]
        boxes, flips = drawn.boxes[rows], drawn.flips[rows]
        answers = None if self.known is None else self.known[torch.from_numpy(indices[1:])]
        if self.told:
            answers = self.told(step, self.rank * share, share)
        teacher_sides = self.teacher_sides if answers is None else ()  # what is known needs no look
        sides = () if self.own_teacher_view else tuple(side for side in teacher_sides if side != self.side)
        crops, *others = self.cut_views(indices, boxes, flips, (self.side, *sides))
        if self.randaugment:
            ops, strengths = randaugment.draw_operations(
                step_generator(self.seed, step, RANDAUGMENT_STREAM), self.batch, *self.randaugment
            )
            crops, *others = (
                randaugment.apply_operations(each, ops[rows], strengths[rows]) for each in (crops, *others)
            )
        shown = dict(zip((self.side, *sides), (crops, *others), strict=True))
        if drawn.teacher_view and teacher_sides:
            boxes, flips = drawn.teacher_view[0][rows], drawn.teacher_view[1][rows]
            own = self.cut_views(indices, boxes, flips, teacher_sides)
            shown = dict(zip(teacher_sides, own, strict=True))
        lam, cut = self.sample_mixing(step, drawn.lam, rows[1:])
        shown = tuple(shown[side] for side in teacher_sides)
        return Batch(crops, self.split.labels(indices), lam, answers, shown, cut, step, self.rank * share)

    def sample_mixing(
        self, step: int, lam: float | np.ndarray, rows: np.ndarray
    ) -> tuple[float | Tensor, Tensor | None]:
        """λ of MixUp and boxes of CutMix, of the rows of a global batch that are ours."""
        cut = None
        if self.cutmix:
            rng, each = step_generator(self.seed, step, CUTMIX_STREAM), self.mixing.per_image
            cut, lam = cuts_of(rng, self.batch, self.cutmix, lam, each=each, mixed=self.mixing.a > 0)
            cut = torch.from_numpy(cut[rows] if each else cut).float()
        return lam if isinstance(lam, float) else torch.from_numpy(lam[rows]).float(), cut

    def cut_views(self, indices, boxes, flips, sides: tuple[int, ...]) -> list[Tensor]:
        """Crops of images, (n, 3, side, side) at each of several sides; where the pixels are, there they are cut."""
        alone = self.crop in ("inception", "whole")
        if isinstance(self.split.store, DeviceStore):
            return self.split.store.crops(self.split.index[indices], boxes, flips, sides, alone=alone)
        if alone:
            images, boxes = self.split.read_boxes(indices, boxes)
            return [crop_resize_flip(images, boxes, flips, side, native=self.native) for side in sides]
        images = self.split.images(indices)
        return [crop_of_resized_flip(images, boxes, flips, side, native=self.native) for side in sides]


def prefetch(
    loader: Loader, start: int, stop: int, *, workers: int = 1, finish: Callable[[Batch], Batch] | None = None
) -> Generator[Batch]:
    """The batches of steps `start` … `stop` − 1 in order, made ahead by threads.

    Args:
        workers: threads; each keeps to one core, beside those that the model uses.
        finish: what else is done to a batch in its thread, such as a copy into pinned memory.
    """

    def make(step: int) -> Batch:
        with timed("views"):
            batch = loader.batch_at(step)
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
