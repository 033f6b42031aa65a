"""Collects what a run will draw in its first steps: the weights of mixed images, and the areas and aspects of crops."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from funmatch.data.loader import Loader
from funmatch.ops.mixing import own_weight

MOST_STEPS = 1000
"""Steps whose draws are collected, at most: about two seconds for batches of 512 images."""
Values = Mapping[str, np.ndarray]
"""Values of each crop, (crops,), by who is shown it: `student`, and `teacher` where it has crops of its own."""


@dataclass(frozen=True)
class Draws:
    """What the first steps of a run draw.

    Attributes:
        steps: how many steps these are.
        weights: the weight of an image in its own view, in [0, 1]: one a step, or one an image. 1 is not mixed.
        areas: share of its image that a crop covers, in (0, 1].
        aspects: width of a crop divided by its height, in pixels of the image.
    """

    steps: int
    weights: np.ndarray
    areas: Values
    aspects: Values


def collect(loader: Loader, steps: int) -> Draws:
    """Draws the first steps of a run as its batches are drawn, without reading an image.

    Args:
        loader: of the whole global batch.
        steps: length of the run.
    """
    weights: list[np.ndarray] = []
    areas: dict[str, list[np.ndarray]] = {}
    aspects: dict[str, list[np.ndarray]] = {}
    steps = min(steps, MOST_STEPS)
    for step in range(steps):
        drawn = loader.sample(step)
        lam, cuts = loader.mixing(step, drawn.lam, np.arange(loader.spec.batch))
        weights.append(np.atleast_1d(np.asarray(own_weight(lam, cuts, loader.spec.side), np.float64)))
        images_h, images_w = loader.split.sizes(drawn.indices)
        # As floats: areas of large images overflow the type in which their sizes are stored.
        whole = images_h.astype(np.float64) * images_w
        views = {"student": drawn.boxes} | ({"teacher": drawn.teacher_view[0]} if drawn.teacher_view else {})
        for name, boxes in views.items():
            _, _, height, width = boxes.astype(np.float64).T
            areas.setdefault(name, []).append(height * width / whole)
            aspects.setdefault(name, []).append(width / height)
    return Draws(
        steps,
        np.concatenate(weights),
        {name: np.concatenate(each) for name, each in areas.items()},
        {name: np.concatenate(each) for name, each in aspects.items()},
    )
