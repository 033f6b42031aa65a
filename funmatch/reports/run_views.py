"""Draws the views of a step as a sheet, from a run's folder and its data."""

import base64
from io import BytesIO
from typing import Any

from funmatch.config import TAUGHT
from funmatch.config.choices import STRATEGIES
from funmatch.data.loader import Loader
from funmatch.errors import InputError
from funmatch.ops import mixing
from funmatch.ops.mixtures.policies import draw_policies, list_images
from funmatch.reports.images import stacked, views_image
from funmatch.runtime.functions import find_function
from funmatch.runtime.text import percent
from funmatch.training import datasets
from funmatch.training.defaults import source_shares, view_spec
from funmatch.training.run import folder as run_folder

SHOWN_VIEWS = 12
MOST_PIXELS = 2**28
"""Pixels of a batch of which views are drawn, at most: a record may name any image size. 2 ** 28 take 3 GB."""


def views_sheet(run: run_folder.Run, step: int | None) -> dict[str, Any] | None:
    """Draws the teacher's and the student's views of a step; None if the data set is gone or has changed.

    Args:
        step: None: of the first step, but only if the data set was opened on this machine before. The run may be a
            stranger's, and nobody asked for its data.
    """
    config = run.config
    options = config["knobs"]
    try:
        # Not `checked`, which may refuse options that an earlier version took.
        table = TAUGHT[config["verb"]](**options)
        open_set = datasets.open_known_data_set if step is None else datasets.open_data_set
        cache = datasets.open_run_data(table, log=lambda _: None, open_set=open_set)
        # A function of a program that has ended cannot be called.
        if table.augment:
            find_function(table.augment, "augment")
    # A page outlives its data: without views it still has everything else.
    except (InputError, OSError, ValueError, KeyError):
        return None
    # Views are functions of the seed, the step and the images: other images would show views that never were.
    if cache.key != config["facts"]["data"]:
        return None
    if options["batch"] * options["side"] ** 2 > MOST_PIXELS:
        return None
    step = step or 0
    strategy = STRATEGIES[options["strategy"]] if "strategy" in options else None
    # At the student's size: both rows of a sheet must be equally wide.
    sides = (options["side"],) if strategy and not strategy.fixed else ()
    train = cache.splits["train"]
    spec = view_spec(table, source_shares(table, train))
    batch = Loader(train, spec, teacher_sides=sides).batch_at(step)
    shown, student = mixing.mix_views(batch.crops, batch.teacher_crops, batch.lam, batch.cutmix_boxes)
    rows = [views_image(views[:SHOWN_VIEWS], SHOWN_VIEWS) for views in (*shown, student)]
    image, png = stacked(rows), BytesIO()
    image.save(png, "PNG")
    return {
        "name": run.folder.resolve().name,
        "step": step,
        # One per image cannot be written beside the sheet.
        "lam": (lam := batch.lam if isinstance(batch.lam, float) else None),
        "strategy": options.get("strategy", "training on labels"),
        "rows": (names := ["teacher", "student"][-len(rows) :]),
        "caption": _caption(names, lam, list_images(table.policy, draw_policies(spec, step)[:SHOWN_VIEWS])),
        "png": base64.b64encode(png.getvalue()).decode(),
    }


def _caption(rows: list[str], lam: float | None, policies: str) -> str:
    """Describes a sheet: whose input each row is, how its images are mixed, and which has which view policy."""
    which = "the teacher's input above, the student's below" if len(rows) > 1 else "the student's input"
    # 1 is an image that is not mixed.
    mixed = "" if lam is None or lam == 1 else f". MixUp: {percent(lam)} of each image, the rest of the one before it"
    drawn = f". Policies, from the left: {policies}" if policies else ""
    return f"{which}{mixed}{drawn}."
