"""Processes that share one run: joins them through torch.distributed, and lets them reduce, broadcast and wait."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from funmatch.errors import InputError
from funmatch.runtime import env
from funmatch.runtime.devices import pick_device
from funmatch.runtime.env import mark_reported

Made = TypeVar("Made")

TIMEOUT = timedelta(days=30)
"""For which processes wait for each other: while one of them reads ImageNet. One that ends is noticed at once."""


GROUPS_JOINED = count()


@contextmanager
def process_group(name: str) -> Generator[None]:
    """Works with the other processes that torchrun started, if there are any, while the block runs.

    Where the block fails on one process it fails on all: whoever waits for a process that has ended gets an
    `InputError`. The first to fail says why, the others are silent.

    Args:
        name: of the device, as a person gave it.
    """
    if env.world_size() == 1:
        yield
        return
    if dist.is_initialized():
        raise InputError("torch.distributed is in use already; funmatch joins the processes by itself")
    store = _rendezvous_store()
    try:
        _init_process_group(store, pick_device(name))
        yield
        barrier()
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
        told = InputError("another process of this run has ended") if lost else error
        mark_reported(told, elsewhere=not _first_to_report(store))
        if lost:
            raise told from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _rendezvous_store() -> dist.Store:
    """Where the processes find each other; under a name of its own each time, since those of before may still be up."""
    store, _, _ = next(rendezvous("env://"))
    return dist.PrefixStore(f"funmatch-{next(GROUPS_JOINED)}", store)


def _init_process_group(store: dist.Store, device: torch.device) -> None:
    backends = "cpu:gloo"  # for what the processes say to each other, on any machine
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
        backends += f",{device.type}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backends, store=store, rank=env.rank(), world_size=env.world_size(), timeout=TIMEOUT)


def _first_to_report(store: dist.Store) -> bool:
    try:
        return store.add("told", 1) == 1
    except RuntimeError:
        return False  # whoever kept the store is gone, and has told


def all_reduce_max(number: int) -> int:
    """The greatest of the numbers of all processes."""
    if env.world_size() == 1:
        return number
    told = torch.tensor(number)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def barrier() -> None:
    """Waits until all processes are here."""
    all_reduce_max(0)


def broadcast_from_main(work: Callable[[], Made]) -> Made:
    """What `work` gives on the first process, which alone does it; plain values."""
    made: list[Any] = [work() if env.is_main_process() else None]
    if env.world_size() > 1:
        dist.broadcast_object_list(made, 0, device=torch.device("cpu"))
    return made[0]


def main_process_first(work: Callable[[], Made]) -> Made:
    """What `work` gives on each process: the first does it alone, the others find what it left on the disk."""
    if not env.is_main_process():
        barrier()
        return work()
    made = work()
    barrier()
    return made


def all_reduce_mean_(tensors: Sequence[Tensor]) -> None:
    """Makes each tensor its mean over all processes, to the same bits in each."""
    if env.world_size() > 1:
        _flattened_(tensors, lambda flat: [dist.all_reduce(flat), flat.div_(env.world_size())])


def sharded_map(work: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """What `work` makes of stacks, one of each at a time, where every process does an equal part of it."""
    if env.world_size() == 1:
        return work(*stacks)
    count = len(stacks[0])
    most = -(-count // env.world_size())
    part = work(*(stack[env.rank() * most : (env.rank() + 1) * most] for stack in stacks))
    mine = part.new_zeros(most, *part.shape[1:])
    mine[: len(part)] = part
    made = mine.new_empty(env.world_size() * most, *part.shape[1:])
    dist.all_gather([*made.chunk(env.world_size())], mine)
    return made[:count]


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Makes each tensor what it is on the first process."""
    if env.world_size() > 1:
        _flattened_(tensors, lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def _flattened_(tensors: Sequence[Tensor], change_: Callable[[Tensor], object]) -> None:
    """Changes tensors, all of one kind of number at once."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        change_(flat)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, through which gradients flow to all of them."""
    return _Sum.apply(tensor)


class _Sum(torch.autograd.Function):
    """Its gradient is the sum of the gradients, since each process's input reaches every process's loss."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return _Sum.forward(None, gradients[0])
