"""Changes images by RandAugment: a few operations drawn for each image, all of the same magnitude.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space" (2019), with the
operations and ranges of torchvision. The operations are drawn on the CPU for the global batch, as all random choices
are, and `apply_operations` is a pure function of images and draws. So each process takes its rows of both, with that of
its first image's predecessor, and changes that image as the process does to which it belongs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torchvision.transforms.v2.functional as F
from torch import Tensor

MAX_MAGNITUDE = 30
"""The magnitude at which operations reach their strongest."""
FILL = [0.5] * 3
"""Colour of the pixels that geometric operations move in from beyond the border."""


@dataclass(frozen=True)
class Operation:
    """One way to change images.

    Attributes:
        change: maps images (k, 3, side, side) and a strength to changed images.
        weakest, strongest: strengths at magnitudes 0 and `MAX_MAGNITUDE`; linear in between.
        signed: half of the strengths are negative.
    """

    change: Callable[[Tensor, float], Tensor]
    weakest: float = 0.0
    strongest: float = 0.0
    signed: bool = False


def _affine(
    images: Tensor, *, across: float = 0.0, down: float = 0.0, tangents: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Translates images by whole pixels, or shears them about their upper left corner.

    Args:
        images: (k, 3, side, side).
        across, down: translation in fractions of the side.
        tangents: of the shear's angles along x and y.
    """
    side = images.shape[-1]
    angles = [math.degrees(math.atan(tangent)) for tangent in tangents]
    # Truncated to whole pixels as torchvision's RandAugment does, and fractions of a pixel would blur the image.
    shift = [float(int(share * side)) for share in (across, down)]
    return F.affine(images, 0.0, shift, 1.0, angles, fill=FILL, center=[0, 0])


def _posterize(images: Tensor, bits: float) -> Tensor:
    """Keeps the highest bits of each channel; 8 are all that there are."""
    # Skipped, since torchvision's posterize would round float images to 256 levels even then.
    return images if round(bits) == 8 else F.posterize(images, round(bits))


# The strength's unit: tangent (shear), fraction of the side (translate), degrees counterclockwise (rotate), what is
# added to a factor of 1 (brightness to sharpness), bits (posterize), the value above which it is inverted (solarize).
# Geometric operations take the nearest pixel, as in the paper. New operations go to the end: draws are indices.
OPERATIONS: dict[str, Operation] = {
    "identity": Operation(lambda images, _: images),
    "shear-x": Operation(lambda images, s: _affine(images, tangents=(s, 0.0)), 0, 0.3, signed=True),
    "shear-y": Operation(lambda images, s: _affine(images, tangents=(0.0, s)), 0, 0.3, signed=True),
    "translate-x": Operation(lambda images, s: _affine(images, across=s), 0, 150 / 331, signed=True),
    "translate-y": Operation(lambda images, s: _affine(images, down=s), 0, 150 / 331, signed=True),
    "rotate": Operation(lambda images, s: F.rotate(images, s, fill=FILL), 0, 30, signed=True),
    "brightness": Operation(lambda images, s: F.adjust_brightness(images, 1 + s), 0, 0.9, signed=True),
    "color": Operation(lambda images, s: F.adjust_saturation(images, 1 + s), 0, 0.9, signed=True),
    "contrast": Operation(lambda images, s: F.adjust_contrast(images, 1 + s), 0, 0.9, signed=True),
    "sharpness": Operation(lambda images, s: F.adjust_sharpness(images, 1 + s), 0, 0.9, signed=True),
    "posterize": Operation(_posterize, 8, 4),
    "solarize": Operation(lambda images, s: F.solarize(images, s), 1, 0),
    "autocontrast": Operation(lambda images, _: F.autocontrast(images)),
    "equalize": Operation(lambda images, _: F.equalize(images)),
}
"""The operations by name, in the order of the indices that are drawn."""


def draw_operations(
    rng: np.random.Generator, n: int, operations: int, magnitude: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the operations for each of n images, the global batch.

    Args:
        rng: source of the uniform numbers.
        n: images.
        operations: how many are applied to each image, one after another.
        magnitude: in [0, `MAX_MAGNITUDE`].

    Returns:
        the operations' indices in `OPERATIONS`, (n, operations) int64, and their strengths, (n, operations) float64.
    """
    # Row i belongs to image i, so that draws are sliced as the images are.
    ops = (rng.random((n, operations)) * len(OPERATIONS)).astype(np.int64)
    # A sign is drawn for operations without one too, so that no image's draws depend on another's operation.
    is_negative = rng.random((n, operations)) < 0.5
    share = magnitude / MAX_MAGNITUDE
    strengths = np.array([each.weakest + (each.strongest - each.weakest) * share for each in OPERATIONS.values()])
    is_signed = np.array([each.signed for each in OPERATIONS.values()])
    return ops, np.where(is_negative & is_signed[ops], -strengths[ops], strengths[ops])


def apply_operations(views: Tensor, ops: np.ndarray, strengths: np.ndarray) -> Tensor:
    """Applies to each image the operations that were drawn for it.

    Args:
        views: (m, 3, side, side) float32 in [0, 1], on any device.
        ops, strengths: (m, operations) each, of these images, from `draw_operations`.

    Returns:
        the changed images, of the same shape, in [0, 1].
    """
    # Cloned: the same crops may be another teacher's or another student's.
    views, changes = views.clone(), [each.change for each in OPERATIONS.values()]
    for column, strength in zip(ops.T, strengths.T, strict=True):
        # Images with the same operation and strength are changed in one call: at most 23 calls instead of m. No
        # operation mixes images, so an image's result does not depend on the others in its process.
        for op, s in sorted(set(zip(column.tolist(), strength.tolist(), strict=True))):
            rows = np.flatnonzero((column == op) & (strength == s))
            views[rows] = changes[op](views[rows], s)
    # Sharpness and contrast go beyond [0, 1].
    return views.clamp_(0, 1)
