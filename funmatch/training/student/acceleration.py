"""How a student is computed: in the arithmetic that is faster on this machine, and compiled where a run earns it."""

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
"""Steps of a run from which it is worth a few seconds to find the faster arithmetic."""
COMPILED_FROM = 2000
"""Steps of a run from which a minute or two of compiling are won back."""
IMAGES, TURNS = 32, 2
NATIVE = "native"
MODES = {"on": None, "max": "max-autotune"}
"""Of `torch.compile`; max tries many kernels, and replays graphs of an accelerator's launches."""


def resolve_auto(config: Train, steps: int, side: int, student: Classifier, device: torch.device) -> dict[str, str]:
    """`precision` and `compile` with no `auto` left; a run that has begun goes on as it began, to the same bits."""
    before = distributed.broadcast_from_main(lambda: run_folder.options_of(config.out))
    found: dict[str, str] = {}
    if config.compile == "auto":
        # A run that is older than this knob was not compiled, and says nothing of it.
        found["compile"] = before.get("compile", "auto") if before else _compiled(steps, student, device)
    if config.precision == "auto":
        config = config.model_copy(update=found)
        found["precision"] = before.get("precision") or pick_precision(config, steps, side, student, device)
    return found


def _compiled(steps: int, student: Classifier, device: torch.device) -> str:
    """`compile` where nobody said another. On a CPU our own kernels gain more than a compiler does."""
    if device.type == "cpu":
        used = student.count_parameters() >= SMALL_NETWORK and gains_from_native(student.net)
        return distributed.broadcast_from_main(
            lambda: "native" if (_had() if used else library.find_compiler()) else "off"
        )
    return (
        "on"
        if steps >= COMPILED_FROM and student.count_parameters() >= SMALL_NETWORK and env.world_size() == 1
        else "off"
    )


def _had() -> bool:
    """Whether our own kernels can be had; says so where they cannot."""
    if why := norms.why_unavailable():
        info(f"our own kernels cannot be had here, torch's are slower: {why}")
    return not why


def crop_kernel(config: Train, split: CachedSplit) -> dict[str, str]:
    """The fact of who cuts the crops of a run on the CPU: our own kernel, or torch. A run goes on as it began."""

    def found() -> str:
        before = run_folder.provenance_of(config.out)
        if not before:
            sizes = split.index["height"].astype("int64") * split.index["width"]
            return NATIVE if (sizes > crops.MAX_BATCHED_PIXELS).any() and not resample.why_unavailable() else "torch"
        if before.get("views") == NATIVE and (why := resample.why_unavailable()):
            info(f"WARNING: views were cut by our own kernel, which cannot be had now ({why}): the bits will be others")
        return before.get("views", "torch")  # a run that is older than the kernel

    return {"views": distributed.broadcast_from_main(found)}


def pick_precision(config: Train, steps: int, side: int, student: Classifier, device: torch.device) -> str:
    """The student's arithmetic where nobody said another.

    On a CPU with instructions for bf16 this is measured: networks of large kernels gain, those of depthwise ones lose.
    """
    usual = devices.resolve_precision("auto", device)
    fast = "bf16" in devices.teacher_precisions("auto", device)
    if device.type != "cpu" or not fast or student.count_parameters() < SMALL_NETWORK or steps < MEASURED_FROM:
        return usual
    images = min(IMAGES, config.micro_batch or config.batch)
    quick = uses_native_kernels(student, config, device) and not norms.why_unavailable()
    seconds = distributed.broadcast_from_main(lambda: known_step_seconds(student, side, images, quick=quick))
    gain = seconds["fp32"] / seconds["bf16"]
    if gain < CLEARLY_FASTER:
        return usual
    info(f"{config.student} is taught in bf16, {gain:.1f} times as fast here as fp32 (--precision says it otherwise)")
    return "bf16"


def known_step_seconds(student: Classifier, side: int, images: int, *, quick: bool = False) -> dict[str, float]:
    """Seconds a step in each arithmetic, measured once on a machine, so that two runs alike are computed alike."""
    key = repr((repr(student.net), side, images, quick, devices.machine_signature(torch.device("cpu"))))
    measured = Measurement("steps", key, "this student")
    if known := measured.read({"fp32": float, "bf16": float}):
        return {name: max(float(known[name]), 1e-9) for name in ("fp32", "bf16")}
    found = measure_step_seconds(student, side, images, quick=quick)
    measured.write(found)
    return found


def measure_step_seconds(student: Classifier, side: int, images: int, *, quick: bool) -> dict[str, float]:
    """Seconds for a student's way there and back on the CPU, in fp32 and in bf16; endless where it cannot be done."""
    device, seconds = torch.device("cpu"), {}
    with torch.random.fork_rng(devices=[]):
        views = torch.rand(images, 3, side, side).contiguous(memory_format=torch.channels_last)
        for name in ("fp32", "bf16"):
            own = copy.deepcopy(student).to(device).train()
            if quick:
                use_native_kernels(own.net, taught_only=True)
            try:
                times = [_seconds(own, views, device, name) for _ in range(1 + TURNS)]
                seconds[name] = min(times[1:])
            except Exception as error:  # a network may lack an operation in bf16
                if is_out_of_memory(error):
                    raise
                seconds[name] = 1e9
    return seconds


def _seconds(student: Classifier, views: Tensor, device: torch.device, name: str) -> float:
    began = time.perf_counter()
    with devices.autocast(device, name):
        loss = student(views).float().square().mean()
    loss.backward()
    return time.perf_counter() - began


def uses_native_kernels(student: Classifier, config: Train, device: torch.device) -> bool:
    """Whether our own kernels are to compute some of a student while it is taught."""
    wanted = config.compile == "native" and device.type == "cpu"
    return wanted and student.count_parameters() >= SMALL_NETWORK and gains_from_native(student.net)


def accelerate_student(student: Classifier, course: LoopOptions, config: Train, side: int) -> None:
    """Has a student computed as the run's configuration says: by our own kernels, compiled, or as it is."""
    if config.compile != "native":
        compile_student(student, course, config, side)
    elif uses_native_kernels(student, config, course.device) and (why := norms.why_unavailable()):
        info(f"WARNING: our own kernels cannot be had here, torch's are slower and round otherwise: {why}")
    elif uses_native_kernels(student, config, course.device):
        use_native_kernels(student.net, taught_only=True)
        info(f"GroupNorm and standardised convolutions of {config.student} are computed by our own kernels")


def compile_student(student: Classifier, course: LoopOptions, config: Train, side: int) -> None:
    """Compiles what a student does while it is taught, if the run's configuration says so.

    It is tried on views of each size that will come, there and back. Where that fails, the student is computed as it
    is: the same mathematics, only slower.
    """
    if not config.compiles:
        return
    share = config.batch // env.world_size()
    ends = even_chunks(share, config.micro_batch)
    sizes = sorted({stop - start for start, stop in pairwise(ends)})
    began, net = time.monotonic(), student.net
    info(f"compiling {config.student}, a minute or two; --compile off does without")
    student.compiled_net = torch.compile(lambda views: net(views), dynamic=False, mode=MODES[config.compile])
    try:
        for size in sizes:
            views = torch.rand(size, 3, side, side, device=course.device)
            try_step(student, course, views.contiguous(memory_format=torch.channels_last))
    except Exception as error:  # compilers fail in as many ways as machines can be set up
        if is_out_of_memory(error):
            raise
        student.compiled_net = None
        info(f"WARNING: {config.student} cannot be compiled here and is computed as it is: {first_line(error)}")
        return
    info(f"compiled {config.student} in {duration(time.monotonic() - began)}")


def try_step(student: Classifier, course: LoopOptions, views: Tensor) -> None:
    """A way there and back that leaves no trace: the averages of BatchNorm and all random numbers stay as they were."""
    kept = {name: buffer.clone() for name, buffer in student.named_buffers()}
    was, states = student.training, _random_states(course.device)
    try:
        with devices.autocast(course.device, course.precision):
            loss = student.train()(views).float().square().mean()
        loss.backward()
    finally:
        for name, buffer in student.named_buffers():
            buffer.copy_(kept[name])
        student.zero_grad(set_to_none=True)
        student.train(was)
        for restore, state in states:
            restore(state)


def _random_states(device: torch.device) -> list[tuple[Callable[[Any], object], Any]]:
    states: list[tuple[Callable[[Any], object], Any]] = [(torch.set_rng_state, torch.get_rng_state())]
    if device.type != "cpu":
        module = torch.get_device_module(device)
        states.append((module.set_rng_state, module.get_rng_state()))
    return states
