"""Crops, resizes and flips images into views, on the CPU.

How images are resized is an argument; the paper's code does so without antialias ("tf"). `ops.resample` opens with the
table of which code runs when; here are the two that need nothing but torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funmatch.config.choices import EvalResample, Resample
from funmatch.ops import grids, resample
from funmatch.ops.resizing import libraries

MAX_BATCHED_PIXELS = 64 * 64
"""Images of one size up to this many pixels are resampled together: below it, calls cost more than arithmetic."""
GridMaker = Callable[[np.ndarray, grids.Sizes, np.ndarray, int], grids.SamplingGrid]
"""Signature of `grids.crop_then_resize`."""
STRIP_ASPECT = 4
"""Aspect ratio above which an image is not resized whole for its central view."""


def crop_resize_flip(
    images: list[Tensor],
    boxes: np.ndarray,
    flips: np.ndarray,
    side: int,
    *,
    native: bool = True,
    method: Resample = "tf",
) -> Tensor:
    """Cuts a box out of each image, resizes it to a square and mirrors some.

    The crop is cut first and resized alone, so no pixel beyond its edge is read, with half-pixel centres: what
    `tf.image.resize(crop, (side, side))` gives.

    Args:
        images: n tensors (height, width, 3) of uint8, of any sizes.
        boxes: (n, 4) whole pixels: top, left, height, width.
        flips: (n,) bool, mirrored left to right.
        side: of the views, pixels.
        native: use the native CPU kernel if it is available.
        method: how crops are resized.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    # First of all, even with a compiler: for CIFAR-sized images the calls cost more than the arithmetic.
    shape = images[0].shape
    if shape[0] * shape[1] <= MAX_BATCHED_PIXELS and all(image.shape == shape for image in images):
        return _crop_batched(torch.stack(images), boxes, flips, side, method)
    return _cut(images, boxes, flips, side, grids.crop_then_resize, _resize_crop, native=native, method=method)


def crop_of_resized_flip(
    images: list[Tensor],
    boxes: np.ndarray,
    flips: np.ndarray,
    side: int,
    *,
    native: bool = True,
    method: Resample = "tf",
) -> Tensor:
    """Resizes each image, cuts a box out of the result, and mirrors some.

    Unlike `crop_resize_flip` it reads pixels beyond the box where the resized image would: what
    `tf.image.resize(image, …)` and then a crop give.

    Args:
        images: n tensors (height, width, 3) of uint8, of any sizes.
        boxes: (n, 4) pixels of the images, fractional: top, left, height, width.
        flips: (n,) bool, mirrored left to right.
        side: of the views, pixels.
        native: use the native CPU kernel if it is available.
        method: how crops are resized.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    return _cut(images, boxes, flips, side, grids.resize_then_crop, _crop_resized, native=native, method=method)


def _cut(
    images: list[Tensor],
    boxes: np.ndarray,
    flips: np.ndarray,
    side: int,
    make_grid: GridMaker,
    interpolate: Callable[[Tensor, list[Any], int], Tensor],
    *,
    native: bool,
    method: Resample,
) -> Tensor:
    """Computes views by the native kernel where it serves, else one by one by torch.

    Args:
        images, boxes, flips, side, native, method: as of `crop_resize_flip`.
        make_grid: describes the views.
        interpolate: computes one of them without antialias, from the image, its box and the side, not mirrored,
            (3, side, side) float32 in [0, 255].
    """

    def grid_of(starts: np.ndarray, sizes: grids.Sizes, which: slice = slice(None)) -> grids.SamplingGrid:
        return make_grid(starts, sizes, boxes[which], side).flipped(flips[which], side)

    if native and _use_kernel(images):
        return resample.sample(images, grid_of, side, method)
    views = torch.empty(len(images), 3, side, side, memory_format=torch.channels_last)
    for i, (view, image, flip) in enumerate(zip(views, images, flips.tolist(), strict=True)):
        if method == "tf":
            sampled = interpolate(image, boxes[i].tolist(), side)
            # Divided straight into the batch's memory: stacking the views would copy them once more.
            torch.div(sampled.flip(-1) if flip else sampled, 255, out=view)
        else:
            grid = grid_of(np.zeros(1, np.int64), np.array([image.shape[:2]]).T, slice(i, i + 1))
            view.copy_(resample.sample_by_torch(image.contiguous().flatten(), grid, side, method)[0])
    return views


def _resize_crop(image: Tensor, box: list[int], side: int) -> Tensor:
    """Resizes a box of an image to a square, (3, side, side) float32 in [0, 255]."""
    top, left, height, width = box
    # Sliced before it is resized: resizing the image and slicing then would blend in pixels beyond the crop's edge.
    return resize(image[top : top + height, left : left + width], side, side)


def _crop_resized(image: Tensor, box: list[float], side: int) -> Tensor:
    """Computes a box of a resized image, (3, side, side) float32 in [0, 255]."""
    top, left, height, width = box
    # Only the box's pixels are interpolated: resizing the whole image would compute those that are cut away.
    first, second, share = _neighbours(top, height, image.shape[0], side)
    rows = torch.lerp(image[first].float(), image[second].float(), share[:, None, None])
    first, second, share = _neighbours(left, width, image.shape[1], side)
    return torch.lerp(rows[:, first], rows[:, second], share[:, None]).permute(2, 0, 1)


def _use_kernel(images: list[Tensor]) -> bool:
    """Returns whether the native kernel is worth its call (an image is not small) and available."""
    # The sizes first: the check of the kernel compiles it on first use, which small data sets need not pay for.
    large = any(image.shape[0] * image.shape[1] > MAX_BATCHED_PIXELS for image in images)
    return large and not resample.why_unavailable()


def _neighbours(start: float, length: float, size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the two pixels between which each pixel of a view lies, along one axis.

    Args:
        start, length: of the box, in pixels of the image.
        size: of the image.
        side: of the view.

    Returns:
        the first pixel, the second, and the weight of the second, (side,) each.
    """
    # float64: the place is a sum of large and small numbers, and float32 would shift it by 10⁻⁴ of a pixel.
    place = (start + (torch.arange(side, dtype=torch.float64) + 0.5) * (length / side) - 0.5).clamp(0, size - 1)
    first = place.long()
    return first, (first + 1).clamp(max=size - 1), (place - first).float()


def central_view(
    image: Tensor, short_side: int, side: int, *, squash: bool = False, method: EvalResample = "tf", floor: bool = False
) -> Tensor:
    """Makes the evaluation view of an image: its short side resized, then a central square.

    Args:
        image: (height, width, 3) uint8.
        short_side: short side of the resized image, pixels, at least `side`.
        side: of the view, pixels.
        squash: resize both sides to `short_side`, without regard to the image's aspect.
        method: how the image is resized. With a filter of Pillow's, the view is that of timm's evaluation
            transform.
        floor: whether half a pixel at the square's corner is rounded down, as by transformers.

    Returns:
        (3, side, side) float32 in [0, 1].
    """
    sizes = np.array([image.shape[:2]]).T
    own = libraries.OWN.get(method)
    if own is None:
        found = grids.central_squares(sizes, short_side, side, squash=squash, method=method, floor=floor)
        (height, width), (top, left) = (map(int, each[0]) for each in found)
        return libraries.central(image, (height, width), (top, left), side, method)
    if own != "tf" or _use_kernel([image]):
        box = grids.central_boxes(sizes, short_side, side, squash=squash, method=method, floor=floor)
        return crop_of_resized_flip([image], box, np.array([False]), side, method=own)[0]
    height, width = image.shape[:2]
    if squash:
        corner = (short_side - side) // 2
        return resize(image, short_side, short_side)[:, corner : corner + side, corner : corner + side] / 255
    # The short side's scale for both, rounded each for itself, as in big_vision's `resize_small`.
    scale = short_side / min(height, width)
    # A strip of 10 × 30,000 pixels, resized whole to 256 on the short side, would take gigabytes.
    if max(height, width) > STRIP_ASPECT * min(height, width):
        return _central_of_strip(image, scale, side) / 255
    height, width = max(side, round(height * scale)), max(side, round(width * scale))
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image, height, width)[:, top : top + side, left : left + side] / 255


def stack_views(views: Sequence[Tensor]) -> Tensor:
    """Stacks views (3, height, width) to a batch (n, 3, height, width) in `channels_last` memory."""
    # Most views lie so already: stacked as they lie they are copied, and not first turned and then turned back.
    stacked = torch.stack([view.permute(1, 2, 0) for view in views]).permute(0, 3, 1, 2)
    return stacked.contiguous(memory_format=torch.channels_last)


def _central_of_strip(image: Tensor, scale: float, side: int) -> Tensor:
    """Computes `central_view`, in [0, 255], of a very long image by resampling its middle only.

    Args:
        image: (height, width, 3) uint8.
        scale: of the resized image.
        side: of the view, pixels.
    """
    products = []
    for size in image.shape[:2]:
        resized = max(side, round(size * scale))
        places = (np.arange(side) + (resized - side) // 2 + 0.5) * (size / resized) - 0.5
        places = np.clip(places, 0, size - 1)
        # Two beyond the last place: its right neighbour, and the end of a slice.
        first, last = int(places[0]), min(int(places[-1]) + 2, size)
        weights = np.clip(1 - np.abs(places[:, None] - np.arange(first, last)), 0, 1).astype(np.float32)
        products.append((slice(first, last), torch.from_numpy(weights)))
    (rows, down), (columns, across) = products
    return down @ image[rows, columns].permute(2, 0, 1).float() @ across.T


def _crop_batched(images: Tensor, boxes: np.ndarray, flips: np.ndarray, side: int, method: Resample) -> Tensor:
    """Computes `crop_resize_flip` by two matrix products, since bilinear resampling is separable.

    Args:
        images: (n, height, width, 3) uint8; other arguments as of `crop_resize_flip`.
    """
    top, left, height, width = boxes.T
    rows = _weights(top, height, images.shape[1], side, method)
    columns = _weights(left, width, images.shape[2], side, method)
    # Mirrored in the weights, which are smaller than the views.
    columns = np.where(flips[:, None, None], columns[:, ::-1], columns)
    planes = images.permute(0, 3, 1, 2)
    if method == "tf":
        views = torch.from_numpy(rows)[:, None] @ planes.float().div_(255) @ torch.from_numpy(columns)[:, None].mT
    else:
        views = resample.apply_filter(planes, rows[:, None], columns[:, None], method)
    return views.contiguous(memory_format=torch.channels_last)


def _weights(start: np.ndarray, length: np.ndarray, size: int, side: int, method: Resample) -> np.ndarray:
    """Computes the weight of each pixel of an image in each pixel of its view, along one axis.

    Args:
        start, length: of the boxes, (n,) pixels.
        size: of the images.
        side: of the views.
        method: how crops are resized.

    Returns:
        (n, side, size); each row sums to 1.
    """
    if method != "tf":
        step = length / side
        axes = np.stack([start + 0.5 * step - 0.5, step, start, start + length - 1], 1)
        return resample.filter_weights(axes, np.arange(size), side, method)
    centres = (np.arange(side) + 0.5) * (length[:, None] / side) - 0.5
    centres = start[:, None] + np.clip(centres, 0, length[:, None] - 1)  # beyond the crop's edge, the edge is repeated
    # float32 from here on: these are n · side · size numbers, and below 64 its steps are less than 10⁻⁵ of a pixel.
    distance = np.abs(centres.astype(np.float32)[:, :, None] - np.arange(size, dtype=np.float32))
    return np.maximum(1 - distance, 0, out=distance)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resizes (h, w, 3) uint8 to (3, height, width) float32 in [0, 255], as `tf.image.resize` does by default."""
    planes = image.permute(2, 0, 1)[None].float()
    # antialias is off by default, and must stay so: TensorFlow's resize, by which the paper trains, has none.
    return F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0]
