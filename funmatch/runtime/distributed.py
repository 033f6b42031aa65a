"""Joins the processes of one run through torch.distributed, and lets them reduce, broadcast and wait."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
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
from funmatch.runtime.heartbeat import beating
from funmatch.runtime.text import parse_seconds

T = TypeVar("T")

TIMEOUT = timedelta(days=30)
"""How long processes wait for each other. One may take hours to index ImageNet; one that ends or hangs is noticed."""
HANG_TIMEOUT = "10m"
LARGE = 2**18
"""Numbers of a tensor from which copying it into a message costs more than a message of its own."""
# Number of the process groups that this process has joined, one after another.
_groups_joined = count()


@contextmanager
def process_group(device_name: str, hang_timeout: str = HANG_TIMEOUT) -> Generator[None]:
    """Joins the processes that torchrun started while the block runs; does nothing in a single process.

    If the block fails in one process, it fails in all: a process that waits for one that has ended gets an
    `InputError`. The first to fail reports its error, the others are marked as reported elsewhere.

    Args:
        device_name: the device as the user gave it.
        hang_timeout: time after which a process that does not answer ends the run, such as 10m.

    Raises:
        InputError: torch.distributed is initialised already, or another process has ended.
    """
    if env.world_size() == 1:
        yield
        return
    # A group of the user's own may have another backend or timeout, and would be destroyed at the end.
    if dist.is_initialized():
        raise InputError("torch.distributed is initialized already; funmatch joins the processes by itself")
    store = _rendezvous_store()
    with beating(store, parse_seconds(hang_timeout)) as heart:
        try:
            # So that each knows the others from the beginning: the store may end with the first of them.
            heart.beat()
            _init_process_group(store, pick_device(device_name))
            heart.listen()
            yield
            # Without it a process that is finished could leave while another still needs it.
            barrier()
        except BaseException as error:
            # gloo reports a lost peer as a plain RuntimeError, NCCL as a DistError.
            lost_peer = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
            # Before the first process is found out, since a peer that failed by itself says so meanwhile.
            reported = InputError(heart.find_ended()) if lost_peer else error
            # A process that was killed together with the store has reported nothing; one that failed by itself has.
            mark_reported(reported, elsewhere=not ((lost_peer and heart.lost) or _first_to_report(store)))
            if lost_peer:
                raise reported from error
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _rendezvous_store() -> dist.Store:
    """Returns the store in which the processes find each other.

    Raises:
        InputError: torchrun passed on port 0, at which nobody listens; torch would try to reach it for minutes.
    """
    if os.environ.get("MASTER_PORT") == "0":
        raise InputError("torchrun was started with --master-port 0; pass --standalone, or the number of a free port")
    store = _connect(f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}")
    # A prefix for each group: runs follow each other in one process, and keys of an earlier group are still there.
    return dist.PrefixStore(f"funmatch-{next(_groups_joined)}", store)


@cache
def _connect(_address: str) -> dist.Store:
    """Returns the store at torchrun's address, the same one for as long as this process lives.

    Rank 0 may hold it. If it ended with a run, a faster process could still find it for its next run, lose it, and be
    waited for by rank 0 at a new one.

    Args:
        _address: a key alone; torch reads the variables by itself.
    """
    store, _, _ = next(rendezvous("env://"))
    return store


def _init_process_group(store: dist.Store, device: torch.device) -> None:
    # gloo on any machine, for the numbers and objects that processes exchange on the CPU.
    backends = "cpu:gloo"
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
        backends += f",{device.type}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backends, store=store, rank=env.rank(), world_size=env.world_size(), timeout=TIMEOUT)


def _first_to_report(store: dist.Store) -> bool:
    """Returns whether this process is the first to fail; `add` on a store is atomic."""
    try:
        return store.add("reported", 1) == 1
    except RuntimeError:
        # The process that held the store has ended, and so has reported its own error.
        return False


def all_reduce_max(number: int) -> int:
    """Returns the largest of the processes' numbers."""
    if env.world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def barrier() -> None:
    """Waits until all processes have reached this call."""
    # Not `dist.barrier()`, which on NCCL picks an accelerator by rank and warns.
    all_reduce_max(0)


def broadcast_from_main(work: Callable[[], T]) -> T:
    """Runs `work` on the main process only and returns its result on all.

    Args:
        work: returns a value that can be pickled.
    """
    # torch broadcasts lists of objects only, in place.
    results: list[Any] = [work() if env.is_main_process() else None]
    if env.world_size() > 1:
        dist.broadcast_object_list(results, 0, device=torch.device("cpu"))
    return results[0]


def main_process_first(work: Callable[[], T]) -> T:
    """Runs `work` on the main process, then on the others, which find what it has left on the disk."""
    # The others wait before they begin, the main process after it has finished: one barrier for both.
    if not env.is_main_process():
        barrier()
        return work()
    result = work()
    barrier()
    return result


def all_reduce_mean_(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by its mean over all processes, bitwise identical in each.

    Args:
        tensors: the same shapes and dtypes, in the same order, in every process.
    """
    if env.world_size() > 1:
        _for_flattened_(tensors, lambda flat: [dist.all_reduce(flat), flat.div_(env.world_size())])


def sharded_map(work: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """Applies a function to stacks of n elements, an equal share in every process.

    Args:
        work: maps slices of the stacks, (k, …) each, to one tensor of (k, …), element by element.
        stacks: (n, …) each, the same in every process.

    Returns:
        what `work(*stacks)` returns, in every process.
    """
    if env.world_size() == 1:
        return work(*stacks)
    total = len(stacks[0])
    share = -(-total // env.world_size())
    part = work(*(stack[env.rank() * share : (env.rank() + 1) * share] for stack in stacks))
    # all_gather needs equal sizes; the last processes pad with zeros, which are cut off below.
    padded = part.new_zeros(share, *part.shape[1:])
    padded[: len(part)] = part
    gathered = padded.new_empty(env.world_size() * share, *part.shape[1:])
    dist.all_gather([*gathered.chunk(env.world_size())], padded)
    return gathered[:total]


def all_gather(tensor: Tensor) -> list[Tensor]:
    """Returns the tensors of all processes by their rank, all of one shape; gradients do not flow back."""
    if env.world_size() == 1:
        return [tensor]
    gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(env.world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return gathered


def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Replaces each tensor by the main process's."""
    if env.world_size() > 1:
        _for_flattened_(tensors, lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def _for_flattened_(tensors: Sequence[Tensor], change_: Callable[[Tensor], object]) -> None:
    """Changes tensors in place, small ones of one dtype in one flat tensor: one message a step, not one a tensor."""
    small: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() >= LARGE and (flat := _as_it_lies(tensor)) is not None:
            change_(flat)
        else:
            # A dict, and no set: all processes must take the dtypes in the same order.
            small.setdefault(tensor.dtype, []).append(tensor)
    for group in small.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        change_(flat)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _as_it_lies(tensor: Tensor) -> Tensor | None:
    """Returns a tensor's numbers in the order of memory, without a copy; None where they do not lie side by side."""
    # Gradients lie as their parameters do, so the order is the same in every process.
    if tensor.ndim == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # channels last
    return tensor.view(-1) if tensor.is_contiguous() else None


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Returns the sum over all processes; gradients flow back to every process's tensor."""
    return _AllReduceSum.apply(tensor)


class _AllReduceSum(torch.autograd.Function):
    """Sums over processes in both directions.

    Each process's input reaches every process's loss, so its gradient is the sum of all processes' gradients.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004  (the signature is torch's)
        # Cloned, since all_reduce works in place; contiguous, since it sends memory as it lies.
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004  (the signature is torch's)
        return _AllReduceSum.forward(None, gradients[0])
