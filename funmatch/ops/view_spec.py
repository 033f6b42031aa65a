"""Holds, as one value each, everything that decides the training views of a run, and its evaluation views.

Two runs with equal specs and equal images have the same views at every step. So one object answers all questions
of that kind: whether students can share crops, whether a tape belongs to a run, whether kept logits are still valid.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any

from torch import Tensor

from funmatch.config.choices import CROP_RATIO, RESAMPLED_BEFORE, EvalResample, Resample
from funmatch.ops.crops import central_view
from funmatch.ops.mixing import MixupOptions
from funmatch.ops.sampling import SAMPLING_VERSION
from funmatch.runtime.disk.records import list_differences

MILD = ("mild", "squash")
"""Crops that are cut out of a resized image."""


def complete_key(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a stored key with what it leaves out: how images are cropped and resized, where it was no choice."""
    return {"resample": RESAMPLED_BEFORE, "ratio": [*CROP_RATIO], **stored}


def list_key_differences(then: Mapping[str, Any], now: Mapping[str, Any], where: str) -> list[str]:
    """Lists in which options two keys differ, a line each; `where` says where the first is stored."""
    return list_differences(complete_key(then), complete_key(now), where, {"pictures": "images"})


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the view of evaluation: resized, and a central square of it cut out.

    Attributes:
        side: of the view, pixels.
        short_side: of the resized image, pixels, at least `side`.
        squash: whether both sides are resized to `short_side`, which changes the aspect ratio.
        resample: how images are resized.
        floor: whether half a pixel at the square's corner is rounded down, as by transformers.
    """

    side: int
    short_side: int
    squash: bool = False
    resample: EvalResample = "tf"
    floor: bool = False

    def view(self, image: Tensor) -> Tensor:
        """Returns the view of an image, (3, side, side) float32 in [0, 1]; the image is (height, width, 3) uint8."""
        return central_view(image, self.short_side, self.side, **self.shape)

    @property
    def shape(self) -> dict[str, Any]:
        """How images are resized and cut, as arguments of `ops.crops.central_view`."""
        return {"squash": self.squash, "method": self.resample, "floor": self.floor}

    def __str__(self) -> str:
        names = {"tf": "bilinear without antialias", "antialias": "bilinear", "area": "by area"}
        what = "both sides" if self.squash else "the short side"
        how = names.get(self.resample, self.resample)
        return f"{what} resized to {self.short_side} pixels ({how}), then the central {self.side} × {self.side}"


@dataclass(frozen=True)
class ViewSpec:
    """What the views of step t are, as a function of t.

    Every field is part of the key unless its metadata says otherwise, so a field that is added later can never be
    forgotten there: it makes old tapes other tapes.

    Attributes:
        seed: seed of every draw.
        batch: images in the *global* batch; may exceed the number of images.
        side: image size of the student's crops, pixels.
        min_area: smallest share of an image that an Inception crop covers, in (0, 1].
        ratio: bounds of width / height of an Inception crop.
        crop: how an image becomes a view; see `sampling.box_sampler`.
        resize: short side from which a mild crop is cut, pixels; 0 for other crops.
        resample: how crops are resized.
        mixup: how MixUp's λ is drawn.
        cutmix: a of Beta(a, a), from which CutMix's λ is drawn; 0 turns CutMix off.
        randaugment: (operations per image, magnitude), or None.
        sampling: order of the images: shuffled, or balanced (`order.BalancedOrder`).
        augment: the user's function that augments crops, by its name, or None.
        own_teacher_view: whether the teacher is shown crops drawn independently of the student's.
        native: whether the native CPU kernel cuts the crops, which rounds otherwise than torch.
        version: version of the draws themselves.
        policies: shares in the images, whole numbers, and the spec of each view policy; all else in these specs is as
            here. Without any, all images have this spec.
        sources: share, a whole number, and number of images of each source of the training images
            (`order.SharedOrder`); empty where their numbers decide.
    """

    seed: int
    batch: int
    side: int
    min_area: float = 0.05
    # Both part of the key only where they are not those of all runs before there was a choice.
    ratio: tuple[float, float] = field(default=CROP_RATIO, metadata={"key": None})
    crop: str = "inception"
    resize: int = 0
    resample: Resample = field(default="tf", metadata={"key": None})
    mixup: MixupOptions = MixupOptions()  # noqa: RUF009  (frozen)
    cutmix: float = 0.0
    randaugment: tuple[int, int] | None = None
    # Both part of the key only where they are set: tapes of runs without them stay what they are.
    sampling: str = field(default="shuffled", metadata={"key": None})
    augment: str | None = field(default=None, metadata={"key": None})
    own_teacher_view: bool = field(default=False, metadata={"key": "teacher_sees"})
    # A tape stores logits in fp16: the kernel's rounding of a crop (below 1e-5) is not worth running the teacher again.
    native: bool = field(default=True, metadata={"key": None})
    version: int = field(default=SAMPLING_VERSION, metadata={"key": "draws"})
    # Both part of the key only where there are some.
    policies: tuple[tuple[int, "ViewSpec"], ...] = field(default=(), metadata={"key": None})
    sources: tuple[tuple[int, int], ...] = field(default=(), metadata={"key": None})

    def key(self) -> dict[str, Any]:
        """The spec as JSON values, by the names that tapes store; what does not apply to the crop is None."""
        if self.policies:
            # What every policy sets for itself is not of the run, whose own values then decide nothing.
            keys, shares = [each.key() for _, each in self.policies], [share for share, _ in self.policies]
            names = [name for name in sorted({*chain(*keys)}) if len({repr(key.get(name)) for key in keys}) > 1]
            parts = [[share, {name: key.get(name) for name in names}] for share, key in zip(shares, keys, strict=True)]
            return keys[0] | {"policies": parts}
        # A field without `key` gets its own name; only an explicit None leaves it out.
        named = {each.name: each.metadata.get("key", each.name) for each in fields(self)}
        found = {key: getattr(self, name) for name, key in named.items() if key is not None}
        lam = self.mixup
        # None where this crop ignores an option: specs that show the same views must have the same key.
        found |= {"augment": self.augment} if self.augment else {}
        found |= {"sampling": self.sampling} if self.sampling != "shuffled" else {}
        found |= {"ratio": [*self.ratio]} if self.crop == "inception" and self.ratio != CROP_RATIO else {}
        found |= {"sources": [[*each] for each in self.sources]} if self.sources else {}
        found |= {"resample": self.resample} if self.resample != RESAMPLED_BEFORE else {}
        return found | {
            "mixup": [lam.a, lam.per_image, lam.take_max, lam.lam],
            "resize": self.resize if self.crop in MILD else None,
            "min_area": self.min_area if self.crop == "inception" else None,
            "teacher_sees": "its own view" if self.own_teacher_view else "the student's",
        }

    def differences(self, other: "ViewSpec") -> dict[str, tuple[Any, Any]]:
        """Fields in which two specs differ, with both values."""
        pairs = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        found = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
        # The specs of policies repeat what holds for all images.
        return {name: pair for name, pair in found.items() if name != "policies" or len(found) == 1}
