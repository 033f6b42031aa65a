"""Prints the metrics of a trained or evaluated network as a table."""

from pathlib import Path

from funmatch.data.readers.split_names import describe_images
from funmatch.reports.result import Outcome, Result
from funmatch.runtime.log import print_line, print_table
from funmatch.runtime.text import MISSING, duration, number, percent


def show(result: Result) -> None:
    """Prints the metrics of a run, or of an evaluated model, on a split."""
    metrics = result.metrics
    # A model that was evaluated by its name has no folder.
    name = Path(metrics["model"]) if "model" in metrics else result.folder

    teacher = metrics.get("teacher")
    rows = [
        ["top-1", percent(metrics["top1"])],
        ["top-1 through timm's transform", percent(metrics.get("top1_antialias"))],
        ["top-5", percent(metrics["top5"])],
        ["agreement with the teacher", percent(metrics["agreement"])],
        ["teacher's class in the student's top 5", percent(metrics["agreement5"])],
        ["KL from the teacher (nats)", number(metrics["kl"])],
        ["expected calibration error", number(metrics["ece"])],
        ["parameters", f"{metrics['parameters']:,}"],
    ]
    # Of a run, over all the times that it was started.
    if metrics.get("seconds") is not None:
        rows.append(["time", duration(metrics["seconds"])])
    # A distilled run has its teacher's metrics, `evaluate` this one; training on labels has neither.
    top1 = teacher["top1"] if isinstance(teacher, dict) else metrics.get("teacher_top1")
    if teacher:
        rows.insert(1, ["teacher's top-1", percent(top1)])
    # Without a teacher, or without labels, there is nothing to say of some.
    rows = [row for row in rows if row[1] != MISSING]
    images = describe_images(metrics["pictures"], metrics["split"], metrics.get("held_out_of"))
    print_table(f"{name} on {images}", ["metric", "value"], rows)
    if isinstance(result, Outcome) and result.student.is_dir():
        print_line(f"model: {result.student}")
    if result.page:
        print_line(f"report: {result.page}")
