"""Samples all views of a batch on an accelerator by one Triton kernel: `resample.sample_by_gather`, compiled."""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def _sample(flat, corners, axes, views, side, BLOCK: tl.constexpr):
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
    value = _read(flat, axes + 8 * image, pixel, row_bytes, row, column, channel, inside)
    tl.store(views + image.to(tl.int64) * values + place, value / 255, mask=inside)


def sample(flat: Tensor, corners: Tensor, axes: Tensor, side: int) -> Tensor:
    """Samples views on an accelerator.

    Args:
        flat: uint8, the images one after another, each (height, width, 3).
        corners, axes: of a `resample.SamplingGrid`, on the device of `flat`; the axes in float32.
        side: of the views, pixels.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    # Views are the grid's first axis, which may have 2³¹ blocks; the second is limited to 65,535.
    views = torch.empty(len(corners), side, side, 3, device=flat.device)
    grid = len(corners), triton.cdiv(3 * side * side, BLOCK)
    _sample[grid](flat, corners, axes, views, side, BLOCK=BLOCK)  # pyrefly: ignore[bad-argument-type]
    return views.permute(0, 3, 1, 2)
