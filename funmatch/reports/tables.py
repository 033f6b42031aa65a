"""Prints the metrics of a trained or evaluated network as a table."""

from pathlib import Path

from funmatch.reports.result import Result
from funmatch.runtime.log import print_table
from funmatch.runtime.text import percent


def show(result: Result) -> None:
    """Prints the metrics of a run, or of an evaluated model, on a split."""
    figures = result.metrics
    name = Path(figures["model"]) if "model" in figures else result.folder

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.4f}"

    teacher = figures.get("teacher")
    rows = [
        ["top-1", percent(figures["top1"])],
        ["top-5", percent(figures["top5"])],
        ["agreement with the teacher", percent(figures["agreement"])],
        ["the same among its first five", percent(figures["agreement5"])],
        ["KL from the teacher (nats)", number(figures["kl"])],
        ["expected calibration error", number(figures["ece"])],
        ["parameters", f"{figures['parameters']:,}"],
    ]
    if isinstance(teacher, dict):
        rows.insert(1, ["teacher's top-1", percent(teacher["top1"])])
    print_table(f"{name} on {figures['pictures']:,} images of {figures['split']}", ["figure", "value"], rows)
    if result.page:
        print(f"report: {result.page}")
