"""Holds what one process sees of a training step, before mixing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from funmatch.ops.mixing import own_weight
from funmatch.runtime.chunks import even_chunks


@dataclass(frozen=True)
class Batch:
    """What one process sees of step `step`, before mixing.

    Attributes:
        crops: (1 + n, 3, side, side) float32 in [0, 1]; row 0 is row 1's predecessor in the global batch.
        labels: (1 + n,) int64, -1 where there is none.
        lam: MixUp weight of the image itself, in [0, 1]: one, or one an image, (n,) float32.
        answers: (n, classes), the teacher's logits on its view, where they were computed before.
        cuts: of CutMix, (1 or n, 4) float32 as `mixing.cutmix` takes them, or None.
        shown: the teachers' crops, one for each of the loader's `teacher_sides`: `crops` itself where it is the same.
        step, first: of which step these are, and the place of row 1 in the batch of all processes.
    """

    crops: Tensor
    labels: Tensor
    lam: float | Tensor
    teacher_logits: Tensor | None = None
    teacher_crops: tuple[Tensor, ...] = ()
    cutmix_boxes: Tensor | None = None
    step: int = 0
    first_row: int = 0

    @property
    def own_weight(self) -> float | Tensor:
        """How much of each view is its own image, one or (n,): the λ of its label."""
        return own_weight(self.lam, self.cutmix_boxes, self.crops.shape[-1])

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed; what is shared stays shared."""
        crops = change(self.crops)
        answers, cuts = (None if given is None else change(given) for given in (self.teacher_logits, self.cutmix_boxes))
        lam = change(self.lam) if isinstance(self.lam, Tensor) else self.lam
        shown = tuple(crops if each is self.crops else change(each) for each in self.teacher_crops)
        return replace(
            self,
            crops=crops,
            labels=change(self.labels),
            lam=lam,
            teacher_logits=answers,
            teacher_crops=shown,
            cutmix_boxes=cuts,
        )

    def to(self, device: torch.device) -> "Batch":
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pieces(self, size: int | None) -> Iterator[tuple["Batch", float]]:
        """The batch in even pieces of at most so many images, each with its predecessor, and the share that it is."""
        count = len(self.labels) - 1
        for start, stop in pairwise(even_chunks(count, size)):
            crops, rows = self.crops[start : stop + 1], slice(start, stop)
            answers = None if self.teacher_logits is None else self.teacher_logits[rows]
            lam = self.lam[rows] if isinstance(self.lam, Tensor) else self.lam
            shown = tuple(crops if each is self.crops else each[start : stop + 1] for each in self.teacher_crops)
            cut = (
                self.cutmix_boxes
                if self.cutmix_boxes is None or len(self.cutmix_boxes) == 1
                else self.cutmix_boxes[rows]
            )
            labels, first = self.labels[start : stop + 1], self.first_row + start
            yield Batch(crops, labels, lam, answers, shown, cut, self.step, first), (stop - start) / count
