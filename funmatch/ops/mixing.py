"""CutMix: a box of every image is filled from the image before it in the global batch.

Yun et al., "CutMix: Regularization strategy to train strong classifiers with localizable features" (2019). Teacher and
student see the very same result. A box is given as fractions of the side, so that it is the same part of a view at
every side; one without area leaves its image as it is, as a λ of 1 does in `mixup`: so a batch, or each
image of one, can be cut or mixed by its draws alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from funmatch.ops.sampling import beta_quantile


def boxes_from_uniforms(uniforms: np.ndarray, a: float = 1.0) -> np.ndarray:
    """Boxes whose share of an image is 1 − λ with λ from Beta(a, a), around centres that are uniform.

    What lies beyond the border is clipped, so that less than 1 − λ may be left; `kept` says what is. (section 3.2)

    Args:
        uniforms: (k, 3) in [0, 1): for λ and for the centre, down and across.
        a: > 0; 1 is uniform, as in the paper.

    Returns:
        (k, 4) float64: top, left, height, width, as fractions of the side, in [0, 1].
    """
    half = np.sqrt(1 - beta_quantile(uniforms[:, :1], a)) / 2
    corner = np.maximum(uniforms[:, 1:] - half, 0)
    return np.concatenate([corner, np.minimum(uniforms[:, 1:] + half, 1) - corner], axis=1)


def draw_cutmix_boxes(
    rng: np.random.Generator, n: int, a: float, lam: float | np.ndarray, *, each: bool = False, mixed: bool = False
) -> tuple[np.ndarray, float | np.ndarray]:
    """Draws the boxes of a global batch, and which images are cut and which are mixed where both are asked for.

    Args:
        rng: where the uniform numbers come from.
        n: images.
        a: of `cut_boxes`.
        lam: of MixUp, one or (n,).
        each: a box of its own for each image.
        mixed: whether MixUp is asked for too; then a coin decides for a batch, or for each image, as timm does.

    Returns:
        boxes, (n, 4) or (1, 4), without area where nothing is cut; and λ, which is 1 where something is.
    """
    uniforms = rng.random((n if each else 1, 4))
    boxes = boxes_from_uniforms(uniforms[:, :3], a)
    cut = uniforms[:, 3] < 0.5 if mixed else np.full(len(boxes), fill_value=True)
    left = np.where(cut, 1.0, lam)
    return boxes * cut[:, None], left if each else float(left[0])


def cutmix(views: Tensor, boxes: Tensor, own: Tensor | None = None) -> Tensor:
    """Fills a box of every image with the same box of the one before it in the global batch.

    Args:
        views: (1 + n, ..., height, width), whose row 0 is the predecessor of row 1 (the last of the global batch,
            where row 1 is its first).
        boxes: one for all or one each, (1 or n, 4): top, left, height, width, as fractions of the side. Floating,
            and on the device of the views.
        own: what is outside of the boxes, (n, ..., height, width); by default the image itself.

    Returns:
        (n, ..., height, width): x[i − 1] in the box, x[i] elsewhere.
    """
    height, width = views.shape[-2:]
    rows, columns = _inside(boxes[:, 0], boxes[:, 2], height), _inside(boxes[:, 1], boxes[:, 3], width)
    box = rows[:, :, None] & columns[:, None, :]
    return torch.where(
        box.view(-1, *[1] * (views.ndim - 3), height, width), views[:-1], views[1:] if own is None else own
    )


def kept_fraction(boxes: Tensor, side: int) -> Tensor:
    """The share of its own pixels that each image keeps under `cutmix`: λ for `distances.mixed_labels`.

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


def mixup(views: Tensor, lam: float | Tensor) -> Tensor:
    """Mixes every image with the one before it in the global batch.

    Rolling by one pairs each image with another than its partner pairs with; reversing the batch, as is
    often done, makes mirrored pairs of the same two.

    Args:
        views: (1 + n, ...), whose row 0 is the predecessor of row 1 (the last of the global batch, where row
            1 is its first).
        lam: weight of the image itself, in [0, 1]: one for all, or one each, (n,).

    Returns:
        (n, ...), λ·x[i] + (1 − λ)·x[i − 1].
    """
    if isinstance(lam, Tensor):
        return torch.lerp(views[:-1], views[1:], lam.view(-1, *[1] * (views.ndim - 1)))
    return views[1:] if lam == 1 else torch.lerp(views[:-1], views[1:], lam)


def mix_views(
    crops: Tensor, teacher_crops: Sequence[Tensor | None], lam: float | Tensor, cutmix_boxes: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The teachers' views and the student's.

    A teacher that is shown the student's own crops gets the student's own view, the very same pixels: that is
    consistency, and with MixUp it is function matching (paper, section 3).

    Args:
        crops: the student's, (1 + n, 3, side, side) in [0, 1], row 0 being row 1's predecessor in the global batch.
        teacher_crops: the teachers', alike, each at its own side; None for those that are shown `crops`.
        lam: MixUp weight of the image itself, one or (n,); 1 is no MixUp.
        cutmix_boxes: (1 or n, 4), or None.

    Returns:
        views of (n, 3, side, side) in [0, 1]: one for each of `teacher_crops`, and the student's.
    """

    def mixed(crops: Tensor) -> Tensor:
        own = mixup(crops, lam)
        return own if cutmix_boxes is None else cutmix(crops, cutmix_boxes, own)

    student = mixed(crops)
    return [student if each is None else mixed(each) for each in teacher_crops], student


def own_weight(lam: float | Tensor, cuts: Tensor | None, side: int) -> float | Tensor:
    """How much of each view is its own image, one or (n,): the λ of its label."""
    return lam if cuts is None else lam * kept_fraction(cuts, side)
