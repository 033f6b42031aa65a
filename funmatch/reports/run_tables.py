"""Formats what runs recorded as rows of tables: metrics, teachers, agreement, evaluations and options."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from funmatch.config import TAUGHT
from funmatch.config.metadata import Changes, Group
from funmatch.data.readers.split_names import TRAINING_IMAGES
from funmatch.ops.metrics import has_diverged
from funmatch.ops.tasks.task import MULTICLASS, task_of, task_of_metrics
from funmatch.runtime.text import MISSING, duration, number, percent
from funmatch.training.evaluation import scoring
from funmatch.training.evaluation.outcome import describe_failure
from funmatch.training.run import extend
from funmatch.training.run import folder as run_folder
from funmatch.training.run.places import saved_step
from funmatch.training.teachers import freezing

COLUMNS = (
    "run", "top-1", "teacher top-1", "agree@1", "agree@5", "KL", "ECE", "split", "parameters", "trained on", "steps",
    "time",
)  # fmt: skip


def row(run: run_folder.Run) -> list[str]:
    """Formats the metrics of a run in the order of `COLUMNS`: of an unfinished run those of its latest evaluation."""
    result = run.result
    metrics = result or latest_record(run, "eval")
    score = task_of_metrics(metrics).score
    step, steps = steps_of(run)
    # Without a result, the teacher's accuracy is that on the same validation images, from before the first step.
    teacher = (metrics.get("teacher") or {}) if result else latest_record(run, "teacher")
    return [
        run.folder.resolve().name,
        _accuracy(metrics, score),
        _accuracy(teacher, score),
        percent(metrics.get("agreement")),
        percent(metrics.get("agreement5")),
        f"{number(metrics.get('kl'), 3)}{', diverged' if diverged(run) else ''}",
        number(metrics.get("ece"), 3),
        _split_of(metrics) if result or not metrics else f"{metrics['split']}, step {metrics['step']:,}",
        f"{parameters:,}" if (parameters := run.config["facts"].get("parameters")) is not None else MISSING,
        teacher_names(run) or "labels",
        f"{step:,}" if result else f"{step:,} of {steps:,}",
        duration(result["seconds"]) if result else MISSING,
    ]


def headed(columns: Sequence[str], found: Iterable[run_folder.Run]) -> list[str]:
    """Returns the headings of columns, with the metric by which the runs are judged in place of top-1."""
    shown = " or ".join(dict.fromkeys(task_of(run.config["knobs"].get("task")).shown for run in found))
    return [name.replace(MULTICLASS.shown, shown) for name in columns]


def _accuracy(metrics: dict[str, Any], score: str) -> str:
    """Formats the metric by which a network is judged, or the accuracy of its features where it has no classes."""
    value, knn = metrics.get(score), metrics.get("knn")
    return percent(value) if value is not None or knn is None else f"{percent(knn)} (neighbours)"


def teacher_names(run: run_folder.Run) -> str:
    """Returns the names of a run's teachers; an empty string for none."""
    names = run.config["knobs"].get("teacher")
    # Runs of earlier versions recorded a single teacher as a string.
    return short_names([names] if isinstance(names, str) else names or [])


def short_names(teachers: Iterable[str]) -> str:
    """Joins the names of teachers, of folders the last part."""
    return " + ".join(Path(name).name for name in teachers)


def steps_of(run: run_folder.Run) -> tuple[int, int]:
    """Returns how many steps of a run are recorded, and how many it is to have."""
    # Also from the checkpoints: the losses since the last record are in none yet when a run is stopped.
    recorded = max((record["step"] for record in run.metrics.read()), default=0)
    step = (run.result or {}).get("step") or max(recorded, saved_step(run.checkpoints))
    return step, run.config["knobs"].get("steps") or step


def latest_record(run: run_folder.Run, event: str) -> dict[str, Any]:
    """Returns the last record of an event of a run, or an empty one."""
    return next((record for record in reversed(run.metrics.read()) if record["event"] == event), {})


def diverged(run: run_folder.Run) -> bool:
    """Returns whether a run's student is further from its teacher than a uniform guess."""
    metrics = run.result or latest_record(run, "eval")
    outcomes = task_of_metrics(metrics).outcomes(len(run.config["facts"].get("classes", ())))
    return has_diverged(metrics.get("kl"), outcomes)


def failure(run: run_folder.Run) -> str | None:
    """Says in what way a run has failed to train its student; returns None for one that has not."""
    return describe_failure(run.result or latest_record(run, "eval"), len(run.config["facts"].get("classes", ())))


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
        "top-1": _accuracy(metrics, task_of_metrics(metrics).score),
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
    # Where features alone are matched, no classes can agree.
    if all(last[event].get("agreement") is None for event in ("views", "eval")):
        return []
    score = task_of_metrics(last["eval"]).score
    name, teacher = run.folder.resolve().name, last.get("teacher", {}).get(score)
    rows = []
    for event, images, of_teacher, distance in (
        ("views", "training views", last["views"].get(f"teacher_{score}"), last.get("step", {}).get("loss")),
        ("eval", last["eval"]["split"], teacher, None),
    ):
        own = last[event]
        shares = [own.get(score), of_teacher, own.get("agreement"), own.get("agreement5")]
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
                short_names(record["teacher"].split(" + ")),
                _accuracy(record, task_of_metrics(record).score),
                record["split"],
                str(freezing.mode_of(record["form"])) if record.get("form") else MISSING,
                # Rounding can make a KL of nearly equal outputs slightly negative.
                f"{max(0.0, beside['kl']):.1e}" if beside.get("kl") is not None else MISSING,
                percent(beside.get("agreement")),
            ])  # fmt: skip
    return found


EVALUATION_COLUMNS = ("run", "split", "images", "during training", "at the end", "used to select")


def _split_of(metrics: dict[str, Any]) -> str:
    """Formats the split of a result, with the number of training images that it was held out of."""
    of = metrics.get("held_out_of")
    return (
        f"{metrics['split']}, {metrics['pictures']:,} of {of:,} training images"
        if of
        else metrics.get("split", MISSING)
    )


def evaluation_counts(run: run_folder.Run) -> list[list[str]]:
    """Counts a run's evaluations of each split, and names what was selected by them (`EVALUATION_COLUMNS`)."""
    evaluations = [record["split"] for record in run.metrics.read() if record["event"] == "eval"]
    result, options = run.result or {}, run.config["knobs"]
    names = dict.fromkeys([*evaluations, *([result["split"]] if "split" in result else [])])
    # Only what had a consequence: with --keep last the best checkpoint is not the student that is exported.
    choices = ["exported student"] if options.get("keep") == "best" else []
    choices += ["early stopping"] if options.get("patience") else []
    counts = run.config["facts"].get("pictures", {})
    counts = counts | {TRAINING_IMAGES: min(counts.get("train", 0), scoring.TRAIN_IMAGES_FOR_VALIDATION)}
    return [
        [
            run.folder.resolve().name,
            name,
            f"{counts.get(name, 0):,}",
            str(evaluations.count(name)),
            "once" if name == result.get("split") else MISSING,
            (", ".join(choices) if name in evaluations and name not in ("test", TRAINING_IMAGES) else "") or "nothing",
        ]
        for name in names
    ]


def overridden_options(run: run_folder.Run) -> list[list[str]]:
    """Formats a run's differences from its recipe: option, the recipe's value, the run's value."""
    options, others = run.config["knobs"], run.config["facts"].get("overridden", {})
    changes = [(name, *map(_format_option, values)) for name, values in others.items()]
    if options.get("recipe") and not changes:
        changes = [("none", MISSING, MISSING)]
    return [[run.folder.resolve().name, str(options.get("recipe")), *change] for change in changes]


def settings(found: list[run_folder.Run]) -> list[list[str]]:
    """Formats the options that are not at their defaults: the option, its value in each run, its default.

    Left out is what changes no result but by rounding: places of files, and how the machine computes.
    """
    configs = [run.config for run in found]
    options = [config["knobs"] for config in configs]
    names = list(dict.fromkeys(name for config in configs for name in _changed_options(config)))
    rows = []
    for name in names:
        # A run on labels has no teacher, rather than none.
        values = [_format_option(each[name]) if name in each else MISSING for each in options]
        table = next(table for config in configs if name in (table := TAUGHT[config["verb"]]).model_fields)
        default = table.model_fields[name].get_default()
        usual = _format_option(table.opt(name).usual if default in (None, ()) else default)
        required = table.model_fields[name].is_required()
        # A default that was resolved to its usual value is one.
        if required or set(values) != {usual}:
            rows.append([name, *values, MISSING if required else usual])
    return rows


def _changed_options(config: dict[str, Any]) -> list[str]:
    """Names the options of a run's configuration that are not at their defaults, those first that matter most."""
    table, options = TAUGHT[config["verb"]], config["knobs"]
    changed = []
    for name, opt in table.opts():
        place = opt.changes in (Changes.PLACE, Changes.ARITHMETIC) or opt.group is Group.MACHINE
        # As JSON, in which a record holds them: tuples are lists there.
        default = json.loads(json.dumps(table.model_fields[name].get_default(), default=str))
        if name in options and not place and options[name] not in (default, None, [], {}):
            changed.append(name)
    groups = list(Group)
    return sorted(changed, key=lambda name: (not table.opt(name).essential, groups.index(table.opt(name).group)))


def _format_option(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_format_option(each)}" for name, each in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_format_option, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def flat(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Flattens a run's configuration to (name, value) pairs."""
    values = {"command": config["verb"], **config["knobs"], **{f"facts: {k}": v for k, v in config["facts"].items()}}
    return [(name, _format_option(value)) for name, value in values.items()]
