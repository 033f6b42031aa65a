"""Where a network's weights come from, and what is known about it beyond timm."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from funmatch.config.choices import RESAMPLED_BEFORE
from funmatch.models.checkpoints.checkpoint import Checkpoint
from funmatch.models.weights import Lazily

CONFIG_KEYS = ("input_size", "crop_pct", "mean", "std")
"""Entries of timm's `pretrained_cfg` that say what images a network takes."""


@dataclass(frozen=True)
class Origin:
    """Source of a network's weights, and what is known about the network beyond timm.

    Attributes:
        where: path or name, for messages.
        architecture: timm's name, `local-dir:folder`, or `package.module:function`.
        weights: by the network's own names, or a file that has them under some; None where timm has them, or there are
            none.
        kwargs: arguments of the constructor.
        card: entries that override timm's `pretrained_cfg`.
        published: whether this is a BiT network with the eps of the published checkpoints.
        notes: sentences that a user should know.
        side_known: whether the image size in `card`, or else in timm's configuration, is that of these weights.
        alternatives: see `Classifier`.
        net: the network itself with its weights, where another library builds it.
        content: see `Classifier`.
    """

    where: str
    architecture: str
    weights: Lazily[Tensor] | Checkpoint | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    published: bool = False
    notes: tuple[str, ...] = ()
    side_known: bool = True
    alternatives: tuple[str, ...] = ()
    net: nn.Module | None = None
    content: str | None = None


def own_entries(own: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the card takes from our part of a `config.json`, in timm's layout or in that of transformers."""
    # Students were evaluated without antialias before there was a choice.
    before = RESAMPLED_BEFORE if "verb" in own else None
    # What we trained without saying so gives one class an image.
    task = own.get("task") or ("multiclass" if "verb" in own else None)
    resample = own.get("eval_resample") or before
    return {"top1": own.get("top1"), "resample": resample, "floor": own.get("eval_floor"), "task": task}
