"""Renders runs as one offline HTML page: metrics, training curves, the views of a step, and the configuration."""

import tempfile
from pathlib import Path

from funmatch.config import Report
from funmatch.data.readers.split_names import describe_images
from funmatch.errors import InputError
from funmatch.ops.tasks.task import task_of_metrics
from funmatch.reports import run_plots, run_tables, run_views
from funmatch.reports.html import load_template
from funmatch.reports.result import Result
from funmatch.runtime import env
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.log import print_line
from funmatch.runtime.text import percent
from funmatch.training.run import folder as run_folder
from funmatch.training.run.damage import has_changed_log

MANY = 4
"""From this many runs on, the title counts them."""
METRICS = {"top1": "top-1 accuracy", "map": "mean average precision", "agreement": "agreement with its teacher"}


def run(config: Report) -> Result:
    """Writes the page of `funmatch report`.

    Returns:
        `runs`, their folders, and the page.

    Raises:
        InputError: a folder is not a run.
    """
    page = write_page(config)
    return Result(None, {"runs": [str(run) for run in config.runs]}, page)


def show(result: Result) -> None:
    """Prints the path of the page."""
    print_line(str(result.page))


def write_page(config: Report) -> Path:
    """Writes the page and returns its path.

    Raises:
        InputError: a folder is not a run.
    """
    found = [run_folder.find_run(folder) for folder in config.runs]
    # A comparison is not the page of its first run, which that run has written.
    own = found[0].folder / "report.html" if len(found) == 1 else Path("comparison.html")
    path = config.out.expanduser() if config.out else own
    # Before anything is drawn, which takes seconds.
    if path.is_dir() or not path.parent.is_dir():
        reason = "it is a folder" if path.is_dir() else "its folder does not exist"
        raise InputError(f"cannot write the page {path}: {reason}; choose another --out")
    try:
        # Tried, since rights alone do not tell of read-only disks. It has no name.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write the page {path}: {error.strerror}; pass --out FILE elsewhere") from None
    for log in (each.metrics for each in found):
        log.warn_of_damage()
    write_atomically(path, _render(found, config.view_step, path.absolute().parent))
    return path


def _render(found: list[run_folder.Run], view_step: int | None, place: Path) -> str:
    """Renders the page of runs as HTML; `place` is the folder that it is written to."""
    each_of = {
        "rows": run_tables.rows,
        "teachers": run_tables.teachers,
        "agreement": run_tables.agreement_rows,
        "evaluations": run_tables.evaluation_counts,
        "overridden": run_tables.overridden_options,
        "notes": notes,
    }
    names = [each.folder.resolve().name for each in found]
    return load_template("report.html").render(
        title=" and ".join(names) if len(names) < MANY else f"{len(names)} runs",
        lead=lead(found),
        tables=run_tables,
        found=found,
        settings=run_tables.settings(found),
        names=names,
        curves=run_plots.build_panels(found),
        # Only beside it: a link out of the folder would break when the page is moved.
        evaluation=run_folder.EVALUATION if len(found) == 1 and (place / run_folder.EVALUATION).is_file() else None,
        sheets=[sheet for each in found if (sheet := run_views.views_sheet(each, view_step))],
        configs=[(name, run_tables.flat(each.config)) for name, each in zip(names, found, strict=True)],
        **{name: [line for each in found for line in lines_of(each)] for name, lines_of in each_of.items()},
    )


def lead(found: list[run_folder.Run]) -> str:
    """Says what was trained and how well, or which of several runs is the best."""
    if len(found) == 1:
        return _sentence(found[0])
    finished = [each for each in found if each.result]
    known = (name for name in METRICS if all((each.result or {}).get(name) is not None for each in finished))
    name = next(known, "agreement")
    scores = {each: score for each in finished if (score := (each.result or {}).get(name)) is not None}
    if len(scores) < 2:
        return f"A comparison of {len(found)} runs."
    first, second, *others = sorted(scores, key=lambda each: -scores[each])
    best = f"{_with_teacher(first)} has the highest {METRICS[name]}, {percent(scores[first])}"
    rest = f", of {len(scores)} runs" if others else ""
    text = f"{best}{rest}; {_with_teacher(second)} has {percent(scores[second])}."
    evaluated = {(each.result["split"], each.result["pictures"]) for each in finished if each.result}
    return text if len(evaluated) == 1 else f"{text} The runs were evaluated on different images: do not compare them."


def _with_teacher(run: run_folder.Run) -> str:
    return f"{run.folder.resolve().name} ({_trained(run)})"


def _trained(run: run_folder.Run) -> str:
    labels = "fine-tuned on labels" if run.config["verb"] == "finetune" else "trained on labels"
    return f"distilled from {run_tables.teacher_names(run)}" if run.config["verb"] == "distill" else labels


def _sentence(run: run_folder.Run) -> str:
    """Describes one run: how it was trained, and the metrics of its student."""
    # What finetune trains is a teacher as a rule.
    what = "model" if run.config["verb"] == "finetune" else "student"
    begin, result = f"A {what} {_trained(run)}", run.result
    if not result:
        return f"{begin}."
    images = f"on {describe_images(result['pictures'], result['split'], result.get('held_out_of'))}"
    score = task_of_metrics(result).score
    teacher = (result.get("teacher") or {}).get(score)
    compared = "" if teacher is None else f" (its teacher: {percent(teacher)})"
    parts = [f"{percent(result[score])} {METRICS[score]} {images}{compared}"] if result[score] is not None else []
    if result["agreement"] is not None:
        where = "" if parts else f" {images}"
        parts.append(f"{percent(result['agreement'])} agreement with its teacher{where}")
    return f"{begin}: {', '.join(parts)}." if parts else f"{begin}."


def notes(run: run_folder.Run) -> list[str]:
    """Says what a reader must know of a run before its metrics: that it is not finished, or diverged, or damaged."""
    name, (step, steps) = run.folder.resolve().name, run_tables.steps_of(run)
    found = []
    if not run.result:
        done = f"{name} is not finished: {step:,} of {steps:,} steps ({percent(step / max(steps, 1))})."
        last = run_tables.latest_record(run, "eval")
        found.append(f"{done} Its metrics are those of step {last['step']:,} on {last['split']}." if last else done)
    elif step < steps:
        found.append(f"{name} was stopped early, after {step:,} of {steps:,} steps.")
    if problem := run_tables.failure(run):
        found.append(f"{name} {problem}. Try another lr, a longer warmup_steps or more steps.")
    if count := run.metrics.count_damaged():
        found.append(f"{count:,} damaged lines of metrics.jsonl in {name} were left out.")
    if has_changed_log(run):
        found.append(f"metrics.jsonl in {name} was damaged or changed; the curves may lack records or show wrong ones.")
    return found


def write_if_finished(folder: Path) -> Path:
    """Writes the page of a finished run on the main process, unless it is up to date; returns its path."""
    page, result = folder / "report.html", folder / "result.json"
    # Under torchrun every process comes here, and one writes.
    if not env.is_main_process():
        return page
    # An extended run has a newer result than the page of its earlier end.
    if page.is_file() and page.stat().st_mtime >= result.stat().st_mtime:
        return page
    # The user named its data in the same command, so it may be opened.
    return write_page(Report(runs=(folder,), view_step=0))
