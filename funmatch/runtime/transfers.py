"""Between the CPU and an accelerator, with neither waiting for the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class HasTensors(Protocol):
    """Something that holds tensors, such as a batch, and can give itself with each of them changed."""

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self: ...


Tensors = TypeVar("Tensors", bound=HasTensors)


def pin_batch(device: torch.device) -> Callable[[Tensors], Tensors] | None:
    """Copies a batch into pinned memory, from where an accelerator fetches it without being waited for."""
    if device.type == "cpu":
        return None

    def pinned(batch: Tensors) -> Tensors:
        with torch.accelerator.device_index(device.index):  # a thread knows only the machine's first, else
            return batch.map_tensors(lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)

    return pinned


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, by way of pinned memory if it has a way to go: nobody waits for it."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class HostCopy:
    """Tensors on their way to the CPU; an accelerator goes on meanwhile.

    Attributes:
        there: the tensors, on the CPU; not to be read before they have arrived.
        event: when they have arrived; None where they were there already.
    """

    tensors: tuple[Tensor, ...]
    event: torch.Event | None = None

    @property
    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensors


def copy_to_host(*tensors: Tensor) -> HostCopy:
    """Tensors of one device, which begin to be copied to the CPU if they are not there."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return HostCopy(tensors)
    there = tuple(torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors)
    for copy, tensor in zip(there, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    event = torch.Event(next(tensor.device for tensor in tensors if tensor.device.type != "cpu"))
    event.record()
    return HostCopy(there, event)


def snapshot(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies on the CPU, by the same names, which later updates do not change."""
    tensors = [tensor.detach() for each in files.values() for tensor in each.values()]
    alive = any(tensor.device.type != "cpu" for tensor in tensors)
    copies = iter(copy_to_host(*tensors).wait() if alive else [tensor.clone() for tensor in tensors])
    return {name: {key: next(copies) for key in each} for name, each in files.items()}
