"""Measures accuracy and agreement on corrupted images."""

from typing import Any

from torch import Tensor

from funmatch.config import Evaluate
from funmatch.data.cache.stores import CachedSplit
from funmatch.ops.corruptions import CORRUPTIONS, SEVERITIES, Damage
from funmatch.ops.tasks import multilabel
from funmatch.runtime.log import track
from funmatch.training.evaluation import scoring
from funmatch.training.evaluation.subject import Opened

CLEAN = "clean"


def measure(opened: Opened, config: Evaluate) -> dict[str, Any]:
    """Measures each model and the teacher on corrupted images, which are the same for all.

    Returns:
        `images`, `seed`, `kinds`; `models`: for each by its name `top1`, or `map` and `f1_micro` of any number of
        classes an image (with labels), and `agreement` (with a teacher), each with `by_kind`, five numbers a
        corruption, their means `by_severity` and `mean`, and `clean`, that of the same images as they are; and
        `teacher`, the same of the teacher, or None.
    """
    split = opened.split
    if len(split) > config.corruption_images:
        split = split.subset(scoring.evenly_spread(len(split), config.corruption_images))
    labels = split.labels(slice(None)) if split.labelled else None
    kinds = [*CORRUPTIONS] if "all" in config.corruptions else [*dict.fromkeys(config.corruptions)]
    # By name; the teacher, which may have the name of a model, under None.
    found: dict[str | None, dict[str, list[dict[str, float]]]] = {}
    jobs = [(CLEAN, 0), *((kind, severity) for kind in kinds for severity in SEVERITIES)]
    for kind, severity in track(jobs, len(jobs), "corrupting"):
        damage = None if kind == CLEAN else Damage(kind, severity, config.seed)
        for name, values in _measure_one(opened, split, labels, damage).items():
            found.setdefault(name, {}).setdefault(kind, []).append(values)
    summaries = {name: _summarize(values) for name, values in found.items()}
    teacher = summaries.pop(None, None)
    return {"images": len(split), "seed": config.seed, "kinds": kinds, "models": summaries, "teacher": teacher}


def _measure_one(
    opened: Opened, split: CachedSplit, labels: Tensor | None, damage: Damage | None
) -> dict[str | None, dict[str, float]]:
    """Returns the metrics of each model, and of the teacher under None, on one kind of images."""
    found: dict[str | None, dict[str, float]] = {}
    values = _values_of_sets if split.task == "multilabel" else _values
    teacher_logits = None
    if opened.teachers:
        teacher_logits = opened.teachers.predict(split, damage)
        found[None] = values(teacher_logits, labels, None)
    return found | {each.name: values(each.predict(split, damage), labels, teacher_logits) for each in opened.subjects}


def _values(logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None) -> dict[str, float]:
    """Returns the metrics of one class an image."""
    own = logits.argmax(-1)
    found = {} if labels is None else {"top1": (own == labels).double().mean().item()}
    if teacher_logits is None:
        return found
    return found | {"agreement": (own == teacher_logits.argmax(-1)).double().mean().item()}


def _values_of_sets(logits: Tensor, labels: Tensor | None, teacher_logits: Tensor | None) -> dict[str, float]:
    """Returns the metrics of any number of classes an image."""
    found = multilabel.measure(logits, labels, teacher_logits)
    return {name: value for name in ("map", "f1_micro", "agreement") if (value := found[name]) is not None}


def _summarize(values: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Gathers a model's metrics by corruption, and averages them."""
    clean = values[CLEAN][0]
    found: dict[str, Any] = {}
    for metric in clean:
        by_kind = {kind: [each[metric] for each in rows] for kind, rows in values.items() if kind != CLEAN}
        all_values = [value for rows in by_kind.values() for value in rows]
        found[metric] = {
            "clean": clean[metric],
            "mean": sum(all_values) / len(all_values),
            "by_severity": [sum(rows[i] for rows in by_kind.values()) / len(by_kind) for i in range(len(SEVERITIES))],
            "by_kind": by_kind,
        }
    return found
