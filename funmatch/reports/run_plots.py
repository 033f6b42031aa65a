"""Plots the training curves of runs as SVG: metrics against the step."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from funmatch.ops.optim import schedules
from funmatch.reports.html import COLORS, GREY, LONGEST, drawing, plain_label, to_svg
from funmatch.reports.images import tiled, to_image
from funmatch.reports.run_tables import short_names
from funmatch.training.run import extend
from funmatch.training.run import folder as run_folder

SIZE = 4.4, 2.7
"""Width and height of a plot without its legend, inches: about its size on a page, so that its text stays legible."""
ROW = 0.17
"""Height of a row of the legend, inches."""
FEW = 3
"""Fewer points than this have markers, and axes that do not zoom in on them."""


@dataclass(frozen=True)
class Panel:
    """One plot of a page.

    Attributes:
        heading: title above the plot.
        event, name: the event of `metrics.jsonl`, and the metric in its records.
        label: title of the y axis.
        scale: factor by which values are multiplied.
        views: whether to draw the same metric on training views too.
        from_zero: whether the y axis begins at 0.
    """

    heading: str
    event: str
    name: str
    label: str
    scale: float = 1.0
    views: bool = False
    from_zero: bool = False


ACCURACY = Panel("Accuracy during training", "eval", "top1", "top-1 (%)", 100.0)
PRECISION = Panel("Mean average precision during training", "eval", "map", "mAP (%)", 100.0)
AGREEMENT = Panel("Agreement with the teacher", "eval", "agreement", "agreement (%)", 100.0, views=True)
KL = Panel("KL from the teacher", "eval", "kl", "KL (nats)", views=True)
NEIGHBOURS = Panel("Nearest neighbours by features", "eval", "knn", "top-1 of 20 neighbours (%)", 100.0)
COSINE = Panel("Features beside the teacher's", "eval", "cosine", "cosine", views=True)
LOSS = Panel("Loss on training views", "step", "loss", "loss")
LR = Panel("Learning rate", "step", "lr", "learning rate", from_zero=True)
MEASURED = (ACCURACY, PRECISION, NEIGHBOURS, AGREEMENT, KL, COSINE)
OTHERS = (LOSS, LR, Panel("Throughput", "step", "images_per_second", "images/s", from_zero=True))
LARGEST = 1e300
"""Values that are not drawn from here on, as only a damaged log has them: the limits of axes would overflow."""
LR_POINTS = 200
"""Points of the learning rate's line."""
Points = tuple[list[int], list[float]]
"""Steps and values of a line."""


def build_panels(found: list[run_folder.Run]) -> list[tuple[str, str]]:
    """Plots accuracy, agreement with the teacher, loss, learning rate and throughput; returns (heading, SVG) each."""
    return [(panel.heading, plot(found, panel)) for panel in _panels(found)]


def _panels(found: list[run_folder.Run]) -> list[Panel]:
    known = {name for run in found for each in run.metrics.read() if each["event"] == "eval" for name in _given(each)}
    # Without labels there is no accuracy, and without a teacher no agreement: no empty plots.
    return [panel for panel in MEASURED if panel.name in known] + [*OTHERS]


def draw_sheet(found: list[run_folder.Run]) -> Image.Image:
    """Draws the plots of `build_panels` as one image, for notebooks."""
    with drawing():
        return tiled([to_image(_figure(found, panel), panel.heading) for panel in _panels(found)], columns=3)


def _given(record: dict) -> set[str]:
    return {name for name, value in record.items() if value is not None}


def plot(found: list[run_folder.Run], panel: Panel) -> str:
    """Plots one panel; returns the text of an SVG element.

    One line per run; thin lines for the cool-downs of earlier ends of an extended run, dotted lines for the EMA
    weights, dash-dotted lines for training views, and a dashed line for each teacher.
    """
    with drawing():
        return to_svg(_figure(found, panel))


def _figure(found: list[run_folder.Run], panel: Panel) -> Figure:
    # Not pyplot, which keeps global state and may look for a display.
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    # By value: runs with the same teacher share one line and one entry of the legend.
    teachers: dict[float, str] = {}
    for each, color in zip(found, COLORS * (len(found) // len(COLORS) + 1), strict=False):
        _lines(axes, each, panel, color)
        starts = [r for r in each.metrics.read() if r["event"] == "teacher" and r.get(panel.name) is not None]
        if panel in (ACCURACY, PRECISION, NEIGHBOURS):
            teachers |= {panel.scale * r[panel.name]: r["teacher"] for r in starts}
    for value, teacher in teachers.items():
        if abs(value) >= LARGEST:
            continue
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1.2, label=plain_label(_called(teacher)))
    axes.set_xlabel("step")
    axes.set_ylabel(panel.label)
    _limits(axes, panel)
    _legend(figure, axes)
    return figure


def _limits(axes: Axes, panel: Panel) -> None:
    """Sets limits that begin at step 0 and do not enlarge small differences, or a single point, to a whole plot."""
    # The teacher's horizontal line has no steps: its x are fractions of the axes.
    drawn = [line for line in axes.lines if line.get_transform() == axes.transData]
    steps = [x for line in drawn for x in np.asarray(line.get_xdata(), float)]
    values = [y for line in axes.lines for y in np.asarray(line.get_ydata(), float)]
    if not steps:
        return
    axes.set_xlim(0, 1.02 * max(steps))
    if panel.scale == 100.0:
        # Ten points at least: differences of tenths are noise, and look like jumps on an axis of their own.
        low, high = min(values), max(values)
        spare = max(0.05 * (high - low), 5 - (high - low) / 2)
        axes.set_ylim(max(0.0, low - spare), min(100.0, high + spare))
        return
    positive = sorted(value for value in values if value > 0)
    # A run that diverges would press all others into the axis.
    if positive and positive[-1] > 1e3 * positive[len(positive) // 2]:
        axes.set_yscale("log")
    elif panel.from_zero or len(values) < FEW:
        axes.set_ylim(min(0.0, *values), 1.05 * max(values) or 1.0)


def _legend(figure: Figure, axes: Axes) -> None:
    """Puts the legend below the plot, where it hides no curve, and makes the figure taller by its rows."""
    handles, labels = axes.get_legend_handles_labels()
    # matplotlib warns of a legend without entries.
    if not handles:
        return
    columns = 1 if max(map(len, labels)) > LONGEST // 2 else 2
    figure.set_figheight(SIZE[1] + ROW * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def _lines(axes: Axes, run: run_folder.Run, panel: Panel, color: str) -> None:
    """Draws all lines of one run."""
    # Resolved, since the name of `.` is empty.
    name = run.folder.resolve().name
    points = _planned_lr(run) if panel.name == "lr" else _points(run, panel.event, panel)
    _line(axes, points, name, color=color, linewidth=1.6)
    # Thin and without labels: they are parts of the same run.
    for end in extend.earlier_ends(run):
        _line(axes, _points(end, panel.event, panel), None, color=color, linewidth=0.9)
    beside = [("ema", ":", "s", "EMA weights")] if panel.event == "eval" else []
    beside += [("views", "-.", "D", "training views")] if panel.views else []
    for event, style, marker, about in beside:
        look = {"color": color, "linestyle": style, "linewidth": 1.6, "marker": marker, "markerfacecolor": "none"}
        _line(axes, _points(run, event, panel), f"{name}, {about}", **look)


def _line(axes: Axes, points: Points, name: str | None, **look: Any) -> None:
    """Draws a line, if it has points: a run without this metric, as agreement without a teacher, has no entry."""
    drawn = [(step, value) for step, value in zip(*points, strict=True) if abs(value) < LARGEST]
    if not drawn:
        return
    steps, values = zip(*drawn, strict=True)
    # A line through one point is invisible, and through two it hides how few they are.
    look["marker"] = look.get("marker", "o") if len(steps) < FEW else None
    # matplotlib leaves out of the legend what begins with an underscore, as its own names of lines do.
    label = "_end" if name is None else plain_label(name)
    axes.plot(steps, values, label=label, **look)


def _points(run: run_folder.Run, event: str, panel: Panel) -> Points:
    """Returns the steps and values of an event's records."""
    known = [each for each in run.metrics.read() if each["event"] == event and each.get(panel.name) is not None]
    return [each["step"] for each in known], [panel.scale * each[panel.name] for each in known]


def _planned_lr(run: run_folder.Run) -> Points:
    """Returns the learning rate of every update so far, from its schedule: the log may hold no step of the warm-up."""
    options = run.config["knobs"]
    recorded = _points(run, "step", LR)
    # Records of earlier versions may lack what the schedule needs.
    if not recorded[0] or not all(options.get(name) is not None for name in ("lr", "schedule", "steps")):
        return recorded
    last = max(recorded[0])
    warmup, decay = options.get("warmup_steps") or 0, options.get("decay_steps") or []
    steps = drawn_steps(last - 1, (warmup, *decay))
    more = options.get("decay_factors") or (), options.get("cooldown_steps"), options.get("cooldown_shape") or "sqrt"
    # + 1: a record's step counts the updates done, and the rate is that of the last of them.
    return [step + 1 for step in steps], [
        options["lr"] * schedules.factor(options["schedule"], step, options["steps"], warmup, decay, *more)
        for step in steps
    ]


def drawn_steps(last: int, corners: Iterable[int]) -> list[int]:
    """Returns the steps from 0 to `last` at which a schedule is drawn: evenly spaced ones, and those at its corners."""
    # Both sides of a corner, so that it is not cut off.
    beside = {step for each in corners for step in (each - 1, each) if 0 <= step <= last}
    return sorted({*beside, *(round(i * last / LR_POINTS) for i in range(LR_POINTS + 1))})


def _called(teachers: str) -> str:
    # A teacher's run is often called `teacher` itself.
    name = short_names(teachers.split(" + "))
    return name if name.lower().startswith("teacher") else f"teacher {name}"
