"""Measures embeddings by how well simple classifiers do on them: nearest neighbours, and a linear probe."""

import torch
from torch import Tensor

from funmatch.ops.tasks.ranking import mean_average_precision

NEIGHBOURS = 20
TEMPERATURE = 0.07
"""Neighbours and temperature of the protocol of DINO (Caron et al., 2021, appendix F)."""
ROWS = 256
"""Images whose neighbours are searched at a time."""
RIDGES = tuple(10.0**exponent for exponent in range(-6, 5))
"""Strengths of the L2 penalty that are tried, relative to the mean variance of an embedding's dimensions."""


def nearest_neighbours(
    train: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int = NEIGHBOURS, temperature: float = TEMPERATURE
) -> Tensor:
    """Classifies by a weighted vote of the nearest training images.

    Each of the k neighbours of the largest cosine similarity s votes exp(s / temperature) for its class.

    Args:
        train: embeddings (n, d) of training images, and their `labels`, (n,) int64, or (n, classes) in {0, 1} where an
            image may have several classes and its neighbour votes for each.
        queries: embeddings (m, d).
        classes: number of classes.
        k: neighbours; all where there are fewer.
        temperature: the smaller, the more the nearest count.

    Returns:
        votes (m, classes) float32; of several classes the share of the votes that each has, by which images are ranked.
    """
    train, queries = (torch.nn.functional.normalize(each.float(), dim=-1) for each in (train, queries))
    if labels.ndim == 2:
        similarity, places = find_neighbours(train, torch.arange(len(train)), queries, k)
        return vote_for_sets(similarity, places, labels, temperature)
    return vote(*find_neighbours(train, labels, queries, k), classes, temperature)


def find_neighbours(train: Tensor, labels: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds the nearest training images.

    Args:
        train, queries: embeddings of length 1, (n, d) and (m, d).
        labels: of the training images, (n,) int64.
        k: neighbours; all where there are fewer.

    Returns:
        cosine similarities (m, k), the largest first, and the neighbours' labels (m, k).
    """
    k = min(k, len(train))
    found = [(queries[start : start + ROWS] @ train.T).topk(k) for start in range(0, len(queries), ROWS)]
    if not found:
        return queries.new_zeros(0, k), labels.new_zeros(0, k)
    similarity, places = (torch.cat(each) for each in zip(*found, strict=True))
    return similarity, labels[places]


def vote(similarity: Tensor, labels: Tensor, classes: int, temperature: float = TEMPERATURE) -> Tensor:
    """Returns the votes (m, classes) of neighbours, of their similarities and labels, (m, k) each."""
    votes = similarity.new_zeros(similarity.shape[0], classes)
    return votes.scatter_add(1, labels, (similarity / temperature).exp())


def vote_for_sets(similarity: Tensor, places: Tensor, labels: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Returns the share of the neighbours' votes that each class has, where a neighbour votes for all of its classes.

    Args:
        similarity: (m, k) of the neighbours, and their `places` among the training images, (m, k) int64.
        labels: (n, classes) in {0, 1}, of the training images.

    Returns:
        (m, classes) float32 in [0, 1].
    """
    shares = (similarity / temperature).softmax(-1)
    # Some images at a time: the labels of all their neighbours would be twenty times those of the images.
    parts = zip(shares.split(ROWS), places.split(ROWS), strict=True)
    return (
        torch.cat([share_out(*part, labels) for part in parts]) if len(shares) else shares.new_zeros(0, labels.shape[1])
    )


def share_out(shares: Tensor, places: Tensor, labels: Tensor) -> Tensor:
    """Returns the sums of shares (m, k) over the neighbours that have a class, (m, classes)."""
    return torch.einsum("mk,mkc->mc", shares, labels[places].float())


def fit_ridge(features: Tensor, labels: Tensor, classes: int, strengths: tuple[float, ...]) -> list[Tensor]:
    """Fits linear probes by least squares to targets of 0 and 1, with an L2 penalty on all weights but the bias.

    Solved in closed form, in float64, from one eigendecomposition for all strengths: that of the covariance of the
    features, whose condition the penalty bounds.

    Args:
        features: (n, d).
        labels: (n,) int64, or (n, classes) in {0, 1}.
        classes: number of classes.
        strengths: penalties; each is multiplied by the mean variance of the features, so that their scale cancels.

    Returns:
        for each strength, weights (d + 1, classes) float64; the last row is the bias.
    """
    features = features.double()
    center = features.mean(0)
    centered = features - center
    if labels.ndim == 2:
        shares, cross = labels.double().mean(0), centered.T @ labels.double() / len(labels)
    else:
        shares = torch.bincount(labels, minlength=classes).double() / len(labels)
        # Σ over images of (feature − mean) · target is a sum over each class's images, since targets are one-hot.
        cross = torch.zeros(classes, features.shape[1], dtype=torch.float64).index_add_(0, labels, centered).T
        cross /= len(labels)
    values, vectors = torch.linalg.eigh(centered.T @ centered / len(labels))
    scale = values.clamp(min=0).mean().clamp(min=1e-300)
    rotated = vectors.T @ cross
    found = []
    for strength in strengths:
        weights = vectors @ (rotated / (values.clamp(min=0) + strength * scale)[:, None])
        found.append(torch.cat([weights, (shares - center @ weights)[None]]))
    return found


def apply_probe(features: Tensor, weights: Tensor) -> Tensor:
    """Returns scores (n, classes) float64 of features (n, d) by a probe of `fit_ridge`."""
    return features.double() @ weights[:-1] + weights[-1]


def linear_probe(train: Tensor, labels: Tensor, queries: Tensor, classes: int) -> tuple[Tensor, float]:
    """Classifies by a linear probe, whose penalty is chosen on a fifth of the training images.

    Args:
        train, labels, queries, classes: as of `nearest_neighbours`.

    Returns:
        scores (m, classes) float64, and the strength chosen from `RIDGES`.
    """
    # Every fifth: images of a class lie together, so each part has some of every class.
    held_out = torch.arange(len(train)) % 5 == 4
    if not held_out.any():
        return apply_probe(queries, fit_ridge(train, labels, classes, (RIDGES[0],))[0]), RIDGES[0]
    probes = fit_ridge(train[~held_out], labels[~held_out], classes, RIDGES)
    right = [_accuracy(apply_probe(train[held_out], each), labels[held_out]) for each in probes]
    # Of equals the strongest penalty: it is the simplest.
    best = max(range(len(RIDGES)), key=lambda i: (right[i], i))
    return apply_probe(queries, fit_ridge(train, labels, classes, (RIDGES[best],))[0]), RIDGES[best]


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    """Returns the share of images that are right, or the mean average precision of several classes an image."""
    if labels.ndim == 2:
        return mean_average_precision(scores, labels) or 0.0
    return (scores.argmax(-1) == labels).double().mean().item()
