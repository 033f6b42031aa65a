"""Turns an optimizer's state into named tensors, and back, so that a checkpoint is a plain safetensors file.

Optimizers keep numbers, flags and lists beside tensors, and some count steps in a group of parameters. The names, which
are part of the file format:

* `<parameter>:<slot>`: a tensor of a parameter, e.g. `head.fc.weight:exp_avg`;
* `group <i>:<slot>`: what a group keeps beside its options;
* `<name>|json` and `<name>|0`, `<name>|1`, …: any other value as JSON in a tensor of bytes, and the tensors in it;
* `<name>|cpu`: a tensor that stays on the CPU although its parameter is elsewhere, such as AdamW's step.
"""

import json
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.runtime.disk.json_files import parse_json

EXTERNAL = {"params", "lr"}
"""Entries of a group that come from its construction and from the schedule, not from its state."""


def optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the state of an optimizer of a model's parameters as named tensors.

    Args:
        model: names the parameters.
        optimizer: of all or some of them.
    """
    tensors: dict[str, Tensor] = {}
    for i, group in enumerate(optimizer.param_groups):
        # Options that have a default are set anew by the run's configuration; what is left, the steps have written.
        for slot in group.keys() - EXTERNAL - optimizer.defaults.keys():
            tensors |= _encode(f"group {i}:{slot}", group[slot], torch.device("cpu"))
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors |= _encode(f"{name}:{slot}", value, parameter.device)
    return tensors


def load_optimizer_state_(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Replaces an optimizer's state by one from `optimizer_state_dict`.

    Args:
        model: names the parameters.
        optimizer: changed in place.
        tensors: the state, on any device.
    """
    # Cleared, since a slot that the checkpoint does not have must start anew.
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    values: defaultdict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        # From the right: modules of a user may have a colon in their names, slots have none.
        owner, _, slot = key.rpartition(":")
        slot, _, part = slot.partition("|")
        values[owner, slot][part] = tensor
    for (owner, slot), parts in values.items():
        if owner.startswith("group "):
            optimizer.param_groups[int(owner.removeprefix("group "))][slot] = _decode(parts)
        else:
            optimizer.state[parameters[owner]][slot] = _decode(parts, parameters[owner])


def _encode(name: str, value: Any, device: torch.device) -> dict[str, Tensor]:
    """Encodes one value of the state, which belongs to a parameter on `device`."""
    if isinstance(value, Tensor):
        return {name if value.device == device else f"{name}|{value.device.type}": value}
    inside: list[Tensor] = []

    def outline(value: Any) -> Any:
        if isinstance(value, Tensor):
            inside.append(value)
            # A clone's strides: those of a dense tensor in this order of axes, which a view need not have.
            return {"tensor": len(inside) - 1, "strides": value.clone().stride()}
        return [outline(each) for each in value] if isinstance(value, list | tuple) else value

    # As bytes in a tensor, since safetensors holds nothing but tensors.
    try:
        encoded = json.dumps(outline(value)).encode()
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the optimizer's {name} cannot be saved ({first_line(error)}); expected tensors, numbers, strings or lists"
        ) from None
    return {f"{name}|json": torch.tensor(list(encoded), dtype=torch.uint8)} | {
        f"{name}|{i}": tensor for i, tensor in enumerate(inside)
    }


def _decode(parts: dict[str, Tensor], like: Tensor | None = None) -> Any:
    """Decodes one value of the state.

    Args:
        parts: its tensors by what follows the `|` in their names.
        like: the parameter it belongs to; None for a group.
    """
    if "cpu" in parts:
        return parts["cpu"].clone()
    if "" in parts:
        return _place_like(parts[""], like)

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            tensor = parts[str(value["tensor"])]
            device = tensor.device if like is None else like.device
            return torch.empty_strided(tensor.shape, value["strides"], dtype=tensor.dtype, device=device).copy_(tensor)
        return [fill(each) for each in value] if isinstance(value, list) else value

    return fill(parse_json(bytes(parts["json"].tolist())))


def _place_like(value: Tensor, like: Tensor | None) -> Tensor:
    """Copies a tensor to the device of its parameter, in the parameter's memory layout if it has the same shape."""
    if like is None:
        return value.clone()
    # The layout matters: safetensors stores tensors contiguous, and vector units round differently at the ends of an
    # array, so that a resumed run would differ in its last bits.
    same = value.shape == like.shape
    return torch.empty_like(like if same else value, dtype=value.dtype, device=like.device).copy_(value)
