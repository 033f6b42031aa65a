"""Processes, devices, precision and the generators that networks draw from."""

import os
import platform
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from funmatch import launch
from funmatch.errors import InputError, mark_told

Made = TypeVar("Made")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = timedelta(days=30)
"""For which processes wait for each other: while one of them reads ImageNet. One that ends is noticed at once."""
JOINED = count()


def pick(name: str) -> torch.device:
    """The device that a person named; `auto` is the accelerator, if there is one.

    Raises:
        InputError: no such device here.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return accelerator or torch.device("cpu")
    known = f"here: cpu{f', {accelerator.type}' if accelerator else ''}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; {known}") from None
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise InputError(f"no {device.type} device on this machine; {known}")
    if device.type != "cpu" and (device.index or 0) >= torch.accelerator.device_count():
        raise InputError(f"no device {name}; there are {torch.accelerator.device_count()} of {device.type}")
    return device if device.type == "cpu" or launch.world() == 1 else _own(device)


def _own(device: torch.device) -> torch.device:
    """The accelerator of this process, where several share the work."""
    if device.index is not None:
        raise InputError(f"each process takes an accelerator of its own: --device {device.type}, not {device}")
    if launch.local_world() > torch.accelerator.device_count():
        raise InputError(
            f"{launch.local_world()} processes on a machine with {torch.accelerator.device_count()} of {device.type}; "
            "start one for each, or say --device cpu"
        )
    return torch.device(device.type, launch.local_rank())


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` becomes bf16 where an accelerator has it, fp16 where it has not, fp32 on the CPU."""
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", lambda: True)
    return "bf16" if supported() else "fp16"


def teacher_precisions(name: str, device: torch.device) -> tuple[str, ...]:
    """The arithmetic that a frozen teacher may be computed in: as said, or all that the hardware is fast in."""
    if name != "auto":
        return (name,)
    if device.type == "cpu":
        fast = {
            "bf16": torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
            "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
        return (*(precision for precision, has in fast.items() if has), "fp32")
    return ("bf16", "fp16", "fp32") if resolve_precision("auto", device) == "bf16" else ("fp16", "fp32")


def described(device: torch.device) -> tuple[object, ...]:
    """What a measurement on a device depends on: the hardware, the library, and how many threads compute."""
    name = "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return name, platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.__version__, torch.get_num_threads()


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context in which networks run: fp32 as they are, else autocast."""
    return torch.autocast(device.type, DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES)


def loss_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Scales the loss where gradients in fp16 would vanish; does nothing otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def seed_networks(seed: int, step: int, device: torch.device, rank: int = 0) -> None:
    """Makes dropout and its like a function of (seed, step, rank), so that a resumed run drops the same units.

    Each process has other pictures of the global batch, and drops other units for them.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step + rank * 0xD1B54A32D192ED03) % 2**63
    if device.type == "cpu":
        torch.default_generator.manual_seed(mixed)  # without asking every kind of device there could be
    else:
        torch.manual_seed(mixed)


def empty_cache(device: torch.device) -> None:
    """Gives memory that is kept for later back, and begins a new peak."""
    if device.type != "cpu":
        torch.accelerator.empty_cache()
        torch.accelerator.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """The most bytes that were in use at once on an accelerator; 0 for the CPU, where this is not known."""
    return 0 if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def memory_of(device: torch.device) -> int:
    """Bytes of memory that an accelerator has of its own; 0 for the CPU, and where nobody says."""
    asked = getattr(torch.get_device_module(device), "mem_get_info", None) if device.type != "cpu" else None
    return asked(device)[1] if asked else 0


def finish(device: torch.device) -> None:
    """Waits until a device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def spare_threads() -> int:
    """Threads for making views, beside the one that drives the model."""
    cores = len(os.sched_getaffinity(0)) // launch.local_world() if hasattr(os, "sched_getaffinity") else 2
    return max(1, min(8, cores - 1))


@contextmanager
def joined(name: str) -> Generator[None]:
    """Works with the other processes that torchrun started, if there are any, while the block runs.

    Where the block fails on one process it fails on all: whoever waits for a process that has ended gets an
    `InputError`. The first to fail says why, the others are silent.

    Args:
        name: of the device, as a person gave it.
    """
    if launch.world() == 1:
        yield
        return
    if dist.is_initialized():
        raise InputError("torch.distributed is in use already; funmatch joins the processes by itself")
    store = _meeting_point()
    try:
        _join(store, pick(name))
        yield
        wait()
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or "gloo" in str(error))
        told = InputError("another process of this run has ended") if lost else error
        mark_told(told, elsewhere=not _first_to_tell(store))
        if lost:
            raise told from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _meeting_point() -> dist.Store:
    """Where the processes find each other; under a name of its own each time, since those of before may still be up."""
    store, _, _ = next(rendezvous("env://"))
    return dist.PrefixStore(f"funmatch-{next(JOINED)}", store)


def _join(store: dist.Store, device: torch.device) -> None:
    backends = "cpu:gloo"  # for what the processes say to each other, on any machine
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
        backends += f",{device.type}:{dist.get_default_backend_for_device(device)}"
    dist.init_process_group(backends, store=store, rank=launch.rank(), world_size=launch.world(), timeout=PATIENCE)


def _first_to_tell(store: dist.Store) -> bool:
    try:
        return store.add("told", 1) == 1
    except RuntimeError:
        return False  # whoever kept the store is gone, and has told


def greatest(number: int) -> int:
    """The greatest of the numbers of all processes."""
    if launch.world() == 1:
        return number
    told = torch.tensor(number)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def wait() -> None:
    """Waits until all processes are here."""
    greatest(0)


def from_first(work: Callable[[], Made]) -> Made:
    """What `work` gives on the first process, which alone does it; plain values."""
    made: list[Any] = [work() if launch.is_first() else None]
    if launch.world() > 1:
        dist.broadcast_object_list(made, 0, device=torch.device("cpu"))
    return made[0]


def in_turn(work: Callable[[], Made]) -> Made:
    """What `work` gives on each process: the first does it alone, the others find what it left on the disk."""
    if not launch.is_first():
        wait()
        return work()
    made = work()
    wait()
    return made


def average_(tensors: Sequence[Tensor]) -> None:
    """Makes each tensor its mean over all processes, to the same bits in each."""
    if launch.world() > 1:
        _in_one_message_(tensors, lambda flat: [dist.all_reduce(flat), flat.div_(launch.world())])


def shared_out(work: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """What `work` makes of stacks, one of each at a time, where every process does an equal part of it."""
    if launch.world() == 1:
        return work(*stacks)
    count = len(stacks[0])
    most = -(-count // launch.world())
    part = work(*(stack[launch.rank() * most : (launch.rank() + 1) * most] for stack in stacks))
    mine = part.new_zeros(most, *part.shape[1:])
    mine[: len(part)] = part
    made = mine.new_empty(launch.world() * most, *part.shape[1:])
    dist.all_gather([*made.chunk(launch.world())], mine)
    return made[:count]


def share_(tensors: Sequence[Tensor]) -> None:
    """Makes each tensor what it is on the first process."""
    if launch.world() > 1:
        _in_one_message_(tensors, lambda flat: dist.broadcast(flat, 0))


@torch.no_grad()
def _in_one_message_(tensors: Sequence[Tensor], change_: Callable[[Tensor], object]) -> None:
    """Changes tensors, all of one kind of number at once."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in alike])
        change_(flat)
        for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def summed(tensor: Tensor) -> Tensor:
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
