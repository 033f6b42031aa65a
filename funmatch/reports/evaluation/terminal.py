"""Prints an evaluation: tables of metrics, of classes, of corruptions, and of the models that are compared."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from funmatch.data.readers.split_names import describe_images
from funmatch.reports.evaluation import rows
from funmatch.reports.result import Result
from funmatch.runtime.log import print_line, print_table

FEW_CLASSES = 20
"""Classes up to which all are printed; of more only those that differ most from the teacher."""

NARROW = 5
"""Columns of a comparison that fit a terminal of 80 characters."""


def show(result: Result) -> None:
    """Prints the metrics of an evaluation."""
    metrics = result.metrics
    images = describe_images(metrics["pictures"], metrics["split"], metrics.get("held_out_of"))
    found = rows.metric_rows(metrics)
    print_table(f"{Path(metrics['model'])} on {images}", *_used(rows.METRIC_COLUMNS, found))
    if metrics.get("temperature_from"):
        print_line(f"temperature fitted on {metrics['temperature_from']}")
    if (difference := metrics.get("teacher_difference")) and difference.get("p") is not None:
        print_line(
            f"difference from the teacher's top-1: {rows.signed(difference['top1'])} points "
            f"({rows.points(difference['top1'])}); p by McNemar's test: {rows.p_value(difference['p'])}"
        )
    _show_classes(metrics)
    if confusions := rows.confusion_rows(metrics):
        print_table("Most frequent confusions", *_used(rows.CONFUSION_COLUMNS, confusions))
    _show_corruptions(metrics.get("corruptions"))
    if metrics.get("others"):
        _show_comparison(metrics)
    for name in ("per_image", "report"):
        if path := (str(result.page) if result.page else None) if name == "report" else metrics.get(name):
            print_line(f"{name.replace('_', ' ')}: {path}")


def _show_classes(metrics: Mapping[str, Any]) -> None:
    classes = metrics.get("classes") or []
    title = "Classes"
    if len(classes) > FEW_CLASSES:
        names = (metrics.get("differing") or {}).get("classes", ())
        classes = [row for name in names for row in classes if row["name"] == name]
        title = "Classes on which model and teacher differ most"
    if classes:
        print_table(title, *_used(rows.CLASS_COLUMNS, rows.class_rows(classes)))


def _show_corruptions(corruptions: Mapping[str, Any] | None) -> None:
    for name, values in rows.corrupted_models(corruptions):
        metric = rows.CORRUPTED[rows.corruption_metric(values)]
        title = f"{name}: {metric} on corrupted images, severities 1 to 5"
        print_table(title, *_used(rows.CORRUPTION_COLUMNS, rows.corruption_rows(values)))


def _show_comparison(metrics: Mapping[str, Any]) -> None:
    if metrics.get("top1") is None and metrics.get("embedding"):
        for each in metrics["others"]:
            print_table(each["model"], *_used(rows.METRIC_COLUMNS, rows.metric_rows(each)))
        return
    title = "Differences from the first model in points of top-1; p by McNemar's test"
    found = rows.comparison_rows(metrics)
    if "map" in metrics:
        print_table("The models on the same images", *_used(rows.COMPARISON_COLUMNS, found))
        return
    print_table(title, *_used(rows.COMPARISON_COLUMNS[:NARROW], [row[:NARROW] for row in found]))


def _used(columns: Sequence[str], found: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return rows.used_columns(columns, found)
