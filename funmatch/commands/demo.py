"""Runs the demo: trains the same student on labels and distils it from a teacher, for the same number of steps."""

from pathlib import Path
from typing import Any

from funmatch.config import Demo, Distill, Evaluate, Report, Train
from funmatch.reports import run_page, run_plots
from funmatch.reports.result import Result
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.log import info, print_line, print_table
from funmatch.runtime.text import MISSING, duration, percent
from funmatch.training import distill, train
from funmatch.training.evaluation import evaluate
from funmatch.training.run import folder as run_folder

SHARED = {
    "data": "fashion-mini",
    "student": "fashion-mini-student",
    "batch": 32,
    "lr": 8e-3,
    "weight_decay": 1e-4,
    "threads": 1,
}
"""Options of both runs; all others have their defaults. Networks this small train fastest on one core, with views and
teacher logits computed on another."""
DISTILLED = {"teacher": "fashion-mini-teacher", "temperature": 2.0, "teacher_ahead": True}


def run(config: Demo) -> Result:
    """Evaluates the teacher, trains the student on labels, distils it, and writes a report of both runs.

    Returns:
        `teacher`, `labels`, `student`: the metrics of each on the 2,000 test images; `run`: the distilled run's
        folder; and the page.
    """
    # Steps and seed are part of the name: another demo must not resume these runs.
    folder = config.out or Path("runs") / f"demo-{config.steps}-steps-seed-{config.seed}"
    # The teacher's evaluation too, so that all three figures are of one machine and precision.
    machine = {"device": config.device, "precision": config.precision}
    shared = SHARED | machine | {"steps": config.steps, "seed": config.seed}
    info("1/3  evaluating the teacher on 2,000 test images")
    teacher = evaluate.run(Evaluate.checked(model="fashion-mini-teacher", data="fashion-mini", split="test", **machine))
    info(f"     top-1 {percent(teacher['top1'])}")
    info(f"2/3  training the student on 200 labelled images, {config.steps:,} steps")
    labels = train.run(Train.checked(out=folder / "labels", **shared))
    info(f"     top-1 {percent(labels['top1'])}")
    info(f"3/3  distilling the same student on the same images without labels, {config.steps:,} steps")
    student = distill.run(Distill.checked(out=folder / "funmatch", **DISTILLED, **shared))
    info(f"     top-1 {percent(student['top1'])}")
    # Each run has a page of its own too, as after `train` and `distill`.
    for each in (labels, student):
        run_page.write_if_finished(Path(each["run"]))
    # The distilled run first: the page is about it, and the other one is its baseline.
    found = [run_folder.find_run(folder / name) for name in ("funmatch", "labels")]
    page = run_page.write_page(Report(runs=tuple(each.folder for each in found), out=folder / "report.html"))
    write_atomically(folder / "accuracy.svg", run_plots.plot(found, run_plots.ACCURACY))
    metrics = {"teacher": teacher, "labels": labels, "student": student, "run": student["run"]}
    return Result(folder, metrics, page)


def show(result: Result) -> None:
    """Prints the table of the demo."""
    metrics = result.metrics
    rows = [
        [
            name,
            percent(each["top1"]),
            percent(each["agreement"]),
            f"{each['parameters']:,}",
            _seconds(each),
        ]
        for name, each in (
            ("teacher", metrics["teacher"] | {"agreement": 1.0}),
            ("student, trained on labels", metrics["labels"]),
            ("student, function matching", metrics["student"]),
        )
    ]
    print_table(
        "Fashion-MNIST, 200 training images, 2,000 test images",
        ["", "top-1", "agreement", "parameters", "time"],
        rows,
    )
    print_line(f"report: {result.page}")


def _seconds(metrics: dict[str, Any]) -> str:
    # The teacher was not trained here.
    return duration(metrics["seconds"]) if "seconds" in metrics else MISSING
