"""Plots the training curves of runs as SVG: metrics against the step."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from funmatch.reports.html import to_svg
from funmatch.training.run import extend
from funmatch.training.run import folder as run_folder

STYLE = {
    # Text stays text, so that a page can be searched; a fixed salt makes the same curves the same bytes.
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
GREY = "#57606a"


@dataclass(frozen=True)
class Panel:
    """One plot of a page.

    Attributes:
        heading: title above the plot.
        event, name: the event of `metrics.jsonl`, and the metric in its records.
        label: title of the y axis.
        scale: factor by which values are multiplied.
        views: whether to draw the same metric on training views too.
    """

    heading: str
    event: str
    name: str
    label: str
    scale: float = 1.0
    views: bool = False


ACCURACY = Panel("Accuracy during training", "eval", "top1", "top-1 (%)", 100.0)
AGREEMENT = Panel("Agreement with the teacher", "eval", "agreement", "agreement (%)", 100.0, views=True)
KL = Panel("KL from the teacher", "eval", "kl", "KL (nats)", views=True)
LOSS = Panel("Loss on training views", "step", "loss", "loss")
OTHERS = (
    LOSS,
    Panel("Learning rate", "step", "lr", "learning rate"),
    Panel("Throughput", "step", "images_per_second", "images/s"),
)


def build_panels(found: list[run_folder.Run]) -> list[tuple[str, str]]:
    """Plots accuracy, agreement with the teacher, loss, learning rate and throughput; returns (heading, SVG) each."""
    known = {name for run in found for each in run.metrics.read() if each["event"] == "eval" for name in _given(each)}
    # Without labels there is no accuracy, and without a teacher no agreement: no empty plots.
    evaluations = [panel for panel in (ACCURACY, AGREEMENT, KL) if panel.name in known]
    return [(panel.heading, plot(found, panel)) for panel in (*evaluations, *OTHERS)]


def _given(record: dict) -> set[str]:
    return {name for name, value in record.items() if value is not None}


def plot(found: list[run_folder.Run], panel: Panel) -> str:
    """Plots one panel; returns the text of an SVG element.

    One line per run; thin lines for the cool-downs of earlier ends of an extended run, dotted lines for the EMA
    weights, dash-dotted lines for training views, and a dashed line for each teacher.
    """
    with matplotlib.rc_context(STYLE):
        # Not pyplot, which keeps global state and may look for a display.
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        # By value: runs with the same teacher share one line and one entry of the legend.
        teachers: dict[float, str] = {}
        for each, color in zip(found, COLORS * (len(found) // len(COLORS) + 1), strict=False):
            _lines(axes, each, panel, color)
            starts = [r for r in each.metrics.read() if r["event"] == "teacher" and r.get(panel.name) is not None]
            if panel.name == "top1":
                teachers |= {panel.scale * r[panel.name]: r["teacher"] for r in starts}
        for value, teacher in teachers.items():
            axes.axhline(value, color=GREY, linestyle="--", linewidth=1.2, label=_literal(f"teacher {_short(teacher)}"))
        axes.set_xlabel("step")
        axes.set_ylabel(panel.label)
        # matplotlib warns of a legend without entries.
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=8)
        return to_svg(figure)


def _lines(axes: Axes, run: run_folder.Run, panel: Panel, color: str) -> None:
    """Draws all lines of one run."""
    # Resolved, since the name of `.` is empty.
    name = run.folder.resolve().name
    # A line through one point is invisible, and through two it hides how few they are.
    marker = "o" if len(_points(run, panel.event, panel)[0]) < 3 else None
    points = _points(run, panel.event, panel)
    # A run without this metric, as training on labels has no agreement, stays out of the legend.
    axes.plot(*points, color=color, label=_literal(name) if points[0] else None, linewidth=1.6, marker=marker)
    # Thin and without labels: they are parts of the same run.
    for end in extend.earlier_ends(run):
        axes.plot(*_points(end, panel.event, panel), color=color, linewidth=0.9, marker=marker)
    beside = [("ema", ":", "EMA weights")] if panel.event == "eval" else []
    beside += [("views", "-.", "training views")] if panel.views else []
    for event, style, about in beside:
        if points := _points(run, event, panel):
            label = _literal(f"{name}, {about}") if points[0] else None
            axes.plot(*points, color=color, linestyle=style, linewidth=1.6, label=label)


def _points(run: run_folder.Run, event: str, panel: Panel) -> tuple[list[int], list[float]]:
    """Returns the steps and values of an event's records."""
    known = [each for each in run.metrics.read() if each["event"] == event and each.get(panel.name) is not None]
    return [each["step"] for each in known], [panel.scale * each[panel.name] for each in known]


def _short(teachers: str) -> str:
    return " + ".join(Path(name).name for name in teachers.split(" + "))


def _literal(text: str) -> str:
    """Escapes text that matplotlib would hide (leading underscore) or typeset (dollar signs)."""
    # A space without width: matplotlib leaves labels that begin with an underscore out of the legend.
    return "\u200b" + text.encode(errors="replace").decode().replace("$", r"\$")
