"""Plots what a run will do, before it: its learning rate and weight decay, and what it draws for its views."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from funmatch.config import Train
from funmatch.ops.optim import schedules
from funmatch.reports.html import COLORS, GREY
from funmatch.reports.plan.draws import Draws
from funmatch.reports.run_plots import drawn_steps
from funmatch.runtime.functions import is_function_name
from funmatch.runtime.text import percent
from funmatch.training.setup import TrainSetup

SIZE = 4.8, 2.9
"""Width and height of a plot, inches."""
BINS = 40
ASPECTS = 0.25, 4.0
"""Aspects beyond these are counted at the ends of their plot: single strips would press all others into one bar."""


@dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
        name: of its file, without an ending.
        heading: title above the plot.
        figure: the plot.
    """

    name: str
    heading: str
    figure: Figure


def build_panels(setup: TrainSetup[Any], draws: Draws) -> list[Panel]:
    """Plots the schedule, the weights of mixed images, and the areas and aspects of crops; call it inside the style."""
    steps, config = setup.loop.steps, setup.config
    epochs = steps * config.batch / len(setup.loader.split)
    first = f"first {draws.steps:,} steps" if draws.steps < steps else f"all {steps:,} steps"
    mixing, cutting = _mixes(config)
    mixed = [each for each in ("MixUp" * mixing, "CutMix" * cutting) if each]
    mean = {name: f"{percent(float(values.mean()))} on average" for name, values in draws.areas.items()}
    return [
        Panel("schedule", f"Schedule: {steps:,} steps, {epochs:,.4g} epochs", _schedule(setup)),
        Panel("mixing", f"{' and '.join(mixed) or 'No MixUp'}, {first}", _weights(draws, config)),
        Panel("areas", f"Area of the crops, {first}: {mean['student']}", _areas(draws)),
        Panel("aspects", f"Aspect of the crops, {first}", _aspects(draws)),
    ]


def _mixes(config: Train) -> tuple[bool, bool]:
    """Returns whether some images are mixed by MixUp, and whether by CutMix."""
    variants = config.variants() or [config]
    return any(bool(each.mixup) for each in variants), any(bool(each.cutmix) for each in variants)


def _figure() -> tuple[Figure, Axes]:
    # Not pyplot, which keeps global state and may look for a display.
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.subplots()


def _schedule(setup: TrainSetup[Any]) -> Figure:
    """Plots the learning rate of every update, as the training loop sets it; weight decay has the axis at the right."""
    figure, axes = _figure()
    config, loop = setup.config, setup.loop
    warmup, cooldown = config.warmup_steps or 0, _cooldown(config, loop.steps)
    steps = drawn_steps(loop.steps - 1, (warmup, *config.decay_steps, loop.steps - cooldown))
    # + 1, here and below: the rate at step t is that of the update which leads to t + 1.
    axes.plot([step + 1 for step in steps], [loop.lr_at(step) for step in steps], color=COLORS[0], linewidth=1.6)
    for place, length, name in ((warmup, warmup, "warm-up"), (loop.steps - cooldown, cooldown, "cool-down")):
        if length:
            look = {"color": GREY, "linestyle": "--" if name == "warm-up" else ":", "linewidth": 1.2}
            axes.axvline(place + 1, label=f"{name}: {length:,} steps", **look)
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, 1.02 * loop.steps), ylim=(0, 1.05 * loop.lr))
    # A function of the user decays weights as it likes; all others by this share, times the schedule's factor.
    if config.weight_decay and not is_function_name(config.optimizer):
        share = config.weight_decay / loop.lr
        right = axes.secondary_yaxis("right", functions=(lambda lr: lr * share, lambda decay: decay / share))
        right.set_ylabel("weight decay a step")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, loc="best")
    return figure


def _cooldown(config: Train, steps: int) -> int:
    """Returns the length of the cool-down at the end of a run in steps, 0 for schedules that have none."""
    return schedules.cooldown_length(steps, config.cooldown_steps) if config.schedule == "wsd" else 0


def _weights(draws: Draws, config: Train) -> Figure:
    figure, axes = _figure()
    each = "images" if len(draws.weights) > draws.steps else "steps"
    _histogram(axes, {"student": draws.weights}, (0.0, 1.0))
    # CutMix may cover less than 1 − λ, at the border; what is left of the image is its weight.
    mixing, cutting = _mixes(config)
    what = "λ: " if mixing and not cutting else ""
    axes.set(xlabel=f"{what}weight of an image in its own view", ylabel=f"share of the {each} (%)")
    return figure


def _areas(draws: Draws) -> Figure:
    figure, axes = _figure()
    _histogram(axes, {name: 100 * areas for name, areas in draws.areas.items()}, (0.0, 100.0))
    axes.set(xlabel="share of its image that a crop covers (%)", ylabel="share of the crops (%)")
    return figure


def _aspects(draws: Draws) -> Figure:
    figure, axes = _figure()
    clipped = {name: aspects.clip(*ASPECTS) for name, aspects in draws.aspects.items()}
    low, high = (extreme([extreme(each) for each in clipped.values()]) for extreme in (min, max))
    # Not narrower than Inception crops are: squares that differ by rounding are squares.
    _histogram(axes, clipped, (min(low, 0.7), max(high, 1.4)))
    axes.set(xlabel="width / height of a crop", ylabel="share of the crops (%)")
    return figure


def _histogram(axes: Axes, values: Mapping[str, np.ndarray], span: tuple[float, float]) -> None:
    """Plots the distribution of values in a range as shares, a colour for each name; the last ones only as outlines."""
    edges = np.linspace(*span, BINS + 1)
    for number, (name, each) in enumerate(values.items()):
        shares = 100 * np.histogram(each, edges)[0] / len(each)
        look: dict[str, Any] = {"fill": True, "alpha": 0.6} if number == 0 else {"linewidth": 1.4}
        axes.stairs(shares, edges, color=COLORS[number], label=name, **look)
    axes.set_xlim(*span)
    axes.set_ylim(bottom=0)
    if len(values) > 1:
        axes.legend(fontsize=8, loc="best")
