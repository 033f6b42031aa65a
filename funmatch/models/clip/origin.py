"""Origins of networks of image and text: an image tower with its weights, and the layer made of class names."""

from pathlib import Path
from typing import Any

from funmatch.errors import InputError
from funmatch.models.clip import names
from funmatch.models.clip.class_texts import ClassTexts
from funmatch.models.clip.network import OWN
from funmatch.models.clip.open_clip_models import load_open_clip
from funmatch.models.clip.pair import Pair, compare_with_texts
from funmatch.models.clip.transformers_models import fetch_transformers, load_transformers
from funmatch.models.origins.origin import Origin
from funmatch.models.weights import Lazily

SIGMOID = (
    "it was trained with a sigmoid for each class; here the softmax of its scaled similarities is taken, as of any "
    "classifier"
)


def clip_origin(name: str, weights: Path | None, kwargs: dict[str, Any], texts: ClassTexts | None) -> Origin:
    """Returns the origin of a network of image and text.

    Args:
        name: `clip:MODEL`.
        weights: a file with weights, for an architecture without a tag.
        kwargs: arguments of a constructor, of which it takes none.
        texts: the classes; None for the image tower alone, whose outputs are embeddings of length 1.

    Raises:
        InputError: the model cannot be loaded, or a class name is too long for it.
    """
    if kwargs:
        raise InputError(f"{name} takes no options of a constructor; leave out {', '.join(kwargs)}")
    pair = _load(name, weights)
    tower, card, notes = pair.tower, pair.card, pair.notes
    state = {f"tower.{key}": tensor for key, tensor in tower.state.items()}
    options = {"tower": tower.arguments, "dimensions": tower.dimensions}
    digest = None
    if texts:
        head, digest = compare_with_texts(pair, texts)
        state |= {f"head.{key}": tensor for key, tensor in head.items()}
        card = card | {"label_names": texts.names, "num_classes": len(texts.names), "task": "multiclass"}
        count = len(texts.all_texts)
        notes = (f"{len(texts.names):,} classes by {count:,} texts ({texts.source}), scale {pair.scale:.4g}", *notes)
        notes += (SIGMOID,) if pair.sigmoid else ()
    return Origin(name, OWN, Lazily(state, state.__getitem__, state.pop), options, card, notes=notes, content=digest)


def _load(name: str, weights: Path | None) -> Pair:
    model = names.parse(name)
    if weights and (model.tag or not model.architecture):
        raise InputError(f"{name} has its own weights; leave out {weights}")
    if model.architecture:
        return load_open_clip(name, model, weights)
    folder = model.folder or fetch_transformers(name, model.repository)
    if folder is not None and not _is_of_open_clip(folder):
        return load_transformers(name, folder)
    return load_open_clip(name, model, None)


def _is_of_open_clip(folder: Path) -> bool:
    """Returns whether a folder is OpenCLIP's, whose layout goes first where it has both and OpenCLIP is installed."""
    is_there = (folder / names.OPEN_CLIP_CONFIG).is_file()
    return is_there and (names.has_open_clip() or not (folder / names.TRANSFORMERS_CONFIG).is_file())
