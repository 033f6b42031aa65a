"""Translates torchvision's names of weights to timm's, for networks that compute the same in both libraries."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from funmatch.models.checkpoints.checkpoint import Checkpoint, Entry
from funmatch.models.checkpoints.fitting import Wanted
from funmatch.models.weights import COUNTER

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the images that all networks of torchvision take; timm's networks of the same name may have others."""


@dataclass(frozen=True)
class Family:
    """Networks whose tensors are the same, in the same order, in both libraries.

    Attributes:
        pattern: of timm's names, without a tag.
        marker: a name that only torchvision's networks of the kind have.
        kwargs: arguments with which timm's constructor builds torchvision's network.
    """

    pattern: str
    marker: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)


STEM, EPS = "features.0.0.weight", {"bn_eps": 1e-3}
FAMILIES = (
    Family(r"convnext_(tiny|small|base|large)", STEM),
    Family(r"efficientnet_b[0-4]", STEM),
    Family(r"efficientnet_b[5-7]|efficientnetv2_[sml]|mobilenetv3_(large|small)_100", STEM, EPS),
    Family(r"mobilenetv2_100", STEM),
    Family(r"mnasnet_(050|075|100)", "layers.0.weight"),
    Family(r"regnet[xy]_\d+", "trunk_output.block1.block1-0.proj.0.weight"),
    Family(r"swin_(tiny|small|base)_patch4_window7_224", STEM),
    Family(r"vit_(base|large|huge)_patch(14|16|32)_224", "encoder.layers.encoder_layer_0.ln_1.weight"),
)
"""Each was compared with torchvision by its logits; others of equal shapes pad or normalise otherwise."""

ORDER = (
    "class_token", "encoder.pos_embedding", "conv_proj",
    "stem", "trunk_output", "features", "encoder", "layers",
    "norm1", "ln_1", "attn", "self_attention", "norm2", "ln_2", "mlp",
    "relative_position_bias_table", "qkv", "in_proj_weight", "in_proj_bias", "out_proj",
    "f", "a", "b", "se", "c", "proj", "norm", "reduction",
    "layer_scale", "block", "conv", "fc1", "fc2", "ln", "head", "fc", "heads", "classifier",
    "weight", "bias", "running_mean", "running_var", COUNTER,
)  # fmt: skip
"""Parts of torchvision's names, in timm's order where they stand side by side; numbers among them count up."""
RANK = {word: rank for rank, word in enumerate(ORDER)}
ENDS = {
    "layer_scale": "gamma", "in_proj_weight": "weight", "in_proj_bias": "bias", "class_token": "cls_token",
    "pos_embedding": "pos_embed",
}  # fmt: skip
"""Last parts of names, and timm's."""
TABLES = "relative_position_index"  # computed from the size of a window; timm does not save them


@dataclass(frozen=True)
class Translated:
    """Weights under timm's names.

    Attributes:
        checkpoint: with the translated names.
        note: what was done.
        kwargs, card: arguments of the constructor and entries of the card that such weights need.
    """

    checkpoint: Checkpoint
    note: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)


def translate(checkpoint: Checkpoint, wanted: Wanted) -> Translated | None:
    """Returns the weights of torchvision's network under timm's names; None where a file has none of that network."""
    name = wanted.what.partition(".")[0]
    family = next((each for each in FAMILIES if re.fullmatch(each.pattern, name)), None)
    if family is None:
        return None
    entries: dict[str, Entry] = {}
    for key in checkpoint.entries:
        if f".{key}".endswith(f".{family.marker}"):
            entries |= _under(checkpoint, key.removesuffix(family.marker), wanted)
    note = f"{checkpoint.where}: its names are torchvision's, and so are its mean and std of images (ImageNet's)"
    card = {"mean": MEAN, "std": STD}
    return Translated(replace(checkpoint, entries=entries), note, family.kwargs, card) if entries else None


def _under(checkpoint: Checkpoint, prefix: str, wanted: Wanted) -> dict[str, Entry]:
    """Returns the tensors under a prefix by timm's names; nothing where one has no counterpart of its shape."""
    entries = {key.removeprefix(prefix): entry for key, entry in checkpoint.entries.items() if key.startswith(prefix)}
    # Older files lack BatchNorm's counters; and nothing depends on them.
    names = sorted((name for name in entries if not name.endswith((TABLES, COUNTER))), key=_place)
    targets = [name for name in wanted.shapes if not name.endswith(COUNTER)]
    # The head is last: it may be missing in the file, or in the network, of which the features are wanted.
    if len(names) < len(targets):
        targets = [name for name in targets if not wanted.is_head(name)]
    elif not wanted.head and names[len(targets) :] == [name for name in names if name.startswith(_head_of(names))]:
        names = names[: len(targets)]
    if len(names) != len(targets):
        return {}
    found: dict[str, Entry] = {}
    for name, target in zip(names, targets, strict=True):
        entry, shape, end = entries[name], wanted.shapes[target], name.rpartition(".")[2]
        shape = (*entry.shape[:1], *shape[1:]) if wanted.is_head(target) else shape
        same = _sizes(entry.shape) == _sizes(shape) and ENDS.get(end, end) == target.rpartition(".")[2]
        if not same:
            return {}
        found[f"{prefix}{target}"] = replace(entry, shape=shape, read=partial(_read, entry, shape))
    return found


def _head_of(names: Sequence[str]) -> str:
    """Returns the beginning of the names of the last module."""
    return f"{names[-1].rpartition('.')[0]}."


def _read(entry: Entry, shape: tuple[int, ...]) -> Tensor:
    return entry.read().reshape(shape)


def _sizes(shape: tuple[int, ...]) -> list[int]:
    """Returns the sizes of a tensor without axes of 1, by which a linear layer differs from a 1 × 1 convolution."""
    return [size for size in shape if size != 1]


def _place(name: str) -> list[tuple[int, ...]]:
    """Returns the place of one of torchvision's names among the others, which files of safetensors sort by letter."""
    if name in RANK:
        return [(RANK[name],)]
    # "encoder_layer_10" and "block2-10" by their numbers, "mlp.linear_1" as "mlp.1".
    return [
        (RANK[part],) if part in RANK else (0, *(int(number) for number in re.findall(r"\d+", part)))
        for part in name.split(".")
    ]
