"""Fits heads of one kind to features, and chooses among them by the validation images."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funmatch.config import Head
from funmatch.models.heads.headed import AnyHead
from funmatch.models.heads.modules import CosineHead, NeighbourHead, log_odds, log_shares
from funmatch.ops.calibration import fit_temperature
from funmatch.ops.embeddings import ROWS, find_neighbours, vote, vote_for_sets
from funmatch.ops.heads.logistic import LinearHead, fit_logistic, moments
from funmatch.ops.heads.means import class_means, directions, fit_slope, nearer_mean, nearest_mean, prior_log_odds
from funmatch.ops.tasks.multiclass import accuracy
from funmatch.ops.tasks.task import MULTICLASS, MULTILABEL, Task, task_of
from funmatch.runtime.log import ProgressBar, info

PATIENCE = 3
"""Values that may be no better before the others are left out, where the user gave none: the weaker the penalty, the
longer the fit."""


@dataclass(frozen=True)
class Labelled:
    """Features (n, d) float32 of images, and their labels, (n,) int64; (n, classes) in {0, 1} of several an image."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Fit:
    """A head that was fitted.

    Attributes:
        value: of the option among whose values the validation images choose; None where there is no such option.
        head: gives logits (n, classes) of features (n, d) as the backbone computes them.
        logits: of the validation images; None where there are none.
        is_calibrated: whether they have their scale already, which is then `value`.
    """

    value: float | None
    head: AnyHead
    logits: Tensor | None
    is_calibrated: bool = False


@dataclass(frozen=True)
class FittedHead:
    """The head that was chosen.

    Attributes:
        head: gives logits of features as the backbone computes them.
        tried: of each that was tried its `value`, and `nll` and `top1`, or `map` of several classes an image, on the
            validation images.
        chosen: the value that was chosen.
    """

    head: AnyHead
    tried: list[dict[str, Any]]
    chosen: float

    def logits(self, features: Tensor) -> Tensor:
        """Returns the logits (n, classes) of features (n, d)."""
        if isinstance(self.head, NeighbourHead) and self.head.several:
            # The labels of all images' neighbours at once could take more memory than there is.
            return torch.cat([self.head(rows) for rows in features.split(ROWS)])
        return self.head(features)


def fit_head(config: Head, train: Labelled, val: Labelled | None, classes: int, device: torch.device) -> FittedHead:
    """Fits a head for each value that is tried, and chooses one by the validation images.

    Weights are fitted to the training images alone; validation images decide which head it is, and the scale of its
    logits.

    Args:
        val: the validation images; None where one value is given.
        device: on which the fits are computed.
    """
    task = task_of(config.task)
    tried, found = [], []
    with ProgressBar(config.kind, max(1, len(config.tried))) as bar:
        for done, fit in enumerate(FITS[config.kind](config, train, val, classes, device), 1):
            scores, scale = {}, 1.0
            if val and fit.logits is not None:
                scale = _scale(fit.logits, val.labels) if config.calibrate and not fit.is_calibrated else 1.0
                scores = _scores(task, scale * fit.logits, val.labels)
            value = scale if fit.value is None else fit.value
            tried.append({"value": value} | scores)
            found.append((value, scale, fit.head))
            bar.update(done, f"validation {scores[task.score]:.1%}" if scores else "")
            if scores and not config.strengths and _is_past_best(tried, task.score):
                break
    value, scale, head = found[_best(tried, task, len(val.labels)) if val else 0]
    _note_edge(config, value)
    return FittedHead(head.scaled(scale), tried, value)


def _is_past_best(tried: list[dict[str, Any]], score: str) -> bool:
    """Returns whether neither accuracy, under the name `score`, nor log loss became better by the last values."""
    earlier, last = tried[:-PATIENCE], tried[-PATIENCE:]
    return bool(earlier) and (
        max(each[score] for each in last) <= max(each[score] for each in earlier)
        and min(each["nll"] for each in last) >= min(each["nll"] for each in earlier)
    )


def _best(tried: list[dict[str, Any]], task: Task, images: int) -> int:
    """Returns the place of the best: of those within a standard error of the best accuracy, that of least log loss.

    Accuracies that a few images decide would choose among equals by chance, and may choose useless probabilities.
    Mean average precision, which all ranks of all classes decide, is taken as it is.
    """
    if task is MULTILABEL:
        return min((-each["map"], each["nll"], place) for place, each in enumerate(tried))[2]
    top1 = max(each["top1"] for each in tried)
    least = top1 - (top1 * (1 - top1) / images) ** 0.5
    return min((each["nll"], place) for place, each in enumerate(tried) if each["top1"] >= least)[1]


def _scale(logits: Tensor, labels: Tensor) -> float:
    """Returns the factor of logits (n, classes) with the least log loss, as if one more image were given a wrong class.

    Without that image there would be no such factor where all predictions are right: the larger the better. Where an
    image may have several classes, each is a case of its own, of two outcomes.
    """
    if labels.ndim == 2:
        present = logits.flatten()
        logits, labels = torch.stack([torch.zeros_like(present), present], 1), labels.flatten().long()
    ranked = logits.topk(2, dim=-1)
    # One that the head is as sure of as of most.
    usual = (ranked.values[:, 0] - ranked.values[:, 1]).median(0).indices
    temperature = fit_temperature(
        torch.cat([logits, logits[usual : usual + 1]]), torch.cat([labels, ranked.indices[usual, 1:2]])
    )
    return 1.0 if temperature is None else 1 / temperature


def _scores(task: Task, logits: Tensor, labels: Tensor) -> dict[str, float]:
    if task is MULTICLASS:
        return {"top1": accuracy(logits, labels), "nll": F.cross_entropy(logits, labels).item()}
    # None of the images may have a class, and all rankings are then alike.
    return {"map": task.accuracy(logits, labels) or 0.0, "nll": task.label_loss(logits, labels).mean().item()}


Fits = Callable[[Head, Labelled, Labelled | None, int, torch.device], Iterator[Fit]]


def _fit_linear(
    config: Head, train: Labelled, val: Labelled | None, classes: int, device: torch.device
) -> Iterator[Fit]:
    """Yields logistic regressions, from the strongest penalty on."""
    by = moments(train.features, scale=config.standardise)
    features = by.apply(train.features.to(device))
    balanced = task_of(config.task).balanced_weights
    weights = balanced(train.labels, classes) if config.class_weights == "balanced" else None
    fits = fit_logistic(features, train.labels, classes, config.tried, weights)
    for value, fitted in zip(config.tried, fits, strict=True):
        if not fitted.converged:
            info(f"WARNING: C {value:g} has not converged in {fitted.steps:,} steps; leave it out (--C)")
        head = fitted.unscaled(by)
        yield Fit(value, head, head(val.features) if val else None)


def _fit_knn(config: Head, train: Labelled, val: Labelled | None, classes: int, device: torch.device) -> Iterator[Fit]:
    """Yields votes of more and more neighbours."""
    several = train.labels.ndim == 2
    known = F.normalize(train.features, dim=-1)
    most, found = int(max(config.tried)), None
    if val:
        queries = F.normalize(val.features, dim=-1)
        # Of several labels an image, their rows: those of all neighbours at once could take too much memory.
        labels = torch.arange(len(known)) if several else train.labels
        found = find_neighbours(known.to(device), labels.to(device), queries.to(device), most)
    for value in map(int, config.tried):
        head = NeighbourHead(known.shape[1], classes, len(known), value, several=several)
        head.known, head.labels = known, train.labels.byte() if several else train.labels
        logits = None
        if found:
            nearest = found[0][:, :value], found[1][:, :value]
            if several:
                logits = log_odds(vote_for_sets(*nearest, train.labels.to(device))).cpu()
            else:
                logits = log_shares(vote(*nearest, classes)).cpu()
        yield Fit(value, head, logits)


def _fit_means(
    config: Head, train: Labelled, val: Labelled | None, classes: int, device: torch.device
) -> Iterator[Fit]:
    """Yields the nearest mean, by cosine or by distance."""
    del device  # one pass over the features
    if train.labels.ndim == 2:
        yield _fit_means_of_sets(config, train, val)
        return
    if config.distance == "euclidean":
        head: LinearHead | CosineHead = nearest_mean(train.features, train.labels, classes)
    else:
        head = CosineHead(train.features.shape[1], classes)
        # Of directions: otherwise the images with the longest features would decide.
        means = class_means(F.normalize(train.features, dim=-1), train.labels, classes)
        head.means = F.normalize(means, dim=-1).float()
    yield Fit(None, head, head(val.features) if val else None)


def _fit_means_of_sets(config: Head, train: Labelled, val: Labelled | None) -> Fit:
    """Returns for each class by how much nearer the mean of its images is than that of the others, as log-odds.

    To the similarity, times a slope that all classes share, the log-odds of the class's share of the training images
    are added: they are the probability where nothing speaks for either. The other way round, that of a class in one of
    a hundred images would be 1/2 between the means.
    """
    prior = prior_log_odds(train.labels)
    if config.distance == "euclidean":
        head: LinearHead | CosineHead = nearer_mean(train.features, train.labels)
    else:
        head = CosineHead(train.features.shape[1], len(prior), several=True)
        head.means = directions(train.features, train.labels)
    slope = fit_slope(head(val.features), prior, val.labels) if val and config.calibrate else 1.0
    head = head.scaled(slope)
    if isinstance(head, LinearHead):
        head = replace(head, bias=head.bias + prior)
    else:
        head.bias = prior.float()
    return Fit(slope, head, head(val.features) if val else None, is_calibrated=True)


FITS: dict[str, Fits] = {"linear": _fit_linear, "knn": _fit_knn, "means": _fit_means}


def _note_edge(config: Head, value: float) -> None:
    """Says where the best of several strengths is the smallest or the largest: a better one may lie beyond."""
    ends = {config.tried[0]: "smallest", config.tried[-1]: "largest"} if config.kind == "linear" else {}
    if len(ends) > 1 and value in ends:
        info(f"note: the best C, {value:g}, is the {ends[value]} that was tried; a better one may lie beyond (--C)")
