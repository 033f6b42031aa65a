"""The learning rate's shape: step to a factor in [0, 1]."""

import math


def cosine(step: int, steps: int, warmup_steps: int) -> float:
    """Linear warm-up from 0, then half a cosine down to 0 at `steps`.

    Args:
        step: counted from 0.
        steps: length of the run.
        warmup_steps: during which the factor also rises linearly.
    """
    progress = min(max((step - warmup_steps) / max(steps - warmup_steps, 1), 0.0), 1.0)
    rise = min(step / warmup_steps, 1.0) if warmup_steps else 1.0
    return rise * (1 + math.cos(math.pi * progress)) / 2
