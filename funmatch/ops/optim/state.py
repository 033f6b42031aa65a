"""What an optimizer remembers, as named tensors, and back.

Optimizers keep tensors beside numbers, flags and lists of them; some count steps in a group of parameters. A tensor of
a parameter is `<parameter>:<slot>`, what a group counts `group <i>:<slot>`. Anything else is JSON, in a tensor of bytes
called `<name>|json`, and `<name>|0`, `<name>|1`, … are the tensors in it. A counter that stays on the CPU while its
parameter is elsewhere is `<name>|cpu`.
"""

import json
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

SET = {"params", "lr"}
"""What a group has from its maker or from the schedule."""


def optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that an optimizer of a model's parameters remembers."""
    tensors: dict[str, Tensor] = {}
    for i, group in enumerate(optimizer.param_groups):
        for slot in group.keys() - SET - optimizer.defaults.keys():
            tensors |= _pack(f"group {i}:{slot}", group[slot], torch.device("cpu"))
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors |= _pack(f"{name}:{slot}", value, parameter.device)
    return tensors


def load_optimizer_state_(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Makes an optimizer remember what was packed.

    Values are copied into tensors laid out in memory as those of an optimizer that was never packed: the vector units
    round differently at the ends of an array, so another layout would give other last bits.
    """
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    parts: defaultdict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        owner, _, slot = key.rpartition(":")
        slot, _, part = slot.partition("|")
        parts[owner, slot][part] = tensor
    for (owner, slot), found in parts.items():
        if owner.startswith("group "):
            optimizer.param_groups[int(owner.removeprefix("group "))][slot] = _unpack(found)
        else:
            optimizer.state[parameters[owner]][slot] = _unpack(found, parameters[owner])


def _pack(name: str, value: Any, device: torch.device) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name if value.device == device else f"{name}|{value.device.type}": value}
    inside: list[Tensor] = []

    def outline(value: Any) -> Any:
        if isinstance(value, Tensor):
            inside.append(value)
            return {"tensor": len(inside) - 1, "strides": value.clone().stride()}
        return [outline(each) for each in value] if isinstance(value, list | tuple) else value

    written = json.dumps(outline(value)).encode()
    return {f"{name}|json": torch.tensor(list(written), dtype=torch.uint8)} | {
        f"{name}|{i}": tensor for i, tensor in enumerate(inside)
    }


def _unpack(parts: dict[str, Tensor], like: Tensor | None = None) -> Any:
    if "cpu" in parts:
        return parts["cpu"].clone()
    if "" in parts:
        return _placed(parts[""], like)

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            found = parts[str(value["tensor"])]
            device = found.device if like is None else like.device
            return torch.empty_strided(found.shape, value["strides"], dtype=found.dtype, device=device).copy_(found)
        return [filled(each) for each in value] if isinstance(value, list) else value

    return filled(json.loads(bytes(parts["json"].tolist())))


def _placed(value: Tensor, like: Tensor | None) -> Tensor:
    """The value where its parameter lies, and laid out alike if it has the same shape."""
    if like is None:
        return value.clone()
    same = value.shape == like.shape
    return torch.empty_like(like if same else value, dtype=value.dtype, device=like.device).copy_(value)
