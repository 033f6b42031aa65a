"""Finds where a model's weights come from: a run, a folder, a file, a published checkpoint or a SavedModel."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from funmatch.config.choices import RESAMPLED_BEFORE
from funmatch.errors import InputError, first_line
from funmatch.models import bit, custom, timm_models
from funmatch.models.checkpoints.checkpoint import Checkpoint, open_checkpoint, weights_in
from funmatch.models.checkpoints.fitting import fit
from funmatch.models.download import PAPER_FILES, paper_file
from funmatch.models.keras.network import open_keras
from funmatch.models.names import (
    BIT,
    GIVEN,
    HUB,
    KERAS,
    LOCAL,
    NAMED,
    OWN_CARDS,
    SAVEDMODEL,
    check_architecture,
    is_function,
    is_timm_name,
    no_model_at,
    own_architecture,
    renaming_note,
)
from funmatch.models.tensorflow.preprocessing import AS_GIVEN, Inputs
from funmatch.models.tensorflow.savedmodel import open_savedmodel
from funmatch.models.weights import Lazily
from funmatch.runtime.disk import records
from funmatch.runtime.disk.checksums import MANIFEST, verify_folder
from funmatch.runtime.disk.json_files import Damaged, parse_json

CONFIG_KEYS = ("input_size", "crop_pct", "mean", "std")
MODEL = {"architecture": str, "model_args?": dict, "funmatch?": dict, "pretrained_cfg?": dict}
"""What the `config.json` of a model holds in timm's layout; `timm_models.card_of` checks the rest."""
CARD = {"pretrained_cfg": dict.fromkeys(CONFIG_KEYS, Any), "num_classes?": int | None, "model_args?": dict | None}
"""What the `config.json` of a network that is not timm's holds."""


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
    """

    where: str
    architecture: str
    weights: Lazily[Tensor] | Checkpoint | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    published: bool = False
    notes: tuple[str, ...] = ()
    side_known: bool = True


def find_origin(
    name: str,
    kwargs: dict[str, Any],
    *,
    weights: Path | None,
    side: int | None,
    inputs: Inputs | None,
    classes: int | None = None,
) -> Origin | None:
    """Returns the origin of a model whose weights are files; None where timm or the user's own code brings them.

    Args:
        name, weights, side, inputs, classes: see `load`.
        kwargs: arguments of the constructor.
    """
    # First, since an .npz is always BiT's, whatever kind of name it comes with.
    if weights and weights.suffix == ".npz":
        return _npz_origin(weights, kwargs, expected=name)
    if weights and weights.suffix.lower() in KERAS:
        return keras_origin(weights, kwargs, inputs, expected=name)
    if weights and is_function(name):
        return _function_origin(name, weights, kwargs, side)
    if weights:
        return _state_origin(name, weights, kwargs, classes)
    if name.startswith(SAVEDMODEL):
        return keras_origin(Path(name.removeprefix(SAVEDMODEL)).expanduser(), kwargs, inputs)
    if name.startswith(GIVEN):
        raise InputError(f"{name} was given from Python as a module; give it again from there")
    if name.startswith(BIT):
        path = paper_file(name.removeprefix(BIT))
        paper_side, _ = PAPER_FILES[name.removeprefix(BIT)]
        # The paper evaluates crops of 128 pixels out of 160, and 224 out of 256: 32 more (section 4.1).
        card = {"input_size": (3, paper_side, paper_side), "crop_pct": paper_side / (paper_side + 32)}
        return _npz_origin(path, kwargs, card)
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        return _npz_origin(path, kwargs)
    if path.suffix.lower() in KERAS and path.is_file():
        return keras_origin(path, kwargs, inputs)
    own = NAMED.get(name, name)
    folder = model_folder(own) if isinstance(own, str) else None
    return _folder_origin(folder, kwargs) if folder else None


def model_folder(name: str) -> Path | None:
    """Returns the folder with `config.json` and weights that a name means; None if it means none."""
    # A timm name wins over a folder of the same name in the working directory; ./name means the folder.
    if name.startswith(HUB) or is_function(name) or is_timm_name(name):
        return None
    path = Path(name.removeprefix(LOCAL)).expanduser()
    if not path.is_dir():
        raise no_model_at(name, path, LOCAL if name.startswith(LOCAL) else "")
    for folder in (path / "student", path):
        if weights_in(folder) and (folder / "config.json").is_file():
            return folder
    if records.is_run(path):
        raise InputError(
            f"the run {path} is unfinished, so it has no student yet; start its command again to resume it"
        )
    if (path / "saved_model.pb").is_file():
        raise InputError(f"{path} is a SavedModel of Keras; pass {SAVEDMODEL}{path}")
    if found := weights_in(path):
        raise InputError(f"{path} has no config.json; pass the name of its architecture, and {found} as its weights")
    raise InputError(f"{path} is neither a run nor a model: it has no config.json with model.safetensors")


def _own_entries(own: dict[str, Any]) -> dict[str, Any]:
    """Returns what the card takes from our part of a `config.json`."""
    # Students were evaluated without antialias before there was a choice.
    before = RESAMPLED_BEFORE if "verb" in own else None
    return {"top1": own.get("top1"), "resample": own.get("eval_resample") or before}


def _folder_origin(folder: Path, kwargs: dict[str, Any]) -> Origin:
    """Returns the origin of a folder in timm's layout."""
    path = folder / "config.json"
    verify_model(folder)
    try:
        config = parse_json(path.read_bytes(), MODEL)
    except ValueError as error:
        raise InputError(_bad_config(path, error)) from None
    kwargs = config.get("model_args", {}) | kwargs
    architecture, card = config["architecture"], _own_entries(config.get("funmatch", {}))
    weights = weights_in(folder) or folder / "model.safetensors"
    if architecture.startswith(GIVEN):
        raise InputError(f"{folder} has the weights of a module that was given from Python; load them from there")
    if architecture == bit.OTHER_SIZES:
        return Origin(str(folder), architecture, open_checkpoint(weights), kwargs, card | _read_card(path))
    # A file that was downloaded must not decide which code runs, so the user has to name the function.
    if is_function(architecture):
        raise InputError(
            f"{folder} is a network made by the function {architecture}; if you trust that code, name it yourself: "
            f"{architecture}, with the weights {weights}"
        )
    # An import of a file that did not say it (`funmatch import`).
    known = config.get("funmatch", {}).get("side_known") is not False
    return Origin(str(folder), f"{LOCAL}{folder}", open_checkpoint(weights), kwargs, card, side_known=known)


def verify_model(folder: Path) -> None:
    """Raises `InputError` if the files of a model's folder are not those that were written; see `verify_folder`."""
    try:
        verify_folder(folder)
    except Damaged as error:
        mend = "start the command of its run again" if records.is_run(folder.parent) else "copy the folder again"
        raise InputError(f"{error}; {mend}, or remove {folder / MANIFEST} if you changed it yourself") from None


def _bad_config(path: Path, error: Exception) -> str:
    """Returns the message for a `config.json` that is not in timm's layout."""
    try:
        config = parse_json(path.read_bytes(), dict)
    except ValueError:
        config = {}
    if "model_type" in config or "architectures" in config:
        classes = config.get("architectures") or config.get("model_type")
        name = classes[0] if isinstance(classes, list) and classes else classes
        return (
            f"{path.parent} is a model of the transformers library ({name}), and only timm's layout is read; load it "
            "in a function of your own and pass package.module:function"
        )
    return f"{path} is not the configuration of a model ({first_line(error)})"


def _function_origin(name: str, path: Path, kwargs: dict[str, Any], side: int | None) -> Origin:
    """Returns the origin of weights for a network that the user's function makes."""
    # A run that trained such a network wrote its card beside the weights.
    config = path.parent / "config.json"
    card = _read_card(config) if config.is_file() else {}
    side = side or custom.DEFAULT_SIDE
    plain = {"input_size": (3, side, side), "mean": AS_GIVEN[0], "std": AS_GIVEN[1]}
    return Origin(str(path), name, open_checkpoint(path), card.pop("model_args", {}) | kwargs, plain | card)


def _read_card(path: Path) -> dict[str, Any]:
    """Reads the card of a network that is not timm's from its `config.json`."""
    try:
        config = parse_json(path.read_bytes(), CARD)
    except ValueError as error:
        raise InputError(_bad_config(path, error)) from None
    card = {key: config["pretrained_cfg"][key] for key in CONFIG_KEYS}
    return card | {key: config.get(key) for key in ("num_classes", "label_names", "model_args") if config.get(key)}


def _npz_origin(
    path: Path, kwargs: dict[str, Any], card: dict[str, Any] | None = None, expected: str | None = None
) -> Origin:
    """Returns the origin of a published BiT checkpoint, which must be of the expected architecture."""
    return _bit_origin(str(path), *bit.read_npz(path), kwargs, card or {}, expected)


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
    return replace(_bit_origin(str(path), *bit.assemble(saved.arrays, str(path)), kwargs, card, expected), notes=notes)


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


def _state_origin(name: str, path: Path, kwargs: dict[str, Any], classes: int | None) -> Origin:
    """Returns the origin of a state dict for a timm name; its head decides the number of classes."""
    own, kwargs = own_architecture(name, kwargs)
    if not is_timm_name(own) and (":" in name or "/" in name or Path(name).exists()):
        raise InputError(f"{name} has its own weights; leave out {path}")
    # With its tag, though the tag's weights are not used: it says what images such weights were trained on.
    architecture = check_architecture(own, name)
    checkpoint = open_checkpoint(path)
    wanted = timm_models.wanted_by(architecture, kwargs, classes)
    if not wanted.head:
        raise InputError(f"{architecture} is not a classifier, so {path} cannot be its weights")
    found = fit(checkpoint, wanted)
    # Distilled transformers have two heads, of the same number of classes.
    head = found.state.get(f"{wanted.heads[0]}.weight")
    if head is not None and head.ndim:
        kwargs = {"num_classes": head.shape[0], **kwargs}
    notes = renaming_note(own, architecture) + found.notes
    card = OWN_CARDS.get(name, {})
    # A tag names published weights, and so their image size.
    known = bool(card) or "." in own
    return Origin(str(path), architecture, found.state, kwargs, card, notes=notes, side_known=known)
