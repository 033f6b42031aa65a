"""Computes all metrics of one model's logits on a split: of all images, of each class, and of each image."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from funmatch.ops import calibration, metrics
from funmatch.ops.intervals import mcnemar as mcnemar_p
from funmatch.ops.intervals import paired_bootstrap, wilson
from funmatch.training.run.folder import finite

ROWS = 1024
"""Images whose columns are computed at a time: the probabilities of 50,000 images of 1,000 classes are 200 MB."""
PAIRS = 10
"""Confused pairs, and classes that differ most from the teacher's, that a result lists."""
SHARES = ("top1", "top5", "agreement", "agreement5")
"""Metrics that are shares of images, which have Wilson's intervals."""
LARGEST_MATRIX = 100
"""Classes up to which a result holds the whole confusion matrix."""


@dataclass(frozen=True)
class Scores:
    """What one model's logits say of each image.

    Attributes:
        logits: (n, classes).
        labels: (n,) int64, or None without labels.
        columns: (n,) each: those of `metrics.per_image`; `entropy`; with labels those of
            `calibration.proper_scores`; with a teacher `teacher` and `teacher_confidence`, its first class and that
            class's probability, and with labels too `teacher_top1`.
    """

    logits: Tensor
    labels: Tensor | None
    columns: dict[str, Tensor]

    @property
    def classes(self) -> int:
        return self.logits.shape[-1]

    def groups(self) -> Tensor | None:
        """The class that counts as an image's own: its label, else the teacher's first; None without both."""
        return self.labels if self.labels is not None else self.columns.get("teacher")


def score(logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None = None) -> Scores:
    """Computes the columns of `Scores`."""
    parts = [
        _columns(logits[rows], *(None if each is None else each[rows] for each in (labels, teacher_logits)))
        for rows in (slice(start, start + ROWS) for start in range(0, max(len(logits), 1), ROWS))
    ]
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Scores(logits, labels, columns)


def _columns(logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None) -> dict[str, Tensor]:
    """Computes the columns of some images."""
    columns = metrics.per_image(logits, labels, teacher_logits)
    columns["entropy"] = calibration.entropy(logits)
    if labels is not None:
        # Of `confidence` that of `per_image` stays, by which runs recorded their calibration error.
        columns = calibration.proper_scores(logits, labels) | columns
    if teacher_logits is not None:
        # Of the logits, as for `agreement`: probabilities near 1 are rounded to ties.
        first = teacher_logits.argmax(-1)
        columns |= {"teacher": first, "teacher_confidence": teacher_logits.softmax(-1).amax(-1)}
        if labels is not None:
            columns["teacher_top1"] = (first == labels).float()
    return columns


def figures(scores: Scores) -> dict[str, Any]:
    """Returns the metrics of all images, as `funmatch evaluate --json` prints them; None where labels are missing."""
    columns, count = scores.columns, len(scores.logits)
    found: dict[str, Any] = metrics.summarize(columns)
    found.pop("balanced")
    for name in ("nll", "brier", "entropy"):
        found[name] = columns[name].double().mean().item() if name in columns else None
    shares = {name: found[name] for name in SHARES if found[name] is not None}
    found["intervals"] = {name: wilson(share, count) for name, share in shares.items()}
    found |= {"aurc": None, "accuracy_at_coverage": None, "reliability": None}
    if scores.labels is not None:
        selective = calibration.selective(columns["confidence"], columns["top1"])
        found["aurc"] = selective.aurc
        found["accuracy_at_coverage"] = {f"{coverage:g}": each for coverage, each in selective.accuracy.items()}
        bins = calibration.reliability(columns["confidence"], columns["top1"])
        found["reliability"] = [asdict(each) for each in bins]
    return found | {"class_balanced": class_balanced(scores)}


def class_balanced(scores: Scores) -> dict[str, float | None] | None:
    """Returns the means over the classes that occur of their means, and the mean F1; None without labels."""
    if scores.labels is None:
        return None
    names = [name for name in ("top1", "top5", "agreement", "kl", "nll", "brier") if name in scores.columns]
    found: dict[str, float | None] = {}
    for name in names:
        means = metrics.class_means(scores.columns[name], scores.labels, scores.classes)
        # A class without images has no mean.
        found[name] = means[~means.isnan()].mean().item()
    return found | {"f1": metrics.macro_f1(scores.columns["predicted"], scores.labels, scores.classes)}


def class_rows(scores: Scores, names: Sequence[str]) -> list[dict[str, Any]] | None:
    """Returns the metrics of each class: of the images with its label, else of those that the teacher puts there.

    Returns:
        `name`, `images`, `predicted` (images that the model puts there), and where they are known `top1` with its
        `interval`, `precision`, `teacher_top1`, `agreement` and `kl`; None without labels and teacher.
    """
    groups = scores.groups()
    if groups is None:
        return None
    size = scores.classes
    counts = torch.bincount(groups, minlength=size)
    predicted = torch.bincount(scores.columns["predicted"], minlength=size)
    means: dict[str, list[float]] = {
        name: metrics.class_means(scores.columns[name], groups, size).tolist()
        for name in ("top1", "teacher_top1", "agreement", "kl")
        if name in scores.columns
    }
    if scores.labels is not None:
        means["precision"] = metrics.class_means(scores.columns["top1"], scores.columns["predicted"], size).tolist()
    rows = []
    for number, (name, images) in enumerate(zip(names, counts.tolist(), strict=True)):
        row: dict[str, Any] = {"name": name, "images": images, "predicted": int(predicted[number])}
        row |= {key: finite(values[number]) for key, values in means.items()}
        if "top1" in means:
            row["interval"] = wilson(row["top1"] or 0.0, images)
        rows.append(row)
    return rows


def confusions(scores: Scores, names: Sequence[str]) -> dict[str, Any] | None:
    """Returns the largest confused `pairs` and, of few classes, the `matrix`, rows by label; None without labels."""
    if scores.labels is None:
        return None
    predicted = scores.columns["predicted"]
    pairs = metrics.largest_confusions(predicted, scores.labels, PAIRS)
    is_small = scores.classes <= LARGEST_MATRIX
    return {
        "pairs": [{"label": names[a], "predicted": names[b], "images": count} for a, b, count in pairs],
        "matrix": metrics.confusion(predicted, scores.labels, scores.classes).tolist() if is_small else None,
    }


def differing_classes(rows: Sequence[dict[str, Any]], most: int = PAIRS) -> list[str]:
    """Names the classes on which model and teacher differ most: the least agreement, then the largest KL divergence."""
    present = [row for row in rows if row.get("agreement") is not None]
    ranked = sorted(present, key=lambda row: (row["agreement"], -(row.get("kl") or 0.0)))
    return [row["name"] for row in ranked[:most] if row["agreement"] < 1]


def differing_images(scores: Scores, most: int) -> list[int]:
    """Returns the images on which model and teacher differ most, by their KL divergence, the largest first."""
    if "kl" not in scores.columns:
        return []
    # An infinite divergence is the largest there is.
    divergence = scores.columns["kl"].nan_to_num(posinf=torch.finfo(torch.float32).max)
    return divergence.argsort(descending=True, stable=True)[:most].tolist()


def compare(first: Scores, other: Scores, seed: int) -> dict[str, Any]:
    """Compares two models on the same images: mean differences, other less first, with bootstrap intervals.

    Returns:
        `mean`, `low` and `high` of each metric that both have; and with labels `gained` and `lost`, the images that the
        other, and the first, alone has right, and `p` of McNemar's test.
    """
    names = [
        name
        for name in ("top1", "top5", "nll", "brier", "agreement", "kl")
        if name in first.columns and name in other.columns
    ]
    differences = {name: other.columns[name].double() - first.columns[name].double() for name in names}
    # Infinite differences have no mean; the metric of such a model is None, too.
    usable = {name: values for name, values in differences.items() if bool(values.isfinite().all())}
    found: dict[str, Any] = dict.fromkeys(names)
    if usable:
        found |= {name: asdict(each) for name, each in paired_bootstrap(usable, seed=seed).items()}
    if first.labels is not None:
        gained, lost = metrics.alone_right(other.columns["top1"] > 0, first.columns["top1"] > 0)
        found |= {"gained": gained, "lost": lost, "p": mcnemar_p(gained, lost)}
    return found
