"""Figures of a study, drawn from what `results.jsonl` holds."""

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from funmatch.reports.run_plots import COLORS, GREY, STYLE

Results = Sequence[Mapping[str, Any]]
SHARES = ("top1", "top5", "agreement", "agreement5", "balanced")
NAMES = {
    "top1": "top-1 on test images", "agreement": "agreement with the teacher", "agreement5": "agreement among five",
    "kl": "KL from the teacher (nats)", "loss": "loss on training views", "views_kl": "KL on training views (nats)",
    "views_agreement": "agreement on training views", "ece": "calibration error", "seconds": "seconds",
    "ema_top1": "top-1 of the average of weights", "steps": "steps", "epochs": "epochs", "temperature": "temperature",
}  # fmt: skip
"""Figures in words; others stand for themselves."""
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1)))
MARKS = "osD^vPX*"


def is_share(name: str) -> bool:
    """Whether a figure is a share, and is shown in percent."""
    return name.removeprefix("views_").removeprefix("ema_").removeprefix("teacher_") in SHARES


def draw_svg(figure: Mapping[str, Any], results: Results) -> str:
    """A figure as the text of an SVG element; '' where no run has what it shows."""
    kinds: dict[str, Callable[..., bool]] = {"curves": _curves, "ends": _ends, "against": _against, "scatter": _scatter}
    with matplotlib.rc_context(STYLE):
        sheet = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = sheet.subplots()
        if not kinds[figure["kind"]](axes, results, figure):
            return ""
        text = BytesIO()
        sheet.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue().decode()
    return svg[svg.index("<svg") :]


def heading(figure: Mapping[str, Any]) -> str:
    """What stands above a figure."""
    if title := figure.get("title"):
        return title
    value = NAMES.get(figure["value"], figure["value"])
    kind = figure["kind"]
    if kind == "curves":
        return f"{value.removesuffix(' on test pictures')} while runs go on"
    if kind == "against":
        return f"{value} against {figure['knob']}"
    if kind == "scatter":
        return f"{value} against {NAMES.get(figure['across'], figure['across'])}"
    return value


def look_of(number: int) -> dict[str, Any]:
    """Colour, dash and mark of a line: told apart beyond the eighth, too."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": DASHES[number // len(COLORS) % len(DASHES)],
        "marker": MARKS[number % len(MARKS)],
    }


def by(results: Results, key: str) -> dict[str, list[Mapping[str, Any]]]:
    """Results with the same name (or group), in the order of the study."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        found.setdefault(result[key], []).append(result)
    return found


def spread(values: Sequence[float]) -> float:
    """The standard deviation of a sample; 0 of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def value_of(result: Mapping[str, Any], name: str) -> float | None:
    """A final figure, in percent if it is a share."""
    value = result["figures"].get(name)
    return None if value is None else value * (100.0 if is_share(name) else 1.0)


def _label(axes: Axes, side: str, name: str, *, curve: bool = False) -> None:
    words = NAMES.get(name, name)
    if curve:
        words = words.removesuffix(" on test images")
    getattr(axes, f"set_{side}label")(f"{words} (%)" if is_share(name) else words)


def _curves(axes: Axes, results: Results, figure: Mapping[str, Any]) -> bool:
    """A value against the step: a line a name, the mean over seeds, with a band of their spread."""
    event, value = figure["event"], figure["value"]
    scale, shown = 100.0 if is_share(value) else 1.0, False
    for number, (name, group) in enumerate(by(results, "name").items()):
        own = [each["curves"].get(event, {}) for each in group]
        own = [each for each in own if any(v is not None for v in each.get(value, ()))]
        if not own:
            continue
        steps = np.array(max((each["step"] for each in own), key=len), float)
        lines = np.array([np.interp(steps, each["step"], np.array(each[value], float)) for each in own]) * scale
        mean = lines.mean(0)
        look = {name: part for name, part in look_of(number).items() if name != "marker"}
        axes.plot(steps, mean, label=name, linewidth=1.6, **look)
        if len(own) > 1:
            band = lines.std(0, ddof=1)
            axes.fill_between(steps, mean - band, mean + band, color=look["color"], alpha=0.15, linewidth=0)
        shown = True
    axes.set_xlabel("step")
    _label(axes, "y", value, curve=True)
    if figure.get("log"):
        axes.set_yscale("log")
    if shown:
        _legend(axes)
    return shown


def _ends(axes: Axes, results: Results, figure: Mapping[str, Any]) -> bool:
    """A final figure of each run: a dot a seed, a bar for their mean."""
    value, places, names = figure["value"], [], []
    for number, (name, group) in enumerate(by(results, "name").items()):
        values = [v for each in group if (v := value_of(each, value)) is not None]
        if values:
            look = look_of(number)
            axes.plot(values, [len(places)] * len(values), "o", color=look["color"], alpha=0.75, markersize=5)
            axes.plot([np.mean(values)] * 2, [len(places) - 0.3, len(places) + 0.3], color=look["color"], linewidth=2.4)
            places.append(len(places))
            names.append(name)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    _label(axes, "x", value)
    if value == "top1":
        _teacher(axes, results, across=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    return bool(places)


def _against(axes: Axes, results: Results, figure: Mapping[str, Any]) -> bool:
    """A final figure against a knob: a line a group, the mean over seeds with bars of their spread."""
    value, knob, shown, ticks = figure["value"], figure["knob"], False, set()
    for number, (name, group) in enumerate(by(results, "group").items()):
        points: dict[Any, list[float]] = {}
        for each in group:
            place, figure_of_run = each["asked"].get(knob, each["knobs"].get(knob)), value_of(each, value)
            if figure_of_run is not None and isinstance(place, int | float):
                points.setdefault(place, []).append(figure_of_run)
        if points:
            at = sorted(points)
            ticks |= {*at}
            means, bars = [float(np.mean(points[x])) for x in at], [spread(points[x]) for x in at]
            axes.errorbar(at, means, bars, label=name, capsize=3, linewidth=1.6, markersize=5, **look_of(number))
            shown = True
    if figure.get("log", True) and ticks and min(ticks) > 0:
        axes.set_xscale("log")
    axes.set_xticks(sorted(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _label(axes, "x", knob)
    _label(axes, "y", value)
    if value == "top1":
        _teacher(axes, results)
    if shown:
        _legend(axes)
    return shown


def _scatter(axes: Axes, results: Results, figure: Mapping[str, Any]) -> bool:
    """One final figure against another: a dot a run, a colour and mark a name."""
    shown = False
    for number, (name, group) in enumerate(by(results, "name").items()):
        pairs = [(value_of(each, figure["across"]), value_of(each, figure["value"])) for each in group]
        pairs = [(x, y) for x, y in pairs if x is not None and y is not None]
        if pairs:
            look = look_of(number)
            axes.plot(*zip(*pairs, strict=True), look["marker"], color=look["color"], label=name, alpha=0.85)
            shown = True
    if figure.get("log"):
        axes.set_xscale("log")
    _label(axes, "x", figure["across"])
    _label(axes, "y", figure["value"])
    if shown:
        _legend(axes)
    return shown


def _teacher(axes: Axes, results: Results, *, across: bool = False) -> None:
    """A dashed line for each teacher."""
    tops = (each["figures"].get("teacher_top1") for each in results)
    for top1 in sorted({round(100 * top1, 2) for top1 in tops if top1 is not None}):
        line = axes.axvline if across else axes.axhline
        line(top1, color=GREY, linestyle="--", linewidth=1.2, label=f"teacher ({top1:.1f} %)")


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
