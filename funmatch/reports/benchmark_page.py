"""Renders a benchmark as tables, a plot of accuracy against latency, and one offline HTML page."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from funmatch.reports.html import COLORS, GREY, INK, drawing, load_template, to_svg
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.text import MISSING, percent

COLUMNS = ("format", "status", "size (MB)", "top-1", "agreement", "ms/image", "images/s")
"""The main table: ms/image is the median at batch 1, images/s that of the best batch."""
DETAILS = ("format", "p50", "p90", "p99", "spread", "calls", "batch", "memory (MB)")
"""The table of times, in milliseconds at batch 1, of the best batch, and of memory."""
SIZE = 7.6, 4.6
"""Width and height of the plot, inches."""
FRAME = 0.085, 0.98, 0.2, 0.965
"""Left, right, bottom and top of the axes, as shares of the plot: fixed, so that labels are placed before drawing."""
SMALLEST, LARGEST = 5.0, 34.0
"""Diameters of the smallest and the largest bubble, points."""
LETTER, LINE = 4.6, 10.0
"""Width of a letter and height of a line of the labels, points."""
Results = Sequence[Mapping[str, Any]]
Box = tuple[float, float, float, float]
"""Left, bottom, right and top, points."""


def name_of(result: Mapping[str, Any]) -> str:
    """Names a row among those of other models: the model and its format; a file is both."""
    return f"{result['model']}, {result['label']}" if result["model"] else result["label"]


def format_of(result: Mapping[str, Any]) -> str:
    """Names a row among those of the same model."""
    return result["label"]


Namer = Callable[[Mapping[str, Any]], str]


def rows(results: Results, name: Namer = name_of) -> list[list[str]]:
    """Formats the rows of `COLUMNS`."""
    return [
        [
            name(each), each["status"], _megabytes(each["bytes"]), percent(each["top1"]),
            percent(each["agreement"]), _digits(each["ms"]), _digits(each["images_per_second"]),
        ]
        for each in results
    ]  # fmt: skip


def details(results: Results, name: Namer = name_of) -> list[list[str]]:
    """Formats the rows of `DETAILS`, of the formats that could be measured."""
    return [
        [
            name(each), _digits(each["ms"]), _digits(each["ms_p90"]), _digits(each["ms_p99"]),
            percent(each["spread"]), f"{each['calls']:,}", f"{each['batch']}", _megabytes(each["memory_bytes"]),
        ]
        for each in results
        if each["status"] == "ok"
    ]  # fmt: skip


def reasons(results: Results) -> list[str]:
    """Returns a line for each format that could not be measured, with the reason."""
    return [f"{name_of(each)}: {each['reason']}" for each in results if each["reason"]]


def about(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Lists (name, value) of what a benchmark measured, where and how."""
    images = MISSING
    if metrics["images"]:
        images = f"{metrics['images']:,} of {metrics['of_images']:,} of {metrics['split']}, evenly spread"
    settled = f"until the medians of rounds vary by {percent(metrics['spread'])} at most"
    return [
        *((each["label"], about_model(each)) for each in metrics["models"]),
        ("machine", metrics["machine"]),
        ("threads", str(metrics["threads"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())),
        ("images for top-1 and agreement", images),
        ("timing", f"all formats in turn, {settled}, or for {metrics['max_seconds']:g} s each"),
    ]


def about_model(model: Mapping[str, Any]) -> str:
    """Describes a model: its name, parameters, operations, and the step of its weights."""
    step = "" if model["step"] is None else f", step {model['step']:,}"
    work = f"{_digits(model['gflop'])} GFLOP at {model['side']} × {model['side']} pixels"
    return f"{model['name']}{step}, {model['parameters']:,} parameters, {work}"


def write_page(path: Path, metrics: Mapping[str, Any]) -> Path:
    """Writes the page, and beside it the plot as .svg, where there are accuracies to plot."""
    drawing = draw(metrics["results"])
    path.parent.mkdir(parents=True, exist_ok=True)
    if drawing:
        write_atomically(path.with_suffix(".svg"), drawing)
    page = load_template("benchmark.html").render(
        columns=COLUMNS,
        rows=rows(metrics["results"]),
        details=DETAILS,
        detail_rows=details(metrics["results"]),
        reasons=reasons(metrics["results"]),
        drawing=drawing,
        models=[(each["label"], about_model(each)) for each in metrics["models"]],
        about=about(metrics),
    )
    write_atomically(path, page)
    return path


def draw(results: Results) -> str:
    """Plots top-1 against latency; a bubble's area is the size of the file. Returns the text of an SVG element.

    Without labelled images there is no accuracy, and the text is empty.
    """
    points = [each for each in results if each["status"] == "ok" and each["top1"] is not None]
    if not points:
        return ""
    with drawing():
        figure = Figure(figsize=SIZE)
        axes = figure.subplots()
        left, right, bottom, top = FRAME
        figure.subplots_adjust(left=left, right=right, bottom=bottom, top=top)
        _set_axes(axes, points)
        _draw_bubbles(axes, points)
        _legend(figure, points)
        return to_svg(figure)


def _set_axes(axes: Axes, points: Results) -> None:
    """Sets a logarithmic axis of milliseconds, and one of accuracy that does not enlarge small differences."""
    times = [each["ms"] for each in points]
    low, high = min(times), max(times)
    # Space for the bubbles and their labels; at least a factor of three, or a single point fills the axis.
    factor = max((high / low) ** 0.14, (3 / (high / low)) ** 0.5, 1.25)
    axes.set_xscale("log")
    axes.set_xlim(low / factor, high * factor)
    ticks = [step * 10.0**power for power in range(-4, 6) for step in (1, 2, 5)]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low / factor <= tick <= high * factor]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    tops = [100 * each["top1"] for each in points]
    # Ten points at least: formats differ by tenths, which is one image or two.
    spare = max(0.25 * (max(tops) - min(tops)), 5 - (max(tops) - min(tops)) / 2)
    axes.set_ylim(max(0.0, min(tops) - spare), max(tops) + spare)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}" if y <= 100 else ""))
    axes.set_xlabel("latency of one image (ms, median)")
    axes.set_ylabel("top-1 (%)")


def _diameter(size: float, largest: float) -> float:
    """The diameter of a bubble, points, whose area is in proportion to a size."""
    return max(SMALLEST, LARGEST * (size / largest) ** 0.5)


def _draw_bubbles(axes: Axes, points: Results) -> None:
    """Draws the bubbles, the largest first, and a label beside each that covers no other label and no bubble."""
    colors = _colors(points)
    largest = max(each["bytes"] for each in points)
    scale = 72 / axes.figure.dpi
    places = axes.transData.transform([(each["ms"], 100 * each["top1"]) for each in points]) * scale
    radii = [_diameter(each["bytes"], largest) / 2 for each in points]
    for number in sorted(range(len(points)), key=lambda i: -radii[i]):
        each, color = points[number], colors[points[number]["model"]]
        axes.scatter(
            [each["ms"]], [100 * each["top1"]], s=(2 * radii[number]) ** 2, color=color, alpha=0.45, edgecolors=color,
            linewidths=1.2, clip_on=False,
        )  # fmt: skip
    labels = _Labels([_around(*each) for each in zip(places, radii, strict=True)], _frame_of(axes, scale))
    # From the left, as one reads.
    for number in np.argsort(places[:, 0]):
        text = points[number]["label"]
        axes.annotate(
            text.replace("$", r"\$"), (points[number]["ms"], 100 * points[number]["top1"]),
            labels.place(places[number], radii[number], text), textcoords="offset points", ha="center", va="center",
            fontsize=8, color=INK,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6, "shrinkA": 0, "shrinkB": radii[number]},
        )  # fmt: skip


def _around(place: Sequence[float], radius: float) -> Box:
    return place[0] - radius, place[1] - radius, place[0] + radius, place[1] + radius


def _frame_of(axes: Axes, scale: float) -> Box:
    box = axes.get_window_extent()
    return box.x0 * scale, box.y0 * scale, box.x1 * scale, box.y1 * scale


class _Labels:
    """Places the labels of bubbles so that none covers a bubble, a line or another label.

    Args:
        bubbles: their boxes.
        frame: the box of the axes.
    """

    def __init__(self, bubbles: Sequence[Box], frame: Box) -> None:
        self.taken, self.boxes, self.texts, self.frame = list(bubbles), list(bubbles), list[Box](), frame

    def place(self, place: Sequence[float], radius: float, text: str) -> tuple[float, float]:
        """Places a label above or below its bubble, as near as possible; returns the way there in points."""
        left, bottom, right, top = self.frame
        half = LETTER * len(text) / 2
        # Inside the frame: a label at the edge moves inwards.
        x = min(max(place[0], left + half + 2), right - half - 2)
        ways = [sign * (radius + LINE * (0.8 + row)) for row in range(12) for sign in (1, -1)]
        # Where bubbles stand close, lines that cross a label are better than labels that cover each other.
        for lines_count in (True, False):
            for way in ways:
                y = place[1] + way
                box = x - half, y - LINE / 2, x + half, y + LINE / 2
                line = place[0] - 1, min(place[1], y), place[0] + 1, max(place[1], y)
                free = not any(_overlap(box, other) for other in (self.taken if lines_count else self.boxes))
                crosses = lines_count and any(_overlap(line, other) for other in self.texts)
                if bottom <= box[1] and box[3] <= top and free and not crosses:
                    self.taken += [box, line]
                    self.boxes.append(box)
                    self.texts.append(box)
                    return x - place[0], way
        # More labels than there is room for: covered ones are still in the table.
        return x - place[0], ways[0]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _colors(points: Results) -> dict[str, str]:
    """Returns the colour of each model, the same for all of its formats."""
    models = dict.fromkeys(each["model"] for each in points)
    return {model: COLORS[number % len(COLORS)] for number, model in enumerate(models)}


def _legend(figure: Figure, points: Results) -> None:
    """Explains the colours and the areas below the plot."""
    largest = max(each["bytes"] for each in points)
    colors = _colors(points)
    axes = figure.axes[0]
    # The nearest round size below the largest, and a tenth and a hundredth of it, as far as they can be told apart.
    top = 10.0 ** np.floor(np.log10(largest))
    sizes = [size for size in (top / 100, top / 10, top) if LARGEST * (size / largest) ** 0.5 >= SMALLEST]
    handles = [axes.scatter([], [], s=60, color=color, alpha=0.6, label=name) for name, color in colors.items()]
    handles += [
        axes.scatter([], [], s=_diameter(size, largest) ** 2, facecolors="none", edgecolors=GREY, label=_size(size))
        for size in sizes
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), fontsize=8, columnspacing=2.2)


def _size(count: float) -> str:
    return f"{count / 1e6:g} MB" if count >= 1e6 else f"{count / 1e3:g} kB"


def _digits(value: float | None) -> str:
    """Formats a number by three significant digits: 0.0123, 1.23, 123, 12,345."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(count: float | None) -> str:
    return MISSING if count is None else _digits(count / 1e6)
