"""Moves tensors between the CPU and an accelerator without making either wait for the other."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device; from the CPU to an accelerator by pinned memory and without waiting."""
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    # non_blocking alone does not help: from pageable memory the copy is synchronous.
    # Nothing needs to hold the pinned copy: torch's allocator reuses its memory only after the transfer.
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class HostCopy:
    """Tensors that are being copied to the CPU while the accelerator works on.

    Attributes:
        tensors: the copies on the CPU; their contents are undefined until the copy has arrived.
        event: recorded behind the copies; None if the tensors were on the CPU already.
    """

    tensors: tuple[Tensor, ...]
    event: torch.Event | None = None

    @property
    def arrived(self) -> bool:
        """Whether the copy has arrived; does not wait."""
        return self.event is None or self.event.query()

    def wait(self) -> tuple[Tensor, ...]:
        """Waits for the copy, then returns the tensors."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensors


def copy_to_host(*tensors: Tensor) -> HostCopy:
    """Starts copying tensors to the CPU.

    Args:
        tensors: all on one device.

    Returns:
        the copy under way. Tensors that are on the CPU already are returned as they are, not copied.
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return HostCopy(tensors)
    # Pinned, or the copies would be synchronous.
    copies = tuple(torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    # One event for all: it is recorded behind the last copy, on the stream that does them in order.
    event = torch.Event(next(tensor.device for tensor in tensors if tensor.device.type != "cpu"))
    event.record()
    return HostCopy(copies, event)


def snapshot(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies tensors to the CPU, so that they can be written by a thread while training changes the originals.

    Args:
        files: for each file its tensors by name.

    Returns:
        the copies under the same names.
    """
    tensors = [tensor.detach() for each in files.values() for tensor in each.values()]
    on_accelerator = any(tensor.device.type != "cpu" for tensor in tensors)
    # Cloned on a CPU: `copy_to_host` returns the tensors themselves, which the next step would change.
    copies = iter(copy_to_host(*tensors).wait() if on_accelerator else [tensor.clone() for tensor in tensors])
    # All copies are taken in the order in which the tensors were listed above.
    return {name: {key: next(copies) for key in each} for name, each in files.items()}
