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


def cuts(
    rng: np.random.Generator, n: int, a: float, lam: float | np.ndarray, *, each: bool = False, mixed: bool = False
) -> tuple[np.ndarray, float | np.ndarray]:
    """Draws the boxes of a global batch, and which pictures are cut and which are mixed where both are asked for.

    Args:
        rng: where the uniform numbers come from.
        n: pictures.
        a: of `cut_boxes`.
        lam: of MixUp, one or (n,).
        each: a box of its own for each picture.
        mixed: whether MixUp is asked for too; then a coin decides for a batch, or for each picture, as timm does.

    Returns:
        boxes, (n, 4) or (1, 4), without area where nothing is cut; and λ, which is 1 where something is.
    """
    uniforms = rng.random((n if each else 1, 4))
    boxes = cut_boxes(uniforms[:, :3], a)
    cut = uniforms[:, 3] < 0.5 if mixed else np.full(len(boxes), fill_value=True)
    left = np.where(cut, 1.0, lam)
    return boxes * cut[:, None], left if each else float(left[0])


def cutmix(views: Tensor, boxes: Tensor, own: Tensor | None = None) -> Tensor:
    """Fills a box of every picture with the same box of the one before it in the global batch.

    Args:
        views: (1 + n, ..., height, width), whose row 0 is the predecessor of row 1 (the last of the global batch,
            where row 1 is its first).
        boxes: one for all or one each, (1 or n, 4): top, left, height, width, as fractions of the side. Floating,
            and on the device of the views.
        own: what is outside of the boxes, (n, ..., height, width); by default the picture itself.

    Returns:
        (n, ..., height, width): x[i − 1] in the box, x[i] elsewhere.
    """
    height, width = views.shape[-2:]
    rows, columns = _inside(boxes[:, 0], boxes[:, 2], height), _inside(boxes[:, 1], boxes[:, 3], width)
    box = rows[:, :, None] & columns[:, None, :]
    return torch.where(
        box.view(-1, *[1] * (views.ndim - 3), height, width), views[:-1], views[1:] if own is None else own
    )


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
