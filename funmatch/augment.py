"""Pixels to views: crop, resize, flip, mix. Bilinear without antialias throughout, as in the paper's code."""

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_resize_flip(pictures: list[Tensor], boxes, flips, side: int) -> Tensor:
    """Cuts one box out of each picture, resizes it to a square and mirrors some.

    The crop is cut first and resized alone, so no pixel beyond its edge is read, with half-pixel centres and
    without antialias: what `tf.image.resize(crop, (side, side))` gives.

    Args:
        pictures: n tensors (height, width, 3) of uint8, of any sizes.
        boxes: (n, 4) whole pixels: top, left, height, width.
        flips: (n,) bool, mirrored left to right.
        side: of the views, pixels.

    Returns:
        (n, 3, side, side) float32 in [0, 1], in `channels_last` memory.
    """
    views = torch.empty(len(pictures), 3, side, side, memory_format=torch.channels_last)
    for view, picture, (top, left, height, width), flip in zip(
        views, pictures, boxes.tolist(), flips.tolist(), strict=True
    ):
        resized = _resize(picture[top : top + height, left : left + width], side, side)
        view.copy_(resized.flip(-1) if flip else resized)
    return views.div_(255)


def central_view(picture: Tensor, short_side: int, side: int) -> Tensor:
    """The evaluation view: the short side resized, then a central square.

    Args:
        picture: (height, width, 3) uint8.
        short_side: of the resized picture, pixels, at least `side`.
        side: of the view, pixels.

    Returns:
        (3, side, side) float32 in [0, 1].
    """
    height, width = picture.shape[:2]
    scale = short_side / min(height, width)
    height, width = max(side, round(height * scale)), max(side, round(width * scale))
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(picture, height, width)[:, top : top + side, left : left + side] / 255


def mixup(views: Tensor, lam: float) -> Tensor:
    """Mixes every picture with the one before it in the global batch, all with one weight.

    Rolling by one pairs each picture with another than its partner pairs with; reversing the batch, as is
    often done, makes mirrored pairs of the same two.

    Args:
        views: (1 + n, ...), whose row 0 is the predecessor of row 1 (the last of the global batch, where row
            1 is its first).
        lam: weight of the picture itself, in [0.5, 1].

    Returns:
        (n, ...), λ·x[i] + (1 − λ)·x[i − 1].
    """
    return torch.lerp(views[:-1], views[1:], lam)


def _resize(picture: Tensor, height: int, width: int) -> Tensor:
    """(h, w, 3) uint8 to (3, height, width) float32 in [0, 255]."""
    planes = picture.permute(2, 0, 1)[None].float()
    return F.interpolate(planes, (height, width), mode="bilinear", align_corners=False)[0]
