"""The learning rate's shape: step to a factor, 1 at the top."""

import math
from collections.abc import Sequence


def risen(step: int, warmup_steps: int) -> float:
    """Linear warm-up: from 0 at step 0 to 1 at `warmup_steps`."""
    return min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up from 0, then half a cosine down to 0 at `steps`.

    Args:
        step: counted from 0.
        steps: length of the run.
        warmup_steps: during which the factor also rises linearly.
    """
    progress = min(max((step - warmup_steps) / max(steps - warmup_steps, 1), 0.0), 1.0)
    return risen(step, warmup_steps) * (1 + math.cos(math.pi * progress)) / 2


def staircase(step: int, warmup_steps: int, decay_steps: Sequence[int], factors: Sequence[float] = ()) -> float:
    """Linear warm-up from 0, then a factor that falls at given steps.

    Args:
        decay_steps: at which it falls, rising.
        factors: after each of these steps; by default 0.1, 0.01, …
    """
    levels = (1.0, *(factors or [0.1 ** (i + 1) for i in range(len(decay_steps))]))
    return risen(step, warmup_steps) * levels[sum(step >= each for each in decay_steps)]


def factor(
    name: str, step: int, steps: int, warmup_steps: int, decay_steps: Sequence[int] = (), factors: Sequence[float] = ()
) -> float:
    """The factor at a step of the schedule with this name: cosine, staircase or constant."""
    if name == "cosine":
        return cosine(step, steps, warmup_steps)
    return staircase(step, warmup_steps, decay_steps if name == "staircase" else (), factors)
