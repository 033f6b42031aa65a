"""Ways to teach as tables: what student and teacher see of an image, and between which answers distance is."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Crop = Literal["inception", "mild", "squash", "whole"]
"""How an image becomes a view: an Inception crop, a random square of the resized image (keeping its shape, or of
the whole image resized to a square), or the whole image resized, never mirrored."""
TeacherInput = Literal["same", "own", "whole", "central", "ensemble"]


@dataclass(frozen=True)
class Strategy:
    """A row of the paper's table (section 3, figure 3).

    Attributes:
        crop: of the student's view.
        teacher: what the teacher sees: the same view; its own, drawn alike but independently; or always the same
            (fixed): the whole image, a central crop, or the mean of what it says of many Inception crops.
        mixup: the a of Beta(a, a) of MixUp's λ, where nobody said another; 0 is no MixUp.
    """

    crop: Crop
    teacher: TeacherInput
    mixup: float = 0.0

    @property
    def fixed(self) -> bool:
        """Whether the teacher's answer to an image never changes, so that it is computed once."""
        return self.teacher not in ("same", "own")

    @property
    def crops(self) -> tuple[Crop, ...]:
        """The crops that the strategy allows the student."""
        return ("mild", "squash") if self.crop == "mild" else (self.crop,)


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {
        "fix/rs": Strategy("whole", "whole"),
        "fix/cc": Strategy("mild", "central"),
        "fix/ic_ens": Strategy("inception", "ensemble"),
        "ind/rc": Strategy("mild", "own"),
        "ind/ic": Strategy("inception", "own"),
        "same/rc": Strategy("mild", "same"),
        "same/ic": Strategy("inception", "same"),
        "funmatch": Strategy("inception", "same", mixup=1.0),
    }
)
"""Function matching is consistent teaching (same/ic) with MixUp."""

DISTANCES: Mapping[str, bool] = MappingProxyType(
    {
        "kl": True,
        "reverse-kl": True,
        "js": True,
        "dist": True,
        "hard": False,
        "l2": False,
        "euclidean": False,
        "log-softmax-l2": False,
        "log-softmax-euclidean": False,
    }
)
"""The distances of `funmatch.distances`, and whether each is of probabilities at a temperature."""
