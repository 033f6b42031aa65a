"""Distances between what the student says and what it should say, one number a picture."""

import torch.nn.functional as F
from torch import Tensor


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · KL(softmax(t / T) ‖ softmax(s / T)), the distance of function matching (paper, section 3).

    The factor T² keeps the gradient's size independent of the temperature (Hinton et al., 2015, section 2).

    Args:
        student_logits, teacher_logits: (n, classes).
        temperature: T > 0.

    Returns:
        (n,) float32, at least 0.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """−Σ p · log softmax(logits), for labels that are distributions (one-hot, or mixed as the views are).

    Args:
        logits: (n, classes).
        probabilities: (n, classes), each row sums to 1.

    Returns:
        (n,) float32.
    """
    return -(probabilities * F.log_softmax(logits.float(), dim=-1)).sum(-1)


def mixed_labels(labels: Tensor, lam: float, classes: int, smoothing: float = 0.0) -> Tensor:
    """One-hot labels mixed as `augment.mixup` mixes views.

    Args:
        labels: (1 + n,) int64, row 0 being row 1's predecessor in the global batch.
        lam: weight of the picture's own label; 1 leaves the labels as they are.
        classes: how many there are.
        smoothing: the share of each label that is spread over all classes (Szegedy et al., 2016, section 7).

    Returns:
        (n, classes) float32.
    """
    one_hot = F.one_hot(labels, classes).float()
    if smoothing:
        one_hot = (1 - smoothing) * one_hot + smoothing / classes
    return lam * one_hot[1:] + (1 - lam) * one_hot[:-1]
