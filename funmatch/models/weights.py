"""Files of weights, read a tensor at a time, and put into a network: every one of them, or none."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from funmatch.errors import InputError, first_line

Value = TypeVar("Value")

WRAPPERS = ("state_dict", "model", "model_state_dict")  # under which trainers keep a state dict
PREFIXES = ("module.", "_orig_mod.")  # which torch's wrappers put before every name
COUNTER = "num_batches_tracked"  # of BatchNorm: older files lack it, and nothing depends on it


class Lazily(Mapping[str, Value]):
    """Values that are made when they are asked for, so that a file needs no second place in memory.

    Attributes:
        read: gives the value of a name.
        take: gives it for the last time.
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

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read_state(path: Path) -> Lazily[Tensor]:
    """The state dict of a `.safetensors` or `.pt` file. Nothing is unpickled but tensors.

    Raises:
        InputError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise InputError(f"no weights file {path}{': it is a folder' if path.is_dir() else ''}")
    try:
        state = _safetensors(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # each format fails in its own many ways
        raise InputError(f"{path} is no state dict in .safetensors or .pt: {first_line(error)}") from error
    if path.suffix == ".safetensors":
        return state
    while isinstance(state, dict) and (inner := next((key for key in WRAPPERS if key in state), None)):
        state = state[inner]
    good = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not good or not state:
        raise InputError(f"{path} is no state dict: wanted a dict of tensors by name")
    while prefix := next((prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    held: dict[str, Tensor] = dict(state)
    return Lazily(held, held.__getitem__, held.pop)


def _safetensors(path: Path) -> Lazily[Tensor]:
    def read(name: str) -> Tensor:
        # Opened for each tensor, because pages of a mapped file count as memory until it is closed.
        with safe_open(path, "pt") as file:
            return file.get_tensor(name).clone()

    with safe_open(path, "pt") as file:
        return Lazily(file.keys(), read)


def fill(net: nn.Module, weights: Lazily[Tensor], what: str, where: str) -> None:
    """Puts weights into a network, one at a time.

    Args:
        net: whose tensors may lie on the device `meta`, with no memory yet.
        weights: by the network's own names.
        what: the network is called, and
        where: the weights come from, for messages.

    Raises:
        InputError: anything is missing, left over, of another shape or not finite; the network is then of no use.
    """
    wanted = net.state_dict(keep_vars=True)
    problems = [f"{key} is missing" for key in wanted if key not in weights and not key.endswith(COUNTER)]
    problems += [f"{key} is not of this model" for key in weights if key not in wanted]
    if not problems:
        # Places first, contents after: between the two, freed memory would be left in pieces too small for the next.
        places = {key: _place(net, key, slot) for key, slot in wanted.items()}
        problems = [problem for key in places for problem in _put(key, places[key], weights)]
    if problems:
        more = f" … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{where} does not fit {what}: {'; '.join(problems[:5])}{more}")


def _place(net: nn.Module, key: str, slot: Tensor) -> Tensor:
    """The tensor of this name, made, with no content yet, where it has no memory."""
    if not slot.is_meta:
        return slot
    owner, _, name = key.rpartition(".")
    layout = torch.channels_last if slot.ndim == 4 else torch.contiguous_format  # as a classifier has it
    empty = torch.empty(slot.shape, dtype=slot.dtype, memory_format=layout)
    place = nn.Parameter(empty, slot.requires_grad) if isinstance(slot, nn.Parameter) else empty
    setattr(net.get_submodule(owner), name, place)
    return place


@torch.no_grad()
def _put(key: str, place: Tensor, weights: Lazily[Tensor]) -> list[str]:
    """Puts one tensor into its place, or says why it cannot be."""
    tensor = weights.take(key) if key in weights else torch.zeros(place.shape, dtype=place.dtype)
    problems = []
    if tensor.shape != place.shape:
        problems.append(f"{key} has shape {tuple(tensor.shape)}, wanted {tuple(place.shape)}")
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_complex() or tensor.is_quantized:
        return [f"{key} is no plain tensor of numbers ({tensor.dtype}, {tensor.layout}, {tensor.device})"]
    if not problems:
        place.copy_(tensor)
    kept = tensor if problems else place  # what is finite in 64 bits may not be in 32
    if kept.numel() and not all(bound.isfinite() for bound in kept.aminmax()):  # which needs no second tensor
        problems.append(f"{key} holds values that are not finite")
    return problems
