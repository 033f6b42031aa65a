"""Measures a student's training step in each arithmetic, with native kernels and without."""

import copy
import math
import time
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor

from funmatch.errors import is_out_of_memory
from funmatch.models.classifier import Classifier
from funmatch.models.inference.native.layers import ATTENTION, SOFTMAX, use_native_kernels
from funmatch.models.inference.timing import SETUP_SECONDS
from funmatch.ops.native.attention import ProductAttention
from funmatch.runtime import devices
from funmatch.runtime.disk.json_files import Shape
from funmatch.runtime.measured import Measurement

REPEATS = 2
"""Timed steps after a first one that does not count."""
HOPELESS = 2.0
"""Multiple of the fastest step's time from which a first step decides that an arithmetic is slower."""
STEP_SHAPE: Shape = {"bf16 native": float, "bf16": float, "fp32 native": float, "fp32": float}
"""What is measured of a student, by name: seconds a step. What is usually the fastest comes first."""


def use_kernels(student: Classifier, kinds: Collection[str]) -> None:
    """Lets native kernels of some kinds compute a student."""
    # In training mode only: evaluation computes as whoever loads the student will.
    use_native_kernels(student.net, training_only=True, kinds=kinds)
    if ATTENTION in kinds:
        student.attention = partial(ProductAttention, native_softmax=SOFTMAX in kinds)


def steps_measurement(student: Classifier, side: int, images: int, kinds: Collection[str]) -> Measurement:
    """Returns the place where a student's seconds a step are remembered, under everything that decides them."""
    # The network's structure is the key, not its name: options change it.
    machine = devices.machine_signature(torch.device("cpu"))
    return Measurement("steps", repr((repr(student.net), side, images, *kinds, machine)), "this student")


def known_step_seconds(student: Classifier, side: int, images: int, kinds: Collection[str] = ()) -> dict[str, float]:
    """Returns seconds a step by name, measured once on a machine, so that equal runs compute alike.

    Args:
        side, images, kinds: as of `measure_step_seconds`.
    """
    measured = steps_measurement(student, side, images, kinds)
    # At least a nanosecond, since a damaged record must not divide by zero.
    if record := measured.read(STEP_SHAPE):
        return {name: max(float(record[name]), 1e-9) for name in STEP_SHAPE}
    seconds = measure_step_seconds(student, side, images, kinds)
    measured.write(seconds)
    return seconds


def measure_step_seconds(student: Classifier, side: int, images: int, kinds: Collection[str]) -> dict[str, float]:
    """Measures seconds of a forward and backward pass on the CPU, in fp32 and bf16, with native kernels and without.

    Args:
        side: image size, pixels.
        images: per step.
        kinds: of native kernels.

    Returns:
        seconds by the names of `STEP_SHAPE`; 1e9 where a pass fails. Without kernels those with and without are equal.
    """
    seconds: dict[str, float] = {}
    # Measuring must not move the generator that training draws from.
    with torch.random.fork_rng(devices=[]):
        views = torch.rand(images, 3, side, side).contiguous(memory_format=torch.channels_last)
        for name in STEP_SHAPE:
            precision, _, native = name.partition(" ")
            if native and not kinds:
                continue
            # A copy, since BatchNorm's statistics and the gradients change.
            trial = copy.deepcopy(student).to("cpu").train()
            if native:
                use_kernels(trial, kinds)
            fastest = min(seconds.values(), default=math.inf)
            try:
                seconds[name] = _fastest_step(lambda: _step_seconds(trial, views, precision), fastest)  # noqa: B023
            except Exception as error:  # a network may lack an operation in bf16
                if is_out_of_memory(error):
                    raise
                seconds[name] = 1e9
    return {name: seconds.get(name, seconds[name.partition(" ")[0]]) for name in STEP_SHAPE}


def _fastest_step(step: Callable[[], float], fastest: float) -> float:
    """Returns the least seconds of a few steps, or those of the first one if it is far from the fastest so far."""
    first = step()
    return first if first > HOPELESS * fastest + SETUP_SECONDS else min(step() for _ in range(REPEATS))


def _step_seconds(student: Classifier, views: Tensor, precision: str) -> float:
    began = time.perf_counter()
    with devices.autocast(views.device, precision):
        loss = student(views).float().square().mean()
    loss.backward()
    return time.perf_counter() - began
