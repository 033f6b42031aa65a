"""Plots a hyperparameter search: parallel coordinates, slices, importance of options."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image

from funmatch.reports.html import COLORS, drawing, to_svg
from funmatch.reports.images import tiled, to_image
from funmatch.runtime.text import format_value

BEST = COLORS[1]
SHADES = colormaps["viridis"]
Result = Mapping[str, Any]
Trials = list[dict[str, Any]]


def draw_plots(result: Result) -> list[tuple[str, str]]:
    """Plots the finished trials; returns (heading, SVG) of each plot, or nothing for fewer than two trials."""
    with drawing():
        return [(heading, to_svg(figure)) for heading, figure in _figures(result)]


def draw_sheet(result: Result) -> Image.Image | None:
    """Draws the plots of `draw_plots` as one image, for notebooks; None for fewer than two trials."""
    with drawing():
        images = [to_image(figure, heading) for heading, figure in _figures(result)]
    return tiled(images, columns=1) if images else None


def _figures(result: Result) -> Iterator[tuple[str, Figure]]:
    """Yields heading and figure of each plot; call it inside the style's context."""
    complete = [trial for trial in result["trials"] if trial["value"] is not None]
    # A plot of one trial compares nothing.
    if len(complete) < 2:
        return
    # In proportion to the options, so that their labels do not overlap.
    wide = max(6.4, 2.4 * len(result["space"]) + 1.6)
    plots: list[tuple[str, Callable[..., None], tuple[float, float]]] = [
        ("Parallel coordinates: one line per trial, the best in orange", _parallel, (wide, 3.6)),
        ("Slices: one dot per trial, with the standard deviation over its executions", _slices, (wide, 3.0)),
    ]
    # Too few trials have no importance.
    if result["importance"]:
        size = (6.4, 0.6 + 0.4 * len(result["importance"]))
        plots.append(("Importance of each option for the score (PED-ANOVA)", _bars, size))
    for heading, draw, size in plots:
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, complete, result)
        yield heading, figure


def _parallel(figure: Figure, trials: Trials, result: Result) -> None:
    axes = figure.subplots()
    space = result["space"]
    values = [trial["value"] for trial in trials]
    low, high = min(values), max(values)
    # The best is drawn last, over all others.
    for trial in sorted(trials, key=lambda each: (each["number"] == result["best"], each["value"])):
        heights = [_height(space[name], trial["knobs"][name]) for name in space]
        # All trials may have the same value.
        heights.append((trial["value"] - low) / ((high - low) or 1.0))
        best = trial["number"] == result["best"]
        # Neither end of viridis: yellow can hardly be seen on white, nor dark violet on a dark page.
        color = BEST if best else SHADES(0.25 + 0.6 * heights[-1])
        axes.plot(range(len(heights)), heights, color=color, linewidth=2.4 if best else 1.1, alpha=1 if best else 0.7)
    for place, name in enumerate(space):
        for height, word in _marks(space[name]):
            axes.annotate(
                word,
                (place, height),
                xytext=(-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
            )
    for height, value in ((0.0, low), (1.0, high)):
        axes.annotate(
            f"{100 * value:.1f} %",
            (len(space), height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_xticks(range(len(space) + 1), [*space, "validation"])
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=True, axis="x", alpha=0.6)
    axes.set_xlim(-0.4, len(space) + 0.4)


def _height(span: Mapping[str, Any], value: Any) -> float:
    """Computes the position of a value in its option's range, in [0, 1]."""
    if span["choices"]:
        # A single choice stands at the bottom.
        return list(span["choices"]).index(value) / max(1, len(span["choices"]) - 1)
    # As it was sampled: on a linear axis most trials would crowd at the lower end.
    scale = math.log if span["log"] else float
    low, high = scale(span["low"]), scale(span["high"])
    return (scale(value) - low) / (high - low)


def _marks(span: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Returns (height, label) of the values to mark on an axis."""
    ends = span["choices"] or (span["low"], span["high"])
    return [(_height(span, value), format_value(value)) for value in ends]


def _slices(figure: Figure, trials: Trials, result: Result) -> None:
    space = result["space"]
    # squeeze=False, or a single option would not give an array.
    panels = figure.subplots(1, len(space), sharey=True, squeeze=False)[0]
    for axes, (name, span) in zip(panels, space.items(), strict=True):
        _slice(axes, name, span, trials, result["best"])
    panels[0].set_ylabel("validation (%)")


def _slice(axes: Axes, name: str, span: Mapping[str, Any], trials: Trials, best: int) -> None:
    """Plots the score against the values of one option."""
    for trial in trials:
        value = trial["knobs"][name]
        # Choices are evenly spaced by their order: they may be names.
        place = list(span["choices"]).index(value) if span["choices"] else value
        axes.errorbar(
            place, 100 * trial["value"], yerr=100 * (trial["spread"] or 0.0) or None, fmt="o", markersize=5,
            color=BEST if trial["number"] == best else COLORS[0], elinewidth=0.8, alpha=0.85,
        )  # fmt: skip
    if span["choices"]:
        axes.set_xticks(range(len(span["choices"])), list(map(format_value, span["choices"])))
        axes.margins(x=0.2)
    elif span["log"]:
        low, high = span["low"], span["high"]
        axes.set_xscale("log")
        # Only three: powers of ten may lie outside a narrow range.
        ticks = (low, math.sqrt(low * high), high)
        axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
        # A margin of 5 % in the logarithm, as matplotlib has on linear axes.
        axes.set_xlim(low / (high / low) ** 0.05, high * (high / low) ** 0.05)
    axes.set_xlabel(name)


def _bars(figure: Figure, _trials: Trials, result: Result) -> None:
    axes = figure.subplots()
    # matplotlib draws the first bar at the bottom.
    shares = list(reversed(result["importance"].items()))
    axes.barh([name for name, _ in shares], [100 * share for _, share in shares], color=COLORS[0], height=0.6)
    axes.set_xlabel("importance (%)")
    axes.grid(visible=False, axis="y")
