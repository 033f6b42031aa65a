"""Origins of BiT networks: published `.npz` checkpoints, and what Keras saved."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from funmatch.errors import InputError
from funmatch.models import bit, timm_models
from funmatch.models.keras.network import open_keras
from funmatch.models.names import check_architecture
from funmatch.models.origins.download import PAPER_FILES, paper_file
from funmatch.models.origins.origin import CONFIG_KEYS, Origin
from funmatch.models.tensorflow.preprocessing import Inputs
from funmatch.models.tensorflow.savedmodel import open_savedmodel
from funmatch.models.weights import Lazily


def npz_origin(
    path: Path, kwargs: dict[str, Any], card: dict[str, Any] | None = None, expected: str | None = None
) -> Origin:
    """Returns the origin of a published BiT checkpoint, which must be of the expected architecture."""
    architecture, size, state, usual = bit.read_npz(path)
    # As it was in the code that wrote such files, unless the user says otherwise.
    asked = kwargs.get(bit.PADDING)
    padding, kwargs = asked or usual, {key: value for key, value in kwargs.items() if key != bit.PADDING}
    if padding not in bit.STEM_TYPES:
        raise InputError(f"{bit.PADDING} is {padding!r}, expected {' or '.join(bit.STEM_TYPES)}")
    origin = _with_padding(_bit_origin(str(path), architecture, size, state, kwargs, card or {}, expected), padding)
    if asked:
        return origin
    other = next(each for each in bit.STEM_TYPES if each != usual)
    why = f"its first max-pool is padded with {usual}, as by {bit.WRITERS[usual]}, whose layout the file has"
    return replace(origin, notes=(why,), alternatives=(f"{bit.PADDING}={other}",))


def paper_origin(name: str, kwargs: dict[str, Any]) -> Origin:
    """Returns the origin of one of the paper's checkpoints, a key of `PAPER_FILES`, downloaded on first use."""
    path, (side, _) = paper_file(name), PAPER_FILES[name]
    # The paper evaluates crops of 128 pixels out of 160, and 224 out of 256: 32 more (section 4.1).
    return npz_origin(path, kwargs, {"input_size": (3, side, side), "crop_pct": side / (side + 32)})


def keras_origin(path: Path, kwargs: dict[str, Any], inputs: Inputs | None, expected: str | None = None) -> Origin:
    """Returns the origin of a BiT network that Keras saved as a SavedModel or a file.

    Args:
        path: of the folder or file.
        kwargs: arguments of the constructor.
        inputs: its mean and std; None takes those of its graph.
        expected: the architecture that it must have; None takes any.
    """
    saved = open_keras(path) if path.is_file() else open_savedmodel(path)
    # The user's `inputs` first: a graph shows what it does itself, not what was done to images before it.
    used = inputs or saved.inputs
    if used is None:
        raise InputError(
            f"{path} is a BiT network, but the images that it was trained on are unknown: {saved.why}; give their "
            f"range with `funmatch import {path} --inputs 0..1` (as they are) or `-1..1` (if it rescales them itself)"
        )
    notes = saved.notes
    if used != saved.inputs and not saved.is_plain:
        notes += (f"using the given --inputs, though {saved.why or f'its graph has mean and std {saved.inputs}'}",)
    card: dict[str, Any] = {"mean": used[0], "std": used[1]}
    card |= {"input_size": (3, saved.side, saved.side)} if saved.side else {}
    origin = _bit_origin(str(path), *bit.assemble(saved.arrays, str(path)), kwargs, card, expected)
    return _with_padding(replace(origin, notes=notes), saved.pool_padding)


def _with_padding(origin: Origin, padding: str) -> Origin:
    """Returns an origin whose network pads its first max-pool so, one of `bit.STEM_TYPES`."""
    if padding == "zeros":
        return origin
    if origin.architecture == bit.OWN:
        return replace(origin, kwargs={bit.PADDING: padding} | origin.kwargs)
    cfg = timm_models.pretrained_config(origin.architecture)
    return replace(
        origin,
        architecture=bit.OWN,
        kwargs=bit.size_of(origin.architecture) | {bit.PADDING: padding} | origin.kwargs,
        card={key: cfg[key] for key in CONFIG_KEYS} | origin.card,
    )


def _bit_origin(
    where: str,
    architecture: str,
    size: dict[str, Any],
    state: Lazily[Tensor],
    kwargs: dict[str, Any],
    card: dict[str, Any],
    expected: str | None = None,
) -> Origin:
    if expected is not None and check_architecture(expected, expected).partition(".")[0] != architecture:
        raise InputError(f"{where} has weights of {architecture}, not of {expected}")
    if "head.fc.bias" not in state:
        raise InputError(f"{where} has no head/bias, so it is not a classifier; expected a checkpoint with its head")
    # By the bias: tensors are read on access, and the kernel may have gigabytes.
    bias = state["head.fc.bias"]
    if bias.ndim != 1 or not len(bias):
        raise InputError(f"{where}: head/bias has shape {tuple(bias.shape)}, expected one number a class")
    kwargs = {"num_classes": len(bias), **size, **kwargs}
    # Networks of other sizes have no entry in timm; their input is that of every BiT network.
    usual = timm_models.pretrained_config("resnetv2_50x1_bit")
    known = {key: usual[key] for key in CONFIG_KEYS} if size else {}
    sided = "input_size" in card
    return Origin(where, architecture, state, kwargs, known | card, published=True, side_known=sided)
