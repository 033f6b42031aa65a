"""What `task.Task` needs of classifiers that give an image one class, by a softmax over all."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from funmatch.ops import distances, metrics


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, labels: Tensor, lam: float | Tensor, weights: Tensor
) -> Tensor:
    """Computes the cross-entropy of each image, (n,), times the weight of its label.

    Args:
        logits: (n, classes).
        targets: (n, classes), mixed.
        labels, lam: that targets were mixed from; see `distances.mix_weights`.
        weights: of the classes, (classes,).
    """
    return distances.cross_entropy(logits, targets) * distances.mix_weights(labels, lam, weights)


def changes(logits: Tensor, reference: Tensor, nats: float) -> tuple[Tensor, Tensor, Tensor]:
    """Says which images have another first class than in the reference.

    Two classes of probability a > b there are tied where a KL divergence of `nats` from the reference is enough to
    make them equal: the nearest such distribution gives each (a + b) / 2.

    Args:
        logits, reference: (n, classes).

    Returns:
        (n,) float64 each: 1 where the first class is another one, which is not tied with the reference's; 1 where it is
        one that is tied; and how much less probable it is in the reference.
    """
    probabilities = reference.double().softmax(-1)
    first = probabilities.amax(-1)
    chosen = probabilities.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)
    mean = (first + chosen) / 2
    needed = torch.xlogy(first, first / mean) + torch.xlogy(chosen, chosen / mean)
    changed, is_tied = chosen < first, needed <= nats
    return (changed & ~is_tied).double(), (changed & is_tied).double(), first - chosen


def mean_probabilities(logits: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Computes logits whose softmax at the temperature is the weighted mean of the teachers' probabilities.

    The KL divergence from them has the gradient of the weighted mean of the KLs from each teacher, since
    Σ wᵢ KL(pᵢ ‖ s) and KL(Σ wᵢ pᵢ ‖ s) differ by what does not depend on s. (The authors' code adds up the KLs: n times
    this.)

    Args:
        logits: one tensor (n, classes) a teacher.
        weights: one a teacher, summing to 1.
        temperature: T > 0.
    """
    # In the log domain, where probabilities that float32 cannot hold do not become −∞.
    logs = [
        (each / temperature).log_softmax(-1) + torch.tensor(weight).log()
        for each, weight in zip(logits, weights, strict=True)
    ]
    return torch.stack(logs).logsumexp(0) * temperature


def mean_over_views(logits: Tensor) -> Tensor:
    """Returns logits whose softmax is the mean over views, (n, views, …, classes) to (n, …, classes), in float64."""
    return logits.double().log_softmax(-1).logsumexp(1) - np.log(logits.shape[1])


def join_classes(logits: Tensor) -> Tensor:
    """Returns the logit of a class that stands for several, (n, classes) to (n,): their probabilities are added."""
    return logits.logsumexp(-1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Returns the share of images whose first class is the label, (n,) int64."""
    return (logits.argmax(-1) == labels).double().mean().item()


def measure(logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None) -> dict[str, float | None]:
    """Computes the metrics of a split, `metrics.summarize`.

    Args:
        logits: (n, classes).
        labels: (n,) int64, or None without labels.
        teacher_logits: (n, classes), or None without a teacher.
    """
    return metrics.summarize(metrics.per_image(logits, labels, teacher_logits))
