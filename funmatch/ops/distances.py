"""Computes the distances between the student's and the teacher's logits, one number an image.

Here p = softmax(t / T) is the teacher and q = softmax(s / T) the student, for logits t and s of (n, classes) at the
temperature T. All are computed in float32, whatever the networks compute in.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from funmatch.errors import InputError
from funmatch.runtime.functions import find_function, is_function_name

Distance = Callable[[Tensor, Tensor, float], Tensor]
NEARLY_CONSTANT = 1e-3
"""Norm of a row less its mean, as a fraction of the row's norm, below which the row counts as constant."""


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes T² · KL(p ‖ q) = T² Σ p · (log p − log q), the distance of function matching (paper, section 3).

    The factor T² keeps the gradient's size independent of the temperature (Hinton et al., 2015, section 2).

    Args:
        student_logits, teacher_logits: (n, classes).
        temperature: T > 0.

    Returns:
        (n,) float32, at least 0.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    # log_target: from probabilities torch would take the logarithm again, and lose those that underflow.
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1) * temperature**2


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes T² · KL(q ‖ p) = T² Σ q · (log q − log p); arguments as of `kl`."""
    # The student is the second argument here, so `kl` must let gradients through both.
    return kl(teacher_logits, student_logits, temperature)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Computes T² · (KL(p ‖ m) + KL(q ‖ m)) / 2 with m = (p + q) / 2; arguments as of `kl`. At most T² · log 2."""
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    # The mean in the log domain: log((p + q) / 2) of probabilities that underflow would be −∞.
    middle = torch.logaddexp(student, teacher) - math.log(2)
    each = [F.kl_div(middle, log, reduction="none", log_target=True).sum(-1) for log in (student, teacher)]
    return (each[0] + each[1]) / 2 * temperature**2


def hard(student_logits: Tensor, teacher_logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """Computes −Σ y · log softmax(s), the cross-entropy with the teacher's first class y as the label.

    Args:
        student_logits, teacher_logits: (n, classes).
        smoothing: share of the label that is spread over all classes, in [0, 1).
    """
    # Of equal logits the first class, which torch promises of argmax (not of topk).
    labels = teacher_logits.argmax(-1)
    return F.cross_entropy(student_logits.float(), labels, reduction="none", label_smoothing=smoothing)


def l2(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Computes ‖s − t‖² = Σ (s − t)², (n,)."""
    # float32 first: in fp16 the square of a difference beyond 255 is infinite.
    return (student_logits.float() - teacher_logits.float()).square().sum(-1)


def euclidean(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Computes ‖s − t‖, (n,); its gradient is 0 where the two are equal."""
    # Not the root of `l2`, whose gradient is NaN at 0.
    return torch.linalg.vector_norm(student_logits.float() - teacher_logits.float(), dim=-1)


def log_softmax_l2(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Computes ‖log q − log p‖² at T = 1, (n,); unlike `l2` it ignores a constant added to all logits."""
    return l2(*_log_probabilities(student_logits, teacher_logits, 1.0))


def log_softmax_euclidean(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Computes ‖log q − log p‖ at T = 1, (n,)."""
    return euclidean(*_log_probabilities(student_logits, teacher_logits, 1.0))


def dist(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, inter: float = 1.0, intra: float = 1.0
) -> Tensor:
    """Computes T² · (β · (1 − ρ(qᵢ, pᵢ)) + γ · mean over classes k of (1 − ρ(q₍ₖ₎, p₍ₖ₎))), ρ Pearson's correlation.

    qᵢ are the probabilities of image i (a row), q₍ₖ₎ those of class k over the batch (a column), so the second term is
    the same for all images of a batch: Huang et al., "Knowledge distillation from a stronger teacher" (NeurIPS 2022),
    equations 6 to 9.

    Args:
        student_logits, teacher_logits: (n, classes).
        temperature: T > 0.
        inter, intra: β and γ.

    Returns:
        (n,) float32.
    """
    student, teacher = (log.exp() for log in _log_probabilities(student_logits, teacher_logits, temperature))
    # The columns' term is a mean over classes: one number for the batch, added to each image's own.
    rows, columns = 1 - _correlation(student, teacher), 1 - _correlation(student.mT, teacher.mT)
    return (inter * rows + intra * columns.mean()) * temperature**2


def standardize_logits(logits: Tensor) -> Tensor:
    """Standardizes each row of logits to (z − mean of z) / standard deviation of z, so that only its shape is matched.

    Sun et al., "Logit standardization in knowledge distillation", CVPR 2024, equation 12. The temperature is applied
    to the result.

    Args:
        logits: (n, classes).

    Returns:
        (n, classes) float32.
    """
    logits = logits.float()
    deviation = logits.std(-1, correction=0, keepdim=True)
    # A student whose head is all zeros has constant rows at its first step.
    return (logits - logits.mean(-1, keepdim=True)) / deviation.clamp_min(1e-6)


def _log_probabilities(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Returns log q and log p, (n, classes) float32 each."""
    # float32 before the division: under autocast logits come in 16 bits, in which 10.03 and 10.05 are the same.
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return student, F.log_softmax(teacher_logits.float() / temperature, dim=-1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Computes Pearson's correlation of each row of `a` with that of `b`: (n,) in [-1, 1], 0 for constant rows."""
    return (_center_rows(a) * _center_rows(b)).sum(-1)


def _center_rows(rows: Tensor) -> Tensor:
    """Subtracts each row's mean and scales it to length 1; rows that are nearly constant are left shorter."""
    tiny = torch.finfo(rows.dtype).tiny
    # Scaled by the largest element first: squares of small probabilities would underflow.
    rows = rows / rows.detach().abs().amax(-1, keepdim=True).clamp_min(tiny)
    rest = rows - rows.mean(-1, keepdim=True)
    # A row that differs from its mean by less than a thousandth holds little but rounding, and its gradient would grow
    # without bound; a student whose head is all zeros starts with such rows.
    least = (NEARLY_CONSTANT * rows.detach().norm(dim=-1, keepdim=True)).square().clamp_min(tiny)
    return rest / rest.square().sum(-1, keepdim=True).clamp_min(least).sqrt()


TEMPERED: dict[str, Distance] = {"kl": kl, "reverse-kl": reverse_kl, "js": jensen_shannon, "dist": dist}
"""Distances of probabilities at a temperature."""
PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hard": hard,
    "l2": l2,
    "euclidean": euclidean,
    "log-softmax-l2": log_softmax_l2,
    "log-softmax-euclidean": log_softmax_euclidean,
}
"""Distances without a temperature."""


def distance(
    name: str,
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    squared: bool = True,
    smoothing: float = 0.0,
    tempered: Mapping[str, Distance] = TEMPERED,
) -> Tensor:
    """Computes the distance of a name.

    Args:
        name: a key of `tempered` or `PLAIN`, or the name of a user's function of two logits.
        student_logits, teacher_logits: (n, classes).
        temperature: T > 0, for `tempered`.
        squared: multiply those by T².
        smoothing: label smoothing, for `hard`.
        tempered: distances of probabilities at a temperature, which are the task's.

    Returns:
        (n,) float32.
    """
    if is_function_name(name):
        return _call_function(name, student_logits, teacher_logits)
    # By itself, since it alone has label smoothing.
    if name == "hard":
        return hard(student_logits, teacher_logits, smoothing)
    if name in PLAIN:
        return PLAIN[name](student_logits, teacher_logits)
    result = tempered[name](student_logits, teacher_logits, temperature)
    return result if squared else result / temperature**2


def _call_function(name: str, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Computes the distance of a user's function; raises `InputError` unless it returns one number an image."""
    # float32, as for our own distances: a function need not know of autocast.
    result = find_function(name, "distance")(student_logits.float(), teacher_logits.float())
    found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
    if found != (len(student_logits),):
        raise InputError(f"distance {name} returned {found}, expected one number an image, ({len(student_logits)},)")
    return result


def cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Computes −Σ p · log softmax(logits) for labels p that are distributions (one-hot, or mixed as the views are).

    Args:
        logits: (n, classes).
        probabilities: (n, classes); each row sums to 1.

    Returns:
        (n,) float32.
    """
    return -(probabilities * F.log_softmax(logits.float(), dim=-1)).sum(-1)


def mix_labels(labels: Tensor, lam: float | Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """Mixes one-hot labels as `mixing.mixup` and `mixing.cutmix` mix views.

    Args:
        labels: (1 + n,) int64; row 0 is row 1's predecessor in the global batch.
        lam: weight of the image's own label, one for all or (n,); 1 leaves the labels as they are.
        classes: number of classes.
        smoothing: share of each label that is spread over all classes (Szegedy et al., 2016, section 7).

    Returns:
        (n, classes) float32.
    """
    # Smoothed before they are mixed, which gives the same as afterwards, since the rows sum to 1.
    one_hot = F.one_hot(labels, classes).float()
    if smoothing:
        one_hot = (1 - smoothing) * one_hot + smoothing / classes
    return mix_targets(one_hot, lam)


def mix_targets(targets: Tensor, lam: float | Tensor) -> Tensor:
    """Mixes targets as pixels are mixed: λ is the share of the image itself, the rest is its predecessor's.

    Args:
        targets: (1 + n, classes); row 0 is row 1's predecessor in the global batch.
        lam: one number for all or (n,).

    Returns:
        (n, classes).
    """
    share = lam[:, None] if isinstance(lam, Tensor) else lam
    return share * targets[1:] + (1 - share) * targets[:-1]


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Computes weights of classes that are inversely proportional to their numbers of images, as scikit-learn does.

    images / (classes that occur · images of the class), so that the mean over the images is 1.

    Args:
        labels: of the training images, (n,) int64.
        classes: number of classes.

    Returns:
        (classes,) float32; 0 for a class without images, whose weight is never used.
    """
    counts = torch.bincount(labels, minlength=classes).double()
    weights = len(labels) / (int((counts > 0).sum()) * counts.clamp(min=1))
    return torch.where(counts > 0, weights, 0.0).float()


def mix_weights(labels: Tensor, lam: float | Tensor, weights: Tensor) -> Tensor:
    """Computes the weight of each mixed label: the sum of its classes' weights, each times the share of the class.

    Args:
        labels, lam: as of `mix_labels`.
        weights: of the classes, (classes,).

    Returns:
        (n,) float32.
    """
    each = weights[labels]
    return lam * each[1:] + (1 - lam) * each[:-1]
