"""Draws the first views of a run as a sheet, made by the loader and the mixing that the run itself uses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageOps
from torch import Tensor

from funmatch.config import Distill
from funmatch.config.choices import STRATEGIES
from funmatch.ops.mixing import mix_views
from funmatch.ops.mixtures.policies import draw_policies, list_images
from funmatch.reports.images import captioned, stacked, views_image
from funmatch.runtime.text import percent
from funmatch.training.setup import TrainSetup
from funmatch.training.teachers.fixed import fixed_views

SHOWN = 16
"""Images whose views are shown, at most."""
WIDEST = 1200
"""Pixels up to which a row has more than four views."""
MARGIN = 6
TEACHER = {
    "whole": "the teacher's at {side} pixels: the whole image, the same in every step",
    "central": "the teacher's at {side} pixels: a central crop, the same in every step",
    "ensemble": "the teacher's at {side} pixels: one of {crops:,} crops whose outputs are averaged, always the same",
}


@dataclass(frozen=True)
class Views:
    """Views of the first images of step 0.

    Attributes:
        caption: whose they are, and how they are made.
        views: (n, 3, side, side) float32 in [0, 1].
    """

    caption: str
    views: Tensor


def first_views(setup: TrainSetup[Distill]) -> list[Views]:
    """Makes the student's views of the first images of step 0; then the teachers', where they are other pixels."""
    # The first rows of the global batch: as the first of many processes, each with a small share of it.
    loader = replace(setup.loader, rank=0, world_size=max(1, setup.loader.spec.batch // SHOWN))
    batch = loader.batch_at(0)
    teachers, student = mix_views(batch.crops, batch.teacher_crops, batch.lam, batch.cutmix_boxes)
    found = [Views(_caption(setup, batch.lam), student[:SHOWN])]
    if not isinstance(setup.config, Distill):
        return found
    row = STRATEGIES[setup.config.strategy]
    if row.fixed:
        # Of the images themselves: what is mixed of a fixed teacher is its outputs.
        source, sides = fixed_views(setup), sorted(set(setup.config.teacher_side))
        images = loader.sample(0).indices[: min(len(batch), SHOWN)].tolist()
        each = [source.views(image, slice(1), sides) for image in images]
        about = TEACHER[source.kind]
        return found + [
            Views(about.format(side=side, crops=source.crops), torch.cat([views[side] for views in each]))
            for side in sides
        ]
    about = "crops of its own" if row.teacher == "own" else "the same crops"
    return found + [
        Views(f"the teacher's at {side} pixels: {about}", views[:SHOWN])
        for side, views, crops in zip(loader.teacher_sides, teachers, batch.teacher_crops, strict=True)
        if crops is not None
    ]


def _caption(setup: TrainSetup, lam: float | Tensor) -> str:
    config = setup.config
    what = "the student's" if isinstance(config, Distill) else "the network's"
    # 1 is an image that is not mixed.
    mixed = (
        f"; MixUp: {percent(lam)} of each, the rest of the one before it" if isinstance(lam, float) and lam != 1 else ""
    )
    same = isinstance(config, Distill) and STRATEGIES[config.strategy].teacher == "same"
    if config.policy:
        shown = draw_policies(setup.loader.spec, 0)[:SHOWN]
        mixed += f"; {list_images(config.policy, shown)}"
    side = config.side or 0
    shared = " and the teacher's" if same and side in setup.loader.teacher_sides else ""
    return f"First views of step 0, {what}{shared}, {side} pixels{mixed}"


def draw_sheet(found: Sequence[Views]) -> Image.Image:
    """Draws views in rows under their captions, each view with all its pixels; few of them where they are large."""
    columns = next((each for each in (8, 6) if each * found[0].views.shape[-1] <= WIDEST), 4)
    rows = [captioned(views_image(each.views[: 2 * columns], columns), each.caption) for each in found]
    return stacked([ImageOps.expand(each, MARGIN, "white") for each in rows])
