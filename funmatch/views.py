"""Teaching strategies: what the teacher and what the student see of a batch (paper, section 3, figure 3)."""

from collections.abc import Callable

from torch import Tensor

from funmatch.augment import mixup

Strategy = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def funmatch(crops: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """Function matching: one shared Inception crop, mixed; both see the very same pixels."""
    shared = mixup(crops, lam)
    return shared, shared


def same_inception_crop(crops: Tensor, _lam: float) -> tuple[Tensor, Tensor]:
    """Consistent teaching without mixing: one shared Inception crop."""
    shared = crops[1:]
    return shared, shared


STRATEGIES: dict[str, Strategy] = {"funmatch": funmatch, "same/ic": same_inception_crop}
"""Each takes crops (1 + n, 3, side, side), row 0 being row 1's predecessor in the global batch, and the MixUp
weight, and gives (teacher's view, student's view), each (n, 3, side, side) in [0, 1]."""

MIXED = {"funmatch"}
"""The strategies whose labels, where labels are used, are mixed as the views are."""
