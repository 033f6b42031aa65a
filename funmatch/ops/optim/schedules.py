"""Computes the learning rate's factor at a step: 1 at its peak, after a linear warm-up, down to 0 at the end."""

import math
from collections.abc import Sequence


def warmup(step: int, warmup_steps: int) -> float:
    """Returns the factor of a linear warm-up: 0 at step 0, 1 from `warmup_steps` on."""
    # Without a warm-up step 0 is at the peak already; 0 / 0 would end the run at its start.
    return min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def progress(step: int, steps: int, since: int) -> float:
    """Returns the part of the steps from `since` to `steps` that is done, in [0, 1]."""
    # At least 1 below: a run may end with its warm-up.
    return min(max((step - since) / max(steps - since, 1), 0.0), 1.0)


def cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Returns the factor of a linear warm-up, then half a cosine down to 0 at `steps`.

    Args:
        step: counted from 0.
        steps: length of the run.
        warmup_steps: length of the warm-up.
    """
    return warmup(step, warmup_steps) * (1 + math.cos(math.pi * progress(step, steps, warmup_steps))) / 2


def power(step: int, steps: int, warmup_steps: int, exponent: int) -> float:
    """Returns the factor of a linear warm-up, then (1 − t)^exponent with t from 0 to 1.

    An exponent of 1 gives a line, 2 the paper's quadratic decay for Shampoo (appendix D).
    """
    return warmup(step, warmup_steps) * (1 - progress(step, steps, warmup_steps)) ** exponent


def wsd(step: int, steps: int, warmup_steps: int, cooldown_steps: int | None, shape: str = "sqrt") -> float:
    """Returns the factor of warm-up, stable, decay: linear warm-up, then 1, then a cool-down to 0 at `steps`.

    Zhai et al., "Scaling vision transformers" (2022), cool down linearly; Hägele et al., "Scaling laws and
    compute-optimal training beyond fixed training durations" (2024), find 1 − √t better, over a fifth of the run.

    Args:
        step: counted from 0.
        steps: length of the run.
        warmup_steps: length of the warm-up.
        cooldown_steps: length of the cool-down at the end; None for a fifth of the run.
        shape: sqrt or linear.
    """
    length = cooldown_length(steps, cooldown_steps)
    # Without a cool-down `progress` would be 1 at the last step, and 0 the factor there.
    done = progress(step, steps, steps - length) if length else 0.0
    return warmup(step, warmup_steps) * (1 - (math.sqrt(done) if shape == "sqrt" else done))


def cooldown_length(steps: int, cooldown_steps: int | None) -> int:
    """Returns the length of a run's cool-down in steps: as given, at most the run's; a fifth of it if None."""
    # Used for extending a run too, which starts from the checkpoint at which this begins.
    return steps // 5 if cooldown_steps is None else min(cooldown_steps, steps)


def staircase(step: int, warmup_steps: int, decay_steps: Sequence[int], factors: Sequence[float] = ()) -> float:
    """Returns the factor of a linear warm-up, then a constant that falls at given steps.

    Args:
        step: counted from 0.
        warmup_steps: length of the warm-up.
        decay_steps: the steps at which it falls, rising.
        factors: the factor from each of these steps on; 0.1, 0.01, … if empty.
    """
    # `>=`: the factor falls in the update that follows the step, as in the published rule.
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
    """Returns the factor at a step of the schedule of a name.

    Args:
        name: cosine, linear, quadratic, wsd, staircase or constant.
        step: counted from 0.
        steps: length of the run.
        warmup_steps: length of the warm-up.
        decay_steps, factors: of `staircase`.
        cooldown_steps, cooldown_shape: of `wsd`.
    """
    # The factor of step t is used for the update from t to t + 1, so that of step 0 is 0 with a warm-up.
    if name == "cosine":
        return cosine(step, steps, warmup_steps)
    if name in ("linear", "quadratic"):
        return power(step, steps, warmup_steps, 1 if name == "linear" else 2)
    if name == "wsd":
        return wsd(step, steps, warmup_steps, cooldown_steps, cooldown_shape)
    # A constant is a staircase without steps down: options of a staircase that are set beside it do not count.
    return staircase(step, warmup_steps, decay_steps if name == "staircase" else (), factors)
