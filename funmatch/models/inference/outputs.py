"""Finds the logits in what a network returns: a tensor, or a tuple, dictionary or dataclass that holds it."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from funmatch.errors import InputError

EXACT, NEAR = 1e-4, 1e-3
"""Largest differences of logits, relative to the largest of them or to 1: of a network that was written and is read
again, or whose last layer was replaced; and of one that computes in another order, as folded ones do."""


def is_close(found: Tensor, expected: Tensor, tolerance: float = EXACT) -> bool:
    """Returns whether logits are the expected ones up to rounding."""
    if found.shape != expected.shape:
        return False
    wanted = expected.double()
    return bool((found.double() - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1.0))


def logits_of(output: Any, name: str) -> Tensor:
    """Returns the logits of a network's output: itself, its `logits` by attribute or key, or a tuple's only rows.

    Args:
        output: of the network.
        name: of the network, for the message.

    Raises:
        InputError: the output holds something else, or several tensors that could be meant.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, tuple | list):
        # Networks that also return their features or states: rows are logits only where nothing else is rows.
        rows = [each for each in output if isinstance(each, Tensor) and each.ndim == 2]
        if len(rows) == 1:
            return rows[0]
    raise InputError(
        f"{name} returned {describe(output)}, in which its logits are not known; let it return a tensor (n, classes), "
        "or an object that has one as `logits`"
    )


def describe(output: Any) -> str:
    """Lists what an output holds: names and shapes."""
    parts = [f"{name} {_shape(value)}" for name, value in _parts(output)]
    return f"{type(output).__name__} with {', '.join(parts) or 'nothing'}" if parts else type(output).__name__


def _parts(output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        yield from ((str(key), value) for key, value in output.items())
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        yield from zip(output._fields, output, strict=True)
    elif isinstance(output, tuple | list):
        yield from ((f"[{number}]", value) for number, value in enumerate(output))
    elif dataclasses.is_dataclass(output):
        yield from ((field.name, getattr(output, field.name)) for field in dataclasses.fields(output))


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
