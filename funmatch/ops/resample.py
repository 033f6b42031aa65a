"""Crops of many images at once, of any sizes: what an accelerator wants, and the CPU's own kernel.

The same bilinear resampling as `augment`, said in numbers: on each axis pixel i of a view is read at
clip(start + i · step, least, most) of its image. With that one formula go crops that are resized alone, crops of
resized images, mirrored ones (a step below 0), and the central view of evaluation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from funmatch.ops.native import library

TOLERANCE = 1e-5


@dataclass(frozen=True)
class SamplingGrid:
    """Where n views are read from.

    Attributes:
        corners: (n, 2) int64: where in the memory the pixel lies from which places are counted, and the bytes of a row.
        axes: (n, 2, 4) float64: of rows and of columns start, step, least, most; in pixels, counted from that pixel.
    """

    corners: np.ndarray
    axes: np.ndarray

    def flipped(self, flips: np.ndarray, side: int) -> "SamplingGrid":
        """The same, some of them mirrored left to right.

        Args:
            flips: (n,) bool.
            side: of the views, pixels.
        """
        axes = self.axes.copy()
        start, step = axes[flips, 1, 0], axes[flips, 1, 1]
        axes[flips, 1, 0], axes[flips, 1, 1] = start + (side - 1) * step, -step
        return SamplingGrid(self.corners, axes)


def crop_then_resize(starts, sizes, boxes, side: int) -> SamplingGrid:
    """Boxes that are cut out and resized alone, as `augment.crop_resize_flip` does: nothing beyond their edge is read.

    Args:
        starts: (n,) where each image begins.
        sizes: heights and widths, (n,) each.
        boxes: (n, 4) whole pixels: top, left, height, width.
        side: of the views, pixels.
    """
    boxes = np.asarray(boxes, np.int64)
    lengths = boxes[:, 2:]
    return _looks(
        starts, sizes, boxes[:, :2], np.zeros((len(boxes), 2)), lengths, np.zeros_like(lengths), lengths, side
    )


def resize_then_crop(starts, sizes, boxes, side: int) -> SamplingGrid:
    """Boxes that are cut out of resized images, as `augment.sample_flip` does.

    Args:
        boxes: (n, 4) pixels of the images, fractional: top, left, height, width.
    """
    boxes = np.asarray(boxes, np.float64)
    whole = np.floor(boxes[:, :2]).astype(np.int64)
    # A box may begin before the image does; the pixel from which places are counted must lie in it.
    inside = np.clip(whole, 0, np.stack(sizes, 1) - 1)
    ends = np.stack(sizes, 1) - inside
    return _looks(starts, sizes, inside, boxes[:, :2] - inside, boxes[:, 2:], -inside, ends, side)


def central_grid(starts, sizes, short_side: int, side: int, *, squash: bool = False) -> SamplingGrid:
    """The evaluation views, as `augment.central_view` sees them.

    Args:
        short_side: of the resized images, pixels.
        side: of the views, pixels.
        squash: resize both sides to `short_side`.
    """
    given = np.stack(sizes, 1).astype(np.float64)
    if squash:
        resized = np.full_like(given, short_side)
    else:
        # Python's round, to even, as the view of one image has it.
        resized = np.maximum(side, np.rint(given * (short_side / given.min(1))[:, None]))
    scale = given / resized
    corner = (resized - side) // 2 * scale
    return resize_then_crop(starts, sizes, np.concatenate([corner, side * scale], 1), side)


def _looks(starts, sizes, corner, rest, lengths, least, ends, side: int) -> SamplingGrid:
    """Looks at boxes that begin `rest` beyond a whole pixel `corner` of their images, (n, 2) each.

    Args:
        least, ends: the first pixel that may be read and the one after the last, counted from the corner.
    """
    inside = np.stack(sizes, 1)
    if not ((corner + least >= 0) & (ends > least) & (corner + ends <= inside)).all():
        raise ValueError("a box is empty, or lies beyond its image")
    row = 3 * inside[:, 1].astype(np.int64)
    corners = np.stack([starts + corner[:, 0] * row + 3 * corner[:, 1], row], 1)
    step = lengths / side
    axes = np.stack([rest + 0.5 * step - 0.5, step, least, ends - 1], -1)
    return SamplingGrid(corners, axes)


def sample_by_gather(flat: Tensor, corners: Tensor, axes: Tensor, side: int) -> Tensor:
    """The views, by indexing: slow, but for any device, and what a kernel is held against.

    Args:
        flat: images as they lie in memory one after another, each (height, width, 3) of uint8.
        corners, axes: as `Looks` has them, on the device of `flat`.
        side: of the views, pixels.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    start, step, least, most = axes[..., None].unbind(2)
    at = torch.minimum(torch.maximum(start + torch.arange(side, device=axes.device) * step, least), most)
    first = at.floor()
    share = (at - first).float()
    near, far = first.long(), torch.minimum(first + 1, most).long()
    row = corners[:, 1:]
    rows = [corners[:, :1] + each[:, 0] * row for each in (near, far)]
    columns = [3 * each[:, 1] for each in (near, far)]
    channel = torch.arange(3, device=axes.device)

    def read(rows: Tensor, columns: Tensor) -> Tensor:
        return flat[rows[:, :, None, None] + columns[:, None, :, None] + channel].float()

    down, across = share[:, 0, :, None, None], share[:, 1, None, :, None]
    left, right = (torch.lerp(read(rows[0], each), read(rows[1], each), down) for each in columns)
    return (torch.lerp(left, right, across) / 255).permute(0, 3, 1, 2)


@cache
def why_unavailable() -> str:
    """Why the CPU's own kernel cannot be had here; empty where it can."""
    return library.why_unavailable() or ("" if _computes() else "what the compiler made of it computes something else")


def _computes() -> bool:
    """Whether the kernel reads what indexing reads, of a mirrored crop and of one that reaches beyond its image."""
    image = torch.arange(0, 180, 2, dtype=torch.uint8)[:60].view(4, 5, 3)
    for cut, box in ((crop_then_resize, (1, 1, 3, 4)), (resize_then_crop, (-0.5, 0.25, 3.5, 4.5))):

        def looks(
            starts: np.ndarray, sizes: np.ndarray, cut: Callable[..., SamplingGrid] = cut, box: tuple = box
        ) -> SamplingGrid:
            return cut(starts, sizes, np.array([box]), 7).flipped(np.array([True]), 7)

        wanted = looks(np.zeros(1, np.int64), np.array([[4], [5]]))
        numbers = torch.from_numpy(wanted.corners), torch.from_numpy(wanted.axes)
        if (sample([image], looks, 7) - sample_by_gather(image.flatten(), *numbers, 7)).abs().max() > TOLERANCE:
            return False
    return True


def _look(looks: SamplingGrid, side: int) -> Tensor:
    """The views of images whose corners are addresses."""
    views = torch.empty(len(looks.corners), side, side, 3, dtype=torch.float32, device="cpu")
    corners, axes = np.ascontiguousarray(looks.corners), np.ascontiguousarray(looks.axes)
    library.load_library().look(corners.ctypes.data, axes.ctypes.data, views.data_ptr(), len(views), side)
    return views.permute(0, 3, 1, 2)


def sample(images: Sequence[Tensor], cut: Callable[..., SamplingGrid], side: int) -> Tensor:
    """The views of images wherever they lie, by the CPU's own kernel.

    Args:
        images: each (height, width, 3) of uint8.
        cut: what is looked at, given where the images begin, and their heights and widths.
        side: of the views, pixels.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    images = [image.contiguous() for image in images]
    starts = np.array([image.data_ptr() for image in images], np.int64)
    return _look(cut(starts, np.array([image.shape[:2] for image in images]).T), side)
