"""CutMix: a box of every picture is filled from the picture before it in the global batch.

Yun et al., "CutMix: Regularization strategy to train strong classifiers with localizable features" (2019). Teacher and
student see the very same result. A box is given as fractions of the side, so that it is the same part of a view at
every side; one without area leaves its picture as it is, as a λ of 1 does in `augment.mixup`: so a batch, or each
picture of one, can be cut or mixed by its draws alone.
"""

import numpy as np
import torch
from torch import Tensor

from funmatch.draws import beta


def cut_boxes(uniforms: np.ndarray, a: float = 1.0) -> np.ndarray:
    """Boxes whose share of a picture is 1 − λ with λ from Beta(a, a), around centres that are uniform.

    What lies beyond the border is clipped, so that less than 1 − λ may be left; `kept` says what is. (section 3.2)

    Args:
        uniforms: (k, 3) in [0, 1): for λ and for the centre, down and across.
        a: > 0; 1 is uniform, as in the paper.

    Returns:
        (k, 4) float64: top, left, height, width, as fractions of the side, in [0, 1].
    """
    half = np.sqrt(1 - beta(uniforms[:, :1], a)) / 2
    corner = np.maximum(uniforms[:, 1:] - half, 0)
    return np.concatenate([corner, np.minimum(uniforms[:, 1:] + half, 1) - corner], axis=1)


def cutmix(views: Tensor, boxes: Tensor) -> Tensor:
    """Fills a box of every picture with the same box of the one before it in the global batch.

    Args:
        views: (1 + n, ..., height, width), whose row 0 is the predecessor of row 1 (the last of the global batch,
            where row 1 is its first).
        boxes: one for all or one each, (1 or n, 4): top, left, height, width, as fractions of the side. Floating,
            and on the device of the views.

    Returns:
        (n, ..., height, width): x[i − 1] in the box, x[i] elsewhere.
    """
    height, width = views.shape[-2:]
    rows, columns = _inside(boxes[:, 0], boxes[:, 2], height), _inside(boxes[:, 1], boxes[:, 3], width)
    box = rows[:, :, None] & columns[:, None, :]
    return torch.where(box.view(-1, *[1] * (views.ndim - 3), height, width), views[:-1], views[1:])


def kept(boxes: Tensor, side: int) -> Tensor:
    """The share of its own pixels that each picture keeps under `cutmix`: λ for `distances.mixed_labels`.

    Args:
        boxes: (k, 4), as of `cutmix`.
        side: of the views, pixels.

    Returns:
        (k,) float32 in [0, 1], counted in pixels: the box is rounded to those of that side.
    """
    rows, columns = _inside(boxes[:, 0], boxes[:, 2], side).sum(-1), _inside(boxes[:, 1], boxes[:, 3], side).sum(-1)
    return (side**2 - rows * columns) / side**2


def _inside(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Whether each pixel along a side lies between a box's edges, which are rounded to pixels: (k, side)."""
    first, last = ((edge * side + 0.5).floor()[:, None] for edge in (start, start + length))
    pixels = torch.arange(side, device=start.device)
    return (first <= pixels) & (pixels < last)
