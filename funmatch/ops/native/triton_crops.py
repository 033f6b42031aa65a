"""Samples all views of a batch on an accelerator by one Triton kernel: `resample.sample_by_torch`, compiled."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from funmatch.config.choices import Resample
from funmatch.ops.grids import SamplingGrid
from funmatch.ops.resample import FILTERS, count_taps, move_grid

BLOCK = 1024


@triton.jit
def _read(flat, axes, pixel, row_bytes, row, column, channel, inside):
    """Computes the bilinear value of an image at a pixel of its view."""
    y = tl.load(axes) + row * tl.load(axes + 1)
    lowest = tl.load(axes + 3)
    y = tl.minimum(tl.maximum(y, tl.load(axes + 2)), lowest)
    x = tl.load(axes + 4) + column * tl.load(axes + 5)
    rightmost = tl.load(axes + 7)
    x = tl.minimum(tl.maximum(x, tl.load(axes + 6)), rightmost)
    upper, left = tl.floor(y), tl.floor(x)
    down, across = y - upper, x - left
    # int64: addresses go beyond 2 GB, where 32 bits would wrap around.
    upper_row = pixel + upper.to(tl.int64) * row_bytes
    lower_row = pixel + tl.minimum(upper + 1, lowest).to(tl.int64) * row_bytes
    left_byte = left.to(tl.int64) * 3 + channel
    right_byte = tl.minimum(left + 1, rightmost).to(tl.int64) * 3 + channel
    a = tl.load(flat + upper_row + left_byte, mask=inside, other=0).to(tl.float32)
    b = tl.load(flat + lower_row + left_byte, mask=inside, other=0).to(tl.float32)
    c = tl.load(flat + upper_row + right_byte, mask=inside, other=0).to(tl.float32)
    d = tl.load(flat + lower_row + right_byte, mask=inside, other=0).to(tl.float32)
    # Rows first, then columns: the order in which the other codes interpolate, and so round.
    at_left = a + (b - a) * down
    at_right = c + (d - c) * down
    return at_left + (at_right - at_left) * across


@triton.jit
def _weight(offset, step, METHOD: tl.constexpr):
    """Computes `resample._filter`."""
    if METHOD == 3:
        return tl.maximum(tl.minimum(offset + 0.5, step / 2) - tl.maximum(offset - 0.5, -step / 2), 0.0)
    distance = tl.abs(offset / tl.maximum(step, 1.0))
    if METHOD == 2:
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        return tl.where(distance < 1, near, tl.where(distance < 2, far, 0.0))
    return tl.maximum(1 - distance, 0.0)


@triton.jit
def _finish(value, METHOD: tl.constexpr):
    """Rounds to a byte, as Pillow does after each of its two passes; means of areas are not rounded."""
    if METHOD == 3:
        return value
    return tl.floor(tl.minimum(tl.maximum(value, 0.0), 255.0) + 0.5)


@triton.jit
def _place(axis, i, METHOD: tl.constexpr):
    """Computes where a filter is centred along an axis, the step and its first pixel."""
    step = tl.abs(tl.load(axis + 1))
    radius = (step + 1) / 2 if METHOD == 3 else METHOD * tl.maximum(step, 1.0)
    place = tl.load(axis) + i * tl.load(axis + 1)
    place = tl.minimum(tl.maximum(place, tl.load(axis + 2) - 0.5), tl.load(axis + 3) + 0.5)
    return place, step, tl.floor(place - radius)


@triton.jit
def _filter(flat, axes, pixel, row_bytes, row, column, channel, inside, taps, METHOD: tl.constexpr):
    """Computes the mean of an image around a pixel of its view, weighted by a filter."""
    y, height, top = _place(axes, row, METHOD)
    x, width, left = _place(axes + 4, column, METHOD)
    highest, lowest = tl.load(axes + 2), tl.load(axes + 3)
    leftmost, rightmost = tl.load(axes + 6), tl.load(axes + 7)
    total, height_sum = tl.zeros_like(y), tl.zeros_like(y)
    for i in range(taps):
        line = top + i
        down = tl.where((line >= highest) & (line <= lowest), _weight(line - y, height, METHOD), 0.0)
        line = tl.minimum(tl.maximum(line, highest), lowest)
        start = pixel + line.to(tl.int64) * row_bytes + channel
        across_sum, width_sum = tl.zeros_like(y), tl.zeros_like(y)
        for j in range(taps):
            place = left + j
            across = _weight(place - x, width, METHOD)
            across = tl.where((place >= leftmost) & (place <= rightmost), across, 0.0)
            place = tl.minimum(tl.maximum(place, leftmost), rightmost)
            used = inside & (across != 0) & (down != 0)
            value = tl.load(flat + start + place.to(tl.int64) * 3, mask=used, other=0)
            across_sum += across * value.to(tl.float32)
            width_sum += across
        total += down * _finish(across_sum / width_sum, METHOD)
        height_sum += down
    return _finish(total / height_sum, METHOD)


@triton.jit
def _sample(flat, corners, axes, views, side, taps, METHOD: tl.constexpr, BLOCK: tl.constexpr):
    """Computes `BLOCK` neighbouring values of one view; the grid is (views, blocks)."""
    image = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = side * side * 3
    inside = place < values
    # Channels last: neighbouring threads write neighbouring bytes, and read neighbouring ones of the image.
    channel = place % 3
    column = (place // 3) % side
    row = place // (3 * side)
    pixel, row_bytes = tl.load(corners + 2 * image), tl.load(corners + 2 * image + 1)
    if METHOD == 0:
        value = _read(flat, axes + 8 * image, pixel, row_bytes, row, column, channel, inside)
    else:
        value = _filter(flat, axes + 8 * image, pixel, row_bytes, row, column, channel, inside, taps, METHOD)
    tl.store(views + image.to(tl.int64) * values + place, value / 255, mask=inside)


def sample(flat: Tensor, grid: SamplingGrid, side: int, method: Resample = "tf") -> Tensor:
    """Samples views on an accelerator.

    Args:
        flat: uint8, the images one after another, each (height, width, 3).
        grid: where they are read; its corners are offsets in `flat`.
        side: of the views, pixels.
        method: how images are resized.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    corners, axes = move_grid(grid, flat.device)
    views = torch.empty(len(corners), side, side, 3, device=flat.device)
    # Views are the first axis of blocks, which may have 2³¹ of them; the second is limited to 65,535.
    blocks = len(corners), triton.cdiv(3 * side * side, BLOCK)
    arguments = flat, corners, axes.float(), views, side, count_taps(grid, method)
    _sample[blocks](*arguments, METHOD=FILTERS[method], BLOCK=BLOCK)  # pyrefly: ignore
    return views.permute(0, 3, 1, 2)
