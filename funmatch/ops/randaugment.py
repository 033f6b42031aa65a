"""RandAugment: a few operations drawn for every image, all equally strong.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space" (2019), with the
operations and ranges of torchvision. What is done to which image is drawn as everything else is, on the CPU for the
global batch; `apply` is a pure function of images and draws. So each process takes its rows of both, that of its
first image's predecessor among them, and changes that image as the process does whose own it is.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torchvision.transforms.v2.functional as F
from torch import Tensor

MAX_MAGNITUDE = 30
"""The magnitude at which an operation is as strong as it can be."""
FILL = [0.5] * 3
"""What is moved in from beyond the border."""


@dataclass(frozen=True)
class Operation:
    """One way to change images.

    Attributes:
        change: images (k, 3, side, side) and a strength to images.
        weakest, strongest: the strengths at magnitudes 0 and `STRONGEST`; between them it is linear.
        signed: whether half of the strengths are negative.
    """

    change: Callable[[Tensor, float], Tensor]
    weakest: float = 0.0
    strongest: float = 0.0
    signed: bool = False


def _moved(images: Tensor, *, across: float = 0.0, down: float = 0.0, lean: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """Images moved by whole pixels, or sheared about their upper left corner by angles whose tangents are given."""
    side = images.shape[-1]
    shear = [math.degrees(math.atan(tangent)) for tangent in lean]
    shift = [float(int(share * side)) for share in (across, down)]
    return F.affine(images, 0.0, shift, 1.0, shear, fill=FILL, center=[0, 0])


def _posterized(images: Tensor, bits: float) -> Tensor:
    """Images of which each channel has so many bits; 8 are all that they have."""
    return images if round(bits) == 8 else F.posterize(images, round(bits))


OPERATIONS: dict[str, Operation] = {
    "identity": Operation(lambda images, _: images),
    "shear-x": Operation(lambda images, s: _moved(images, lean=(s, 0.0)), 0, 0.3, signed=True),
    "shear-y": Operation(lambda images, s: _moved(images, lean=(0.0, s)), 0, 0.3, signed=True),
    "translate-x": Operation(lambda images, s: _moved(images, across=s), 0, 150 / 331, signed=True),
    "translate-y": Operation(lambda images, s: _moved(images, down=s), 0, 150 / 331, signed=True),
    "rotate": Operation(lambda images, s: F.rotate(images, s, fill=FILL), 0, 30, signed=True),
    "brightness": Operation(lambda images, s: F.adjust_brightness(images, 1 + s), 0, 0.9, signed=True),
    "color": Operation(lambda images, s: F.adjust_saturation(images, 1 + s), 0, 0.9, signed=True),
    "contrast": Operation(lambda images, s: F.adjust_contrast(images, 1 + s), 0, 0.9, signed=True),
    "sharpness": Operation(lambda images, s: F.adjust_sharpness(images, 1 + s), 0, 0.9, signed=True),
    "posterize": Operation(_posterized, 8, 4),
    "solarize": Operation(lambda images, s: F.solarize(images, s), 1, 0),
    "autocontrast": Operation(lambda images, _: F.autocontrast(images)),
    "equalize": Operation(lambda images, _: F.equalize(images)),
}
"""All of them, and in what a strength is said: a tangent (shear), a share of the side (translate), degrees, counter-
clockwise (rotate), what is added to a factor of 1 (brightness to sharpness), bits (posterize), the value from which on
a channel is inverted (solarize; at magnitude 0 what is quite white). Where pixels are moved the nearest is taken, as in
the paper, and what comes in from beyond the border is mid-grey."""


def draw_operations(
    rng: np.random.Generator, n: int, operations: int, magnitude: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draws what is done to each of n images, the global batch.

    Args:
        rng: where the uniform numbers come from.
        n: images.
        operations: how many one after another on each.
        magnitude: how strong they are, in [0, `STRONGEST`].

    Returns:
        which operations, (n, operations) int64, by their place in `OPERATIONS`, and the strengths, (n, operations)
        float64. Row i is of image i, so both are sliced as the images are.
    """
    ops = (rng.random((n, operations)) * len(OPERATIONS)).astype(np.int64)
    negative = rng.random((n, operations)) < 0.5
    share = magnitude / MAX_MAGNITUDE
    strengths = np.array([each.weakest + (each.strongest - each.weakest) * share for each in OPERATIONS.values()])
    signed = np.array([each.signed for each in OPERATIONS.values()])
    return ops, np.where(negative & signed[ops], -strengths[ops], strengths[ops])


def apply_operations(views: Tensor, ops: np.ndarray, strengths: np.ndarray) -> Tensor:
    """Changes every image as was drawn for it.

    Images that share an operation and its strength are changed together; what becomes of one does not depend on
    which others there are.

    Args:
        views: (m, 3, side, side) float32 in [0, 1], on any device.
        ops, strengths: of these images, (m, operations) each, from `draw`.

    Returns:
        as the views.
    """
    views, changes = views.clone(), [each.change for each in OPERATIONS.values()]
    for column, strength in zip(ops.T, strengths.T, strict=True):
        for op, s in sorted(set(zip(column.tolist(), strength.tolist(), strict=True))):
            rows = np.flatnonzero((column == op) & (strength == s))
            views[rows] = changes[op](views[rows], s)
    return views.clamp_(0, 1)
