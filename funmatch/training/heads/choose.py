"""Fits heads of one kind to features, and chooses among them by the validation images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funmatch.config import Head
from funmatch.ops.calibration import fit_temperature
from funmatch.ops.distances import balanced_weights
from funmatch.ops.heads.logistic import LinearHead, fit_logistic, moments
from funmatch.runtime.log import ProgressBar, info

AnyHead = LinearHead
"""What computes logits (n, classes) of features (n, d)."""


@dataclass(frozen=True)
class Labelled:
    """Features (n, d) float32 of images, and their labels (n,) int64."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FittedHead:
    """The head that was chosen.

    Attributes:
        head: the layer, for features as the backbone computes them.
        tried: of each that was tried its value, and `top1` and `nll` on the validation images.
        chosen: the value that was chosen; None where there was nothing to choose.
    """

    head: AnyHead
    tried: list[dict[str, Any]]
    chosen: float | None


def fit_head(config: Head, train: Labelled, val: Labelled | None, classes: int, device: torch.device) -> FittedHead:
    """Fits a head for each value that is tried, and chooses the one with the best accuracy on validation.

    Of equals that with the lower log loss is taken. Weights are fitted to the training images alone; validation images
    decide which head it is, and the scale of its logits.

    Args:
        val: the validation images; None where one value is given.
        device: on which the fits are computed.
    """
    heads = FITS[config.kind](config, train, classes, device)
    tried, best, found = [], (-1.0, 0.0), None
    with ProgressBar(config.kind, len(config.tried)) as bar:
        for done, (value, head) in enumerate(zip(config.tried, heads, strict=True), 1):
            if val and config.calibrate:
                head = head.scaled(_scale(head(val.features), val.labels))
            row = {"value": value} | (_scores(head, val) if val else {})
            tried.append(row)
            score = (row.get("top1", 0.0), -row.get("nll", 0.0))
            if found is None or score > best:
                best, found = score, (value, head)
            bar.update(done, f"validation {row['top1']:.1%}" if val else "")
    assert found
    _note_edge(config, found[0])
    return FittedHead(found[1], tried, found[0])


def _scale(logits: Tensor, labels: Tensor) -> float:
    """Returns the factor of logits (n, classes) with the least log loss, as if one more image were given a wrong class.

    Without that image there would be no such factor where all predictions are right: the larger the better.
    """
    ranked = logits.topk(2, dim=-1)
    # One that the head is as sure of as of most.
    usual = (ranked.values[:, 0] - ranked.values[:, 1]).median(0).indices
    temperature = fit_temperature(
        torch.cat([logits, logits[usual : usual + 1]]), torch.cat([labels, ranked.indices[usual, 1:2]])
    )
    return 1.0 if temperature is None else 1 / temperature


def _scores(head: AnyHead, val: Labelled) -> dict[str, float]:
    logits = head(val.features)
    right = (logits.argmax(-1) == val.labels).double().mean()
    return {"top1": right.item(), "nll": F.cross_entropy(logits, val.labels).item()}


def _fit_linear(config: Head, train: Labelled, classes: int, device: torch.device) -> Iterator[AnyHead]:
    scale = moments(train.features, scale=config.standardise)
    features = scale.apply(train.features.to(device))
    weights = balanced_weights(train.labels, classes) if config.class_weights == "balanced" else None
    for head in fit_logistic(features, train.labels, classes, config.tried, weights):
        if not head.converged:
            info(f"WARNING: a fit has not converged in {head.steps:,} steps; leave out the largest of --C")
        yield head.unscaled(scale)


FITS: dict[str, Callable[[Head, Labelled, int, torch.device], Iterator[AnyHead]]] = {"linear": _fit_linear}


def _note_edge(config: Head, value: float) -> None:
    """Says where the best of several strengths is the smallest or the largest: a better one may lie beyond."""
    ends = {config.tried[0]: "smallest", config.tried[-1]: "largest"}
    if config.kind == "linear" and len(ends) > 1 and value in ends:
        info(f"note: the best C, {value:g}, is the {ends[value]} that was tried; a better one may lie beyond (--C)")
