"""When memory does not suffice: how much of a batch would fit, measured."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from funmatch.data.batch import Batch
from funmatch.data.loader import Batches
from funmatch.errors import InputError, is_out_of_memory
from funmatch.runtime import devices, env
from funmatch.training.loop import LoopOptions, Losses

GENERAL = "--micro-batch (pieces of a batch for the student), --teacher-batch (for the teacher), --grad-checkpointing"


@contextmanager
def explain_out_of_memory(
    batches: Batches, course: LoopOptions, student: nn.Module, optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Batch], Losses],
) -> Generator[None]:  # fmt: skip
    """Turns what a lack of memory raises in the block into an `InputError` that names what would fit.

    Args:
        batches: the training batches.
        loss_of: one of them to its mean losses.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return
    # Only here, since the error holds on to the activations for which there was no room.
    optimizer.zero_grad(set_to_none=True)
    now = course.micro_batch or batches.size
    if env.world_size() > 1:  # the others are not there to compute with
        raise InputError(f"out of memory on {course.device}; what helps: {GENERAL}") from None
    fitting = next(
        (size for size in halves(now) if find_fitting_size(batches, course, student, optimizer, loss_of, size)), None
    )
    if fitting is None:
        raise InputError(
            f"out of memory on {course.device}, even with one image at a time; a smaller network or --side needs "
            "less, and so does --grad-checkpointing"
        ) from None
    taken = devices.peak_memory(course.device)
    used = f", where a step took {taken / 1e9:.1f} GB at most" if taken else ""
    raise InputError(
        f"out of memory on {course.device} with {now} images at once; --micro-batch {fitting} fits (tried{used}): "
        "the same crops, λ and batch, in pieces. What also helps: --teacher-batch, --grad-checkpointing"
    ) from None


def halves(size: int) -> list[int]:
    """What is left of a batch that is halved, and halved again: …, 2, 1."""
    found = []
    while size > 1:
        size = -(-size // 2)
        found.append(size)
    return found


def find_fitting_size(
    batches: Batches, course: LoopOptions, student: nn.Module, optimizer: torch.optim.Optimizer,
    loss_of: Callable[[Batch], Losses], size: int,
) -> bool:  # fmt: skip
    """Whether a step in pieces of so many images has room, its gradients and the optimizer's state among them."""
    devices.empty_cache(course.device)
    student.train()
    kept: Sequence[Tensor] = ()
    try:
        taught = [parameter for parameter in student.parameters() if parameter.requires_grad]
        if not optimizer.state:
            kept = [torch.empty_like(parameter) for parameter in taught for _ in range(2)]
        for piece, share in batches.batch_at(0).to(course.device).pieces(size):
            with devices.autocast(course.device, course.precision):
                loss = loss_of(piece)["loss"] * share
            loss.backward()
        devices.synchronize(course.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        del kept
        optimizer.zero_grad(set_to_none=True)
    return True
