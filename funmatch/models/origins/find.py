"""Finds where a model's weights come from: a run, a folder, a file, a published checkpoint or a SavedModel."""

from functools import partial
from pathlib import Path
from typing import Any

from funmatch.errors import InputError
from funmatch.models import bit, timm_models
from funmatch.models.checkpoints.checkpoint import KEY, open_checkpoint
from funmatch.models.checkpoints.reading import read_weights
from funmatch.models.clip.class_texts import ClassTexts
from funmatch.models.clip.names import is_clip
from funmatch.models.clip.origin import clip_origin
from funmatch.models.names import (
    BIT,
    GIVEN,
    HUB,
    KERAS,
    NAMED,
    OWN_CARDS,
    SAVEDMODEL,
    check_architecture,
    is_function,
    is_timm_name,
    own_architecture,
    renaming_note,
)
from funmatch.models.origins.bit_files import keras_origin, npz_origin, paper_origin
from funmatch.models.origins.folders import folder_origin, function_origin, model_folder, verify_weights
from funmatch.models.origins.origin import Origin
from funmatch.models.tensorflow.preprocessing import Inputs
from funmatch.models.transformers.hub import hub_folder


def find_origin(
    name: str,
    kwargs: dict[str, Any],
    *,
    weights: Path | None,
    side: int | None,
    inputs: Inputs | None,
    classes: int | None = None,
    texts: ClassTexts | None = None,
) -> Origin | None:
    """Returns the origin of a model whose weights are files; None where timm or the user's own code brings them.

    Args:
        name, weights, side, inputs, classes, texts: see `load`.
        kwargs: arguments of the constructor.
    """
    if is_clip(name):
        return clip_origin(name, weights, kwargs, texts)
    is_npz = name.startswith(BIT) or ".npz" in (Path(name).suffix, weights and weights.suffix)
    if bit.PADDING in kwargs and not (is_npz or is_function(name)):
        raise InputError(f"{name}: {bit.PADDING} is an option of BiT's .npz files; leave it out")
    key, kwargs = kwargs.get(KEY), {name: value for name, value in kwargs.items() if name != KEY}
    if key is not None and not (weights and weights.suffix.lower() not in (".npz", *KERAS)):
        raise InputError(
            f"{name}: {KEY} chooses among the weights in a file of torch.save or safetensors; leave it out"
        )
    # First, since an .npz is always BiT's, whatever kind of name it comes with.
    if weights and weights.suffix == ".npz":
        return npz_origin(weights, kwargs, expected=name)
    if weights and weights.suffix.lower() in KERAS:
        return keras_origin(weights, kwargs, inputs, expected=name)
    if weights and is_function(name):
        return function_origin(name, weights, kwargs, side, key)
    if weights:
        return _state_origin(name, weights, kwargs, classes, key)
    if name.startswith(SAVEDMODEL):
        return keras_origin(Path(name.removeprefix(SAVEDMODEL)).expanduser(), kwargs, inputs)
    if name.startswith(GIVEN):
        raise InputError(f"{name} was given from Python as a module; give it again from there")
    if name.startswith(BIT):
        return paper_origin(name.removeprefix(BIT), kwargs)
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        return npz_origin(path, kwargs)
    if path.suffix.lower() in KERAS and path.is_file():
        return keras_origin(path, kwargs, inputs)
    own = NAMED.get(name, name)
    folder = (hub_folder(own) if own.startswith(HUB) else model_folder(own)) if isinstance(own, str) else None
    return folder_origin(folder, kwargs, side) if folder else None


def _state_origin(name: str, path: Path, kwargs: dict[str, Any], classes: int | None, key: Any) -> Origin:
    """Returns the origin of a state dict for a timm name; its head decides the number of classes."""
    own, kwargs = own_architecture(name, kwargs)
    if not is_timm_name(own) and (":" in name or "/" in name or Path(name).exists()):
        raise InputError(f"{name} has its own weights; leave out {path}")
    # With its tag, though the tag's weights are not used: it says what images such weights were trained on.
    architecture = check_architecture(own, name)
    verify_weights(path)
    checkpoint = open_checkpoint(path, key)
    wanted = timm_models.wanted_by(architecture, kwargs, classes)
    # A network without classes takes the features alone; a head in the file is left out.
    if not wanted.head and kwargs.get("num_classes") != 0:
        raise InputError(f"{architecture} is not a classifier, so {path} cannot be its weights")
    reading = read_weights(checkpoint, wanted, partial(timm_models.for_weights, architecture, kwargs, classes))
    found, kwargs = reading.found, {**reading.kwargs, **kwargs}
    # Distilled transformers have two heads, of the same number of classes.
    head = found.state.get(f"{wanted.heads[0]}.weight")
    if head is not None and head.ndim:
        kwargs = {"num_classes": head.shape[0], **kwargs}
    notes = renaming_note(own, architecture) + found.notes
    card = {**reading.card, **OWN_CARDS.get(name, {})}
    # A tag names published weights, and so their image size.
    known = name in OWN_CARDS or "." in own
    return Origin(str(path), architecture, found.state, kwargs, card, notes=notes, side_known=known)
