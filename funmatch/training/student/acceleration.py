"""Chooses the student's fastest arithmetic and crop kernel on this machine, and compiles it where that pays off."""

from collections.abc import Collection
from typing import Any

import torch

from funmatch.config import Train
from funmatch.data.cache.stores import CachedSplit
from funmatch.models.classifier import Classifier
from funmatch.models.inference.frozen import SMALL_NETWORK
from funmatch.models.inference.native.layers import ATTENTION, AVAILABLE, FROZEN_KINDS, SOFTMAX, kinds_of
from funmatch.models.inference.timing import CLEARLY_FASTER
from funmatch.ops import crops, resample
from funmatch.runtime import devices, distributed, env
from funmatch.runtime.log import info
from funmatch.training.loop import LoopOptions
from funmatch.training.run import folder as run_folder
from funmatch.training.student.compilation import compile_student
from funmatch.training.student.step_times import STEP_SHAPE, known_step_seconds, steps_measurement, use_kernels

MEASURED_FROM = 100
"""Length of a run, in steps, from which measuring the faster arithmetic pays off, which takes as long as six steps."""
COMPILED_FROM = 2000
"""Length of a run, in steps, from which a minute or two of compilation pay off."""
IMAGES, PIXELS = 16, 16 * 160**2
"""Images of a timed step, and pixels of all of them, at most."""
NATIVE = "native"
NAMES = {
    "group_norm": "GroupNorm", "std_conv": "standardised convolutions", "batch_norm": "BatchNorm",
    "depthwise": "depthwise convolutions", "linear": "linear layers", "layer_norm": "LayerNorm",
    ATTENTION: "attention", SOFTMAX: "softmax",
}  # fmt: skip
"""The kinds of native kernels, for messages."""


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
        # What of them is available and used is a fact of its own, `kernels`.
        return NATIVE
    return (
        "on"
        if steps >= COMPILED_FROM and student.count_parameters() >= SMALL_NETWORK and env.world_size() == 1
        else "off"
    )


def student_kernels(config: Train, steps: int, side: int, student: Classifier, device: torch.device) -> dict[str, Any]:
    """Returns the fact `kernels`: the kinds of native kernels that compute a student in training.

    A resumed run keeps its own, as it does its options.

    Args:
        config: the resolved options.
        steps, side, student, device: as of `resolve_auto`.
    """

    def choose() -> list[str]:
        before = run_folder.provenance_of(config.out)
        if config.compile != NATIVE or device.type != "cpu":
            return []
        if before and run_folder.options_of(config.out).get("compile") == NATIVE:
            return before.get("kernels", [*FROZEN_KINDS])  # runs from before the fact had no others
        kinds = available_kinds(config, student)
        if missing := [why for kind in gaining_kinds(config, student) if (why := AVAILABLE[kind]())]:
            info(f"native CPU kernels unavailable ({missing[0]}); falling back to slower PyTorch kernels")
        measured = (
            steps_measurement(student, side, _timed_images(config, side), kinds).read(STEP_SHAPE) if kinds else None
        )
        if not measured or steps < MEASURED_FROM:
            return [*kinds]
        return [*kinds] if measured[f"{config.precision} native"] <= measured[config.precision] else []

    return {"kernels": distributed.broadcast_from_main(choose)}


def gaining_kinds(config: Train, student: Classifier) -> tuple[str, ...]:
    """Returns the kinds of native kernels that compute part of a student, available or not."""
    # A small network spends its time elsewhere.
    if config.compile != NATIVE or student.count_parameters() < SMALL_NETWORK:
        return ()
    return tuple(kind for kind in kinds_of(student.net) if _goes_with(kind, config))


def available_kinds(config: Train, student: Classifier) -> tuple[str, ...]:
    """Returns those of `gaining_kinds` that are available here."""
    return tuple(kind for kind in gaining_kinds(config, student) if not AVAILABLE[kind]())


def _goes_with(kind: str, config: Train) -> bool:
    # What is recomputed in the backward pass would be computed outside the context of these kinds.
    return not (kind in (ATTENTION, SOFTMAX) and config.grad_checkpointing)


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
    kinds = available_kinds(config, student)
    # Measured by one process: a close race could end differently on each, and they must round alike.
    seconds = distributed.broadcast_from_main(
        lambda: known_step_seconds(student, side, _timed_images(config, side), kinds)
    )
    fastest = {name: min(seconds[name], seconds[f"{name} native"]) for name in ("fp32", "bf16")}
    speedup = fastest["fp32"] / fastest["bf16"]
    if speedup < CLEARLY_FASTER:
        return default
    info(
        f"training {config.student} in bf16 ({speedup:.1f}× faster than fp32 on this machine; override with "
        "--precision)"
    )
    return "bf16"


def _timed_images(config: Train, side: int) -> int:
    # A part of the batch is enough to compare, and takes seconds instead of a minute.
    return min(IMAGES, max(2, PIXELS // side**2), config.micro_batch or config.batch)


def accelerate_student(
    student: Classifier, loop: LoopOptions, config: Train, side: int, kinds: Collection[str] = ()
) -> None:
    """Sets a student up as configured: with native kernels, compiled, or as it is.

    Args:
        kinds: the fact `kernels` of the run.
    """
    if config.compile != NATIVE:
        compile_student(student, loop, config, side)
        return
    missing = [why for kind in kinds if (why := AVAILABLE[kind]() if kind in AVAILABLE else f"{kind} is unknown")]
    if missing:
        info(f"WARNING: native CPU kernels unavailable ({missing[0]}); PyTorch's are slower and round differently")
    supported = kinds_of(student.net)
    used = [kind for kind in kinds if kind in supported and not AVAILABLE[kind]() and _goes_with(kind, config)]
    if used:
        use_kernels(student, used)
        info(f"{config.student}: using native CPU kernels for {', '.join(NAMES[kind] for kind in used)}")
