"""Losses and metrics of classifiers that give an image any number of classes, each by a probability of its own.

The probability of a class is σ(z) of its logit z, whatever the other logits are: a Bernoulli distribution for each
class, in place of one distribution over all. Losses are means over the classes, so that they are of one size for any
number of classes, and the distance to a teacher is weighed against labels like with like.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from funmatch.ops import distances, metrics
from funmatch.ops.tasks import ranking


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes T² · mean over classes of KL(Ber(σ(t / T)) ‖ Ber(σ(s / T))).

    The sum over the classes is the KL divergence of the two distributions of label sets, of classes that are
    independent given the image; Yang et al., "Multi-label knowledge distillation" (ICCV 2023), sum it too.

    Args:
        student_logits, teacher_logits: (n, classes).
        temperature: T > 0.

    Returns:
        (n,) float32, at least 0.
    """
    student, teacher = student_logits.float() / temperature, teacher_logits.float() / temperature
    each = _expected_log_ratio(teacher, student) + _expected_log_ratio(-teacher, -student)
    return each.mean(-1) * temperature**2


def _expected_log_ratio(teacher: Tensor, student: Tensor) -> Tensor:
    """Computes σ(t) · (log σ(t) − log σ(s))."""
    # From logits on both sides: 1 − σ(z) of a large z would be 0, and its logarithm −∞.
    ratio = F.logsigmoid(teacher) - F.logsigmoid(student)
    probability = teacher.sigmoid()
    # A logit of −∞ stands for the probability 0, which has no part in the mean.
    return probability * ratio.masked_fill(probability == 0, 0.0)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes T² · mean over classes of KL(Ber(σ(s / T)) ‖ Ber(σ(t / T))); arguments as of `kl`."""
    return kl(teacher_logits, student_logits, temperature)


METRICS = ("map", "f1_micro", "f1_macro")
"""Metrics of several classes an image alone."""
TEMPERED = {"kl": kl, "reverse-kl": reverse_kl}
"""Distances of probabilities at a temperature, which have other forms here than for one class an image."""
distance = partial(distances.distance, tempered=TEMPERED)
"""Computes the distance of a name, of logits as for one class an image."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Computes the mean over classes of −y · log σ(z) − (1 − y) · log (1 − σ(z)), the binary cross-entropy.

    Args:
        logits: (n, classes).
        targets: (n, classes) in [0, 1].

    Returns:
        (n,) float32.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none").mean(-1)


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Computes the mean over classes of −w · y · log σ(z) − (1 − y) · log (1 − σ(z)), torch's `pos_weight`.

    Args:
        logits, targets: as of `cross_entropy`.
        weights: of `balanced_weights`, (classes,).

    Returns:
        (n,) float32.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none", pos_weight=weights).mean(-1)


def balanced_weights(labels: Tensor, classes: int) -> Tensor:  # noqa: ARG001
    """Computes how often an image with a class counts, so that those with it weigh as much as those without.

    Args:
        labels: of the training images, (n, classes) in {0, 1}.
        classes: number of classes.

    Returns:
        (classes,) float32: images without the class / images with it; 1 for a class that none or all have.
    """
    # float64: float32 counts no further than 2²⁴ images.
    having = labels.sum(0, dtype=torch.float64)
    lacking = len(labels) - having
    # A weight of 0, or an infinite one, would leave the class out, or nothing but it.
    return torch.where((having > 0) & (lacking > 0), lacking / having.clamp(min=1), 1.0).float()


def mix_labels(labels: Tensor, lam: float | Tensor, classes: int, smoothing: float = 0.0) -> Tensor:  # noqa: ARG001
    """Mixes labels as `mixing.mixup` and `mixing.cutmix` mix views.

    Args:
        labels: (1 + n, classes) in {0, 1}; row 0 is row 1's predecessor in the global batch.
        lam: weight of the image's own labels, one for all or (n,).
        classes: number of classes.
        smoothing: each label is moved this share of the way to 1/2, which is the mean of its two outcomes.

    Returns:
        (n, classes) float32, λ·y[i] + (1 − λ)·y[i − 1].
    """
    smooth = (1 - smoothing) * labels + smoothing / 2 if smoothing else labels
    return distances.mix_targets(smooth, lam)


def decisions(logits: Tensor) -> Tensor:
    """Returns the classes that are predicted, (n, classes) bool: those of a probability above 1/2."""
    return logits > 0


def changes(logits: Tensor, reference: Tensor, nats: float) -> tuple[Tensor, Tensor, Tensor]:
    """Says which decisions are not the reference's, as `multiclass.changes` does of first classes.

    A decision is tied where a KL divergence of `nats` is enough to bring the class's probability to 1/2.

    Returns:
        (n,) float64 each: of each image the share of decisions that are other ones and not tied, that of those which
        are tied, and the largest distance between the probabilities, in the reference, of such a decision and of its
        opposite.
    """
    probability = reference.double().sigmoid()
    margin = (2 * probability - 1).abs()
    needed = torch.xlogy(probability, 2 * probability) + torch.xlogy(1 - probability, 2 - 2 * probability)
    changed, is_tied = decisions(logits) != decisions(reference), needed <= nats
    shares = ((changed & ~is_tied).double().mean(-1), (changed & is_tied).double().mean(-1))
    return *shares, margin.where(changed, torch.zeros_like(margin)).amax(-1)


def mean_probabilities(logits: Sequence[Tensor], weights: Sequence[float], temperature: float) -> Tensor:
    """Computes logits whose σ at the temperature is the weighted mean of the teachers' probabilities.

    Args:
        logits: one tensor (n, classes) a teacher.
        weights: one a teacher, summing to 1.
        temperature: T > 0.
    """
    parts = [(each / temperature, torch.tensor(weight).log()) for each, weight in zip(logits, weights, strict=True)]
    # The logit of a mean is log Σ w·σ(z) − log Σ w·σ(−z): in the log domain, neither sum underflows.
    some, none = (
        torch.stack([F.logsigmoid(sign * each) + weight for each, weight in parts]).logsumexp(0) for sign in (1, -1)
    )
    return (some - none) * temperature


def mean_over_views(logits: Tensor) -> Tensor:
    """Returns logits whose σ is the mean over views, (n, views, …, classes) to (n, …, classes), in float64."""
    views = logits.double()
    return F.logsigmoid(views).logsumexp(1) - F.logsigmoid(-views).logsumexp(1)


def join_classes(logits: Tensor) -> Tensor:
    """Returns the logit of a class that stands for several, (n, classes) to (n,): that of the likeliest of them."""
    return logits.amax(-1)


def compare(logits: Tensor, teacher_logits: Tensor) -> dict[str, Tensor]:
    """Returns for each image `agreement`, the share of decisions that are the teacher's, and `kl`, (n,) each."""
    same = decisions(logits) == decisions(teacher_logits)
    return {"agreement": same.float().mean(-1), "kl": kl(logits, teacher_logits)}


def accuracy(logits: Tensor, labels: Tensor) -> float | None:
    """Returns the mean average precision, of labels (n, classes); None where no image has a class."""
    return ranking.mean_average_precision(logits.float(), labels)


def measure(logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None) -> dict[str, float | None]:
    """Computes the metrics of a split.

    Args:
        logits: (n, classes).
        labels: (n, classes) in {0, 1}, or None without labels.
        teacher_logits: (n, classes), or None without a teacher.

    Returns:
        `map`, the mean average precision over the classes that some image has; `f1_micro` and `f1_macro` of the
        decisions at 1/2; `agreement`, the share of decisions that are the teacher's; and `kl`, the mean over images and
        classes, in nats. None stands for what is not known, and for the metrics of one class an image.
    """
    found: dict[str, float | None] = dict.fromkeys((*metrics.METRICS, *METRICS))
    if labels is not None:
        micro, macro = ranking.f1_scores(decisions(logits), labels)
        found |= {"map": accuracy(logits, labels), "f1_micro": micro, "f1_macro": macro}
    if teacher_logits is not None:
        same = decisions(logits) == decisions(teacher_logits)
        found["agreement"] = same.double().mean().item()
        found["kl"] = kl(logits, teacher_logits).double().mean().item()
    return found
