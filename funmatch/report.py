"""One offline HTML page about runs: figures, curves, the views of a step, and the configuration."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib.figure import Figure
from PIL import Image

from funmatch import launch, runs, views
from funmatch.config import TAUGHT, Report
from funmatch.errors import InputError
from funmatch.files import write_atomically
from funmatch.logs import duration, percent
from funmatch.models.frozen import Form
from funmatch.strategies import STRATEGIES
from funmatch.tasks import lesson, pictures

SHOWN_VIEWS = 12
THUMBNAIL = 96
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "funmatch",
    "font.family": ["sans-serif"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
COLORS = ("#1f6feb", "#d1570a", "#1a7f37", "#8250df", "#bf3989", "#57606a", "#0a7d91", "#9a6700")


def run(config: Report) -> Path:
    """Writes the page and returns where it is.

    Raises:
        InputError: a folder that is no run.
    """
    config.check()
    found = [runs.find(folder) for folder in config.runs]
    path = config.out.expanduser() if config.out else found[0].folder / "report.html"
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"cannot write the page {path}: {'it is a folder' if path.is_dir() else 'no such folder'}")
    page = Environment(
        loader=PackageLoader("funmatch", "templates"), autoescape=select_autoescape(), trim_blocks=True
    ).get_template("report.html")
    sheets = [sheet for each in found if (sheet := views_sheet(each, config.view_step))]
    distilled = [each for each in found if each.config["verb"] == "distill"]
    best = max((each.result or {}).get("top1") or 0.0 for each in distilled or found)
    html = page.render(
        title=" and ".join(each.folder.resolve().name for each in found),
        best=percent(best) if best else None,
        rows=[line for each in found for line in rows(each)],
        columns=COLUMNS,
        teachers=[line for each in found for line in teachers(each)],
        teacher_columns=TEACHER_COLUMNS,
        lead="Function matching" if distilled else "Taught by labels",
        seen=[line for each in found for line in seen(each)],
        seen_columns=SEEN_COLUMNS,
        overridden=[line for each in found for line in overridden(each)],
        curves=curves(found),
        sheets=sheets,
        configs=[(each.folder.resolve().name, flat(each.config)) for each in found],
        colors=COLORS,
    )
    write_atomically(path, html)
    return path


def of_finished(folder: Path) -> Path:
    """The page of one finished run, written by the first process unless it is there."""
    page, result = folder / "report.html", folder / "result.json"
    if not launch.is_first():
        return page
    if page.is_file() and page.stat().st_mtime >= result.stat().st_mtime:
        return page
    return run(Report(runs=(folder,)))


COLUMNS = (
    "run",
    "taught by",
    "steps",
    "top-1",
    "teacher top-1",
    "agreement",
    "KL",
    "ECE",
    "parameters",
    "split",
    "time",
)


ACCURACY = ("eval", "top1", 100.0, "top-1 (%)")


def row(run: runs.Run) -> list[str]:
    """The figures of a run, in the order of `COLUMNS`; dashes where it has none yet."""
    config, result = run.config, run.result or {}
    records = run.metrics.read()
    knobs = config["knobs"]
    step = result.get("step") or max((record["step"] for record in records), default=0)
    teacher = result.get("teacher") or {}
    return [
        run.folder.resolve().name,
        " + ".join(Path(name).name for name in _several(knobs.get("teacher"))) or "labels",
        f"{step:,}" if run.result else f"{step:,} of {knobs['steps']:,}",
        percent(result.get("top1")),
        percent(teacher.get("top1")),
        percent(result.get("agreement")),
        _number(result.get("kl")),
        _number(result.get("ece")),
        f"{config['facts']['parameters']:,}",
        str(result.get("split", "–")),
        duration(result["seconds"]) if result else "–",
    ]


def rows(run: runs.Run) -> list[list[str]]:
    """The row of a run, and one for the average of its student's weights where that was kept."""
    found = [row(run)]
    if average := (run.result or {}).get("ema"):
        own = dict(zip(COLUMNS, found[0], strict=True)) | {
            "run": f"{found[0][0]}, average of weights",
            "top-1": percent(average["top1"]),
            "agreement": percent(average["agreement"]),
            "KL": _number(average["kl"]),
            "ECE": _number(average["ece"]),
        }
        found.append(list(own.values()))
    return found


TEACHER_COLUMNS = ("run", "teacher", "top-1", "split", "computed in", "KL from fp32", "agreement with fp32")


def teachers(run: runs.Run) -> list[list[str]]:
    """How good each teacher of a run was before it began, and how its fast form answers beside plain fp32."""
    found = []
    for record in run.metrics.read():
        if record["event"] == "teacher":
            beside = record.get("beside_fp32") or {}
            found.append([
                run.folder.resolve().name,
                " + ".join(Path(name).name for name in record["teacher"].split(" + ")),
                percent(record.get("top1")),
                record["split"],
                str(Form(**record["form"])) if record.get("form") else "–",
                f"{max(0.0, beside['kl']):.1e}" if beside else "–",
                percent(beside.get("agreement")),
            ])  # fmt: skip
    return found


SEEN_COLUMNS = ("run", "split", "pictures", "during the run", "at its end", "chosen by it")


def seen(run: runs.Run) -> list[list[str]]:
    """How often a run judged its student on each split, and whether anything was chosen by what came out."""
    evaluations = [record["split"] for record in run.metrics.read() if record["event"] == "eval"]
    result, knobs = run.result or {}, run.config["knobs"]
    names = dict.fromkeys([*evaluations, *([result["split"]] if "split" in result else [])])
    choices = ["the best checkpoint"]
    choices += ["the student that was kept"] if knobs.get("keep") == "best" else []
    choices += ["the end of the run"] if knobs.get("patience") else []
    return [
        [
            run.folder.resolve().name,
            name,
            f"{run.config['facts']['pictures'].get(name, 0):,}",
            str(evaluations.count(name)),
            "once" if name == result.get("split") else "–",
            ", ".join(choices) if name in evaluations and name != "test" else "nothing",
        ]
        for name in names
    ]


def overridden(run: runs.Run) -> list[list[str]]:
    """What a run did otherwise than the recipe that it followed: knob, the recipe's value, its own."""
    knobs, others = run.config["knobs"], run.config["facts"].get("overridden", {})
    told = [(name, *map(_told, values)) for name, values in others.items()]
    if knobs.get("recipe") and not told:
        told = [("nothing", "–", "–")]
    return [[run.folder.resolve().name, str(knobs.get("recipe")), *line] for line in told]


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def curves(found: list[runs.Run]) -> list[tuple[str, str]]:
    """(heading, SVG) of accuracy, loss, learning rate and throughput against the step."""
    panels = [
        ("Accuracy on the watched split", *ACCURACY),
        ("Loss on training views", "step", "loss", 1.0, "loss"),
        ("Learning rate", "step", "lr", 1.0, "learning rate"),
        ("Throughput", "step", "images_per_second", 1.0, "images/s"),
    ]
    if not any(record.get("top1") is not None for each in found for record in each.metrics.read()):
        panels[0] = ("Agreement with the teacher", "eval", "agreement", 100.0, "agreement (%)")
    return [(panel[0], plot(found, *panel[1:])) for panel in panels]


def plot(found: list[runs.Run], event: str, name: str, scale: float, label: str) -> str:
    """One panel, as the text of an SVG element: a line a run, and a dashed one for each teacher."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        teachers: dict[float, str] = {}
        for each, color in zip(found, COLORS * (len(found) // len(COLORS) + 1), strict=False):
            records = [r for r in each.metrics.read() if r["event"] == event and r.get(name) is not None]
            steps, values = [r["step"] for r in records], [scale * r[name] for r in records]
            marker = "o" if len(steps) < 3 else None
            axes.plot(
                steps, values, color=color, label=_literal(each.folder.resolve().name), linewidth=1.6, marker=marker
            )
            if event == "eval":
                averaged = [r for r in each.metrics.read() if r["event"] == "ema" and r.get(name) is not None]
                steps, values = [r["step"] for r in averaged], [scale * r[name] for r in averaged]
                about = _literal(f"{each.folder.resolve().name}, average of weights") if averaged else None
                axes.plot(steps, values, color=color, linestyle=":", linewidth=1.6, label=about)
            starts = [r for r in each.metrics.read() if r["event"] == "teacher" and r.get(name) is not None]
            teachers |= {scale * r[name]: r["teacher"] for r in starts}
        for value, teacher in teachers.items():
            axes.axhline(
                value, color="#57606a", linestyle="--", linewidth=1.2, label=_literal(f"teacher {Path(teacher).name}")
            )
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=8)
        text = BytesIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue().decode()
    return svg[svg.index("<svg") :]


def _literal(text: str) -> str:
    """Text that matplotlib neither hides (leading underscore) nor typesets (dollars)."""
    return "\u200b" + text.encode(errors="replace").decode().replace("$", r"\$")


def views_sheet(run: runs.Run, step: int) -> dict[str, Any] | None:
    """What a step showed to teacher and student, as a picture; None where the pictures are gone or have changed."""
    config = run.config
    knobs = config["knobs"]
    try:
        table = TAUGHT[config["verb"]](**knobs)
        cache = pictures.of_run(table)
    except (InputError, OSError, ValueError, KeyError):
        return None
    if cache.key != config["facts"]["data"]:
        return None
    strategy = STRATEGIES[knobs["strategy"]] if "strategy" in knobs else None
    sides = (knobs["side"],) if strategy and not strategy.fixed else ()
    batch = lesson.loader_of(table, cache, sides).batch_at(step)
    shown, student = views.seen(batch.crops, batch.shown, batch.lam, batch.cuts)
    rows = [view[:SHOWN_VIEWS].permute(0, 2, 3, 1).numpy() for view in (*shown, student)]
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
    image = Image.fromarray((sheet * 255).round().astype(np.uint8))
    enlarge = max(1, THUMBNAIL // knobs["side"])
    image = image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST)
    png = BytesIO()
    image.save(png, "PNG")
    return {
        "name": run.folder.resolve().name,
        "step": step,
        "lam": batch.lam if isinstance(batch.lam, float) else None,
        "strategy": knobs.get("strategy", "labels"),
        "rows": ["teacher", "student"][-len(rows) :],
        "png": base64.b64encode(png.getvalue()).decode(),
    }


def flat(config: dict[str, Any]) -> list[tuple[str, str]]:
    """A run's configuration as (name, value) for reading."""
    values = {"verb": config["verb"], **config["knobs"], **{f"facts: {k}": v for k, v in config["facts"].items()}}
    return [(name, _told(value)) for name, value in values.items()]


def _several(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else names or []


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
