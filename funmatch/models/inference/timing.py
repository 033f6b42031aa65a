"""Times the modes of a frozen network on this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from funmatch.errors import InputError
from funmatch.models.classifier import to_memory_format
from funmatch.models.inference.modes import LAYOUTS, AllowedModes, InferenceMode

TIMING_REPEATS = 3
CLEARLY_FASTER = 1.1
"""Speed-up that is needed to prefer what is less usual: timings vary by a few per cent."""
HOPELESS = 1.5
"""Multiple of the fastest mode's time from which a first pass decides that a mode is slower."""
SETUP_SECONDS = 0.25
"""What a first pass may take besides: it chooses kernels and allocates, for tenths of a second in any network."""


def time_layouts(
    build: Callable[[InferenceMode], Any], modes: list[InferenceMode], views: Tensor, fastest: float,
    allowed: AllowedModes,
) -> dict[InferenceMode, float]:  # fmt: skip
    """Times modes that differ in their layout only.

    Args:
        build: returns a frozen teacher in a mode.
        modes: the usual one first; others have to be clearly faster.
        views: to time with, (n, 3, side, side).
        fastest: seconds of the fastest mode so far; modes that are far from it are not timed further.
        allowed: whether to time packed weights too, which need not be clearly faster, as they round no more.

    Returns:
        the better mode and its seconds for the views, infinite if it could not be computed.
    """
    seconds: dict[InferenceMode, float] = {}
    try:
        frozen = build(modes[0])
        for mode in modes:
            frozen.mode = mode
            to_memory_format(frozen.classifier.net, LAYOUTS[mode.layout])
            seconds[mode] = _median_seconds(frozen, views, min([*seconds.values(), fastest]))
        if allowed.packed:
            to_memory_format(frozen.classifier.net, LAYOUTS[modes[0].layout])
            frozen.mode = modes[0]
            frozen.pack(sums=allowed.sums)
            # This pass lays the weights out, which takes as long as there are weights.
            frozen(views)
            seconds[frozen.mode] = _median_seconds(frozen, views, min([*seconds.values(), fastest]))
    except InputError:
        raise
    except Exception:  # not every network runs in every mode; `try_mode` reports why
        return {modes[0]: float("inf")}
    best = min(seconds, key=lambda mode: seconds[mode] * (CLEARLY_FASTER if mode in modes[1:] else 1))
    return {best: seconds[best]}


def _median_seconds(frozen: Any, views: Tensor, fastest: float) -> float:
    first = _seconds(frozen, views)
    if first > HOPELESS * fastest + SETUP_SECONDS:
        return first
    return statistics.median(_seconds(frozen, views) for _ in range(TIMING_REPEATS))


def _seconds(frozen: Any, views: Tensor) -> float:
    began = time.perf_counter()
    frozen(views).sum().item()  # `item` waits for the device
    return time.perf_counter() - began
