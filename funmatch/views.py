"""What the teachers and the student see of a batch: its crops, mixed."""

from collections.abc import Sequence

from torch import Tensor

from funmatch.augment import mixup
from funmatch.mixing import cutmix, kept


def seen(
    crops: Tensor, shown: Sequence[Tensor], lam: float | Tensor, cuts: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The teachers' views and the student's.

    A teacher that is shown the student's own crops gets the student's own view, the very same pixels: that is
    consistency, and with MixUp it is function matching (paper, section 3).

    Args:
        crops: the student's, (1 + n, 3, side, side) in [0, 1], row 0 being row 1's predecessor in the global batch.
        shown: the teachers', alike, each at its own side; `crops` itself where they are shared.
        lam: the MixUp weight of the picture itself, one or (n,); 1 is no MixUp.
        cuts: of CutMix, (1 or n, 4), or None.

    Returns:
        views of (n, 3, side, side) in [0, 1]: one for each of `shown`, and the student's.
    """

    def mixed(crops: Tensor) -> Tensor:
        own = mixup(crops, lam)
        return own if cuts is None else cutmix(crops, cuts, own)

    student = mixed(crops)
    return [student if each is crops else mixed(each) for each in shown], student


def own_share(lam: float | Tensor, cuts: Tensor | None, side: int) -> float | Tensor:
    """How much of each view is its own picture, one or (n,): the λ of its label."""
    return lam if cuts is None else lam * kept(cuts, side)
