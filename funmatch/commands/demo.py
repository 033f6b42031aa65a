"""The demonstration: the same student taught by labels and by a teacher, for the same number of steps."""

from pathlib import Path
from typing import Any

from funmatch.config import Demo, Distill, Evaluate, Report, Train
from funmatch.reports import run_page, run_plots
from funmatch.reports.result import Result
from funmatch.runtime.files import write_atomically
from funmatch.runtime.log import info, print_table
from funmatch.runtime.text import duration, percent
from funmatch.training import distill, evaluate, train
from funmatch.training.run import folder as run_folder

KNOBS = {
    "data": "fashion-mini",
    "student": "fashion-mini-student",
    "batch": 32,
    "lr": 8e-3,
    "weight_decay": 1e-4,
    "threads": 1,
}
"""What both runs share; everything else is the default of `config`. Networks this small are fastest on one core, with
views, and the teacher's answers, made on another."""
DISTILLED = {"teacher": "fashion-mini-teacher", "temperature": 2.0, "teacher_ahead": True}


def run(config: Demo) -> Result:
    """Judges the teacher, trains the student on labels, distils it, and writes a report about both.

    Returns:
        `teacher`, `labels`, `student`: the figures of each on the 2,000 test images; `run`: the distilled run's
        folder; and the page.
    """
    folder = config.out or Path("runs") / f"demo-{config.steps}-steps-seed-{config.seed}"
    machine = {"device": config.device, "precision": config.precision}
    shared = KNOBS | machine | {"steps": config.steps, "seed": config.seed}
    shared |= {"eval_every": max(1, config.steps // 12), "save_every": max(1, config.steps // 6)}
    info("1/3  the teacher, on 2,000 test images that it has never seen")
    teacher = evaluate.run(Evaluate.checked(model="fashion-mini-teacher", data="fashion-mini", split="test", **machine))
    info(f"     top-1 {percent(teacher['top1'])}")
    info(f"2/3  the student learns from 200 labelled images, {config.steps:,} steps")
    labels = train.run(Train.checked(out=folder / "labels", **shared))
    info(f"     top-1 {percent(labels['top1'])}")
    info(f"3/3  the same student matches the teacher's function on the same images, {config.steps:,} steps, no labels")
    student = distill.run(Distill.checked(out=folder / "funmatch", **DISTILLED, **shared))
    info(f"     top-1 {percent(student['top1'])}")
    for each in (labels, student):
        run_page.write_if_finished(Path(each["run"]))
    found = [run_folder.find_run(folder / name) for name in ("funmatch", "labels")]
    page = run_page.write_page(Report(runs=tuple(each.folder for each in found), out=folder / "report.html"))
    write_atomically(folder / "accuracy.svg", run_plots.plot(found, run_plots.ACCURACY))
    metrics = {"teacher": teacher, "labels": labels, "student": student, "run": student["run"]}
    return Result(folder, metrics, page)


def show(result: Result) -> None:
    """Prints the demonstration's table."""
    figures = result.metrics
    rows = [
        [
            name,
            percent(each["top1"]),
            percent(each["agreement"]),
            f"{each['parameters']:,}",
            _seconds(each),
        ]
        for name, each in (
            ("teacher", figures["teacher"] | {"agreement": 1.0}),
            ("student, labels alone", figures["labels"]),
            ("student, function matching", figures["student"]),
        )
    ]
    print_table(
        "Fashion-MNIST, 200 training images, 2,000 test images",
        ["", "top-1", "agreement", "parameters", "time"],
        rows,
    )
    print(f"report: {result.page}")


def _seconds(figures: dict[str, Any]) -> str:
    return duration(figures["seconds"]) if "seconds" in figures else "–"
