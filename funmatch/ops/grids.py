"""Describes views as sampling grids: where in its image each pixel of a view lies.

The grid is one formula: along each axis, the centre of pixel i of a view lies at start + i · step of its image, and
pixels from least to most may be read. It covers crops that are resized alone, crops of resized images, mirrored ones (a
negative step) and evaluation's views. `ops.resample` computes the pixels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from funmatch.config.choices import EvalResample, Resample

Sizes = tuple[np.ndarray, np.ndarray] | np.ndarray
"""Heights and widths of n images in pixels: two arrays of (n,), or one of (2, n)."""
TENSORFLOW: tuple[Resample, ...] = ("tf", "area")
"""Methods of TensorFlow, where lengths are rounded as in the paper's code; the others are Pillow's."""


@dataclass(frozen=True)
class SamplingGrid:
    """Where the pixels of n views are read.

    Attributes:
        corners: (n, 2) int64: the address of the pixel that coordinates are counted from (an address in memory, or an
            offset in a flat tensor), and the bytes of one row of the image.
        axes: (n, 2, 4) float64: start, step, least and most of the rows and of the columns, in pixels from there.
    """

    # Coordinates are counted from a pixel near the box, not from the memory's begin: places in a data set of more than
    # 2 GB do not fit into the float32 in which a device gets the axes.
    corners: np.ndarray
    axes: np.ndarray

    def flipped(self, flips: np.ndarray, side: int) -> "SamplingGrid":
        """Returns the grid with some of the views mirrored left to right.

        Args:
            flips: (n,) bool.
            side: of the views, pixels.
        """
        axes = self.axes.copy()
        # Read from the last pixel to the first; the clip stays, since it belongs to the image.
        start, step = axes[flips, 1, 0], axes[flips, 1, 1]
        axes[flips, 1, 0], axes[flips, 1, 1] = start + (side - 1) * step, -step
        return SamplingGrid(self.corners, axes)


def crop_then_resize(starts: np.ndarray, sizes: Sizes, boxes: np.ndarray, side: int) -> SamplingGrid:
    """Describes boxes that are cut out and resized alone, as by `crops.crop_resize_flip`.

    Args:
        starts: (n,) int64, where each image begins.
        sizes: heights and widths of the images, (n,) each.
        boxes: (n, 4) whole pixels: top, left, height, width; nothing beyond their edge is read.
        side: of the views, pixels.

    Raises:
        ValueError: a box is empty, or reaches beyond its image.
    """
    # Counted from the box's own corner, so that the clip to [0, length − 1] repeats the crop's edge.
    boxes = np.asarray(boxes, np.int64)
    lengths = boxes[:, 2:]
    return _grid(starts, sizes, boxes[:, :2], np.zeros((len(boxes), 2)), lengths, np.zeros_like(lengths), lengths, side)


def resize_then_crop(starts: np.ndarray, sizes: Sizes, boxes: np.ndarray, side: int) -> SamplingGrid:
    """Describes boxes that are cut out of resized images, as by `crops.crop_of_resized_flip`.

    Args:
        starts, sizes: as of `crop_then_resize`.
        boxes: (n, 4) pixels of the images, fractional: top, left, height, width.
        side: of the views, pixels.

    Raises:
        ValueError: a box is empty, or lies beyond its image.
    """
    boxes = np.asarray(boxes, np.float64)
    whole = np.floor(boxes[:, :2]).astype(np.int64)
    # A box may begin before the image does; the pixel that coordinates are counted from must lie in it.
    corner = np.clip(whole, 0, np.stack([*sizes], 1) - 1)
    ends = np.stack([*sizes], 1) - corner
    return _grid(starts, sizes, corner, boxes[:, :2] - corner, boxes[:, 2:], -corner, ends, side)


def central_squares(
    sizes: Sizes, short_side: int, side: int, *, squash: bool = False, method: EvalResample = "tf", floor: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the squares of the evaluation views: the short side resized, then a central square.

    Args:
        sizes: heights and widths of the images, (n,) each.
        short_side: short side of the resized images, pixels, at least `side`.
        side: of the views, pixels.
        squash: resize both sides to `short_side`, without regard to the image's aspect.
        method: how images are resized, which decides how lengths are rounded, too.
        floor: whether half a pixel at the square's corner is rounded down, as by transformers.

    Returns:
        heights and widths of the resized images, and top and left of the squares in them, (n, 2) whole numbers each.
    """
    original = np.stack([*sizes], 1).astype(np.float64)
    shortest = original.min(1)[:, None]
    if squash:
        resized = np.full_like(original, short_side)
    elif method in TENSORFLOW:
        # The short side's scale for both, rounded each for itself (halves to even), as in big_vision's `resize_small`.
        resized = np.maximum(side, np.rint(original * (short_side / shortest)))
    else:
        # As torchvision's Resize, which timm's transform uses.
        resized = np.floor(short_side * original / shortest)
    # torchvision's CenterCrop rounds halves to even.
    corner = (resized - side) // 2 if floor or method in TENSORFLOW else np.rint((resized - side) / 2)
    return resized, corner


def central_boxes(sizes: Sizes, short_side: int, side: int, **how: Any) -> np.ndarray:
    """Returns the boxes of the evaluation views in the images; arguments as of `central_squares`.

    Returns:
        (n, 4) pixels of the images, fractional: top, left, height, width.
    """
    resized, corner = central_squares(sizes, short_side, side, **how)
    scale = np.stack([*sizes], 1).astype(np.float64) / resized
    return np.concatenate([corner * scale, side * scale], 1)


def central_grid(starts: np.ndarray, sizes: Sizes, short_side: int, side: int, **how: Any) -> SamplingGrid:
    """Describes the evaluation views, as of `crops.central_view`; arguments as of `central_squares`."""
    return resize_then_crop(starts, sizes, central_boxes(sizes, short_side, side, **how), side)


def _grid(
    starts: np.ndarray,
    sizes: Sizes,
    corner: np.ndarray,
    rest: np.ndarray,
    lengths: np.ndarray,
    least: np.ndarray,
    ends: np.ndarray,
    side: int,
) -> SamplingGrid:
    """Builds the grid of boxes that begin `rest` beyond a whole pixel `corner` of their images.

    Args:
        starts, sizes, side: as of `crop_then_resize`.
        corner, rest: (n, 2) int64 and float64.
        lengths: of the boxes, (n, 2).
        least, ends: (n, 2), the first pixel that may be read and the one after the last, counted from the corner.
    """
    inside = np.stack([*sizes], 1)
    # The kernels read raw addresses without further checks; a box beyond its image would read foreign memory.
    if not ((corner + least >= 0) & (ends > least) & (corner + ends <= inside)).all():
        raise ValueError("a box is empty, or lies beyond its image")
    row = 3 * inside[:, 1].astype(np.int64)
    corners = np.stack([starts + corner[:, 0] * row + 3 * corner[:, 1], row], 1)
    step = lengths / side
    # Half-pixel centres: pixel i of the view lies at (i + 1/2) · step − 1/2 of the box.
    axes = np.stack([rest + 0.5 * step - 0.5, step, least, ends - 1], -1)
    return SamplingGrid(corners, axes)
