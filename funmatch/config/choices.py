"""The tables of strategies (which views of an image student and teacher get) and of distances."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from funmatch.runtime.functions import is_function_name

Crop = Literal["inception", "mild", "squash", "whole"]
"""How an image becomes a view: an Inception crop; a random square of the resized image (aspect ratio kept, or the
whole image squashed to a square); or the whole image resized, never mirrored."""
Resample = Literal["antialias", "bicubic", "area", "tf"]
"""How images are resized: bilinear with antialias (the default of PyTorch's and timm's transforms), bicubic with
antialias, by the mean of each pixel's area (as the paper's code evaluates), or bilinear without antialias
(`tf.image.resize`, as it trains)."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Bounds of width / height of Inception crops, in runs and tapes that do not say them."""
EvalResample = Literal[
    Resample, "nearest", "lanczos", "box", "hamming", "torchvision-nearest", "torchvision-bilinear",
    "torchvision-bicubic", "torchvision-lanczos",
]  # fmt: skip
"""How images are resized for evaluation: also by other filters of Pillow's, and by torchvision's own code."""
RESAMPLED_BEFORE: Resample = "tf"
"""How images were resized by runs, tapes and students that do not say it: there was no choice yet."""
Fit = Literal["squash", "keep"]
"""How images of shards are resized to a side: to a square, or the shorter side with the aspect kept."""
ShardResample = Literal["antialias", "bicubic", "tf"]
"""The methods of `Resample` by which images of shards are resized."""
TaskName = Literal["multiclass", "multilabel"]
"""What labels and outputs mean: one class an image, or any number of them (`ops.tasks`)."""
TeacherInput = Literal["same", "own", "whole", "central", "ensemble"]


@dataclass(frozen=True)
class Strategy:
    """A row of the paper's table (section 3, figure 3).

    Attributes:
        crop: the student's crop.
        teacher: the teacher's view: the same one; one of its own, drawn from the same distribution; or a fixed one:
            the whole image, a central crop, or many Inception crops, whose mean output counts.
        mixup: the default a of Beta(a, a), from which MixUp's λ is drawn; 0 is no MixUp.
    """

    crop: Crop
    teacher: TeacherInput
    mixup: float = 0.0

    @property
    def fixed(self) -> bool:
        """Whether the teacher's output for an image never changes, so that it is computed once."""
        # By exclusion: every view of the teacher that is not drawn anew in each step is fixed.
        return self.teacher not in ("same", "own")

    @property
    def crops(self) -> tuple[Crop, ...]:
        """The crops that the strategy allows the student."""
        # Squash is a mild crop of an image resized otherwise, so no row of its own is needed for it.
        return ("mild", "squash") if self.crop == "mild" else (self.crop,)


# Read-only, since one table serves all runs of a process. `--help` lists it from the last row, so that the default
# stands first.
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
"""Function matching is the consistent strategy same/ic with MixUp."""


@dataclass(frozen=True)
class Distance:
    """What the checks of options need to know about a distance of `funmatch.ops.distances`.

    Attributes:
        tempered: whether it compares probabilities at a temperature.
        couples_batch: whether it compares the images of a batch with each other, so that a batch cannot be cut.
        needs_all_classes: whether it wants all of the teacher's logits.
        needs_top_class: whether only the teacher's top class counts.
        smooths: whether it takes label smoothing.
        multilabel: whether it compares the outputs of classes that are independent of each other.
    """

    tempered: bool = False
    couples_batch: bool = False
    needs_all_classes: bool = True
    needs_top_class: bool = False
    smooths: bool = False
    multilabel: bool = False


DISTANCES: Mapping[str, Distance] = MappingProxyType(
    {
        # Divergences of probabilities can be computed on top classes and one for the mass of all others.
        "kl": Distance(tempered=True, needs_all_classes=False, multilabel=True),
        "reverse-kl": Distance(tempered=True, needs_all_classes=False, multilabel=True),
        "js": Distance(tempered=True, needs_all_classes=False),
        # DIST correlates each class over the images of a batch, too.
        "dist": Distance(tempered=True, couples_batch=True),
        "hard": Distance(needs_top_class=True, smooths=True),
        "l2": Distance(multilabel=True),
        "euclidean": Distance(multilabel=True),
        "log-softmax-l2": Distance(),
        "log-softmax-euclidean": Distance(),
    }
)
"""The distances between the outputs of student and teacher, by name."""


def find_distance(name: str) -> Distance | None:
    """Returns the row of a distance, None where there is none; a user's function takes all logits of each image."""
    return Distance(multilabel=True) if is_function_name(name) else DISTANCES.get(name)


CORRUPTIONS = (
    "noise", "blur", "brightness", "darkness", "contrast", "saturation", "jpeg", "solarize", "posterize", "elastic",
    "pixelate",
)  # fmt: skip
"""Names of `ops/corruptions.py`, for checks before torch is loaded."""
