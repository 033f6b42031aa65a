"""Holds the views on which inference modes are compared with plain fp32, and plain fp32's answers to them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

CHUNK_IMAGES = 64
"""Images in a forward pass, at most."""
VIEWS, VIEWS_NEAR_LIMIT = 256, 1024
"""Views on which a mode of 16 bits is compared, and those where its differences are near a limit."""
SECONDS = 5.0
"""Seconds of plain fp32 that more views than a run's share may take."""
MAX_ROW_NUMBERS, MAX_VIEW_NUMBERS = 1 << 25, 1 << 27
"""Numbers of answers and of views that are held at most: 128 and 512 MiB."""


@dataclass(frozen=True)
class FurtherViews:
    """The views that follow those of a run's first batch.

    Attributes:
        batches: of the first batch's shape and on its device, made as they are asked for.
        share: number of views, the first ones included, that are so small a part of the run that they may take as
            long as they do.
        key: everything that decides the batches, the images among it, as text; empty where that is not known.
    """

    batches: Iterator[Tensor] = field(default_factory=lambda: iter(()))
    share: int = 0
    key: str = ""


class Reference:
    """Plain fp32's answers to the views of a run's first batches, computed once for all modes.

    The first batch is always there. Further ones are computed up to a number of views, as long as they are within the
    run's share, or take `SECONDS` at most: a large teacher in a short run is compared on fewer.

    Args:
        first: views of the first batch, (n, 3, side, side) in [0, 1], on the teacher's device.
        further: the views that follow.

    """

    def __init__(self, first: Tensor, further: FurtherViews | None = None) -> None:
        self.first, self.further = first, further or FurtherViews()
        self.views: list[Tensor] = []
        self.rows: list[Tensor] = []
        self.seconds, self.newest = 0.0, 0.0

    def __len__(self) -> int:
        """Number of views with answers."""
        return sum(map(len, self.views))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches of views, (n, 3, side, side), and plain fp32's answers to them, (n, width)."""
        return zip(self.views, self.rows, strict=True)

    def extend(self, plain: Callable[[], nn.Module], count: int) -> bool:
        """Computes answers to further views until there are `count`, or no more are affordable.

        Args:
            plain: returns the teacher in plain fp32; called if there is something to compute.

        Returns:
            whether there are more than before.
        """
        before, teacher = len(self), None
        while len(self) < max(count, 1) and self._affords_more():
            began = time.perf_counter()
            views = next(self.further.batches, None) if self.views else self.first
            if views is None:
                break
            teacher = teacher or plain()
            self.rows.append(answer(teacher, views))
            self.views.append(views)
            self.newest = time.perf_counter() - began
            self.seconds += self.newest
        return len(self) > before

    @property
    def seconds_of_share(self) -> float:
        """Seconds that plain fp32 takes for the run's share of views."""
        return self.further.share * self.seconds / max(1, len(self))

    def _affords_more(self) -> bool:
        if not self.views:
            return True
        more = len(self) + len(self.first)
        rows, views = (more * each[0][0].numel() for each in (self.rows, self.views))
        if rows > MAX_ROW_NUMBERS or views > MAX_VIEW_NUMBERS:
            return False
        # By the newest batch: the very first forward pass takes longer than others do.
        return more <= self.further.share or self.seconds + self.newest <= SECONDS


def answer(teacher: Callable[[Tensor], Tensor], views: Tensor, *, whole: bool = False) -> Tensor:
    """Computes a teacher's answers to views, (n, width), a part of them at a time unless `whole`."""
    rows = torch.cat([teacher(part) for part in views.split(len(views) if whole else CHUNK_IMAGES)])
    if rows.device.type != "cpu":
        torch.accelerator.synchronize(rows.device)  # so that its time is what it took
    return rows
