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
    """This process's rows of the global batch of one step.

    Attributes:
        crops: the student's crops, (1 + n, 3, side, side) float32 in [0, 1]; row 0 is the predecessor of row 1 in the
            global batch, its MixUp and CutMix partner.
        labels: (1 + n,) int64, -1 for no label.
        lam: MixUp weight of the image itself, in [0, 1]: one, or one per image, (n,) float32.
        teacher_logits: (n, classes), where they are known without asking the teacher; else None.
        teacher_crops: one for each of the loader's `teacher_sides`, shaped as `crops`; None stands for `crops`, so
            that the teacher is given the very same pixels as the student.
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
        """Images of which there are views: n."""
        return len(self.labels) - 1

    @property
    def own_weight(self) -> float | Tensor:
        """Weight of a view's own label, one or (n,): λ, less what CutMix covers."""
        return own_weight(self.lam, self.cutmix_boxes, self.crops.shape[-1])

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with every tensor changed."""

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
        """The batch on a device."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

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
                first_row=self.first_row + start,
            )
            yield piece, (stop - start) / len(self)
