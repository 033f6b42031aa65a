"""Batches as a function of the step, made a little ahead of the model by threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from funmatch.augment import central_view, crop_resize_flip, sample_flip
from funmatch.data.pixels import CachedSplit
from funmatch.draws import Draw, Mixing, boxes_of, draw

Made = TypeVar("Made")


@dataclass(frozen=True)
class Batch:
    """What one process sees of step `step`, before mixing.

    Attributes:
        crops: (1 + n, 3, side, side) float32 in [0, 1]; row 0 is row 1's predecessor in the global batch.
        labels: (1 + n,) int64, -1 where there is none.
        lam: MixUp weight of the picture itself, in [0, 1]: one, or one a picture, (n,) float32.
        answers: (n, classes), the teacher's logits on its view, where they were computed before.
        shown: the teachers' crops, one for each of the loader's `teacher_sides`: `crops` itself where it is the same.
    """

    crops: Tensor
    labels: Tensor
    lam: float | Tensor
    answers: Tensor | None = None
    shown: tuple[Tensor, ...] = ()

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed; what is shared stays shared."""
        crops = change(self.crops)
        answers = None if self.answers is None else change(self.answers)
        lam = change(self.lam) if isinstance(self.lam, Tensor) else self.lam
        shown = tuple(crops if each is self.crops else change(each) for each in self.shown)
        return Batch(crops, change(self.labels), lam, answers, shown)

    def to(self, device: torch.device) -> "Batch":
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pieces(self, size: int | None) -> Iterator[tuple["Batch", float]]:
        """The batch in even pieces of at most so many pictures, each with its predecessor, and the share that it is."""
        count = len(self.labels) - 1
        for start, stop in pairwise(cuts(count, size)):
            crops, rows = self.crops[start : stop + 1], slice(start, stop)
            answers = None if self.answers is None else self.answers[rows]
            lam = self.lam[rows] if isinstance(self.lam, Tensor) else self.lam
            shown = tuple(crops if each is self.crops else each[start : stop + 1] for each in self.shown)
            yield Batch(crops, self.labels[start : stop + 1], lam, answers, shown), (stop - start) / count


def cuts(count: int, size: int | None) -> list[int]:
    """Where so many pictures are cut into the fewest pieces of at most `size`, as even as can be: 0, …, count.

    Even, since BatchNorm has no statistics of a last piece of one picture.
    """
    pieces = -(-count // (size or count))
    return [count * number // pieces for number in range(pieces + 1)]


@dataclass(frozen=True)
class Loader:
    """Training batches of a split.

    Attributes:
        split: the pictures.
        seed: of the run.
        batch: pictures in the *global* batch; may be larger than the split.
        side: of the crops, pixels.
        min_area: the smallest share of a picture that a crop covers.
        rank, world: which of how many equal slices of the global batch is ours.
        crop: of `draws.boxes_of`.
        resize: the short side of which a mild crop is cut, pixels.
        mixing: how MixUp's λ is drawn.
        teacher_sides: at which teachers are shown crops, pixels.
        own: whether these are drawn for themselves, not the student's.
        known: what is known beforehand of the teacher's answers: to each picture of the split, (pictures, classes).
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
    mixing: Mixing = Mixing()  # noqa: RUF009
    teacher_sides: tuple[int, ...] = ()
    own: bool = False
    known: Tensor | None = None

    def draw(self, step: int) -> Draw:
        """The draws of the whole global batch."""
        boxes = boxes_of(self.crop, min_area=self.min_area, side=self.side, resize=self.resize)
        return draw(
            self.seed, step, self.batch, len(self.split), self.split.sizes,
            boxes=boxes, mixing=self.mixing, mirrored=self.crop != "whole", own=self.own,
        )  # fmt: skip

    def batch_at(self, step: int) -> Batch:
        """The batch of a step: the same whenever, wherever and in whichever order it is asked for."""
        drawn = self.draw(step)
        share = self.batch // self.world
        rows = np.arange(self.rank * share - 1, (self.rank + 1) * share) % self.batch
        indices = drawn.indices[rows]
        boxes, flips = drawn.boxes[rows], drawn.flips[rows]
        sides = () if self.own else tuple(side for side in self.teacher_sides if side != self.side)
        crops, *others = self.cut(indices, boxes, flips, (self.side, *sides))
        shown = dict(zip((self.side, *sides), (crops, *others), strict=True))
        if drawn.own:
            boxes, flips = drawn.own[0][rows], drawn.own[1][rows]
            own = self.cut(indices, boxes, flips, self.teacher_sides)
            shown = dict(zip(self.teacher_sides, own, strict=True))
        return Batch(
            crops,
            self.split.labels(indices),
            drawn.lam if isinstance(drawn.lam, float) else torch.from_numpy(drawn.lam[rows[1:]]).float(),
            None if self.known is None else self.known[torch.from_numpy(indices[1:])],
            tuple(shown[side] for side in self.teacher_sides),
        )

    def cut(self, indices, boxes, flips, sides: tuple[int, ...]) -> list[Tensor]:
        """Crops of pictures, (n, 3, side, side) at each of several sides."""
        if self.crop in ("inception", "whole"):
            pictures, boxes = self.split.boxed(indices, boxes)
            return [crop_resize_flip(pictures, boxes, flips, side) for side in sides]
        pictures = self.split.pictures(indices)
        return [sample_flip(pictures, boxes, flips, side) for side in sides]


def prefetch(
    loader: Loader, start: int, stop: int, *, workers: int = 1, finish: Callable[[Batch], Batch] | None = None
) -> Generator[Batch]:
    """The batches of steps `start` … `stop` − 1 in order, made ahead by threads.

    Args:
        workers: threads; each keeps to one core, beside those that the model uses.
        finish: what else is done to a batch in its thread, such as a copy into pinned memory.
    """

    def make(step: int) -> Batch:
        batch = loader.batch_at(step)
        return finish(batch) if finish else batch

    return ahead(make, start, stop, workers)


def ahead(make: Callable[[int], Made], start: int, stop: int, workers: int) -> Generator[Made]:
    """`make(start)` … `make(stop − 1)` in order, made ahead by threads."""
    waiting: deque = deque()
    pool = ThreadPoolExecutor(workers, "views", initializer=torch.set_num_threads, initargs=(1,))
    try:
        for step in range(start, stop):
            if not waiting:
                waiting.extend(pool.submit(make, s) for s in range(step, min(step + 2 * workers, stop)))
            made = waiting.popleft().result()
            following = step + 2 * workers
            if following < stop:
                waiting.append(pool.submit(make, following))
            yield made
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def central_batches(
    split: CachedSplit, side: int, short_side: int, batch: int, *, squash: bool = False, workers: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split once through in order, as evaluation sees it.

    Args:
        side: of the views, pixels.
        short_side: to which pictures are resized before the central square is cut, pixels.
        batch: pictures at a time.
        squash: resize both sides to `short_side`.
        workers: threads that decode ahead, where pictures have to be decoded.

    Yields:
        views (n, 3, side, side) float32 in [0, 1], and labels (n,) int64.
    """

    def make(number: int) -> tuple[Tensor, Tensor]:
        indices = np.arange(number * batch, min((number + 1) * batch, len(split)))
        pictures = split.pictures(indices)
        views = torch.stack([central_view(picture, short_side, side, squash=squash) for picture in pictures])
        return views.contiguous(memory_format=torch.channels_last), split.labels(indices)

    count = -(-len(split) // batch)
    return ahead(make, 0, count, workers) if split.store.decodes else map(make, range(count))
