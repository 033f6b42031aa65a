"""Plots an evaluation as SVG: reliability, selective accuracy, confusions, and accuracy on corrupted images."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from funmatch.ops.corruptions import SEVERITIES
from funmatch.reports.evaluation import rows
from funmatch.reports.html import COLORS, GREY, INK, drawing, plain_label, to_svg

SIZE = 4.4, 3.3
"""Width and height of a plot, inches: about its size on a page."""
NAMED = 30
"""Classes up to which the axes of a confusion matrix carry their names, and cells their numbers."""
NAME_LENGTH = 18
Metrics = Mapping[str, Any]


def draw_all(metrics: Metrics, matrix: np.ndarray | None, names: tuple[str, ...]) -> list[tuple[str, str, bool]]:
    """Plots what is known of an evaluation.

    Args:
        matrix: confusion matrix (classes, classes), rows by label; None without labels.
        names: of the classes.

    Returns:
        heading, SVG, and whether the plot is wide, of each.
    """
    with drawing():
        return [(heading, to_svg(figure), wide) for heading, figure, wide in _figures(metrics, matrix, names)]


def _figures(metrics: Metrics, matrix: np.ndarray | None, names: tuple[str, ...]) -> Iterator[tuple[str, Figure, bool]]:
    if metrics.get("reliability"):
        yield "Reliability: accuracy against confidence", _reliability(metrics), False
    if metrics.get("accuracy_at_coverage"):
        yield "Accuracy on the most confident images", _selective(metrics), False
    if metrics.get("corruptions"):
        yield "Corrupted images, mean over corruptions", _severities(metrics["corruptions"]), False
        yield "Corrupted images, each corruption by severity", _each_corruption(metrics["corruptions"]), True
    if matrix is not None and len(matrix) > 1:
        yield "Confusions: share of each class's images (rows) by predicted class", _confusions(matrix, names), True


def _reliability(metrics: Metrics) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1.2, label="perfect")
    scaled = metrics.get("reliability_scaled")
    for bins, color, label in (
        (metrics["reliability"], COLORS[0], f"as predicted (ECE {metrics['ece']:.3f})"),
        (scaled, COLORS[1], f"temperature {metrics['temperature'] or 1:.2f} (ECE {metrics['ece_scaled'] or 0:.3f})"),
    ):
        filled = [each for each in bins or () if each["images"]]
        if not filled:
            continue
        confidence, accuracy = ([100 * each[name] for each in filled] for name in ("confidence", "accuracy"))
        axes.plot(confidence, accuracy, color=color, linewidth=1.4, label=label)
        # By area: bins of few images are noise.
        sizes = [4 + 60 * each["images"] / metrics["pictures"] for each in filled]
        axes.scatter(confidence, accuracy, sizes, color=color)
    _percent_axes(axes, "confidence (%)", "accuracy (%)")
    axes.set(xlim=(0, 102), ylim=(0, 102))
    axes.legend(fontsize=8, loc="best")
    return figure


def _selective(metrics: Metrics) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    points = sorted((100 * float(coverage), 100 * share) for coverage, share in metrics["accuracy_at_coverage"].items())
    axes.plot(*zip(*points, strict=True), color=COLORS[0], marker="o", linewidth=1.6)
    _percent_axes(axes, "share of the images that are answered (%)", "accuracy (%)")
    axes.set_xlim(0, 102)
    _zoom(axes, [share for _, share in points])
    return figure


def _severities(corruptions: Metrics) -> Figure:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    shown = []
    for name, values, look in _models(corruptions):
        shares = [100 * each for each in (values["clean"], *values["by_severity"])]
        axes.plot([0, *SEVERITIES], shares, label=name, **look)
        shown += shares
    _percent_axes(axes, "severity (0: as they are)", _metric_of(corruptions))
    _zoom(axes, shown)
    axes.legend(fontsize=8, loc="best")
    return figure


def _each_corruption(corruptions: Metrics) -> Figure:
    kinds = corruptions["kinds"]
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(2.4 * columns + 0.6, 1.9 * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, kind in zip(grid, kinds, strict=False):
        for name, values, look in _models(corruptions):
            shares = [100 * each for each in (values["clean"], *values["by_kind"][kind])]
            axes.plot([0, *SEVERITIES], shares, label=name, **look)
        axes.set_title(kind, fontsize=9)
        axes.set_ylim(0, 102)
        axes.set_xticks([0, *SEVERITIES])
    for axes in grid[len(kinds) :]:
        axes.set_axis_off()
    figure.supylabel(_metric_of(corruptions), fontsize=9)
    figure.supxlabel("severity", fontsize=9)
    return figure


def _models(corruptions: Metrics) -> Iterator[tuple[str, Metrics, dict[str, Any]]]:
    """Yields label, values and look of each model's line; the teacher's is dashed and grey."""
    models = [*rows.corrupted_models(corruptions)]
    colors = iter(COLORS * (len(models) // len(COLORS) + 1))
    for number, (name, values) in enumerate(models):
        is_teacher = bool(corruptions["teacher"]) and number == len(models) - 1
        look = {"color": GREY, "linestyle": "--"} if is_teacher else {"color": next(colors), "marker": "o"}
        yield plain_label(name), values[rows.corruption_metric(values)], look | {"linewidth": 1.5, "markersize": 3}


def _metric_of(corruptions: Metrics) -> str:
    metrics = {rows.corruption_metric(values) for _, values in rows.corrupted_models(corruptions)}
    return f"{next(name for key, name in rows.CORRUPTED.items() if key in metrics)} (%)"


def _confusions(matrix: np.ndarray, names: tuple[str, ...]) -> Figure:
    """Draws a confusion matrix by the strength of one colour, which shows on a light and on a dark page."""
    count = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    width = min(9.0, 3.4 + 0.42 * min(count, NAMED))
    figure = Figure(figsize=(width, 0.92 * width), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False)
    if count <= NAMED:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            share = shares[row, column]
            color = COLORS[0] if row == column else COLORS[1]
            # Paths, whose colour follows the page's theme; an image of so few cells would be blurred.
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=color, alpha=0.8 * share**0.6,
                                                        linewidth=0))  # fmt: skip
            if count <= NAMED // 2 or share >= 0.1:
                axes.text(column, row, f"{matrix[row, column]}", ha="center", va="center", fontsize=7, color=INK)
        labels = [plain_label(name, NAME_LENGTH) for name in names]
        axes.set_xticks(range(count), labels, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(count), labels, fontsize=8)
        axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    else:
        pixels = np.empty((count, count, 4))
        pixels[..., :3] = to_rgb(COLORS[1])
        pixels[np.arange(count), np.arange(count), :3] = to_rgb(COLORS[0])
        pixels[..., 3] = shares**0.4
        # All pixels, for the browser to scale: nearest neighbours would drop some of a thousand classes.
        axes.imshow(pixels, interpolation="none")
    axes.set_aspect("equal")
    axes.set(xlabel="predicted", ylabel="label")
    return figure


def _percent_axes(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _zoom(axes: Axes, values: list[float]) -> None:
    """Sets limits of at least ten points: differences of tenths would look like jumps on an axis of their own."""
    low, high = min(values), max(values)
    spare = max(0.05 * (high - low), 5 - (high - low) / 2)
    axes.set_ylim(max(0.0, low - spare), min(102.0, high + spare))
