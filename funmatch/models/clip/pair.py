"""A network of image and text as it was loaded: its image tower, how it reads texts, and how it compares the two."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from funmatch.errors import InputError
from funmatch.models.clip.class_texts import ClassTexts
from funmatch.models.clip.convert import Tower
from funmatch.runtime.disk.files import cache_home, write_atomically
from funmatch.runtime.log import info, track

CHUNK = 256
"""Texts that are read at a time."""
SAID = 4096
"""Texts from which it is said that they are being read: it may take minutes."""
LISTED, SHOWN = 3, 60
"""Classes that a message lists, and characters of a text that it shows, at most."""


@dataclass(frozen=True)
class Pair:
    """A network of image and text.

    Attributes:
        name: as the user gave it.
        tower: its image tower.
        card: what images it takes, as entries of timm's `pretrained_cfg`.
        encode: tokens of each text to embeddings of length 1, (n, dimensions).
        tokens: texts to the numbers of their tokens, as many as they need.
        limit: tokens of a text, at most.
        scale, bias: its logits are `scale` times the cosine, plus `bias`.
        sigmoid: whether it was trained by a sigmoid for each pair, not by a softmax over texts.
        content: all that decides how it reads texts, except for their tokens: a digest of its weights, and its
            configuration.
        notes: sentences that a user should know.
    """

    name: str
    tower: Tower
    card: dict[str, Any]
    encode: Callable[[list[str]], Tensor]
    tokens: Callable[[Sequence[str]], list[list[int]]]
    limit: int
    scale: float
    bias: float
    sigmoid: bool
    content: str
    notes: tuple[str, ...] = ()


def compare_with_texts(pair: Pair, texts: ClassTexts) -> tuple[dict[str, Tensor], str]:
    """Computes the layer that compares an image's embedding with those of classes.

    The embeddings of a class's texts are averaged, scaled to length 1, and multiplied by the network's own scale.

    Returns:
        `weight`, (classes, dimensions), and `bias`, (classes,); and a digest of all that they were made from.

    Raises:
        InputError: a text has more tokens than the network reads.
    """
    tokens = _checked_tokens(pair, texts)
    # Not of the result, whose last bits depend on the machine and its threads: a run must find the same teacher again.
    parts = json.dumps([pair.content, texts.names, tokens, [*map(len, texts.texts)], pair.scale, pair.bias])
    digest = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()
    stored = cache_home() / "texts" / f"{digest}.safetensors"
    shape = (len(texts.names), pair.tower.dimensions)
    found = _stored(stored, shape)
    if found is None:
        found = {"weight": pair.scale * _mean_embeddings(pair, texts), "bias": torch.full(shape[:1], pair.bias)}
        try:
            stored.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(stored, save(found))
        except OSError as error:
            info(f"the texts will be read again next time: {stored.parent} cannot be written ({error.strerror})")
    return found, digest


def _stored(path: Any, shape: tuple[int, int]) -> dict[str, Tensor] | None:
    """Returns the stored layer; None if there is none, or the file is damaged."""
    try:
        found = load(path.read_bytes())
    except (OSError, SafetensorError):
        return None
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    good = shapes == {"weight": shape, "bias": shape[:1]} and all(each.isfinite().all() for each in found.values())
    return found if good else None


def _checked_tokens(pair: Pair, texts: ClassTexts) -> list[list[int]]:
    tokens = pair.tokens(texts.all_texts)
    owners = [name for name, each in zip(texts.names, texts.texts, strict=True) for _ in each]
    # The longest text of each class, so that a message names each class once.
    longest: dict[str, tuple[int, str]] = {}
    for name, text, numbers in zip(owners, texts.all_texts, tokens, strict=True):
        longest[name] = max(longest.get(name, (0, "")), (len(numbers), text))
    long = {name: found for name, found in longest.items() if found[0] > pair.limit}
    if long:
        listed = "; ".join(
            f"{_short(name)} has {count} in {_short(text)}" for name, (count, text) in [*long.items()][:LISTED]
        )
        more = f"; and {len(long) - LISTED} more" if len(long) > LISTED else ""
        raise InputError(
            f"{pair.name} reads at most {pair.limit} tokens of a text, but {len(long)} of {len(longest)} classes of "
            f"{texts.source} need more: {listed}{more}. Shorten these names or their templates"
        )
    _check_apart(pair, texts, tokens)
    return tokens


def _short(text: str) -> str:
    """Returns a text for a message, cut where it is long."""
    return repr(text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…")


def _check_apart(pair: Pair, texts: ClassTexts, tokens: list[list[int]]) -> None:
    """Raises `InputError` if two classes are the same to the network: names in other case, or of unknown words."""
    counts, seen, start = [*map(len, texts.texts)], dict[str, str](), 0
    for name, count in zip(texts.names, counts, strict=True):
        read, start = repr(tokens[start : start + count]), start + count
        if read in seen:
            raise InputError(
                f"{pair.name} reads {seen[read]!r} and {name!r} of {texts.source} as the same tokens, so they "
                "cannot be told apart; name them otherwise, or describe them in a JSON file"
            )
        seen[read] = name


@torch.inference_mode()
def _mean_embeddings(pair: Pair, texts: ClassTexts) -> Tensor:
    """Returns the mean direction of each class's texts, (classes, dimensions)."""
    every = texts.all_texts
    if len(every) >= SAID:
        info(f"{pair.name}: reading {len(every):,} texts for {len(texts.names):,} classes, which is done once …")
    chunks: Iterable[list[str]] = [every[start : start + CHUNK] for start in range(0, len(every), CHUNK)]
    if len(every) >= SAID:
        chunks = track(chunks, math.ceil(len(every) / CHUNK), f"{CHUNK} texts")
    parts = [pair.encode(chunk) for chunk in chunks]
    embeddings = torch.cat(parts).float().split([*map(len, texts.texts)])
    means = torch.stack([each.mean(0) for each in embeddings])
    if not means.isfinite().all():
        raise InputError(f"{pair.name} has text embeddings that are not finite; its weights are damaged")
    return means / means.norm(dim=-1, keepdim=True)
