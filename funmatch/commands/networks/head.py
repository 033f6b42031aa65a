"""Fits a head to a frozen backbone, and prints what was tried and how good the model is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from funmatch.config import Head
from funmatch.ops.tasks.task import task_of_metrics
from funmatch.reports import tables
from funmatch.reports.result import Result
from funmatch.runtime.log import print_line, print_table
from funmatch.runtime.text import number, percent
from funmatch.training.heads.run import run as fit

VALUES = {"linear": "C", "knn": "neighbours", "means": "scale"}
"""What is tried of each kind."""


def run(config: Head, given: Mapping[str, Any] | None = None) -> Result:
    """Fits a head; see `training.heads.run.run`."""
    metrics = fit(config, given)
    return Result(config.out.expanduser(), metrics)


def show(result: Result) -> None:
    """Prints the values that were tried, and the metrics of the model."""
    found = result.metrics
    task = task_of_metrics(found)
    rows = [
        [
            f"{each['value']:g}" + " ←" * (each["value"] == found["chosen"]),
            percent(each[task.score]),
            number(each["nll"]),
        ]
        for each in found["tried"]
        if task.score in each
    ]
    if rows:
        title = f"{found['kind']} heads on the validation images"
        print_table(title, [VALUES[found["kind"]], task.shown, "log loss (nats)"], rows)
    if found["pictures"]:
        tables.show(Result(result.folder, {name: value for name, value in found.items() if name != "model"}))
    out: Path | None = result.folder
    print_line(f"model: {out}; use it with --teacher {out} or --student {out}")
