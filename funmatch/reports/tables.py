"""What is told of a network that was judged."""

from pathlib import Path
from typing import Any

from funmatch.runtime.log import print_table
from funmatch.runtime.text import percent


def show(figures: dict[str, Any], name: str) -> None:
    """The figures of a network on a split, for people."""

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
    print_table(f"{Path(name)} on {figures['pictures']:,} images of {figures['split']}", ["figure", "value"], rows)
    if "report" in figures:
        print(f"report: {figures['report']}")
