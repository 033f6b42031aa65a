"""Draws the plots of a study from `results.jsonl`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from funmatch.reports.html import COLORS, GREY, drawing, to_svg
from funmatch.runtime.disk.json_files import LARGEST

Results = Sequence[Mapping[str, Any]]
SHARES = ("top1", "top5", "agreement", "agreement5", "balanced", "knn")
NAMES = {
    "top1": "top-1 on test images", "agreement": "agreement with the teacher", "agreement5": "teacher's class in top 5",
    "kl": "KL from the teacher (nats)", "loss": "loss on training views", "views_kl": "KL on training views (nats)",
    "views_agreement": "agreement on training views", "ece": "calibration error", "seconds": "seconds",
    "knn": "top-1 of 20 nearest neighbours", "cosine": "cosine with the teacher's features",
    "ema_top1": "top-1 of the EMA weights", "steps": "steps", "epochs": "epochs", "temperature": "temperature",
}  # fmt: skip
"""Axis titles of metrics and options; others are named as they are."""
# Eight colours and four dashes: 32 lines before two look alike. Markers follow the colours.
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1)))
MARKS = "osD^vPX*"


def is_share(name: str) -> bool:
    """Whether a metric is a share in [0, 1], which plots show in percent."""
    # The same metric of training views, of EMA weights or of the teacher is a share, too.
    return name.removeprefix("views_").removeprefix("ema_").removeprefix("teacher_") in SHARES


def draw_svg(figure: Mapping[str, Any], results: Results) -> str:
    """Draws a plot; returns the text of an SVG element, or '' if no run has its metric."""
    kinds: dict[str, Callable[..., bool]] = {"curves": _curves, "ends": _ends, "against": _against, "scatter": _scatter}
    with drawing():
        sheet = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = sheet.subplots()
        if not kinds[figure["kind"]](axes, results, figure):
            return ""
        return to_svg(sheet)


def heading(figure: Mapping[str, Any]) -> str:
    """Returns the title of a plot."""
    if title := figure.get("title"):
        return title
    value = NAMES.get(figure["value"], figure["value"])
    kind = figure["kind"]
    if kind == "curves":
        return f"{value.removesuffix(' on test images')} during training"
    if kind == "against":
        return f"{value} against {figure['knob']}"
    if kind == "scatter":
        return f"{value} against {NAMES.get(figure['across'], figure['across'])}"
    return value


def look_of(number: int) -> dict[str, Any]:
    """Returns colour, dash and marker of a line; lines differ beyond the eighth, when colours repeat."""
    return {
        "color": COLORS[number % len(COLORS)],
        "linestyle": DASHES[number // len(COLORS) % len(DASHES)],
        "marker": MARKS[number % len(MARKS)],
    }


def by(results: Results, key: str) -> dict[str, list[Mapping[str, Any]]]:
    """Groups results by name (or group), in the order of the study."""
    # A dictionary keeps the order of the file, in which authors put what they compare.
    found: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        found.setdefault(result[key], []).append(result)
    return found


def spread(values: Sequence[float]) -> float:
    """Computes the sample standard deviation; 0 for a single value."""
    # ddof=1: seeds are a sample of all seeds.
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def value_of(result: Mapping[str, Any], name: str) -> float | None:
    """Returns a final metric of a run, in percent if it is a share."""
    value = result["figures"].get(name)
    return None if value is None else value * (100.0 if is_share(name) else 1.0)


def _label(axes: Axes, side: str, name: str, *, curve: bool = False) -> None:
    words = NAMES.get(name, name)
    if curve:  # curves are of the validation split
        words = words.removesuffix(" on test images")
    getattr(axes, f"set_{side}label")(f"{words} (%)" if is_share(name) else words)


def _curves(axes: Axes, results: Results, figure: Mapping[str, Any]) -> bool:
    """Plots a metric against the step: one line per name, the mean over seeds, ± standard deviation."""
    event, value = figure["event"], figure["value"]
    scale, shown = 100.0 if is_share(value) else 1.0, False
    for number, (name, group) in enumerate(by(results, "name").items()):
        own = [each["curves"].get(event, {}) for each in group]
        # Training on labels has the event, but no agreement in it.
        own = [each for each in own if any(v is not None for v in each.get(value, ()))]
        own = [each for each in own if len(each.get("step", ())) == len(each[value])]
        if not own:
            continue
        steps = np.array(max((each["step"] for each in own), key=len), float)
        # Runs that stopped early have fewer points: all are interpolated at the steps of the longest.
        lines = np.array([np.interp(steps, each["step"], np.array(each[value], float)) for each in own]) * scale
        mean = lines.mean(0)
        # Without markers, which would hide a curve of 200 points.
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
    """Plots a final metric of each run: one dot per seed, and a bar at their mean."""
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
    # matplotlib counts from below; the first run of the file stands on top.
    axes.invert_yaxis()
    _label(axes, "x", value)
    if value == "top1":
        _teacher(axes, results, across=True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    return bool(places)


def _against(axes: Axes, results: Results, figure: Mapping[str, Any]) -> bool:
    """Plots a final metric against an option: one line per group, the mean over seeds with error bars."""
    value, option, shown, ticks = figure["value"], figure["knob"], False, set()
    for number, (name, group) in enumerate(by(results, "group").items()):
        points: dict[Any, list[float]] = {}
        for each in group:
            # `asked` is what the study file sets, e.g. epochs; `knobs` is resolved, e.g. to steps.
            place, metric = each["asked"].get(option, each["knobs"].get(option)), value_of(each, value)
            if metric is not None and isinstance(place, int | float) and abs(place) < LARGEST:
                points.setdefault(place, []).append(metric)
        if points:
            at = sorted(points)
            ticks |= {*at}
            means, bars = [float(np.mean(points[x])) for x in at], [spread(points[x]) for x in at]
            axes.errorbar(at, means, bars, label=name, capsize=3, linewidth=1.6, markersize=5, **look_of(number))
            shown = True
    # Options are mostly tried in powers; a value of 0, such as no decay, has no place on such an axis.
    if figure.get("log", True) and ticks and min(ticks) > 0:
        axes.set_xscale("log")
    # Ticks at the values that were run: a logarithmic axis would mark powers of ten.
    axes.set_xticks(sorted(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    # Its labels would stand between the ticks and overlap them.
    axes.xaxis.set_minor_formatter(NullFormatter())
    _label(axes, "x", option)
    _label(axes, "y", value)
    if value == "top1":
        _teacher(axes, results)
    if shown:
        _legend(axes)
    return shown


def _scatter(axes: Axes, results: Results, figure: Mapping[str, Any]) -> bool:
    """Plots one final metric against another: one dot per run, one colour and marker per name."""
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
    """Draws a dashed line at each teacher's accuracy."""
    tops = (each["figures"].get("teacher_top1") for each in results)
    # Rounded, so that one teacher gives one line, whatever the last bits of its accuracies.
    for top1 in sorted({round(100 * top1, 2) for top1 in tops if top1 is not None}):
        line = axes.axvline if across else axes.axhline
        line(top1, color=GREY, linestyle="--", linewidth=1.2, label=f"teacher ({top1:.1f} %)")


def _legend(axes: Axes) -> None:
    # Beside the plot: with ten runs it would cover the curves.
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
