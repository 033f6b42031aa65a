"""Measures how well a model's features separate the classes: nearest neighbours, and a linear probe."""

from typing import Any

from torch import Tensor

from funmatch.data.cache.open_cache import Cache
from funmatch.data.cache.stores import CachedSplit
from funmatch.errors import InputError
from funmatch.models.inference.features import Features
from funmatch.ops import embeddings
from funmatch.ops.intervals import wilson
from funmatch.ops.tasks import ranking
from funmatch.runtime.log import info
from funmatch.training.evaluation import scoring
from funmatch.training.evaluation.subject import Subject, check_finite


def measure(subject: Subject, cache: Cache, split: CachedSplit, seed: int) -> dict[str, Any]:
    """Classifies the images of a split by the features of a model, learned from the training images.

    Args:
        seed: of the bootstrap intervals.

    Returns:
        `dimensions`; `train`, the number of training images; `knn` (Caron et al., 2021: the weighted vote of 20
        neighbours) and `probe` (least squares), each with `top1` and `top5`, or `map` where an image may have several
        classes, and `intervals`; the probe with its `l2`.

    Raises:
        InputError: there are no training images, or no labels.
    """
    train = cache.splits.get("train")
    if train is None or not train.labelled or not split.labelled:
        missing = "no training images" if train is None else "no labels"
        raise InputError(
            f"{cache.name} has {missing}, which nearest neighbours and a linear probe need; evaluate {subject.name} on "
            "labelled images with a training split"
        )
    if train.name == split.name:
        raise InputError(
            f"{subject.name} is measured by its features, which are fitted on the training images, so these are no "
            "measure; pass --split test or val, or hold some out with --val 10%"
        )
    assert subject.trained
    features = Features(subject.trained.classifier)
    info(f"{subject.name}: computing features of {len(train):,} training images")
    bank, queries = (scoring.predict(features, each, subject.view) for each in (train, split))
    for found, each in ((bank, train), (queries, split)):
        check_finite(subject.name, found, each)
    known, labels, classes = train.labels(slice(None)), split.labels(slice(None)), len(cache.classes)
    votes = embeddings.nearest_neighbours(bank, known, queries, classes)
    scores, strength = embeddings.linear_probe(bank, known, queries, classes)
    return {
        "dimensions": bank.shape[-1],
        "train": len(train),
        "knn": _accuracies(votes, labels, seed),
        "probe": _accuracies(scores, labels, seed) | {"l2": strength},
    }


def _accuracies(scores: Tensor, labels: Tensor, seed: int) -> dict[str, Any]:
    """Returns the accuracies of scores (n, classes), with their intervals."""
    if labels.ndim == 2:
        interval = ranking.precision_interval(scores, labels, seed)
        return {"map": ranking.mean_average_precision(scores, labels), "intervals": {"map": interval}}
    hits = scores.topk(min(5, scores.shape[-1]), dim=-1).indices == labels[:, None]
    found = {"top1": hits[:, 0].double().mean().item(), "top5": hits.any(-1).double().mean().item()}
    return found | {"intervals": {name: wilson(share, len(labels)) for name, share in found.items()}}
