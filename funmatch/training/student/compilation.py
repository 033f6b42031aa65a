"""Compiles a student for training, where configured."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from funmatch.config import Train
from funmatch.errors import first_line, is_out_of_memory
from funmatch.models.classifier import Classifier
from funmatch.runtime import devices, env
from funmatch.runtime.chunks import even_chunks
from funmatch.runtime.log import info
from funmatch.runtime.text import duration
from funmatch.training.loop import LoopOptions

COMPILED_AT_MOST = 1000
"""Networks and sizes of batches that one process compiles."""
COMPILE_MODES = {"on": None, "max": "max-autotune"}
"""Modes of `torch.compile`; max tries many kernels, and replays CUDA graphs."""
WITHOUT_GRAPHS = {**COMPILE_MODES, "max": "max-autotune-no-cudagraphs"}
"""The same where gradients are summed over pieces of a batch: a replayed graph overwrites those of the piece before."""


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
    # All students and sizes share the code of `forward`, and torch compiles a piece of code eight times by default.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_AT_MOST)
    # A closure over the network: state_dict keeps its names, without the prefix of a compiled module.
    forward = student.answer_net if student.readout else lambda views: net(views)
    modes = COMPILE_MODES if len(bounds) == 2 else WITHOUT_GRAPHS
    student.compiled_net = torch.compile(forward, dynamic=False, mode=modes[config.compile])
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
