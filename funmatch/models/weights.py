"""Fills networks with weights completely, one tensor at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, some_of

Value = TypeVar("Value")

COUNTER = "num_batches_tracked"  # of BatchNorm: older files lack it, and nothing depends on it
MAX_PROBLEMS = 5  # that a message lists
MAX_NAMES = 5  # of tensors that are missing, and of those that are left over


class Lazily(Mapping[str, Value]):
    """Mapping whose values are read on access, so that a file is never in memory as a whole.

    Attributes:
        names: the keys, in order.
        read: returns the value of a name.
        take: returns it for the last time, and may free its memory.
    """

    def __init__(
        self, names: Iterable[str], read: Callable[[str], Value], take: Callable[[str], Value] | None = None
    ) -> None:
        self.names = dict.fromkeys(names)
        self.read, self.take = read, take or read

    def __getitem__(self, name: str) -> Value:
        if name not in self.names:
            raise KeyError(name)
        return self.read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names  # that of Mapping would read the value

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def is_fillable(net: nn.Module) -> bool:
    """Returns whether the state dict of a network has all its tensors, so that `fill` leaves none without values."""
    # Buffers outside the state dict (a transformer's rotary tables) are computed by the constructor.
    filled = net.state_dict(keep_vars=True)
    return all(name in filled for name, _ in [*net.named_parameters(), *net.named_buffers()])


def fill(net: nn.Module, weights: Lazily[Tensor], what: str, where: str) -> None:
    """Copies weights into a network, one tensor at a time.

    Args:
        net: a network; its tensors may be on the device `meta`, without memory yet.
        weights: by the network's own names.
        what: name of the network, for messages.
        where: source of the weights, for messages.

    Raises:
        InputError: a tensor is missing, left over, of another shape or not finite; the network is then unusable.
    """
    # timm itself is silent about some of these cases, and a student would train from half-random weights.
    expected = net.state_dict(keep_vars=True)
    missing = [key for key in expected if key not in weights and not key.endswith(COUNTER)]
    others = [key for key in weights if key not in expected]
    found = {"missing": missing, "not of this model": others}
    problems = [f"{_listed(names)} {what}" for what, names in found.items() if names]
    if not problems:
        # All memory first, contents after: alternating, freed memory would be left in pieces too small for the next.
        targets = {key: _allocate(net, key, slot) for key, slot in expected.items()}
        problems = [problem for key in targets for problem in _copy(key, targets[key], weights)]
    if problems:
        more = f" … and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise InputError(f"{where} does not fit {what}: {'; '.join(problems[:MAX_PROBLEMS])}{more}")


def _listed(names: list[str]) -> str:
    """Returns the first names of a list, how many more there are, and the verb for them."""
    return f"{some_of(names, MAX_NAMES)} {'is' if len(names) == 1 else 'are'}"


def _allocate(net: nn.Module, key: str, slot: Tensor) -> Tensor:
    """Returns the network's tensor of this name; one on `meta` is replaced by one with memory, without content yet."""
    if not slot.is_meta:
        return slot
    owner, _, name = key.rpartition(".")
    # The layout that `Classifier` will want, so that the kernels need not be copied again.
    layout = torch.channels_last if slot.ndim == 4 else torch.contiguous_format
    empty = torch.empty(slot.shape, dtype=slot.dtype, memory_format=layout)
    target = nn.Parameter(empty, slot.requires_grad) if isinstance(slot, nn.Parameter) else empty
    setattr(net.get_submodule(owner), name, target)
    return target


@torch.no_grad()
def _copy(key: str, target: Tensor, weights: Lazily[Tensor]) -> list[str]:
    """Copies one tensor, and returns the problems with it."""
    # `take` frees a tensor once it is copied, so that file and network are not both in memory as a whole.
    tensor = weights.take(key) if key in weights else torch.zeros(target.shape, dtype=target.dtype)
    problems = []
    # Weights that were rounded to integers mean something only together with their scales.
    if target.is_floating_point() and not (tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized):
        problems.append(f"{key} is of {str(tensor.dtype).removeprefix('torch.')}, expected floating-point numbers")
    if tensor.shape != target.shape:
        problems.append(f"{key} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}")
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_complex() or tensor.is_quantized:
        return [f"{key} is not a dense tensor of numbers ({tensor.dtype}, {tensor.layout}, {tensor.device})"]
    if not problems:
        target.copy_(tensor)
    # After the copy: a number that is finite in 64 bits may not be in 32. aminmax needs no second tensor, as isfinite
    # of all values would.
    checked = tensor if problems else target
    if checked.numel() and not all(bound.isfinite() for bound in checked.aminmax()):
        problems.append(f"{key} has values that are not finite")
    return problems
