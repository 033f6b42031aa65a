"""Fits a temperature on validation images, and measures calibration with it on the evaluated ones."""

from dataclasses import asdict
from typing import Any

from torch import Tensor

from funmatch.data.cache.stores import CachedSplit
from funmatch.data.readers.split_names import describe_images
from funmatch.ops import calibration
from funmatch.training.evaluation import scoring
from funmatch.training.evaluation.figures import Scores
from funmatch.training.evaluation.subject import Opened, Subject

MOST_IMAGES = 5000
"""Validation images on which a temperature is fitted, at most: it is a single number."""
SCALED = ("temperature", "temperature_from", "ece_scaled", "nll_scaled", "brier_scaled", "reliability_scaled")


def scale_temperature(subject: Subject, scores: Scores, opened: Opened) -> dict[str, Any]:
    """Fits a temperature, and measures calibration with it.

    It is fitted on the validation images. Where these are the evaluated ones, or there are none, each half of the
    evaluated images is scaled by the temperature of the other half, and `temperature` is that of all of them.

    Returns:
        the keys `SCALED`, None where it is undefined; `temperature_from` says which images it was fitted on.
    """
    found: dict[str, Any] = dict.fromkeys(SCALED)
    if scores.labels is None:
        return found
    others = _other_images(opened)
    if others is None:
        temperature = calibration.fit_temperature(scores.logits, scores.labels)
        fitted_on = f"{opened.split.name}, each half by the temperature of the other"
        scaled = calibration.half_scaled(scores.logits, scores.labels, temperature) if temperature else None
    else:
        temperature = calibration.fit_temperature(subject.predict(others), others.labels(slice(None)))
        fitted_on = describe_images(len(others), others.name)
        scaled = scores.logits / temperature if temperature else None
    if scaled is None:
        return found
    return found | {"temperature": temperature, "temperature_from": fitted_on} | _measure(scaled, scores)


def _measure(scaled: Tensor, scores: Scores) -> dict[str, Any]:
    assert scores.labels is not None
    after = calibration.proper_scores(scaled, scores.labels)
    # A temperature changes no order, so that the same images are right.
    correct = scores.columns["top1"]
    bins = calibration.reliability(after["confidence"], correct)
    return {
        "ece_scaled": calibration.calibration_error(after["confidence"], correct),
        "nll_scaled": after["nll"].mean().item(),
        "brier_scaled": after["brier"].mean().item(),
        "reliability_scaled": [asdict(each) for each in bins],
    }


def _other_images(opened: Opened) -> CachedSplit | None:
    """Returns validation images that are not those evaluated; None where there are none with labels."""
    split = opened.cache.splits.get("val")
    if split is None or not split.labelled or opened.split.name == "val":
        return None
    return split if len(split) <= MOST_IMAGES else split.subset(scoring.evenly_spread(len(split), MOST_IMAGES))
