"""Batches as a function of the step, made a little ahead of the model by threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from funmatch.augment import central_view, crop_resize_flip
from funmatch.data.pixels import CachedSplit
from funmatch.draws import Draw, draw

Made = TypeVar("Made")


@dataclass(frozen=True)
class Batch:
    """What one process sees of step `step`, before mixing.

    Attributes:
        crops: (1 + n, 3, side, side) float32 in [0, 1]; row 0 is row 1's predecessor in the global batch.
        labels: (1 + n,) int64, -1 where there is none.
        lam: MixUp weight of the picture itself, in [0.5, 1].
        answers: (n, classes), the teacher's logits on its view, where they were computed ahead.
        others: the same crops sampled at other sides.
    """

    crops: Tensor
    labels: Tensor
    lam: float
    answers: Tensor | None = None
    others: tuple[Tensor, ...] = ()

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed."""
        answers = None if self.answers is None else change(self.answers)
        return Batch(change(self.crops), change(self.labels), self.lam, answers, tuple(map(change, self.others)))

    def to(self, device: torch.device) -> "Batch":
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))


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
        other_sides: at which the same crops are wanted too, pixels.
    """

    split: CachedSplit
    seed: int
    batch: int
    side: int
    min_area: float = 0.05
    rank: int = 0
    world: int = 1
    other_sides: tuple[int, ...] = ()

    def draw(self, step: int) -> Draw:
        """The draws of the whole global batch."""
        return draw(self.seed, step, self.batch, len(self.split), self.split.sizes, min_area=self.min_area)

    def batch_at(self, step: int) -> Batch:
        """The batch of a step: the same whenever, wherever and in whichever order it is asked for."""
        drawn = self.draw(step)
        share = self.batch // self.world
        rows = np.arange(self.rank * share - 1, (self.rank + 1) * share) % self.batch
        indices = drawn.indices[rows]
        pictures, boxes = self.split.boxed(indices, drawn.boxes[rows])
        crops, *others = (
            crop_resize_flip(pictures, boxes, drawn.flips[rows], side) for side in (self.side, *self.other_sides)
        )
        return Batch(crops, self.split.labels(indices), drawn.lam, others=tuple(others))


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
    split: CachedSplit, side: int, short_side: int, batch: int, *, workers: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split once through in order, as evaluation sees it.

    Args:
        side: of the views, pixels.
        short_side: to which pictures are resized before the central square is cut, pixels.
        batch: pictures at a time.
        workers: threads that decode ahead, where pictures have to be decoded.

    Yields:
        views (n, 3, side, side) float32 in [0, 1], and labels (n,) int64.
    """

    def make(number: int) -> tuple[Tensor, Tensor]:
        indices = np.arange(number * batch, min((number + 1) * batch, len(split)))
        views = torch.stack([central_view(picture, short_side, side) for picture in split.pictures(indices)])
        return views.contiguous(memory_format=torch.channels_last), split.labels(indices)

    count = -(-len(split) // batch)
    return ahead(make, 0, count, workers) if split.store.decodes else map(make, range(count))
