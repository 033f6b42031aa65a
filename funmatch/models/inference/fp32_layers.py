"""Keeps some layers of a network in fp32 while the others compute in 16 bits."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from funmatch.models.inference.native.layers import native_group_norms
from funmatch.models.timm_models import head_modules


class UnknownLayers(ValueError):
    """Names that are not separate modules of a network."""


def check_layers(net: nn.Module, names: Sequence[str]) -> None:
    """Raises `UnknownLayers` unless the names are modules of a network, none of them inside another."""
    known = {name for name, _ in net.named_modules() if name}
    for number, name in enumerate(names):
        if name not in known:
            raise UnknownLayers(f"it has no layer {name!r}")
        if any(other == name or name.startswith(f"{other}.") for other in (*names[:number], *names[number + 1 :])):
            raise UnknownLayers(f"its layer {name!r} is named twice")


def convert(net: nn.Module, dtype: torch.dtype, names: Sequence[str]) -> torch.dtype:
    """Converts a network to 16 bits, in place, except for some layers and its head.

    Args:
        net: in fp32.
        dtype: of the other layers.
        names: of the layers that stay in fp32.

    Returns:
        the type that it takes its images in.

    Raises:
        UnknownLayers: it has no such layers.
    """
    check_layers(net, names)
    layers = [net.get_submodule(name) for name in names]
    kept = {module for layer in (*layers, *head_modules(net)) for module in layer.modules()}
    others = [module for module in net.modules() if module not in kept]
    for module in others:
        _set_tensors(module, {key: value.to(dtype) for key, value in _own_tensors(module).items()})
    for name, layer in zip(names, layers, strict=True):
        # Logits stay in fp32, and so does what the next layer would only widen again.
        stays = not {*layer.modules()}.isdisjoint(head_modules(net)) or _next_is_in_fp32(net, name, names)
        cast_around(layer, torch.float32, None if stays else dtype)
    first = next((module for module in net.modules() if module is not net and _own_tensors(module)), None)
    return torch.float32 if first in kept else dtype


@contextmanager
def lowered(net: nn.Module, layer: nn.Module, dtype: torch.dtype, *, native: bool) -> Generator[None]:
    """Computes one layer in 16 bits, or the whole network, for as long as the block runs; the rest stays in fp32.

    As `frozen.Frozen` does: heads keep fp32, and so do norms of the native kernels where these are used.
    """
    heads = [head for head in head_modules(net) if head in {*layer.modules()}]
    kept = {module for head in heads for module in head.modules()} | {*(native_group_norms(layer) if native else ())}
    before = [(module, _own_tensors(module)) for module in layer.modules() if module not in kept]
    hooks = [handle for head in heads for handle in cast_around(head, torch.float32, None)]
    hooks += cast_around(layer, dtype, torch.float32)
    try:
        for module, tensors in before:
            _set_tensors(module, {key: value.to(dtype) for key, value in tensors.items()})
        yield
    finally:
        for module, tensors in before:
            _set_tensors(module, tensors)
        for handle in hooks:
            handle.remove()


def cast_around(layer: nn.Module, inside: torch.dtype, outside: torch.dtype | None) -> list[RemovableHandle]:
    """Casts what goes into a layer to one type, and what comes out to another, or leaves that as it is (None)."""

    def cast_inputs(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return _cast(args, inside), _cast(kwargs, inside)

    handles = [layer.register_forward_pre_hook(cast_inputs, with_kwargs=True)]
    if outside is not None:
        handles.append(layer.register_forward_hook(lambda _, args, output: _cast(output, outside)))  # noqa: ARG005
    return handles


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Casts tensors of floats, also those in tuples, lists and dicts; leaves anything else."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_cast(each, dtype) for each in value)
    return {key: _cast(each, dtype) for key, each in value.items()} if type(value) is dict else value


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns the floating-point weights and buffers of a module, without those of its children."""
    own: Iterable[tuple[str, Tensor | None]] = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor.data for name, tensor in own if tensor is not None and tensor.is_floating_point()}


def _set_tensors(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        getattr(module, name).data = tensor


def _next_is_in_fp32(net: nn.Module, name: str, names: Sequence[str]) -> bool:
    """Returns whether the output of a layer goes to another one in fp32, so that 16 bits need not hold it."""
    owner, _, own = name.rpartition(".")
    parent = net.get_submodule(owner)
    # In this class alone each child's output is the next one's input.
    if type(parent) is not nn.Sequential:
        return False
    later = [*parent.named_children()]
    later = later[[key for key, _ in later].index(own) + 1 :]
    for key, module in later:
        if f"{owner}.{key}".removeprefix(".") in names:
            return True
        # Activations and pooling take any type.
        if any(True for _ in (*module.parameters(), *module.buffers())):
            return False
    return False
