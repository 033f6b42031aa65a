"""Mixes each image of a batch with the one before it, by MixUp and CutMix, for teacher and student alike.

MixUp: Zhang et al., "mixup: Beyond empirical risk minimization" (2018). CutMix: Yun et al., "CutMix: Regularization
strategy to train strong classifiers with localizable features" (2019).

The partner is the image before it in the *global* batch, which a process gets as row 0 of its crops. A box is given in
fractions of the side, so that it is the same part of a view at every image size. A box without area leaves its image as
it is, as a λ of 1 does: so a batch, or each image of one, is cut or mixed by its draws alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class MixupOptions:
    """How MixUp's λ is drawn.

    Attributes:
        a: parameter of Beta(a, a), the distribution of λ; 1 is uniform, 0 turns MixUp off.
        per_image: draw a λ for each image instead of one for the batch.
        take_max: use max(λ, 1 − λ), so that no image counts less than its partner.
        lam: a fixed λ, used as it is, instead of a drawn one.
    """

    a: float = 1.0
    per_image: bool = False
    take_max: bool = True
    lam: float | None = None

    def lam_at(self, uniforms: np.ndarray) -> np.ndarray:
        """Maps uniform numbers in [0, 1) to λ, in the same shape."""
        # First, since Beta(0, 0) has no quantile function; and MixUp off wins over a fixed λ.
        if self.a == 0:
            return np.ones_like(uniforms)
        if self.lam is not None:
            return np.full_like(uniforms, self.lam)
        lam = beta_quantile(uniforms, self.a)
        return np.maximum(lam, 1 - lam) if self.take_max else lam


def beta_quantile(uniforms: np.ndarray, a: float) -> np.ndarray:
    """Maps uniform numbers in [0, 1) to Beta(a, a), a > 0, by its quantile function; the same shape."""
    if a == 1:
        return uniforms
    # By the quantile function, not `rng.beta`, whose stream numpy does not keep. Imported here: it takes 0.1 s.
    from scipy.special import betaincinv

    return betaincinv(a, a, uniforms)


def boxes_from_uniforms(uniforms: np.ndarray, a: float = 1.0) -> np.ndarray:
    """Maps uniform numbers to CutMix boxes of area 1 − λ, with λ from Beta(a, a) and a uniform centre (section 3.2).

    Boxes are clipped at the border, so that less than 1 − λ may be covered; `kept_fraction` gives what is left.

    Args:
        uniforms: (k, 3) in [0, 1): for λ and for the centre's row and column.
        a: parameter of Beta(a, a), > 0; 1 is uniform, as in the paper.

    Returns:
        (k, 4) float64: top, left, height, width in fractions of the side, in [0, 1].
    """
    half = np.sqrt(1 - beta_quantile(uniforms[:, :1], a)) / 2
    # Clipped, not moved inside: centres are uniform over the whole image, its border included.
    corner = np.maximum(uniforms[:, 1:] - half, 0)
    return np.concatenate([corner, np.minimum(uniforms[:, 1:] + half, 1) - corner], axis=1)


def draw_cutmix_boxes(
    rng: np.random.Generator,
    n: int,
    a: float,
    lam: float | np.ndarray,
    *,
    per_image: bool = False,
    with_mixup: bool = False,
) -> tuple[np.ndarray, float | np.ndarray]:
    """Draws the CutMix boxes of a global batch and, where MixUp is on too, which images are cut and which mixed.

    Args:
        rng: source of the uniform numbers.
        n: images in the global batch.
        a: parameter of Beta(a, a), > 0.
        lam: MixUp weight, one number or (n,) float64.
        per_image: draw a box for each image instead of one for the batch.
        with_mixup: MixUp is on too; one of the two is chosen at random for the batch, or for each image, as in timm.

    Returns:
        boxes, (1 or n, 4) float64, without area where nothing is cut; and λ, which is 1 where something is.
    """
    # The fourth number is drawn even if it is not used, so that MixUp moves no box.
    uniforms = rng.random((n if per_image else 1, 4))
    boxes = boxes_from_uniforms(uniforms[:, :3], a)
    is_cut = uniforms[:, 3] < 0.5 if with_mixup else np.full(len(boxes), fill_value=True)
    lam = np.where(is_cut, 1.0, lam)
    return boxes * is_cut[:, None], lam if per_image else float(lam[0])


def cutmix(views: Tensor, boxes: Tensor, own: Tensor | None = None) -> Tensor:
    """Fills a box of every image with the same box of the one before it in the global batch.

    Args:
        views: (1 + n, ..., height, width); row 0 is the predecessor of row 1 in the global batch (its last image, if
            row 1 is its first).
        boxes: (1 or n, 4) floating: top, left, height, width in fractions of the side; on the device of the views.
        own: (n, ..., height, width), what lies outside the boxes; the images themselves if None.

    Returns:
        (n, ..., height, width): x[i − 1] in the box, x[i] elsewhere.
    """
    height, width = views.shape[-2:]
    # Rounded by the same function as in `kept_fraction`, whose weights must be those of the pixels that are filled.
    rows, columns = _inside(boxes[:, 0], boxes[:, 2], height), _inside(boxes[:, 1], boxes[:, 3], width)
    # A mask rather than slices: boxes differ between images, and their numbers never leave the device.
    box = rows[:, :, None] & columns[:, None, :]
    return torch.where(
        box.view(-1, *[1] * (views.ndim - 3), height, width), views[:-1], views[1:] if own is None else own
    )


def kept_fraction(boxes: Tensor, side: int) -> Tensor:
    """Computes the share of its own pixels that each image keeps under `cutmix`, the λ of its label.

    Args:
        boxes: (k, 4), as of `cutmix`.
        side: of the views, pixels.

    Returns:
        (k,) float32 in [0, 1]. Pixels are counted, since `cutmix` rounds the box to those of this side.
    """
    rows, columns = _inside(boxes[:, 0], boxes[:, 2], side).sum(-1), _inside(boxes[:, 1], boxes[:, 3], side).sum(-1)
    return (side**2 - rows * columns) / side**2


def _inside(start: Tensor, length: Tensor, side: int) -> Tensor:
    """Returns which pixels along a side lie between a box's edges, rounded to pixels.

    Args:
        start, length: of the boxes, (k,), fractions of the side.
        side: pixels.

    Returns:
        (k, side) bool.
    """
    # floor(x + 1/2) rounds halves up; `round`, which rounds them to even, would move the two edges differently.
    first, last = ((edge * side + 0.5).floor()[:, None] for edge in (start, start + length))
    pixels = torch.arange(side, device=start.device)
    return (first <= pixels) & (pixels < last)


def mixup(views: Tensor, lam: float | Tensor) -> Tensor:
    """Mixes every image with the one before it in the global batch.

    Args:
        views: (1 + n, ...); row 0 is the predecessor of row 1 in the global batch (its last image, if row 1 is its
            first).
        lam: weight of the image itself, in [0, 1]: one for all, or (n,).

    Returns:
        (n, ...), λ·x[i] + (1 − λ)·x[i − 1].
    """
    # With the image before it, as in the paper's code: each pair is mixed once. The reversed batch, as is often used,
    # mixes the same two images twice.
    if isinstance(lam, Tensor):
        return torch.lerp(views[:-1], views[1:], lam.view(-1, *[1] * (views.ndim - 1)))
    # Without a copy if nothing is mixed.
    return views[1:] if lam == 1 else torch.lerp(views[:-1], views[1:], lam)


def mix_views(
    crops: Tensor, teacher_crops: Sequence[Tensor | None], lam: float | Tensor, cutmix_boxes: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Mixes the crops of a batch into the teachers' views and the student's.

    A teacher that is shown the student's crops gets the student's view, the very same pixels: that is consistency, and
    with MixUp it is function matching (paper, section 3).

    Args:
        crops: the student's, (1 + n, 3, side, side) in [0, 1]; row 0 is row 1's predecessor in the global batch.
        teacher_crops: one entry a teacher: its crops at its own side, or None if it is shown `crops`.
        lam: MixUp weight of the image itself, one number or (n,); 1 turns MixUp off.
        cutmix_boxes: (1 or n, 4) as of `cutmix`, or None.

    Returns:
        views (n, 3, side, side) in [0, 1]: one for each of `teacher_crops`, and the student's.
    """

    def mix(crops: Tensor) -> Tensor:
        own = mixup(crops, lam)
        return own if cutmix_boxes is None else cutmix(crops, cutmix_boxes, own)

    # Mixed once and shared: the very same tensor, so that no rounding can come between teacher and student.
    student = mix(crops)
    return [student if each is None else mix(each) for each in teacher_crops], student


def own_weight(lam: float | Tensor, cutmix_boxes: Tensor | None, side: int) -> float | Tensor:
    """Computes the weight of its own image in each view, one number or (n,): the λ of its label.

    Args:
        lam: MixUp weight, one number or (n,).
        cutmix_boxes: (1 or n, 4), or None.
        side: of the views, pixels.
    """
    # A product, though `draw_cutmix_boxes` never cuts and mixes the same image: one of the two factors is 1.
    return lam if cutmix_boxes is None else lam * kept_fraction(cutmix_boxes, side)
