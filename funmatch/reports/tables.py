"""Prints the metrics of a trained or evaluated network as a table."""

from pathlib import Path

from funmatch.data.readers.split_names import describe_images
from funmatch.ops.tasks.task import task_of_metrics
from funmatch.reports.result import Outcome, Result
from funmatch.runtime.log import print_line, print_table
from funmatch.runtime.text import MISSING, duration, number, percent


def show(result: Result) -> None:
    """Prints the metrics of a run, or of an evaluated model, on a split."""
    metrics = result.metrics
    # A model that was evaluated by its name has no folder.
    name = Path(metrics["model"]) if "model" in metrics else result.folder

    teacher, task = metrics.get("teacher"), task_of_metrics(metrics)
    rows = [
        [task.shown, percent(metrics[task.score])],
        [f"{task.shown} through timm's transform", percent(metrics.get(f"{task.score}_antialias"))],
        ["top-5", percent(metrics["top5"])],
        ["F1 of all decisions (micro)", percent(metrics.get("f1_micro"))],
        ["mean F1 of the classes (macro)", percent(metrics.get("f1_macro"))],
        ["agreement with the teacher", percent(metrics["agreement"])],
        ["teacher's class in the student's top 5", percent(metrics["agreement5"])],
        ["KL from the teacher (nats)", number(metrics["kl"])],
        ["expected calibration error", number(metrics["ece"])],
        ["top-1 by 20 nearest neighbours", percent(metrics.get("knn"))],
        ["cosine with the teacher's features", number(metrics.get("cosine"))],
        ["parameters", f"{metrics['parameters']:,}"],
    ]
    # Of a run, over all the times that it was started.
    if metrics.get("seconds") is not None:
        rows.append(["time", duration(metrics["seconds"])])
    # A distilled run has its teacher's metrics, `evaluate` this one; training on labels has neither.
    own = teacher.get(task.score) if isinstance(teacher, dict) else metrics.get(f"teacher_{task.score}")
    if teacher:
        rows.insert(1, [f"teacher's {task.shown}", percent(own)])
    # Without a teacher, or without labels, there is nothing to say of some.
    rows = [row for row in rows if row[1] != MISSING]
    images = describe_images(metrics["pictures"], metrics["split"], metrics.get("held_out_of"))
    print_table(f"{name} on {images}", ["metric", "value"], rows)
    if isinstance(result, Outcome) and result.student.is_dir():
        print_line(f"model: {result.student}")
    if result.page:
        print_line(f"report: {result.page}")
