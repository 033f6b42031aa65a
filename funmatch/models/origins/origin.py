"""Where a network's weights come from, and what is known about it beyond timm."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

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
