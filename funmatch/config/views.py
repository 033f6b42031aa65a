"""Options that decide the training views: size, crops, MixUp, CutMix, RandAugment."""

from typing import Annotated, Literal

from funmatch.config.choices import CROP_RATIO, RESAMPLED_BEFORE, Crop, EvalResample, Resample
from funmatch.config.metadata import Changes, Group, Inherit, Opt
from funmatch.config.options import Options
from funmatch.runtime.functions import is_function_name

VIEWS = Changes.VIEWS
RESAMPLE: Resample = "tf"
EVAL_RESAMPLE: Resample = "antialias"
"""How training and evaluation views are resized by default. Trained without antialias, students become as good, and
views are made faster; evaluated with it, most are better, as timm's transform shows (results/resampling-cpu.md)."""


class Views(Options):
    """How images become training views, and how large views are."""

    # None, since pretrained networks have a size of their own.
    side: Annotated[
        int | None,
        Opt(group=Group.VIEWS, changes=VIEWS, inherit=Inherit.ALWAYS, at_least=1, at_most=10**4,
            aliases=("--img-size",), essential=True, usual="the student's own"),
    ] = None  # fmt: skip
    """Image size: side of the square views, in pixels."""
    eval_resize: Annotated[
        int | None,
        Opt(group=Group.VIEWS, changes=VIEWS, inherit=Inherit.ALWAYS, at_least=1, at_most=10**4,
            usual="the student's own; at another --side, 32 more than it, at most a quarter more"),
    ] = None  # fmt: skip
    """For evaluation, resize the shorter side to this many pixels, then crop the central square of --side."""
    crop_min_area: Annotated[float, Opt(group=Group.VIEWS, changes=VIEWS, policy=True, above=0, at_most=1)] = 0.05
    """Smallest share of an image's area that an Inception crop covers."""
    crop_ratio: Annotated[
        tuple[float, float],
        Opt(group=Group.VIEWS, changes=VIEWS, policy=True, above=0, at_most=100, aliases=("--ratio",),
            metavar="LEAST MOST"),
    ] = CROP_RATIO  # fmt: skip
    """Bounds of width / height of an Inception crop. TensorFlow's own end at 1.33, those of torchvision at 4/3."""
    crop: Annotated[
        Crop | None, Opt(group=Group.VIEWS, changes=VIEWS, policy=True, usual="inception", replaces=("resize",))
    ] = None
    """How an image becomes a training view. inception: a crop of random size and place. mild: a random square of
    --side, after resizing the shorter side to --resize. squash: the same, after resizing the whole image to a square.
    whole: all of the image, never mirrored."""
    resize: Annotated[
        int | None, Opt(group=Group.VIEWS, changes=VIEWS, at_least=1, at_most=10**4, usual="--eval-resize")
    ] = None
    """Length of the image's shorter side before a mild crop, in pixels."""
    resample: Annotated[
        Resample | None,
        Opt(group=Group.VIEWS, changes=VIEWS, inherit=Inherit.ALWAYS, usual=RESAMPLE, before=RESAMPLED_BEFORE),
    ] = None
    """How training views are resized. tf: bilinear without antialias, as tf.image.resize and the paper's code.
    antialias: bilinear with antialias. bicubic: with antialias, too. area: the mean of each pixel's area."""
    eval_resample: Annotated[
        EvalResample | None,
        Opt(group=Group.VIEWS, changes=VIEWS, inherit=Inherit.ALWAYS, usual=EVAL_RESAMPLE, before=RESAMPLED_BEFORE),
    ] = None
    """How images are resized for evaluation. With antialias (bilinear), bicubic, nearest, lanczos, box and hamming,
    timm's own transform gives the same figures; with area, the paper's code; with torchvision's own filters, that of
    transformers."""
    # None, not 1: a strategy or BiT-HyperRule has a default of its own.
    mixup: Annotated[
        float | None,
        Opt(group=Group.VIEWS, changes=VIEWS, policy=True, at_least=0, at_most=10**3, usual=1.0, metavar="A"),
    ] = None
    """MixUp: draw λ from Beta(a, a) with this a. 1 is uniform, 0 turns MixUp off."""
    mixup_mode: Annotated[Literal["batch", "image"], Opt(group=Group.VIEWS, changes=VIEWS)] = "batch"
    """Draw one λ (and one CutMix box) per batch, or one per image."""
    mixup_max: Annotated[bool, Opt(group=Group.VIEWS, changes=VIEWS)] = True
    """Use max(λ, 1 − λ), so that no image weighs less than the one it is mixed with."""
    mixup_lam: Annotated[
        float | None,
        Opt(group=Group.VIEWS, changes=VIEWS, policy=True, at_least=0, at_most=1, usual="drawn at every step",
            metavar="LAMBDA"),
    ] = None  # fmt: skip
    """Fixed λ of MixUp, in [0, 1]: the share of the image itself."""
    cutmix: Annotated[
        float, Opt(group=Group.VIEWS, changes=VIEWS, policy=True, at_least=0, at_most=10**3, metavar="A")
    ] = 0.0
    """CutMix (not in the paper): draw λ from Beta(a, a) with this a; 0 is off. With MixUp, one of the two is chosen at
    random per batch."""
    # A pair, so that one without the other cannot be given.
    randaugment: Annotated[
        tuple[int, int] | None,
        Opt(group=Group.VIEWS, changes=VIEWS, policy=True, usual="off", metavar="OPERATIONS MAGNITUDE"),
    ] = None
    """RandAugment (not in the paper) of the shared view: operations per image, and their magnitude from 0 to 30, e.g.
    2 9."""

    # Not searchable: the functions of a search would all have to be importable by name.
    augment: Annotated[
        str | None,
        Opt(group=Group.VIEWS, changes=VIEWS, usual="none", metavar="MODULE:FUNCTION", function=True, searchable=False),
    ] = None
    """Augmentation of your own: package.module:function of the crops, (n, 3, side, side) in [0, 1], and a
    torch.Generator, that gives crops of the same shape. It is applied before MixUp to the crops of student and
    teacher."""

    @property
    def cropped(self) -> Crop:
        """How images become training views."""
        return self.crop or "inception"

    @property
    def resampled(self) -> Resample:
        """How training views are resized."""
        return self.resample or RESAMPLE

    @property
    def mixes(self) -> bool:
        """Whether MixUp is on, as far as this is known without the data."""
        # None counts as on: the default is 1, except where BiT-HyperRule decides by the number of images.
        return self.mixup != 0

    @property
    def mixes_some(self) -> bool:
        """Whether MixUp is on for some of the images."""
        # Overridden by tables with policies, which set it image by image.
        return self.mixes

    @property
    def teacher_is_fixed(self) -> bool:
        """Whether a teacher's output for an image never changes, so that there is nothing to mix."""
        # Overridden by tables with a strategy; here, so that messages about mixing need not know which table it is.
        return False

    def problems(self) -> list[str]:
        found = [
            f"{name} ({size}) must be at least side ({self.side})"
            for name, size in (("eval_resize", self.eval_resize), ("resize", self.resize))
            if self.side and size and size < self.side
        ]
        found += [f"{name} belongs to Inception crops, not to {self.cropped} ones" for name in self._idle_of_crops()]
        if self.crop_ratio[0] > self.crop_ratio[1]:
            found.append(f"crop_ratio must be the least and the most, got {' '.join(map(str, self.crop_ratio))}")
        if self.resize and self.cropped not in ("mild", "squash"):
            found.append(f"resize belongs to mild crops (--crop mild or squash), not to {self.cropped} ones")
        # Every table ends with `super()`: without it the checks of the bases after it would be left out.
        if self.augment is not None and not is_function_name(self.augment):
            found.append(f"augment {self.augment!r} is not the name of a function; expected package.module:function")
        return found + self._mixing_problems() + super().problems()

    def _mixing_problems(self) -> list[str]:
        """Options of MixUp without MixUp, options that exclude each other, and RandAugment out of bounds."""
        found = []
        # 0 is reported below; 1 is the default, and a recipe or a file may spell it out.
        if self.mixup_lam is not None and self.mixup not in (None, 0, 1):
            found.append(f"mixup_lam fixes λ, so mixup {self.mixup} has no effect; set one of them")
        if self.mixup_lam is not None and not self.mixup_max:
            found.append("mixup_lam fixes λ, so mixup_max has no effect; set one of them")
        # Not by `Opt`: its bounds hold for each value of a tuple alike.
        if self.randaugment and not (self.randaugment[0] >= 1 and 0 <= self.randaugment[1] <= 30):
            found.append(
                "randaugment takes a number of operations from 1 on and a magnitude from 0 to 30, e.g. 2 9, got "
                f"{' '.join(map(str, self.randaugment))}"
            )
        hint = "leave it out" if self.teacher_is_fixed else "pass --mixup 1 too"
        return found + [f"{name} belongs to MixUp, which is off; {hint}" for name in self._idle_of_mixing()]

    def idle(self) -> list[str]:
        """Options that are set and have no effect, since others turn off what they belong to."""
        return self._idle_of_crops() + self._idle_of_mixing()

    def _idle_of_crops(self) -> list[str]:
        if self.cropped == "inception":
            return []
        return [name for name in ("crop_min_area", "crop_ratio") if self.moved(name)]

    def _idle_of_mixing(self) -> list[str]:
        if self.mixes_some:
            return []
        idle = [name for name in ("mixup_mode", "mixup_max", "mixup_lam") if self.moved(name)]
        # The mode decides how CutMix boxes are drawn, too.
        return [name for name in idle if not (name == "mixup_mode" and self.cutmix)]
