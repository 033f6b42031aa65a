"""Translates the names under which authors published their weights to timm's, by timm's own functions for that."""

import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from funmatch.errors import some_of
from funmatch.models.checkpoints.checkpoint import Checkpoint, Entry
from funmatch.models.checkpoints.fitting import Wanted
from funmatch.models.checkpoints.torchvision_names import Translated

FUNCTIONS = ("checkpoint_filter_fn", "_filter_fn", "_checkpoint_filter_fn")
"""Names of timm's functions, in the module of a network, that translate the names of its published weights."""
OPTIONS = {"adapt_layer_scale": True}
"""Arguments of such functions that timm sets for some networks of a module, and that change no others."""
LEAST_SHARE = 0.5  # of a network's tensors: with fewer, a dict holds something else
MOST_SHARE = 0.7  # of the tensors under one prefix: the rest is a head or a loss


def translate(checkpoint: Checkpoint, wanted: Wanted, net: nn.Module) -> Translated | None:
    """Returns the weights that a file has under their authors' names; None where timm has no translation for them.

    Args:
        checkpoint: of the file.
        wanted: what the network needs.
        net: the network; it may be on the device `meta`.
    """
    function = _function_of(net)
    if function is None:
        return None
    entries: dict[str, Entry] = {}
    unused: list[str] = []
    for home, prefix in _places(checkpoint, len(wanted.shapes)):
        found, left = _run(function, checkpoint, home, prefix)
        # A part of them would be completed with nothing, and others are those of another network.
        if all(name in found for name in wanted.body) and all(
            name in wanted.shapes or wanted.is_head(name) for name in found
        ):
            entries |= {
                f"{prefix}{name}": Entry(
                    home, tuple(tensor.shape), "float32", f"{prefix}{name}", partial(_same, tensor)
                )
                for name, tensor in found.items()
            }
            unused += left
    if not entries:
        return None
    left = f"; left out {some_of(unused, 3)}" if unused else ""
    note = f"{checkpoint.where}: its names are the authors', translated as timm does{left}"
    return Translated(replace(checkpoint, entries=entries), note)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _function_of(net: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """Returns timm's function for the weights of a network, if it has one."""
    module = sys.modules.get(type(net).__module__)
    function = next((vars(module)[name] for name in FUNCTIONS if name in vars(module)), None) if module else None
    if function is None:
        return None
    parameters = inspect.signature(function).parameters
    options = {name: value for name, value in OPTIONS.items() if name in parameters}
    return lambda state: function(state, *([net] if len(parameters) > 1 else []), **options)


def _places(checkpoint: Checkpoint, size: int) -> Iterator[tuple[str, str]]:
    """Yields the dicts that may hold a network of so many tensors, and the prefix of most names in them."""
    for home in dict.fromkeys(entry.home for entry in checkpoint.entries.values()):
        prefix = home
        while True:
            names = [
                key.removeprefix(prefix)
                for key, entry in checkpoint.entries.items()
                if entry.home == home and key.startswith(prefix)
            ]
            if len(names) < LEAST_SHARE * size:
                break
            yield home, prefix
            first, count = Counter(name.partition(".")[0] for name in names).most_common(1)[0]
            if count < MOST_SHARE * len(names) or first in names:
                break
            prefix = f"{prefix}{first}."


def _run(
    function: Callable[[dict[str, Tensor]], dict[str, Tensor]], checkpoint: Checkpoint, home: str, prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Translates the tensors under a prefix.

    Returns:
        them by timm's names, and the names of those that were not used; nothing where one was changed.
    """
    state = {
        key.removeprefix(prefix): entry.read()
        for key, entry in checkpoint.entries.items()
        if entry.home == home and key.startswith(prefix)
    }
    numbers = {name: tensor.float().requires_grad_() for name, tensor in state.items() if tensor.is_floating_point()}
    try:
        found = function({**state, **numbers})
        total = torch.stack([tensor.sum() for tensor in found.values() if tensor.requires_grad]).sum()
        shares = torch.autograd.grad(total, [*numbers.values()], allow_unused=True)
    except Exception:  # such functions expect the files that they were written for
        return {}, []
    # Each number must be in the result exactly once, with the weight 1: moved, joined or added, but not resampled for
    # another size, which is a choice that a user has to make.
    if any(share is not None and not bool((share == 1).all()) for share in shares):
        return {}, []
    unused = [name for name, share in zip(numbers, shares, strict=True) if share is None]
    return {name: tensor.detach() for name, tensor in found.items()}, unused
