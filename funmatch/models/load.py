"""A name becomes a classifier on [0, 1] images."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.models import bit, custom, timm_models
from funmatch.models.classifier import Card, Classifier
from funmatch.models.download import PAPER_FILES, paper_file
from funmatch.models.tensorflow.preprocessing import AS_GIVEN, Inputs
from funmatch.models.tensorflow.savedmodel import open_savedmodel
from funmatch.models.weights import Lazily, fill, read_state
from funmatch.runtime import records

EMBEDDED = Path(__file__).parent.parent / "embedded"
NAMED: dict[str, str | tuple[str, dict[str, Any]]] = {
    "fashion-mini-teacher": f"local-dir:{EMBEDDED / 'fashion-mini-teacher'}",
    "fashion-mini-student": ("resnet10t", {"channels": (16, 20, 20, 16), "stem_width": 8}),
}
"""Our own names: a folder with weights, or an architecture and what it is built with."""

# What a network without weights of its own reads where nobody says otherwise.
OWN_CARDS = {"fashion-mini-student": {"input_size": (3, 32, 32), "crop_pct": 1.0}}
SAVEDMODEL, BIT, HUB, LOCAL = "savedmodel:", "bit:", "hf-hub:", "local-dir:"


@dataclass(frozen=True)
class Origin:
    """Where a network's weights come from, and what is known of them beside what timm knows.

    Attributes:
        where: for messages.
        architecture: as timm names it, `local-dir:folder` or a function's name.
        weights: by the network's own names; None where timm brings them, or there are none.
        kwargs: of the constructor.
        card: what overrides timm's `pretrained_cfg`.
        published: whether the network is a BiT one with the published eps.
        notes: what a person should know of it.
    """

    where: str
    architecture: str
    weights: Lazily[Tensor] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    published: bool = False
    notes: tuple[str, ...] = ()


def load(
    name: str | nn.Module,
    *,
    weights: Path | None = None,
    options: tuple[str, ...] = (),
    classes: int | None = None,
    side: int | None = None,
    pretrained: bool = False,
    inputs: Inputs | None = None,
) -> Classifier:
    """Loads or builds the classifier that a person named.

    Args:
        name: a timm name, with or without a tag; `hf-hub:user/model`; `local-dir:path` or a folder of a model or of a
            run; a BiT checkpoint `path.npz`, or `bit:` and one of `fetch.PAPER`; `savedmodel:path` of a BiT network;
            `package.module:function`; one of `NAMED`; or a module.
        weights: a `.safetensors`, `.pt` or `.npz` file for a timm name; its head decides the number of classes.
        options: `key=value` pairs for the constructor.
        classes: wanted of a student: pretrained weights with another number get a new head of zeros. None keeps what
            the name stands for.
        side: pixels of the views; networks with a fixed input are built for it.
        pretrained: whether a bare timm name means its pretrained weights.
        inputs: mean and standard deviation, for images in [0, 1], of what a SavedModel was trained on; by default as
            its graph says.

    Raises:
        InputError: an unknown name (with near ones), weights that do not fit, a folder that holds no model.
    """
    kwargs = timm_models.parse_options(options)
    weights = Path(weights) if weights else None
    if isinstance(name, nn.Module):
        if kwargs or weights:
            raise InputError(f"a module is taken as it is; leave out {weights or ', '.join(options)}")
        return custom.wrap_module(custom.GIVEN + type(name).__name__, name, side)
    if classes is not None and kwargs.get("num_classes", classes) != classes:
        raise InputError(f"{name}: num_classes={kwargs['num_classes']} is said, but there are {classes} classes")
    if weights and weights.suffix == ".npz":
        return _filled(name, _of_npz(weights.expanduser(), kwargs, wanted=name), classes, side)
    if weights and custom.is_function(name):
        return _filled(name, _of_function(name, weights.expanduser(), kwargs, side), classes, side)
    if weights:
        return _filled(name, _of_state(name, weights.expanduser(), kwargs), classes, side)
    if name.startswith(SAVEDMODEL):
        folder = Path(name.removeprefix(SAVEDMODEL)).expanduser()
        return _filled(name, _of_savedmodel(folder, kwargs, inputs), classes, side)
    if origin := _with_weights(name, kwargs):
        return _filled(name, origin, classes, side)
    if custom.is_function(name):
        return custom.wrap_module(name, custom.call_function(name, kwargs, classes), side, kwargs)
    return _by_timm(name, kwargs, classes=classes, side=side, pretrained=pretrained)


def _with_weights(name: str, kwargs: dict[str, Any]) -> Origin | None:
    """The origin of a name that stands for files with weights; None for any other."""
    if name.startswith(custom.GIVEN):
        raise InputError(f"{name} was given from Python as a module; give it again from there")
    if name.startswith(BIT):
        path = paper_file(name.removeprefix(BIT))
        side, _ = PAPER_FILES[name.removeprefix(BIT)]
        # The paper's evaluation views are 128 of 160 pixels and 224 of 256: 32 more (section 4.1).
        return _of_npz(path, kwargs, {"input_size": (3, side, side), "crop_pct": side / (side + 32)})
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        return _of_npz(path, kwargs)
    if path.suffix in (".pt", ".pth", ".safetensors", ".bin") and path.is_file():
        raise InputError(f"{name} holds weights alone; name its architecture, and give the file as its weights")
    own = NAMED.get(name, name)
    folder = model_folder(own) if isinstance(own, str) else None
    return _of_folder(folder, kwargs) if folder else None


def _filled(name: str, origin: Origin, classes: int | None, side: int | None) -> Classifier:
    """The classifier of an origin, for views of a side."""
    if custom.is_function(origin.architecture):
        net = custom.call_function(origin.architecture, origin.kwargs, origin.card.get("num_classes"))
        net = net.net if isinstance(net, Classifier) else net
    else:
        net = timm_models.create_empty(origin.architecture, origin.kwargs)
    if origin.published:
        bit.with_published_eps(net)
    if origin.weights is not None:
        fill(net, origin.weights, origin.architecture.removeprefix(LOCAL), origin.where)
    kwargs = origin.kwargs | (timm_models.for_side(net, side) if side else {})
    made = _with_head(net, timm_models.card_of(name, net, origin.card), kwargs, classes)
    made.function = origin.architecture if custom.is_function(origin.architecture) else None
    made.notes = origin.notes
    return made


def _with_head(net: nn.Module, card: Card, kwargs: dict[str, Any], classes: int | None) -> Classifier:
    """The classifier, with a new head where another number of classes is wanted."""
    has = vars(net).get("num_classes") or custom.count_classes(net, card)
    if classes is not None and has != classes:
        net, card = timm_models.with_zero_head(net, classes), replace(card, classes=None, top1=None)
    kwargs = {key: value for key, value in kwargs.items() if key != "num_classes"}  # it stands beside them
    return Classifier(net, card, kwargs, classes or has)


def _by_timm(
    name: str, kwargs: dict[str, Any], *, classes: int | None, side: int | None, pretrained: bool
) -> Classifier:
    """A network that timm builds, and may bring the weights of."""
    own = NAMED.get(name, name)
    if isinstance(own, tuple):
        own, kwargs = own[0], {**own[1], **kwargs}
    hub = own.startswith(HUB)
    architecture = own if hub else timm_models.is_known(own, name, tuple(NAMED))
    if not hub and side and "img_size" not in kwargs and timm_models.net_config(architecture).get("fixed_input_size"):
        kwargs["img_size"] = side
    brings = pretrained or hub or "." in architecture
    if classes is not None and not brings:
        kwargs["num_classes"] = classes
    net = timm_models.create(architecture, kwargs, pretrained=brings)
    if not isinstance(vars(net).get("num_classes"), int):
        raise InputError(f"{name} with these options is no classifier")
    cfg = vars(net)["pretrained_cfg"]
    if brings and "_bit" in (cfg.get("architecture") or "") and (cfg.get("tag") or "").startswith("goog"):
        bit.with_published_eps(net)  # timm's weights are the published ones
    return _with_head(net, timm_models.card_of(name, net, OWN_CARDS.get(name, {})), kwargs, classes)


def brings_weights(name: str) -> bool:
    """Whether a name alone stands for weights, too."""
    own = NAMED.get(name, name)
    return isinstance(own, str) and not timm.is_model(own) and not custom.is_function(own)


def model_folder(name: str) -> Path | None:
    """The folder with `config.json` and `model.safetensors` that a name stands for, if it stands for one."""
    if timm.is_model(name.partition(".")[0]):
        return None  # also where a folder here has that name; ./name means the folder
    path = Path(name.removeprefix(LOCAL)).expanduser()
    if not path.is_dir():
        if name.startswith(LOCAL) or ("/" in name and not name.startswith(HUB)):
            raise InputError(f"{path} is missing; wanted a folder of a run or of a model")
        return None
    for folder in (path / "student", path):
        if (folder / "model.safetensors").is_file() and (folder / "config.json").is_file():
            return folder
    if records.is_run(path):
        raise InputError(f"the run {path} is not finished, so it has no student yet; start its command again first")
    if (path / "saved_model.pb").is_file():
        raise InputError(f"{path} is a SavedModel of Keras; say {SAVEDMODEL}{path}")
    raise InputError(f"{path} is not a run and not a model: it holds no config.json with model.safetensors")


def _of_folder(folder: Path, kwargs: dict[str, Any]) -> Origin:
    """A folder in timm's layout."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        kwargs = config.get("model_args", {}) | kwargs
        architecture, about = str(config["architecture"]), config.get("funmatch", {})
        card = {"top1": about.get("top1")}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} is not the configuration of a model: {first_line(error)}") from error
    weights = folder / "model.safetensors"
    if architecture.startswith(custom.GIVEN):
        raise InputError(f"{folder} holds the weights of a module that was given from Python; load them from there")
    if architecture == bit.OTHER_SIZES:
        return Origin(str(folder), architecture, read_state(weights), kwargs, card | _of_neighbour(path))
    if custom.is_function(architecture):  # a file must not decide which code runs
        raise InputError(
            f"{folder} is of a network that the function {architecture} makes; if you trust that code, name it "
            f"yourself: {architecture}, with the weights {weights}"
        )
    return Origin(str(folder), f"{LOCAL}{folder}", read_state(weights), kwargs, card)


def _of_function(name: str, path: Path, kwargs: dict[str, Any], side: int | None) -> Origin:
    """The weights of a network that the user's function makes; a configuration beside them says how it sees."""
    neighbour = path.parent / "config.json"
    card = _of_neighbour(neighbour) if neighbour.is_file() else {}
    plain = {
        "input_size": (3, side or custom.DEFAULT_SIDE, side or custom.DEFAULT_SIDE),
        "mean": AS_GIVEN[0],
        "std": AS_GIVEN[1],
    }
    return Origin(str(path), name, read_state(path), card.pop("model_args", {}) | kwargs, plain | card)


def _of_neighbour(path: Path) -> dict[str, Any]:
    """What the configuration of a network that is not timm's says of it."""
    try:
        config = json.loads(path.read_text())
        found = {key: config["pretrained_cfg"][key] for key in ("input_size", "crop_pct", "mean", "std")}
        return found | {key: config.get(key) for key in ("num_classes", "label_names", "model_args") if config.get(key)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not the configuration of a model: {first_line(error)}") from error


def _of_npz(
    path: Path, kwargs: dict[str, Any], card: dict[str, Any] | None = None, wanted: str | None = None
) -> Origin:
    """A published BiT checkpoint, of the architecture that is wanted."""
    return _of_bit(str(path), *bit.read_npz(path), kwargs, card or {}, wanted)


def _of_savedmodel(folder: Path, kwargs: dict[str, Any], inputs: Inputs | None) -> Origin:
    """A BiT network that Keras saved. It sees what its graph says, where that is all that was done to images."""
    saved = open_savedmodel(folder)
    given = inputs or saved.inputs
    if given is None:
        raise InputError(
            f"{folder} holds a BiT network of which it cannot be told what images it was trained on: {saved.why}; "
            f"say it by `funmatch import {folder} --inputs 0..1` (as they are) or `-1..1` (if it rescales them itself)"
        )
    notes = saved.notes
    if given != saved.inputs and not saved.is_plain:
        notes += (f"its inputs are taken as said, though {saved.why or f'its graph has mean and std {saved.inputs}'}",)
    origin = _of_bit(str(folder), *bit.assemble(saved.arrays, str(folder)), kwargs, {"mean": given[0], "std": given[1]})
    return replace(origin, notes=notes)


def _of_bit(
    where: str,
    architecture: str,
    size: dict[str, Any],
    state: Lazily[Tensor],
    kwargs: dict[str, Any],
    card: dict[str, Any],
    wanted: str | None = None,
) -> Origin:
    if wanted is not None and timm_models.is_known(wanted, wanted).partition(".")[0] != architecture:
        raise InputError(f"{where} holds weights of {architecture}, not of {wanted}")
    if "head.fc.bias" not in state:
        raise InputError(f"{where} has no head/bias, so it is no classifier; wanted a checkpoint with its head")
    kwargs = {"num_classes": len(state["head.fc.bias"]), **size, **kwargs}
    usual = timm_models.net_config("resnetv2_50x1_bit")
    about = {key: usual[key] for key in ("input_size", "crop_pct", "mean", "std")} if size else {}
    return Origin(where, architecture, state, kwargs, about | card, published=True)


def _of_state(name: str, path: Path, kwargs: dict[str, Any]) -> Origin:
    """A state dict for a timm name, whose head decides how many classes there are."""
    own = NAMED.get(name, name)
    if isinstance(own, tuple):
        own, kwargs = own[0], {**own[1], **kwargs}
    if not timm.is_model(own.partition(".")[0]) and (":" in name or "/" in name or Path(name).exists()):
        raise InputError(f"{name} brings its own weights; leave out {path}")
    architecture = timm_models.is_known(own, name, tuple(NAMED))  # with its tag, which says what it was trained to see
    state = read_state(path)
    heads = timm_models.net_config(architecture).get("classifier")
    if not heads:
        raise InputError(f"{architecture} is no classifier, so {path} cannot be weights of one")
    head = f"{heads if isinstance(heads, str) else heads[0]}.weight"
    if head not in state or state[head].ndim == 0:
        raise InputError(f"{path} has no {head}, the head of {architecture}; is it of another architecture?")
    kwargs = {"num_classes": state[head].shape[0], **kwargs}
    return Origin(str(path), architecture, state, kwargs, OWN_CARDS.get(name, {}))
