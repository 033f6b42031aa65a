"""Chooses the student's fastest arithmetic and crop kernel on this machine, and compiles it where that pays off."""

import copy
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funmatch.config import Train
from funmatch.data.cache.stores import CachedSplit
from funmatch.errors import first_line, is_out_of_memory
from funmatch.models.classifier import Classifier
from funmatch.models.inference.frozen import CLEARLY_FASTER, SMALL_NETWORK
from funmatch.models.inference.native_layers import gains_from_native, use_native_kernels
from funmatch.ops import crops, resample
from funmatch.ops.native import library, norms
from funmatch.runtime import devices, distributed, env
from funmatch.runtime.chunks import even_chunks
from funmatch.runtime.log import info
from funmatch.runtime.measured import Measurement
from funmatch.runtime.text import duration
from funmatch.training.loop import LoopOptions
from funmatch.training.run import folder as run_folder

MEASURED_FROM = 200
"""Length of a run, in steps, from which a few seconds to measure the faster arithmetic pay off."""
COMPILED_FROM = 2000
"""Length of a run, in steps, from which a minute or two of compilation pay off."""
IMAGES, REPEATS = 32, 2
"""Images of a timed step at most, and timed steps after a first one that does not count."""
NATIVE = "native"
COMPILE_MODES = {"on": None, "max": "max-autotune"}
"""Modes of `torch.compile`; max tries many kernels, and replays CUDA graphs."""


def resolve_auto(config: Train, steps: int, side: int, student: Classifier, device: torch.device) -> dict[str, str]:
    """Resolves `auto` of `precision` and `compile`; a resumed run keeps its values, so that it stays bitwise the same.

    Args:
        steps: length of the run.
        side: image size, pixels.

    Returns:
        the options that were `auto`, with their values.
    """
    # Rounding looks into each layer, which a compiled network and our kernels would pass by.
    if config.quantize:
        plain = {"compile": "off", "precision": "fp32"}
        return {name: value for name, value in plain.items() if getattr(config, name) == "auto"}
    before = distributed.broadcast_from_main(lambda: run_folder.options_of(config.out))
    resolved: dict[str, str] = {}
    if config.compile == "auto":
        # A run from before this option was not compiled, and did not record it: `auto` then compiles nothing.
        resolved["compile"] = before.get("compile", "auto") if before else _pick_compile(steps, student, device)
    if config.precision == "auto":
        # After `compile`, since native kernels change which arithmetic is faster.
        config = config.model_copy(update=resolved)
        resolved["precision"] = before.get("precision") or pick_precision(config, steps, side, student, device)
    return resolved


def _pick_compile(steps: int, student: Classifier, device: torch.device) -> str:
    """Returns the default of `compile`. On a CPU the native kernels are faster than what a compiler makes."""
    if device.type == "cpu":
        used = student.count_parameters() >= SMALL_NETWORK and gains_from_native(student.net)
        # One process decides: each might find another compiler, and kernels and PyTorch round differently.
        return distributed.broadcast_from_main(
            lambda: "native" if (_native_available() if used else library.find_compiler()) else "off"
        )
    return (
        "on"
        if steps >= COMPILED_FROM and student.count_parameters() >= SMALL_NETWORK and env.world_size() == 1
        else "off"
    )


def _native_available() -> bool:
    """Returns whether the native kernels are available; reports why where they are not."""
    if why := norms.why_unavailable():
        info(f"native CPU kernels unavailable ({why}); falling back to slower PyTorch kernels")
    return not why


def crop_kernel(config: Train, split: CachedSplit) -> dict[str, str]:
    """Returns the fact `views`: whether the native kernel or torch crops on the CPU. A resumed run keeps its own."""

    def choose() -> str:
        before = run_folder.provenance_of(config.out)
        if not before:
            # Small images are cropped by batched matrix products, which the kernel would not make faster.
            sizes = split.index["height"].astype("int64") * split.index["width"]
            return NATIVE if (sizes > crops.MAX_BATCHED_PIXELS).any() and not resample.why_unavailable() else "torch"
        if before.get("views") == NATIVE and (why := resample.why_unavailable()):
            info(
                "WARNING: this run was started with the native crop kernel, which is unavailable now "
                f"({why}); results will not be bitwise identical"
            )
        return before.get("views", "torch")  # runs from before the kernel did not record who cropped

    return {"views": distributed.broadcast_from_main(choose)}


def pick_precision(config: Train, steps: int, side: int, student: Classifier, device: torch.device) -> str:
    """Returns the default of `precision`.

    On a CPU with instructions for bf16 this is measured: large convolutions gain from bf16, depthwise ones lose.
    """
    default = devices.resolve_precision("auto", device)
    fast = "bf16" in devices.teacher_precisions("auto", device)
    # Short runs and small networks would spend more on measuring than they could gain.
    if device.type != "cpu" or not fast or student.count_parameters() < SMALL_NETWORK or steps < MEASURED_FROM:
        return default
    # A part of the batch is enough to compare, and takes seconds instead of a minute.
    images = min(IMAGES, config.micro_batch or config.batch)
    native = uses_native_kernels(student, config, device) and not norms.why_unavailable()
    # Measured by one process: a close race could end differently on each, and they must round alike.
    seconds = distributed.broadcast_from_main(lambda: known_step_seconds(student, side, images, native=native))
    speedup = seconds["fp32"] / seconds["bf16"]
    if speedup < CLEARLY_FASTER:
        return default
    info(
        f"training {config.student} in bf16 ({speedup:.1f}× faster than fp32 on this machine; override with "
        "--precision)"
    )
    return "bf16"


def known_step_seconds(student: Classifier, side: int, images: int, *, native: bool = False) -> dict[str, float]:
    """Returns seconds a step in fp32 and bf16, measured once on a machine, so that equal runs compute alike."""
    # The network's structure is the key, not its name: options change it.
    key = repr((repr(student.net), side, images, native, devices.machine_signature(torch.device("cpu"))))
    measured = Measurement("steps", key, "this student")
    # At least a nanosecond, since a damaged record must not divide by zero.
    if record := measured.read({"fp32": float, "bf16": float}):
        return {name: max(float(record[name]), 1e-9) for name in ("fp32", "bf16")}
    seconds = measure_step_seconds(student, side, images, native=native)
    measured.write(seconds)
    return seconds


def measure_step_seconds(student: Classifier, side: int, images: int, *, native: bool) -> dict[str, float]:
    """Measures seconds of a forward and backward pass on the CPU in fp32 and bf16; 1e9 where that fails.

    Args:
        side: image size, pixels.
        images: per step.
        native: whether the native kernels are used.
    """
    device, seconds = torch.device("cpu"), {}
    # Measuring must not move the generator that training draws from.
    with torch.random.fork_rng(devices=[]):
        views = torch.rand(images, 3, side, side).contiguous(memory_format=torch.channels_last)
        for name in ("fp32", "bf16"):
            # A copy, since BatchNorm's statistics and the gradients change.
            trial = copy.deepcopy(student).to(device).train()
            if native:
                use_native_kernels(trial.net, training_only=True)
            try:
                # The first one allocates and chooses kernels.
                times = [_step_seconds(trial, views, device, name) for _ in range(1 + REPEATS)]
                seconds[name] = min(times[1:])
            except Exception as error:  # a network may lack an operation in bf16
                if is_out_of_memory(error):
                    raise
                seconds[name] = 1e9
    return seconds


def _step_seconds(student: Classifier, views: Tensor, device: torch.device, name: str) -> float:
    began = time.perf_counter()
    with devices.autocast(device, name):
        loss = student(views).float().square().mean()
    loss.backward()
    return time.perf_counter() - began


def uses_native_kernels(student: Classifier, config: Train, device: torch.device) -> bool:
    """Returns whether native kernels are to compute part of a student during training; they may be unavailable."""
    requested = config.compile == "native" and device.type == "cpu"
    return requested and student.count_parameters() >= SMALL_NETWORK and gains_from_native(student.net)


def accelerate_student(student: Classifier, loop: LoopOptions, config: Train, side: int) -> None:
    """Sets a student up as configured: with native kernels, compiled, or as it is."""
    if config.compile != "native":
        compile_student(student, loop, config, side)
    elif uses_native_kernels(student, config, loop.device) and (why := norms.why_unavailable()):
        info(f"WARNING: native CPU kernels unavailable ({why}); PyTorch's are slower and round differently")
    elif uses_native_kernels(student, config, loop.device):
        # In training mode only: evaluation computes as whoever loads the student will.
        use_native_kernels(student.net, training_only=True)
        info(f"{config.student}: using native CPU kernels for GroupNorm and standardised convolutions")


def compile_student(student: Classifier, loop: LoopOptions, config: Train, side: int) -> None:
    """Compiles a student's forward and backward pass for training, where configured.

    It is tried on each batch size of the run. Where that fails, the student stays uncompiled, which is the same
    mathematics, only slower.
    """
    if not config.compiles:
        return
    # Pieces of a batch differ in size by one at most, and each size is compiled on its own.
    bounds = even_chunks(config.batch // env.world_size(), config.micro_batch)
    sizes = sorted({stop - start for start, stop in pairwise(bounds)})
    began, net = time.monotonic(), student.net
    info(f"compiling {config.student}, a minute or two (disable with --compile off)")
    # A closure over the network: state_dict keeps its names, without the prefix of a compiled module.
    forward = student.answer_net if student.readout else lambda views: net(views)
    student.compiled_net = torch.compile(forward, dynamic=False, mode=COMPILE_MODES[config.compile])
    try:
        # Every size is tried now, so that a failure comes before the first step.
        for size in sizes:
            views = torch.rand(size, 3, side, side, device=loop.device)
            try_step(student, loop, views.contiguous(memory_format=torch.channels_last))
    except Exception as error:  # compilers fail in as many ways as machines can be set up
        if is_out_of_memory(error):
            raise
        student.compiled_net = None
        info(f"WARNING: compiling {config.student} failed ({first_line(error)}); training it uncompiled")
        return
    info(f"compiled {config.student} in {duration(time.monotonic() - began)}")


def try_step(student: Classifier, loop: LoopOptions, views: Tensor) -> None:
    """Runs a forward and backward pass that leaves no trace: buffers, gradients and random states are restored.

    A run that compiles would otherwise not be bitwise the same as its resumed self, which compiles at another step.

    Args:
        views: (n, 3, side, side).
    """
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    was_training, states = student.training, _random_states(loop.device)
    try:
        with devices.autocast(loop.device, loop.precision):
            loss = student.train().answers(views).float().square().mean()
        loss.backward()
    finally:
        for name, buffer in student.named_buffers():
            buffer.copy_(buffers[name])
        student.zero_grad(set_to_none=True)
        student.train(was_training)
        for restore, state in states:
            restore(state)


def _random_states(device: torch.device) -> list[tuple[Callable[[Any], object], Any]]:
    """Returns pairs of a function that restores a random generator, and the generator's state now."""
    states: list[tuple[Callable[[Any], object], Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    if device.type != "cpu":
        module = torch.get_device_module(device)
        # The accelerator has a generator of its own, which dropout uses.
        states.append((module.set_rng_state, module.get_rng_state()))
    return states
