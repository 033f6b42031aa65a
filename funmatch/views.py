"""What the teachers and the student see of a batch: its crops, mixed."""

from collections.abc import Sequence

from torch import Tensor

from funmatch.augment import mixup


def seen(crops: Tensor, shown: Sequence[Tensor], lam: float | Tensor) -> tuple[list[Tensor], Tensor]:
    """The teachers' views and the student's.

    A teacher that is shown the student's own crops gets the student's own view, the very same pixels: that is
    consistency, and with MixUp it is function matching (paper, section 3).

    Args:
        crops: the student's, (1 + n, 3, side, side) in [0, 1], row 0 being row 1's predecessor in the global batch.
        shown: the teachers', alike, each at its own side; `crops` itself where they are shared.
        lam: the MixUp weight of the picture itself, one or (n,); 1 is no MixUp.

    Returns:
        views of (n, 3, side, side) in [0, 1]: one for each of `shown`, and the student's.
    """
    student = mixup(crops, lam)
    return [student if each is crops else mixup(each, lam) for each in shown], student
