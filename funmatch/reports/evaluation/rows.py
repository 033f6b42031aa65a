"""Formats the metrics of an evaluation as rows of tables, for the terminal and for pages."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from funmatch.ops.corruptions import SEVERITIES
from funmatch.ops.tasks.task import task_of_metrics
from funmatch.runtime.text import MISSING, number, percent

Metrics = Mapping[str, Any]
METRIC_COLUMNS = ("metric", "value", "95 % interval")


def bounds(interval: Sequence[float] | None, digits: int = 1) -> str:
    """Formats an interval of a share: (0.812, 0.849) becomes `81.2–84.9 %`."""
    return MISSING if interval is None else "–".join(f"{100 * each:.{digits}f}" for each in interval) + " %"


def metric_rows(metrics: Metrics) -> list[list[str]]:
    """Formats the metrics of one model (`METRIC_COLUMNS`), without those that are unknown."""
    teacher, intervals = metrics.get("of_teacher") or {}, metrics.get("intervals") or {}
    balanced = metrics.get("class_balanced") or {}
    rows = [
        ["mean average precision (mAP)", percent(metrics.get("map")), bounds(intervals.get("map"))],
        ["teacher's mAP", percent(metrics.get("teacher_map")), bounds((teacher.get("intervals") or {}).get("map"))],
        ["F1 of all decisions (micro)", percent(metrics.get("f1_micro")), ""],
        ["mean F1 over classes (macro)", percent(metrics.get("f1_macro")), ""],
        [f"best F1 (micro), from {number(metrics.get('threshold'), 3)} on", percent(metrics.get("f1_best")), ""],
        ["classes without an image, left out", number_of(metrics.get("without_images")), ""],
        ["top-1", percent(metrics["top1"]), bounds(intervals.get("top1"))],
        ["teacher's top-1", percent(metrics["teacher_top1"]), bounds((teacher.get("intervals") or {}).get("top1"))],
        ["top-5", percent(metrics["top5"]), bounds(intervals.get("top5"))],
        ["agreement with the teacher", percent(metrics["agreement"]), bounds(intervals.get("agreement"))],
        ["teacher's class in the model's top 5", percent(metrics["agreement5"]), bounds(intervals.get("agreement5"))],
        ["KL from the teacher (nats)", number(metrics["kl"]), ""],
        ["mean accuracy over classes", percent(balanced.get("top1")), ""],
        ["mean F1 over classes", number(balanced.get("f1")), ""],
        ["negative log-likelihood (nats)", number(metrics.get("nll")), ""],
        ["Brier score", number(metrics.get("brier")), ""],
        ["expected calibration error", number(metrics["ece"]), ""],
        *scaled_rows(metrics),
        ["area under the risk-coverage curve", number(metrics.get("aurc")), ""],
        *([f"accuracy on the most confident {percent_of(name)}", percent(share), ""]
          for name, share in (metrics.get("accuracy_at_coverage") or {}).items() if name in ("0.9", "0.5")),
        ["entropy of the probabilities (nats)", number(metrics.get("entropy")), ""],
        *embedding_rows(metrics.get("embedding")),
        ["parameters", f"{metrics['parameters']:,}", ""],
    ]  # fmt: skip
    return [[cell if cell != MISSING else "" for cell in row] for row in rows if row[1] != MISSING]


def number_of(count: int | None) -> str:
    """Formats a count that is only worth a row where it is not 0."""
    return f"{count:,}" if count else MISSING


def percent_of(name: str) -> str:
    """Formats a coverage, `0.95` as `95 %`."""
    return f"{100 * float(name):g} %"


def scaled_rows(metrics: Metrics) -> list[list[str]]:
    """Formats what temperature scaling does."""
    return [
        ["… after temperature scaling", number(metrics.get("ece_scaled")), ""],
        ["fitted temperature", number(metrics.get("temperature")), ""],
    ]


def embedding_rows(embedding: Metrics | None) -> list[list[str]]:
    """Formats what simple classifiers make of a model's features."""
    if not embedding:
        return []
    task = task_of_metrics(embedding["knn"])
    knn, probe = (
        [percent(embedding[name][task.score]), bounds(embedding[name]["intervals"][task.score])]
        for name in ("knn", "probe")
    )
    return [
        [f"20 nearest neighbours, {task.shown}", *knn],
        [f"linear probe, {task.shown}", *probe],
        ["dimensions of the features", f"{embedding['dimensions']:,}", ""],
    ]


CLASS_COLUMNS = (
    "class", "images", "top-1", "interval", "AP", "teacher AP", "precision", "recall", "F1", "teacher", "agree@1", "KL",
)  # fmt: skip


def class_rows(rows: Iterable[Metrics]) -> list[list[str]]:
    """Formats the metrics of classes (`CLASS_COLUMNS`)."""
    return [
        [
            row["name"],
            f"{row['images']:,}" if "images" in row else MISSING,
            percent(row.get("top1")),
            bounds(row.get("interval"), 0) if row.get("top1") is not None else MISSING,
            percent(row.get("ap")),
            percent(row.get("teacher_ap")),
            percent(row.get("precision")),
            percent(row.get("recall")),
            percent(row.get("f1")),
            percent(row.get("teacher_top1")),
            percent(row.get("agreement")),
            number(row.get("kl"), 3),
        ]
        for row in rows
    ]


def used_columns(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Leaves out columns in which no row has a value."""
    used = [i for i in range(len(columns)) if any(row[i] not in (MISSING, "") for row in rows)]
    return [columns[i] for i in used], [[row[i] for i in used] for row in rows]


CONFUSION_COLUMNS = ("class", "predicted as", "images")


def confusion_rows(metrics: Metrics) -> list[list[str]]:
    """Formats the most frequent confusions (`CONFUSION_COLUMNS`)."""
    pairs = (metrics.get("confusions") or {}).get("pairs", ())
    return [[pair["label"], pair["predicted"], f"{pair['images']:,}"] for pair in pairs]


def corrupted_models(corruptions: Metrics | None) -> Iterator[tuple[str, Metrics]]:
    """Yields name and metrics on corrupted images of each model, then of the teacher, as far as there are some."""
    corruptions = corruptions or {"models": {}, "teacher": None}
    for name, values in (*corruptions["models"].items(), ("teacher", corruptions["teacher"])):
        # Without labels there is nothing to say of the teacher alone.
        if values:
            yield short_name(name), values


CORRUPTION_COLUMNS = ("corruption", *map(str, SEVERITIES), "mean", "agree@1", "F1")
CORRUPTED = {"top1": "top-1", "map": "mAP", "agreement": "agreement with the teacher"}
"""Metrics of corrupted images that are shown by severity, the first that there is, with their names for people."""


def corruption_metric(values: Metrics) -> str:
    """Returns the metric of a model that is shown by severity: without labels there is agreement alone."""
    return next(name for name in CORRUPTED if name in values)


def corruption_rows(values: Metrics) -> list[list[str]]:
    """Formats a model's accuracy on corrupted images by severity, its agreement and F1 (`CORRUPTION_COLUMNS`)."""
    name = corruption_metric(values)
    shown, others = values[name], [values.get(each) if each != name else None for each in ("agreement", "f1_micro")]

    def beside(key: str) -> list[str]:
        return [percent(each[key]) if each else MISSING for each in others]

    rows = [["none", *[MISSING] * len(SEVERITIES), percent(shown["clean"]), *beside("clean")]]
    for kind, shares in shown["by_kind"].items():
        means = [percent(_mean(each["by_kind"][kind])) if each else MISSING for each in others]
        rows.append([kind, *map(percent, shares), percent(_mean(shares)), *means])
    return [*rows, ["mean", *map(percent, shown["by_severity"]), percent(shown["mean"]), *beside("mean")]]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


COMPARISON_COLUMNS = ("model", "top-1", "difference", "p", "KL", "agree@1", "NLL", "ECE", "mAP")


def comparison_rows(metrics: Metrics) -> list[list[str]]:
    """Formats several models beside the first (`COMPARISON_COLUMNS`)."""
    return [_comparison_row(each) for each in (metrics, *metrics["others"])]


def _comparison_row(metrics: Metrics) -> list[str]:
    difference = metrics.get("difference") or {}
    top1 = difference.get("top1")
    return [
        short_name(metrics["model"]),
        percent(metrics["top1"]),
        MISSING if top1 is None else f"{signed(top1)} ({points(top1)})",
        p_value(difference.get("p")),
        number(metrics["kl"], 3),
        percent(metrics["agreement"]),
        number(metrics.get("nll"), 3),
        number(metrics["ece"], 3),
        percent(metrics.get("map")),
    ]


def short_name(model: str) -> str:
    """Returns the last part of a path: `runs/a/student` becomes `student`, and other names stay."""
    return Path(model).name or model


def signed(difference: Metrics | None) -> str:
    """Formats a difference of shares in percentage points."""
    return MISSING if difference is None else f"{100 * difference['mean']:+.1f}"


def points(difference: Metrics | None) -> str:
    """Formats the interval of a difference of shares in percentage points."""
    return MISSING if difference is None else f"{100 * difference['low']:+.1f} to {100 * difference['high']:+.1f}"


def p_value(p: float | None) -> str:
    """Formats a p value; below 0.001 only that it is."""
    return MISSING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"
