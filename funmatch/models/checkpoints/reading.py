"""Reads the weights of one of timm's networks from a file, under timm's names, torchvision's or their authors'."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from funmatch.errors import InputError
from funmatch.models.checkpoints import original_names, torchvision_names
from funmatch.models.checkpoints.checkpoint import Checkpoint
from funmatch.models.checkpoints.fitting import Found, Wanted, fit
from funmatch.models.weights import COUNTER


@dataclass(frozen=True)
class Reading:
    """Weights of a network as they were found in a file.

    Attributes:
        found: by timm's names.
        kwargs, card: arguments of the constructor and entries of the card that they need.
    """

    found: Found
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)


def read_weights(checkpoint: Checkpoint, wanted: Wanted, build: Callable[[], nn.Module]) -> Reading:
    """Returns the weights of a network that a checkpoint holds.

    Args:
        checkpoint: of a file.
        wanted: what the network needs.
        build: returns the network; it may be on the device `meta`.

    Raises:
        InputError: as `fit`. Weights that fit under no names are returned under their own, for `fill` to compare.
    """
    refused, found = None, None
    try:
        found = fit(checkpoint, wanted)
    except InputError as error:
        refused = error
    if found and _is_complete(found, wanted):
        return Reading(found)
    translated = torchvision_names.translate(checkpoint, wanted)
    # Second, since it reads the whole file.
    if translated := translated or original_names.translate(checkpoint, wanted, build()):
        ours = fit(translated.checkpoint, wanted)
        return Reading(replace(ours, notes=(translated.note, *ours.notes)), translated.kwargs, translated.card)
    if refused:
        raise refused
    assert found
    return Reading(found)


def _is_complete(found: Found, wanted: Wanted) -> bool:
    needed = {name for name in wanted.shapes if not name.endswith(COUNTER)}
    return needed <= set(found.state) and set(found.state) <= set(wanted.shapes)
