"""Describes views as sampling grids, and samples many at once: by the native CPU kernel or, on any device, by indexing.

Five codes resample crops. All are bilinear without antialias and agree to 0.01 of a grey level; tests compare them.

| code                                   | runs for                                                    |
|----------------------------------------|-------------------------------------------------------------|
| `crops._crop_batched`, matrix product  | CPU: images of one size up to 64 × 64, e.g. CIFAR           |
| `sample_views` in `native/kernels.cpp` | CPU: larger images, if there is a C++ compiler (4 to 12 ×)  |
| torch one by one, in `crops`           | CPU: larger images without a compiler, small ones that      |
|                                        | differ in size, and runs begun without the kernel           |
| `native/triton_crops`                  | accelerator: data resident on it, if Triton works there     |
| `sample_by_gather`, below              | accelerator: data resident on it without Triton             |

Their last bits differ, so a run records whether the native kernel cut its views and resumes with the same code.

The grid is one formula: along each axis, pixel i of a view is read at clip(start + i · step, least, most) of its image.
It covers crops that are resized alone, crops of resized images, mirrored ones (a negative step) and evaluation's views.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from funmatch.ops.native import library

# A four-hundredth of a grey level: the compiler may fuse a product and a sum, which rounds once less.
TOLERANCE = 1e-5
"""Largest difference, in [0, 1], of the compiled kernel from indexing."""
Sizes = tuple[np.ndarray, np.ndarray] | np.ndarray
"""Heights and widths of n images in pixels: two arrays of (n,), or one of (2, n)."""


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


def central_grid(starts: np.ndarray, sizes: Sizes, short_side: int, side: int, *, squash: bool = False) -> SamplingGrid:
    """Describes the evaluation views, as of `crops.central_view`.

    Args:
        starts, sizes: as of `crop_then_resize`.
        short_side: short side of the resized images, pixels.
        side: of the views, pixels.
        squash: resize both sides to `short_side`.
    """
    original = np.stack([*sizes], 1).astype(np.float64)
    if squash:
        resized = np.full_like(original, short_side)
    else:
        # rint rounds halves to even, as Python's `round` does in `crops.central_view`.
        resized = np.maximum(side, np.rint(original * (short_side / original.min(1))[:, None]))
    scale = original / resized
    corner = (resized - side) // 2 * scale
    return resize_then_crop(starts, sizes, np.concatenate([corner, side * scale], 1), side)


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


def sample_by_gather(flat: Tensor, corners: Tensor, axes: Tensor, side: int) -> Tensor:
    """Samples views by indexing: slow, but on any device, and the reference for the kernels.

    Args:
        flat: uint8, the images one after another, each (height, width, 3).
        corners, axes: of a `SamplingGrid`, on the device of `flat`.
        side: of the views, pixels.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    start, step, least, most = axes[..., None].unbind(2)
    place = torch.minimum(torch.maximum(start + torch.arange(side, device=axes.device) * step, least), most)
    first = place.floor()
    # Weights in float32, places in the axes' dtype: float64 on the CPU, float32 on a device.
    share = (place - first).float()
    # The far neighbour is clipped too: at the edge the pixel is blended with itself.
    near, far = first.long(), torch.minimum(first + 1, most).long()
    row = corners[:, 1:]
    rows = [corners[:, :1] + each[:, 0] * row for each in (near, far)]
    columns = [3 * each[:, 1] for each in (near, far)]
    channel = torch.arange(3, device=axes.device)

    def read(rows: Tensor, columns: Tensor) -> Tensor:
        # One gather for all channels: they are neighbours in memory.
        return flat[rows[:, :, None, None] + columns[:, None, :, None] + channel].float()

    down, across = share[:, 0, :, None, None], share[:, 1, None, :, None]
    left, right = (torch.lerp(read(rows[0], each), read(rows[1], each), down) for each in columns)
    # Computed with channels last and permuted at the end: the order in which networks want their memory.
    return (torch.lerp(left, right, across) / 255).permute(0, 3, 1, 2)


# Cached: views are cut in several threads, batch after batch, and the check runs once.
@cache
def why_unavailable() -> str:
    """Returns why the native CPU kernel is unavailable; an empty string if it is available."""
    return library.why_unavailable() or ("" if _kernel_is_right() else "the compiled kernel computes wrong values")


def _kernel_is_right() -> bool:
    """Compares the kernel with indexing, for a mirrored crop and for one that reaches beyond its image."""
    image = torch.arange(0, 180, 2, dtype=torch.uint8)[:60].view(4, 5, 3)
    for make_grid, box in ((crop_then_resize, (1, 1, 3, 4)), (resize_then_crop, (-0.5, 0.25, 3.5, 4.5))):

        def grid_of(
            starts: np.ndarray, sizes: Sizes, make_grid: Callable[..., SamplingGrid] = make_grid, box: tuple = box
        ) -> SamplingGrid:
            return make_grid(starts, sizes, np.array([box]), 7).flipped(np.array([True]), 7)

        grid = grid_of(np.zeros(1, np.int64), np.array([[4], [5]]))
        expected = sample_by_gather(image.flatten(), torch.from_numpy(grid.corners), torch.from_numpy(grid.axes), 7)
        if (sample([image], grid_of, 7) - expected).abs().max() > TOLERANCE:
            return False
    return True


def sample(images: Sequence[Tensor], grid_of: Callable[[np.ndarray, np.ndarray], SamplingGrid], side: int) -> Tensor:
    """Samples views of images anywhere in memory by the native CPU kernel.

    Args:
        images: n tensors (height, width, 3) of uint8.
        grid_of: returns the grid, given the images' addresses, (n,) int64, and their heights and widths, (2, n).
        side: of the views, pixels.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    # Named `images` again, so that copies of those that were not contiguous live until the kernel has read them.
    images = [image.contiguous() for image in images]
    starts = np.array([image.data_ptr() for image in images], np.int64)
    return _run_kernel(grid_of(starts, np.array([image.shape[:2] for image in images]).T), side)


def _run_kernel(grid: SamplingGrid, side: int) -> Tensor:
    """Runs the native kernel on a grid whose corners are addresses in memory."""
    # dtype and device by name: the user may have changed torch's defaults, the kernel writes float32 on the CPU.
    views = torch.empty(len(grid.corners), side, side, 3, dtype=torch.float32, device="cpu")
    # Held in variables while the kernel runs: a temporary's memory could be reused.
    corners, axes = np.ascontiguousarray(grid.corners), np.ascontiguousarray(grid.axes)
    library.load_library().sample_views(corners.ctypes.data, axes.ctypes.data, views.data_ptr(), len(views), side)
    return views.permute(0, 3, 1, 2)
