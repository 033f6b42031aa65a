"""Holds what one process sees of a training step, before mixing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from funmatch.ops.mixing import own_share
from funmatch.runtime.chunks import cuts


@dataclass(frozen=True)
class Batch:
    """What one process sees of step `step`, before mixing.

    Attributes:
        crops: (1 + n, 3, side, side) float32 in [0, 1]; row 0 is row 1's predecessor in the global batch.
        labels: (1 + n,) int64, -1 where there is none.
        lam: MixUp weight of the picture itself, in [0, 1]: one, or one a picture, (n,) float32.
        answers: (n, classes), the teacher's logits on its view, where they were computed before.
        cuts: of CutMix, (1 or n, 4) float32 as `mixing.cutmix` takes them, or None.
        shown: the teachers' crops, one for each of the loader's `teacher_sides`: `crops` itself where it is the same.
        step, first: of which step these are, and the place of row 1 in the batch of all processes.
    """

    crops: Tensor
    labels: Tensor
    lam: float | Tensor
    answers: Tensor | None = None
    shown: tuple[Tensor, ...] = ()
    cuts: Tensor | None = None
    step: int = 0
    first: int = 0

    @property
    def own_share(self) -> float | Tensor:
        """How much of each view is its own picture, one or (n,): the λ of its label."""
        return own_share(self.lam, self.cuts, self.crops.shape[-1])

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed; what is shared stays shared."""
        crops = change(self.crops)
        answers, cuts = (None if given is None else change(given) for given in (self.answers, self.cuts))
        lam = change(self.lam) if isinstance(self.lam, Tensor) else self.lam
        shown = tuple(crops if each is self.crops else change(each) for each in self.shown)
        return replace(self, crops=crops, labels=change(self.labels), lam=lam, answers=answers, shown=shown, cuts=cuts)

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
            cut = self.cuts if self.cuts is None or len(self.cuts) == 1 else self.cuts[rows]
            labels, first = self.labels[start : stop + 1], self.first + start
            yield Batch(crops, labels, lam, answers, shown, cut, self.step, first), (stop - start) / count
