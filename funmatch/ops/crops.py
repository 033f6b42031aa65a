"""Pixels to views: crop, resize, flip, mix. Bilinear without antialias throughout, as in the paper's code.

Larger images are resampled by our own kernel (`resample`) where it can be had, else by torch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from funmatch.ops import resample

# Images of one size up to this many pixels are resampled together: for them the calls cost more than the arithmetic.
MAX_BATCHED_PIXELS = 64 * 64
STRIP_ASPECT = 4  # times as long as wide: a strip


def crop_resize_flip(images: list[Tensor], boxes, flips, side: int, *, native: bool = True) -> Tensor:
    """Cuts one box out of each image, resizes it to a square and mirrors some.

    The crop is cut first and resized alone, so no pixel beyond its edge is read, with half-pixel centres and
    without antialias: what `tf.image.resize(crop, (side, side))` gives.

    Args:
        images: n tensors (height, width, 3) of uint8, of any sizes.
        boxes: (n, 4) whole pixels: top, left, height, width.
        flips: (n,) bool, mirrored left to right.
        side: of the views, pixels.
        native: whether by our own kernel, where it can be had.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    shape = images[0].shape
    if shape[0] * shape[1] <= MAX_BATCHED_PIXELS and all(image.shape == shape for image in images):
        return _together(torch.stack(images), boxes, flips, side)
    if native and _resampled(images):
        return resample.sample(
            images,
            lambda starts, sizes: resample.crop_then_resize(starts, sizes, boxes, side).flipped(flips, side),
            side,
        )
    views = torch.empty(len(images), 3, side, side, memory_format=torch.channels_last)
    for view, image, (top, left, height, width), flip in zip(
        views, images, boxes.tolist(), flips.tolist(), strict=True
    ):
        resized = _resize(image[top : top + height, left : left + width], side, side)
        torch.div(resized.flip(-1) if flip else resized, 255, out=view)
    return views


def crop_of_resized_flip(images: list[Tensor], boxes, flips, side: int, *, native: bool = True) -> Tensor:
    """Cuts one box out of each image *after* resizing it, and mirrors some.

    Unlike `crop_resize_flip` it reads pixels beyond the box where the resized image would: what
    `tf.image.resize(image, …)` and then a crop give.

    Args:
        images: n tensors (height, width, 3) of uint8, of any sizes.
        boxes: (n, 4) pixels of the images, fractional: top, left, height, width.
        flips: (n,) bool, mirrored left to right.
        side: of the views, pixels.
        native: whether by our own kernel, where it can be had.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    if native and _resampled(images):
        return resample.sample(
            images,
            lambda starts, sizes: resample.resize_then_crop(starts, sizes, boxes, side).flipped(flips, side),
            side,
        )
    views = torch.empty(len(images), 3, side, side, memory_format=torch.channels_last)
    for view, image, (top, left, height, width), flip in zip(
        views, images, boxes.tolist(), flips.tolist(), strict=True
    ):
        first, second, share = _sampled(top, height, image.shape[0], side)
        rows = torch.lerp(image[first].float(), image[second].float(), share[:, None, None])
        first, second, share = _sampled(left, width, image.shape[1], side)
        sampled = torch.lerp(rows[:, first], rows[:, second], share[:, None]).permute(2, 0, 1)
        torch.div(sampled.flip(-1) if flip else sampled, 255, out=view)
    return views


def _resampled(images: list[Tensor]) -> bool:
    """Whether our own kernel can resample these, and is worth it: if any is not small, and it can be had."""
    return (
        any(image.shape[0] * image.shape[1] > MAX_BATCHED_PIXELS for image in images) and not resample.why_unavailable()
    )


def _sampled(start: float, length: float, size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which two pixels of an image's side give each pixel of the view's side, and the share of the second: (side,)."""
    at = (start + (torch.arange(side, dtype=torch.float64) + 0.5) * (length / side) - 0.5).clamp(0, size - 1)
    first = at.long()
    return first, (first + 1).clamp(max=size - 1), (at - first).float()


def central_view(image: Tensor, short_side: int, side: int, *, squash: bool = False) -> Tensor:
    """The evaluation view: the short side resized, then a central square.

    Args:
        image: (height, width, 3) uint8.
        short_side: of the resized image, pixels, at least `side`.
        side: of the view, pixels.
        squash: resize both sides to `short_side`, whatever shape that gives things.

    Returns:
        (3, side, side) float32 in [0, 1].
    """
    if _resampled([image]):
        return resample.sample(
            [image], lambda starts, sizes: resample.central_grid(starts, sizes, short_side, side, squash=squash), side
        )[0]
    height, width = image.shape[:2]
    if squash:
        corner = (short_side - side) // 2
        return _resize(image, short_side, short_side)[:, corner : corner + side, corner : corner + side] / 255
    scale = short_side / min(height, width)
    if max(height, width) > STRIP_ASPECT * min(height, width):
        return _central_of_strip(image, scale, side) / 255
    height, width = max(side, round(height * scale)), max(side, round(width * scale))
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(image, height, width)[:, top : top + side, left : left + side] / 255


def _central_of_strip(image: Tensor, scale: float, side: int) -> Tensor:
    """`central_view`, in [0, 255], of an image too long to be resized whole: its middle alone is resampled."""
    products = []
    for size in image.shape[:2]:
        resized = max(side, round(size * scale))
        at = (np.arange(side) + (resized - side) // 2 + 0.5) * (size / resized) - 0.5
        at = np.clip(at, 0, size - 1)
        first, last = int(at[0]), min(int(at[-1]) + 2, size)
        weights = np.clip(1 - np.abs(at[:, None] - np.arange(first, last)), 0, 1).astype(np.float32)
        products.append((slice(first, last), torch.from_numpy(weights)))
    (rows, down), (columns, across) = products
    return down @ image[rows, columns].permute(2, 0, 1).float() @ across.T


def _together(images: Tensor, boxes, flips, side: int) -> Tensor:
    """`crop_resize_flip` of (n, height, width, 3) by two matrix products, since bilinear resampling is separable."""
    top, left, height, width = boxes.T
    rows = torch.from_numpy(_weights(top, height, images.shape[1], side))
    columns = _weights(left, width, images.shape[2], side)
    columns = torch.from_numpy(np.where(flips[:, None, None], columns[:, ::-1], columns))
    planes = images.permute(0, 3, 1, 2).float().div_(255)
    return (rows[:, None] @ planes @ columns[:, None].mT).contiguous(memory_format=torch.channels_last)


def _weights(start, length, size: int, side: int):
    """(n, side, size): how much each pixel of an image's side counts for each pixel of the view's side."""
    centres = (np.arange(side) + 0.5) * (length[:, None] / side) - 0.5
    centres = start[:, None] + np.clip(centres, 0, length[:, None] - 1)  # beyond the crop's edge, the edge is repeated
    distance = np.abs(centres.astype(np.float32)[:, :, None] - np.arange(size, dtype=np.float32))
    return np.maximum(1 - distance, 0, out=distance)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """(h, w, 3) uint8 to (3, height, width) float32 in [0, 255]."""
    planes = image.permute(2, 0, 1)[None].float()
    return F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0]
