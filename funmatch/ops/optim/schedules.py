"""The learning rate's shape: step to a factor, 1 at the top."""

import math
from collections.abc import Sequence


def warmup(step: int, warmup_steps: int) -> float:
    """Linear warm-up: from 0 at step 0 to 1 at `warmup_steps`."""
    return min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def progress(step: int, steps: int, since: int) -> float:
    """The share of the way from step `since` to the end that is behind, in [0, 1]."""
    return min(max((step - since) / max(steps - since, 1), 0.0), 1.0)


def cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up from 0, then half a cosine down to 0 at `steps`.

    Args:
        step: counted from 0.
        steps: length of the run.
        warmup_steps: during which the factor also rises linearly.
    """
    return warmup(step, warmup_steps) * (1 + math.cos(math.pi * progress(step, steps, warmup_steps))) / 2


def power(step: int, steps: int, warmup_steps: int, exponent: int) -> float:
    """Linear warm-up from 0, then (1 − t)^exponent with t from 0 to 1: a line, or the paper's parabola for Shampoo."""
    return warmup(step, warmup_steps) * (1 - progress(step, steps, warmup_steps)) ** exponent


def wsd(step: int, steps: int, warmup_steps: int, cooldown_steps: int | None, shape: str = "sqrt") -> float:
    """Warm-up, stable, decay: linear warm-up from 0, then 1, then a cool-down to 0 at `steps`.

    Zhai et al., "Scaling vision transformers" (2022), cool down on a line; Hägele et al., "Scaling laws and
    compute-optimal training beyond fixed training durations" (2024), find 1 − √t better, over a fifth of the run.

    Args:
        cooldown_steps: at the end of the run; None for a fifth of it.
        shape: sqrt or linear.
    """
    length = cooldown_length(steps, cooldown_steps)
    behind = progress(step, steps, steps - length) if length else 0.0
    return warmup(step, warmup_steps) * (1 - (math.sqrt(behind) if shape == "sqrt" else behind))


def cooldown_length(steps: int, cooldown_steps: int | None) -> int:
    """How many of a run's steps its cool-down takes: as said, at most all; by default a fifth."""
    return steps // 5 if cooldown_steps is None else min(cooldown_steps, steps)


def staircase(step: int, warmup_steps: int, decay_steps: Sequence[int], factors: Sequence[float] = ()) -> float:
    """Linear warm-up from 0, then a factor that falls at given steps.

    Args:
        decay_steps: at which it falls, rising.
        factors: after each of these steps; by default 0.1, 0.01, …
    """
    levels = (1.0, *(factors or [0.1 ** (i + 1) for i in range(len(decay_steps))]))
    return warmup(step, warmup_steps) * levels[sum(step >= each for each in decay_steps)]


def factor(
    name: str,
    step: int,
    steps: int,
    warmup_steps: int,
    decay_steps: Sequence[int] = (),
    factors: Sequence[float] = (),
    cooldown_steps: int | None = None,
    cooldown_shape: str = "sqrt",
) -> float:
    """The factor at a step of the schedule with this name: cosine, linear, quadratic, wsd, staircase or constant."""
    if name == "cosine":
        return cosine(step, steps, warmup_steps)
    if name in ("linear", "quadratic"):
        return power(step, steps, warmup_steps, 1 if name == "linear" else 2)
    if name == "wsd":
        return wsd(step, steps, warmup_steps, cooldown_steps, cooldown_shape)
    return staircase(step, warmup_steps, decay_steps if name == "staircase" else (), factors)
