"""Explains an out-of-memory error: measures which micro-batch would fit, and names it in the message."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from funmatch.data.loader import Batch, Batches
from funmatch.errors import InputError, is_out_of_memory
from funmatch.runtime import devices, env
from funmatch.training.loop import LoopOptions, Losses, compute_gradients

SAVERS = "--micro-batch (pieces of a batch for the student), --teacher-batch (for the teacher), --grad-checkpointing"
"""Options that save memory."""


@contextmanager
def explain_out_of_memory(
    batches: Batches, loop: LoopOptions, student: nn.Module, optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Batch], Losses],
) -> Generator[None]:  # fmt: skip
    """Turns an out-of-memory error of the block into an `InputError` that names a micro-batch that fits.

    Args:
        batches: the training batches; the first is used for trials.
        loop: the options that the run is trained with.
        student: the network that is trained.
        optimizer: of its parameters.
        loss_of: maps a batch to its mean losses.

    Raises:
        InputError: the block ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return
    # Not within `except`: there the traceback still holds the activations for which there was no room.
    optimizer.zero_grad(set_to_none=True)
    # Halving from what failed finds a size that fits in a few trials, at most a factor of two below the largest.
    now = loop.micro_batch or batches.size
    # With several processes a trial would wait for ever for the others' part of the all-reduce.
    if env.world_size() > 1:
        raise InputError(f"out of memory on {loop.device}; use {SAVERS}") from None
    fitting = next(
        (size for size in halves(now) if find_fitting_size(batches, loop, student, optimizer, loss_of, size)), None
    )
    if fitting is None:
        raise InputError(
            f"out of memory on {loop.device}, even with one image at a time; use a smaller network, a smaller --side "
            "or --grad-checkpointing"
        ) from None
    peak = devices.peak_memory(loop.device)
    used = f"; peak of a step: {peak / 1e9:.1f} GB" if peak else ""
    raise InputError(
        f"out of memory on {loop.device} with {now} images at once; --micro-batch {fitting} fits (tried{used}): "
        "the same crops, λ and batch, in pieces. --teacher-batch and --grad-checkpointing save memory too"
    ) from None


def halves(size: int) -> list[int]:
    """Returns a size halved again and again, rounded up: …, 2, 1."""
    sizes = []
    while size > 1:
        size = -(-size // 2)
        sizes.append(size)
    return sizes


def find_fitting_size(
    batches: Batches, loop: LoopOptions, student: nn.Module, optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Batch], Losses], size: int,
) -> bool:  # fmt: skip
    """Tries a step in pieces of `size` images, with gradients and optimizer state; returns whether it fits."""
    # The allocator's fragments of the failed step would make a size fail that fits in a fresh process.
    devices.empty_cache(loop.device)
    student.train()
    reserved: Sequence[Tensor] = ()
    try:
        trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
        # The first real step also allocates the optimizer's state: two moments a parameter, as in Adam.
        if not optimizer.state:
            reserved = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
        # A whole batch, since its pieces differ in size.
        scaler = devices.loss_scaler(loop.device, loop.precision)
        compute_gradients(replace(loop, micro_batch=size), batches.batch_at(0).to(loop.device), scaler, loss_of)
        # Kernels run asynchronously, so an allocation may fail only here.
        devices.synchronize(loop.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        del reserved  # before the next trial allocates its own
        optimizer.zero_grad(set_to_none=True)
    return True
