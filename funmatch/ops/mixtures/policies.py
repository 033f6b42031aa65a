"""Draws the view policy of each image of a batch, and makes the views of a batch by several policies.

Qin et al., "MobileNetV4: Universal models for the mobile ecosystem" (2024), section 8: a student that is distilled from
images with MixUp and from images with RandAugment, mixed in the same run, becomes better than from either alone.

An image's crop, mirroring, λ and operations are those that it would have in a run with its policy alone. It is mixed
with the image before it in the global batch, whatever policy that one has drawn.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from funmatch.ops import randaugment
from funmatch.ops.mixing import draw_cutmix_boxes
from funmatch.ops.mixtures.shares import divide
from funmatch.ops.sampling import (
    CUTMIX_STREAM,
    POLICY_STREAM,
    RANDAUGMENT_STREAM,
    StepSample,
    step_generator,
)
from funmatch.ops.view_spec import ViewSpec


def draw_policies(spec: ViewSpec, step: int) -> np.ndarray:
    """Returns the policy of each image of a global batch, (batch,) int64; zeros where all images have the same.

    How many images of a batch have a policy is not drawn: it is its share of the batch, rounded so that the rest comes
    later (`shares.divide`). Which images these are is drawn, uniformly.
    """
    if not spec.policies:
        return np.zeros(spec.batch, np.int64)
    places = np.arange(step * spec.batch, (step + 1) * spec.batch, dtype=np.int64)
    groups, _ = divide(places, tuple(share for share, _ in spec.policies))
    order = step_generator(spec.seed, step, POLICY_STREAM).random(spec.batch).argsort(kind="stable")
    return groups[order]


def by_policy(spec: ViewSpec, step: int) -> list[tuple[ViewSpec, np.ndarray]]:
    """Returns the specs of which the views of a global batch are, each with its images, (batch,) bool."""
    drawn = draw_policies(spec, step)
    return [(each, drawn == number) for number, each in enumerate(_specs(spec))]


def _specs(spec: ViewSpec) -> list[ViewSpec]:
    return [each for _, each in spec.policies] or [spec]


def list_images(names: Sequence[str], drawn: np.ndarray) -> str:
    """Lists which images have which policy, counted from 1: "mixup=1: images 1, 3; mixup=0,randaugment=2 9: image 2".

    Args:
        names: of the policies.
        drawn: numbers of the policies of the images, (n,).
    """
    found = [(name, [str(place + 1) for place in np.flatnonzero(drawn == i)]) for i, name in enumerate(names)]
    return "; ".join(f"{name}: image{'s' * (len(each) > 1)} {', '.join(each)}" for name, each in found if each)


def sample(spec: ViewSpec, step: int, draw: Callable[[ViewSpec], StepSample]) -> StepSample:
    """Draws the choices of a global batch by policies.

    Args:
        draw: those of a spec without policies.
    """
    # Each policy's for the whole batch: what one image draws must not depend on the policies of others.
    parts = [(draw(each), rows) for each, rows in by_policy(spec, step)]
    drawn, owns = parts[0][0], [part.teacher_view for part, _ in parts if part.teacher_view]
    lams = [np.broadcast_to(part.lam, rows.shape) for part, rows in parts]
    masks = [rows for _, rows in parts]
    return replace(
        drawn,
        boxes=_pick([part.boxes for part, _ in parts], masks),
        flips=_pick([part.flips for part, _ in parts], masks),
        lam=_pick(lams, masks),
        teacher_view=(_pick([own[0] for own in owns], masks), _pick([own[1] for own in owns], masks)) if owns else None,
    )


def _pick(values: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> np.ndarray:
    """Returns of each row the value of the array whose mask holds it."""
    result = values[0].copy()
    for value, mask in zip(values, masks, strict=True):
        result[mask] = value[mask]
    return result


def draw_mixing(spec: ViewSpec, step: int, lam: float | np.ndarray) -> tuple[float | np.ndarray, np.ndarray | None]:
    """Draws the boxes of CutMix of a global batch.

    Args:
        lam: MixUp weight, one number or (batch,) float64, as `sample` has drawn it.

    Returns:
        λ, which is 1 where CutMix takes its place; and boxes, (1 or batch, 4) float64, or None without CutMix.
    """
    if not spec.policies:
        cuts, lam = _draw_cutmix(spec, step, lam) if spec.cutmix else (None, lam)
        return lam, cuts
    lams, boxes = np.array(lam, np.float64), np.zeros((spec.batch, 4))
    for each, rows in by_policy(spec, step):
        if each.cutmix and rows.any():
            # Where one λ holds for a batch, it is that of any image with this policy.
            cuts, own = _draw_cutmix(each, step, lams if each.mixup.per_image else float(lams[rows][0]))
            lams[rows] = np.broadcast_to(own, rows.shape)[rows]
            boxes[rows] = np.broadcast_to(cuts, boxes.shape)[rows]
    return lams, boxes if any(each.cutmix for each in _specs(spec)) else None


def _draw_cutmix(spec: ViewSpec, step: int, lam: float | np.ndarray) -> tuple[np.ndarray, float | np.ndarray]:
    rng = step_generator(spec.seed, step, CUTMIX_STREAM)
    return draw_cutmix_boxes(
        rng, spec.batch, spec.cutmix, lam, per_image=spec.mixup.per_image, with_mixup=spec.mixup.a > 0
    )


def augment(spec: ViewSpec, step: int, crops: Sequence[Tensor], rows: np.ndarray) -> list[Tensor]:
    """Applies RandAugment to crops of some rows of a global batch, the same to those of every size.

    Args:
        crops: (rows, 3, side, side) float32 in [0, 1] each.
        rows: their places in the global batch, (rows,) int64.
    """
    found = list(crops)
    for each, members in by_policy(spec, step):
        mine = np.flatnonzero(members[rows])
        if not each.randaugment or not len(mine):
            continue
        # Drawn for the global batch, then sliced, as all draws.
        rng = step_generator(spec.seed, step, RANDAUGMENT_STREAM)
        drawn = randaugment.draw_operations(rng, spec.batch, *each.randaugment)
        ops, strengths = (values[rows[mine]] for values in drawn)
        if len(mine) == len(rows):
            found = [randaugment.apply_operations(views, ops, strengths) for views in found]
            continue
        for number, views in enumerate(found):
            changed = views.clone()
            changed[mine] = randaugment.apply_operations(views[mine], ops, strengths)
            found[number] = changed
    return found
