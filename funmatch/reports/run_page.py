"""Renders runs as one offline HTML page: metrics, training curves, the views of a step, and the configuration."""

from pathlib import Path
from typing import Any

from funmatch.config import Report
from funmatch.errors import InputError
from funmatch.ops.metrics import has_diverged
from funmatch.reports import run_plots, run_views
from funmatch.reports.html import load_template
from funmatch.reports.result import Result
from funmatch.runtime import env
from funmatch.runtime.files import write_atomically
from funmatch.runtime.text import duration, number, percent
from funmatch.training.run import extend
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers import loading


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
    print(result.page)


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
    page = load_template("report.html")
    sheets = [sheet for each in found if (sheet := run_views.views_sheet(each, config.view_step))]
    distilled = [each for each in found if each.config["verb"] == "distill"]
    student = ("best " * (len(distilled or found) > 1)) + ("distilled student" if distilled else "student")
    # A comparison is about distillation: a run on labels beside it is the baseline, also where it is better.
    best = max((each.result or {}).get("top1") or 0.0 for each in distilled or found)
    for log in (each.metrics for each in found):
        log.warn_of_damage()
    html = page.render(
        title=" and ".join(each.folder.resolve().name for each in found),
        best=percent(best) if best else None,
        rows=[line for each in found for line in rows(each)],
        columns=COLUMNS,
        teachers=[line for each in found for line in teachers(each)],
        teacher_columns=TEACHER_COLUMNS,
        lead="Function matching" if distilled else "Training on labels",
        student=student,
        agreement=[line for each in found for line in agreement_rows(each)],
        agreement_columns=AGREEMENT_COLUMNS,
        evaluations=[line for each in found for line in evaluation_counts(each)],
        evaluation_columns=EVALUATION_COLUMNS,
        overridden=[line for each in found for line in overridden_options(each)],
        curves=run_plots.build_panels(found),
        damaged=[(each.folder.resolve().name, count) for each in found if (count := each.metrics.count_damaged())],
        sheets=sheets,
        configs=[(each.folder.resolve().name, flat(each.config)) for each in found],
    )
    write_atomically(path, html)
    return path


def write_if_finished(folder: Path) -> Path:
    """Writes the page of a finished run on the main process, unless it is up to date; returns its path."""
    page, result = folder / "report.html", folder / "result.json"
    # Under torchrun every process comes here, and one writes.
    if not env.is_main_process():
        return page
    # An extended run has a newer result than the page of its earlier end.
    if page.is_file() and page.stat().st_mtime >= result.stat().st_mtime:
        return page
    return write_page(Report(runs=(folder,)))


COLUMNS = (
    "run", "trained on", "steps", "top-1", "teacher top-1", "agree@1", "agree@5", "KL", "ECE", "parameters", "split",
    "time",
)  # fmt: skip


def row(run: run_folder.Run) -> list[str]:
    """Formats the metrics of a run in the order of `COLUMNS`; dashes for what an unfinished run lacks."""
    config, result = run.config, run.result or {}
    records = run.metrics.read()
    options = config["knobs"]
    step = result.get("step") or max((record["step"] for record in records), default=0)
    teacher, kl = result.get("teacher") or {}, result.get("kl")
    diverged = has_diverged(kl, len(config["facts"].get("classes", ())))
    return [
        run.folder.resolve().name,
        " + ".join(Path(name).name for name in _several(options.get("teacher"))) or "labels",
        f"{step:,}" if run.result else f"{step:,} of {options.get('steps', step):,}",
        percent(result.get("top1")),
        percent(teacher.get("top1")),
        percent(result.get("agreement")),
        percent(result.get("agreement5")),
        f"{number(kl, 3)}{', diverged' if diverged else ''}",
        number(result.get("ece"), 3),
        f"{parameters:,}" if (parameters := config["facts"].get("parameters")) is not None else "–",
        str(result.get("split", "–")),
        duration(result["seconds"]) if result else "–",
    ]


def rows(run: run_folder.Run) -> list[list[str]]:
    """Formats the rows of a run, of each earlier end of an extended run, and of their EMA weights if there are any."""
    found = [row(run)]
    for end in extend.earlier_ends(run):
        result = end.result or {}
        # `|` keeps the order of the columns.
        own = dict(zip(COLUMNS, found[0], strict=True)) | _format_metrics(result)
        steps = {"run": f"{found[0][0]}, end at step {result['step']:,}", "steps": f"{result['step']:,}"}
        found.append(list((own | steps | {"time": duration(result["seconds"])}).values()))
        found += _ema_row(found[-1], result)
    return found + _ema_row(found[0], run.result or {})


def _ema_row(row: list[str], result: dict[str, Any]) -> list[list[str]]:
    """Formats the row of the EMA weights, below that of the student, if the run kept them."""
    if not (average := result.get("ema")):
        return []
    own = dict(zip(COLUMNS, row, strict=True)) | {"run": f"{row[0]}, EMA weights"} | _format_metrics(average)
    return [list(own.values())]


def _format_metrics(metrics: dict[str, Any]) -> dict[str, str]:
    """Formats the metrics of a student, by column."""
    return {
        "top-1": percent(metrics["top1"]),
        "agree@1": percent(metrics["agreement"]),
        "agree@5": percent(metrics.get("agreement5")),
        "KL": number(metrics["kl"], 3),
        "ECE": number(metrics["ece"], 3),
    }


AGREEMENT_COLUMNS = ("run", "step", "images", "top-1", "teacher top-1", "agree@1", "agree@5", "KL", "distance")


def agreement_rows(run: run_folder.Run) -> list[list[str]]:
    """Formats the student's agreement with its teacher on training views and on held-out images (`AGREEMENT_COLUMNS`).

    With fixed teacher targets, agreement rises on training views and falls on held-out images: the student memorises.
    """
    records = run.metrics.read()
    last = {each["event"]: each for each in records if each["event"] in ("views", "eval", "step", "teacher")}
    if "views" not in last or "eval" not in last:
        return []
    name, teacher = run.folder.resolve().name, last.get("teacher", {}).get("top1")
    rows = []
    for event, images, teacher_top1, distance in (
        ("views", "training views", last["views"].get("teacher_top1"), last.get("step", {}).get("loss")),
        ("eval", last["eval"]["split"], teacher, None),
    ):
        own = last[event]
        shares = [own.get("top1"), teacher_top1, own.get("agreement"), own.get("agreement5")]
        rows.append(
            [name, f"{own['step']:,}", images, *map(percent, shares), number(own.get("kl"), 3), number(distance, 3)]
        )
    return rows


TEACHER_COLUMNS = ("run", "teacher", "top-1", "split", "inference mode", "KL from fp32", "agreement with fp32")


def teachers(run: run_folder.Run) -> list[list[str]]:
    """Formats each teacher's accuracy before training, and its inference mode's difference from fp32."""
    found = []
    for record in run.metrics.read():
        if record["event"] == "teacher":
            beside = record.get("beside_fp32") or {}
            found.append([
                run.folder.resolve().name,
                " + ".join(Path(name).name for name in record["teacher"].split(" + ")),
                percent(record.get("top1")),
                record["split"],
                str(loading.mode_of(record["form"])) if record.get("form") else "–",
                # Rounding can make a KL of nearly equal outputs slightly negative.
                f"{max(0.0, beside['kl']):.1e}" if beside else "–",
                percent(beside.get("agreement")),
            ])  # fmt: skip
    return found


EVALUATION_COLUMNS = ("run", "split", "images", "during training", "at the end", "used to select")


def evaluation_counts(run: run_folder.Run) -> list[list[str]]:
    """Counts a run's evaluations of each split, and names what was selected by them (`EVALUATION_COLUMNS`)."""
    evaluations = [record["split"] for record in run.metrics.read() if record["event"] == "eval"]
    result, options = run.result or {}, run.config["knobs"]
    names = dict.fromkeys([*evaluations, *([result["split"]] if "split" in result else [])])
    choices = ["best checkpoint"]
    choices += ["exported student"] if options.get("keep") == "best" else []
    choices += ["early stopping"] if options.get("patience") else []
    return [
        [
            run.folder.resolve().name,
            name,
            f"{run.config['facts'].get('pictures', {}).get(name, 0):,}",
            str(evaluations.count(name)),
            "once" if name == result.get("split") else "–",
            ", ".join(choices) if name in evaluations and name != "test" else "nothing",
        ]
        for name in names
    ]


def overridden_options(run: run_folder.Run) -> list[list[str]]:
    """Formats a run's differences from its recipe: option, the recipe's value, the run's value."""
    options, others = run.config["knobs"], run.config["facts"].get("overridden", {})
    changes = [(name, *map(_format_option, values)) for name, values in others.items()]
    if options.get("recipe") and not changes:
        changes = [("none", "–", "–")]
    return [[run.folder.resolve().name, str(options.get("recipe")), *change] for change in changes]


def _format_option(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def flat(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Flattens a run's configuration to (name, value) pairs."""
    values = {"verb": config["verb"], **config["knobs"], **{f"facts: {k}": v for k, v in config["facts"].items()}}
    return [(name, _format_option(value)) for name, value in values.items()]


def _several(names: str | list[str] | None) -> list[str]:
    # Runs of earlier versions recorded a single teacher as a string.
    return [names] if isinstance(names, str) else names or []
