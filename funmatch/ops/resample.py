"""Samples many views at once: by the native CPU kernel or, on any device, by torch.

Five codes resample crops, each by four methods (`config.choices.Resample`). They agree to 0.01 of a grey level;
where views are rounded to bytes, in all but a few values on accelerators. Tests compare them.

| code                                   | runs for                                                    |
|----------------------------------------|-------------------------------------------------------------|
| `crops._crop_batched`, matrix product  | CPU: images of one size up to 64 × 64, e.g. CIFAR           |
| `sample_views` in `native/views.cpp`   | CPU: larger images, if there is a C++ compiler (4 to 12 ×)  |
| torch one by one, in `crops`           | CPU: larger images without a compiler, small ones that      |
|                                        | differ in size, and runs begun without the kernel           |
| `native/triton_crops`                  | accelerator: data resident on it, if Triton works there     |
| `sample_by_torch`, below               | accelerator: data resident on it without Triton             |

Their last bits differ, so a run records whether the native kernel cut its views and resumes with the same code.

Without antialias, pixel i of a view is read at clip(start + i · step, least, most) of its grid, between two neighbours.
With it, it is the mean of all pixels from least to most, weighted by a filter that is centred at start + i · step and
as wide as the step (but no narrower than a pixel), rounded to bytes after each axis: the pixels of Pillow, and so those
of torchvision's and timm's transforms. By area, it is the mean of what lies in the step around that place, each pixel
with the part that lies in it, not rounded: as `tf.image.resize` computes it.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from funmatch.config.choices import Resample
from funmatch.ops.grids import SamplingGrid, Sizes, crop_then_resize, resize_then_crop
from funmatch.ops.native import library

# A four-hundredth of a grey level: the compiler may fuse a product and a sum, which rounds once less.
TOLERANCE = 1e-5
"""Largest difference, in [0, 1], of the compiled kernel from torch."""
PRECISION = 22
"""Binary digits of a filter's weights, as in Pillow."""
FILTERS: dict[Resample, int] = {"tf": 0, "antialias": 1, "bicubic": 2, "area": 3}
"""Numbers of the methods in the kernels; with antialias also the radius of their filters, in units of its width."""


def sample_by_torch(flat: Tensor, grid: SamplingGrid, side: int, method: Resample = "tf") -> Tensor:
    """Samples views without a kernel: slow, but on any device, and the reference for the kernels.

    Args:
        flat: uint8, the images one after another, each (height, width, 3).
        grid: where they are read; its corners are offsets in `flat`.
        side: of the views, pixels.
        method: how images are resized.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    if method == "tf":
        return _gather(flat, *move_grid(grid, flat.device), side)
    views = torch.empty(len(grid.axes), side, side, 3, device=flat.device).permute(0, 3, 1, 2)
    for view, (corner, row_bytes), axes in zip(views, grid.corners.tolist(), grid.axes, strict=True):
        (top, bottom), (left, right) = axes[:, 2:].astype(int).tolist()
        shape = bottom - top + 1, right - left + 1, 3
        first = flat.storage_offset() + corner + top * row_bytes + 3 * left
        pixels = flat.as_strided(shape, (row_bytes, 3, 1), first)
        (down,) = filter_weights(axes[:1], np.arange(top, bottom + 1), side, method)
        (across,) = filter_weights(axes[1:], np.arange(left, right + 1), side, method)
        view.copy_(apply_filter(pixels.permute(2, 0, 1), down, across, method))
    return views


def apply_filter(planes: Tensor, down: np.ndarray, across: np.ndarray, method: Resample) -> Tensor:
    """Resizes images by a filter, with antialias to the byte as Pillow does: first their rows, then their columns.

    Args:
        planes: (…, height, width) uint8.
        down, across: `filter_weights` of the rows and of the columns, (…, side, height) and (…, side, width).
        method: of the weights.

    Returns:
        (…, side, side) float32 in [0, 1].
    """

    # Sums of whole numbers of 2⁻²², which are exact in float64; not every device has it.
    dtype = torch.float32 if planes.device.type == "mps" else torch.float64
    rows, columns = (torch.from_numpy(each).to(planes.device, dtype) for each in (down, across))

    def finish(values: Tensor) -> Tensor:
        return values if method == "area" else values.add_(0.5).floor_().clamp_(0, 255)

    return (finish(rows @ finish(planes.to(dtype) @ columns.mT)) / 255).float()


def move_grid(grid: SamplingGrid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the corners and axes of a grid on a device, where axes are in float32."""
    corners, axes = torch.from_numpy(grid.corners), torch.from_numpy(grid.axes)
    if device.type == "cpu":
        return corners, axes
    # Pinned, or the copies would wait for the device in spite of non_blocking.
    return corners.pin_memory().to(device, non_blocking=True), axes.float().pin_memory().to(device, non_blocking=True)


def _gather(flat: Tensor, corners: Tensor, axes: Tensor, side: int) -> Tensor:
    """Reads each pixel of views between two neighbours, by indexing."""
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


def filter_weights(axes: np.ndarray, pixels: np.ndarray, side: int, method: Resample) -> np.ndarray:
    """Computes the weights of pixels in the pixels of views, along one axis.

    Args:
        axes: (n, 4) start, step, least and most, as of a `SamplingGrid`.
        pixels: (p,) coordinates, counted as those of the axes.
        side: of the views, pixels.
        method: antialias, bicubic or area.

    Returns:
        (n, side, p) float64, with antialias whole numbers of 2⁻²²; each row sums to about 1 if `pixels` are all from
        least to most.
    """
    start, step, least, most = (each[:, None] for each in np.asarray(axes, np.float64).T)
    # Beyond the edge there is no pixel, and those inside share the weight.
    places = np.clip(start + np.arange(side) * step, least - 0.5, most + 0.5)
    weights = _filter(pixels - places[:, :, None], np.abs(step)[:, :, None], method)
    weights = np.where((pixels >= least[:, :, None]) & (pixels <= most[:, :, None]), weights, 0)
    shares = weights / weights.sum(-1, keepdims=True)
    if method == "area":
        return shares
    # In Pillow's precision, so that sums are exact and rounded alike.
    shares *= 2**PRECISION
    return np.trunc(shares + np.copysign(0.5, shares)) / 2**PRECISION


def _filter(offset: np.ndarray, step: np.ndarray, method: Resample) -> np.ndarray:
    """Computes a filter at offsets from its centre, for pixels of a view that are `step` apart; not normalised."""
    if method == "area":
        # The part of the pixel that lies in the pixel of the view.
        return np.maximum(np.minimum(offset + 0.5, step / 2) - np.maximum(offset - 0.5, -step / 2), 0)
    # As wide as the step, which covers the image without gaps, but no narrower than a pixel.
    distance = np.abs(offset / np.maximum(step, 1))
    if method == "antialias":
        return np.maximum(1 - distance, 0)
    # Keys' cubic with a = −1/2, as in Pillow.
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = (((distance - 5) * distance + 8) * distance - 4) * -0.5
    return np.where(distance < 1, near, np.where(distance < 2, far, 0))


def count_taps(grid: SamplingGrid, method: Resample) -> int:
    """Returns the largest number of pixels along an axis that make a pixel of a grid's views."""
    widest = max(1.0, float(np.abs(grid.axes[:, :, 1]).max(initial=0)))
    if method == "area":
        return math.ceil(widest) + 2
    return 2 if method == "tf" else math.ceil(2 * FILTERS[method] * widest) + 1


# Cached: views are cut in several threads, batch after batch, and the check runs once.
@cache
def why_unavailable() -> str:
    """Returns why the native CPU kernel is unavailable; an empty string if it is available."""
    return library.why_unavailable() or ("" if _kernel_is_right() else "the compiled kernel computes wrong values")


def _kernel_is_right() -> bool:
    """Compares the kernel with torch, for a mirrored crop and one that reaches beyond its image."""
    image = torch.arange(0, 180, 2, dtype=torch.uint8)[:60].view(4, 5, 3)
    views = ((crop_then_resize, (1, 1, 3, 4)), (resize_then_crop, (-0.5, 0.25, 3.5, 4.5)))
    # Smaller and larger views than their boxes.
    for (make_grid, box), method, side in itertools.product(views, FILTERS, (2, 7)):
        grid_of = partial(_mirrored, make_grid, np.array([box]), side)
        grid = grid_of(np.zeros(1, np.int64), np.array([[4], [5]]))
        expected = sample_by_torch(image.flatten(), grid, side, method)
        if (sample([image], grid_of, side, method) - expected).abs().max() > TOLERANCE:
            return False
    return True


def _mirrored(
    make_grid: Callable[..., SamplingGrid], boxes: np.ndarray, side: int, starts: np.ndarray, sizes: Sizes
) -> SamplingGrid:
    return make_grid(starts, sizes, boxes, side).flipped(np.full(len(boxes), True), side)


def sample(
    images: Sequence[Tensor],
    grid_of: Callable[[np.ndarray, np.ndarray], SamplingGrid],
    side: int,
    method: Resample = "tf",
) -> Tensor:
    """Samples views of images anywhere in memory by the native CPU kernel.

    Args:
        images: n tensors (height, width, 3) of uint8.
        grid_of: returns the grid, given the images' addresses, (n,) int64, and their heights and widths, (2, n).
        side: of the views, pixels.
        method: how images are resized.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    # Named `images` again, so that copies of those that were not contiguous live until the kernel has read them.
    images = [image.contiguous() for image in images]
    starts = np.array([image.data_ptr() for image in images], np.int64)
    return _run_kernel(grid_of(starts, np.array([image.shape[:2] for image in images]).T), side, method)


def _run_kernel(grid: SamplingGrid, side: int, method: Resample) -> Tensor:
    """Runs the native kernel on a grid whose corners are addresses in memory."""
    # dtype and device by name: the user may have changed torch's defaults, the kernel writes float32 on the CPU.
    views = torch.empty(len(grid.corners), side, side, 3, dtype=torch.float32, device="cpu")
    # Held in variables while the kernel runs: a temporary's memory could be reused.
    corners, axes = np.ascontiguousarray(grid.corners), np.ascontiguousarray(grid.axes)
    pointers = corners.ctypes.data, axes.ctypes.data, views.data_ptr()
    library.load_library().sample_views(*pointers, len(views), side, FILTERS[method])
    return views.permute(0, 3, 1, 2)
