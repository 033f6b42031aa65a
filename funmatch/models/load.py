"""A name becomes a classifier on [0, 1] pictures."""

import ast
import json
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from funmatch.errors import InputError, first_line, unknown
from funmatch.models.classifier import Card, Classifier

EMBEDDED = Path(__file__).parent.parent / "embedded"
NAMED: dict[str, str | tuple[str, dict[str, Any]]] = {
    "fashion-mini-teacher": f"local-dir:{EMBEDDED / 'fashion-mini-teacher'}",
    "fashion-mini-student": ("resnet10t", {"channels": (16, 20, 20, 16), "stem_width": 8}),
}
"""Our own names: a folder with weights, or an architecture and what it is built with."""

# What a network without weights of its own reads where nobody says otherwise.
OWN_CARDS = {"fashion-mini-student": {"input_size": (3, 32, 32), "crop_pct": 1.0}}


def load(
    name: str,
    *,
    weights: Path | None = None,
    options: tuple[str, ...] = (),
    classes: int | None = None,
    side: int | None = None,
    pretrained: bool = False,
) -> Classifier:
    """Loads or builds the classifier that a person named.

    Args:
        name: a timm name, with or without a tag; `hf-hub:user/model`; `local-dir:path` or a folder of a model or of a
            run; or one of `NAMED`.
        weights: a `.safetensors` or `.pt` state dict for a timm name; its head decides the number of classes.
        options: `key=value` pairs for timm's constructor.
        classes: of a new network; None keeps what the name stands for.
        side: pixels of the views; networks with a fixed input are built for it.
        pretrained: whether a bare timm name means its pretrained weights.

    Raises:
        InputError: an unknown name (with near ones), weights that do not fit, a folder that holds no model.
    """
    kwargs = parse_options(options)
    own = NAMED.get(name, name)
    if isinstance(own, tuple):
        own, kwargs = own[0], {**own[1], **kwargs}
    folder = model_folder(own)
    if folder:
        if weights:
            raise InputError(f"{name} brings its own weights; leave out {weights}")
        net = _create(f"local-dir:{folder}", kwargs, pretrained=True)
        kwargs = json.loads((folder / "config.json").read_text()).get("model_args", {}) | kwargs
    elif weights:
        net = _from_weights(_known(own, name), weights, kwargs)
    else:
        hub = own.startswith("hf-hub:")
        architecture = own if hub else _known(own, name)
        if not hub and side and "img_size" not in kwargs and _net_config(architecture).get("fixed_input_size"):
            kwargs["img_size"] = side
        if classes is not None:
            kwargs["num_classes"] = classes
        net = _create(architecture, kwargs, pretrained=pretrained or hub or "." in architecture)
    if not isinstance(vars(net).get("num_classes"), int):
        raise InputError(f"{name} with these options is no classifier")
    kwargs.pop("num_classes", None)  # it stands beside them
    return Classifier(net, _card(name, net), kwargs)


def model_folder(name: str) -> Path | None:
    """The folder with `config.json` and `model.safetensors` that a name stands for, if it stands for one."""
    if timm.is_model(name.partition(".")[0]):
        return None  # also where a folder here has that name; ./name means the folder
    path = Path(name.removeprefix("local-dir:")).expanduser()
    if not path.is_dir():
        if name.startswith("local-dir:") or ("/" in name and not name.startswith("hf-hub:")):
            raise InputError(f"{path} is missing; wanted a folder of a run or of a model")
        return None
    for folder in (path / "student", path):
        if (folder / "model.safetensors").is_file() and (folder / "config.json").is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise InputError(f"the run {path} is not finished, so it has no student yet; start its command again first")
    raise InputError(f"{path} is not a run and not a model: it holds no config.json with model.safetensors")


def parse_options(options: tuple[str, ...]) -> dict[str, Any]:
    """`("channels=16,32", "drop_rate=0.1")` to `{"channels": (16, 32), "drop_rate": 0.1}`, as timm reads them."""
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals):
            raise InputError(f"model option {option!r} is not of the form key=value, e.g. channels=16,32,64,128")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def _known(architecture: str, name: str) -> str:
    base, _, tag = architecture.partition(".")
    if not timm.is_model(base):
        raise unknown("model", name, [*NAMED, *timm.list_models()], hint="`timm.list_models()` has them all")
    if tag and architecture not in (tagged := timm.list_pretrained(f"{base}.*")):
        raise unknown("pretrained tag", name, tagged)
    return architecture


def _create(architecture: str, kwargs: dict[str, Any], *, pretrained: bool) -> nn.Module:
    if pretrained and not architecture.startswith("local-dir:"):
        _give_up_on_an_unreachable_hub()
    try:
        return timm.create_model(architecture, pretrained=pretrained, **kwargs)
    except OSError as error:
        raise InputError(
            f"cannot fetch the weights of {architecture} ({first_line(error)}); "
            "without a network, give a file of weights, or a name without a tag for a student from scratch"
        ) from error
    except Exception as error:  # constructors fail in as many ways as they can be called wrongly
        asked = ", ".join(f"{key}={value}" for key, value in kwargs.items()) or "no options"
        raise InputError(f"timm cannot build {architecture} with {asked}: {first_line(error)}") from error


def _give_up_on_an_unreachable_hub() -> None:
    """Without a network, what was fetched before is used at once, and anything else fails at once."""
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def _from_weights(architecture: str, path: Path, kwargs: dict[str, Any]) -> nn.Module:
    """A timm network with the state dict of a file, every tensor of which must fit."""
    state = _state_dict(path)
    heads = _net_config(architecture)["classifier"]
    head = f"{heads if isinstance(heads, str) else heads[0]}.weight"
    if head not in state:
        raise InputError(f"{path} has no {head}, the head of {architecture}; is it of another architecture?")
    net = _create(architecture, {"num_classes": state[head].shape[0], **kwargs}, pretrained=False)
    wanted = net.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in state]
    problems += [f"{key} is not of this model" for key in state if key not in wanted]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, wanted {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state and state[key].shape != tensor.shape
    ]
    problems += [
        f"{key} holds values that are not finite" for key, tensor in state.items() if not tensor.isfinite().all()
    ]
    if problems:
        more = f" … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"{path} does not fit {architecture}: {'; '.join(problems[:5])}{more}")
    net.load_state_dict(state)
    return net


def _state_dict(path: Path) -> dict[str, Tensor]:
    path = path.expanduser()
    if not path.is_file():
        raise InputError(f"no weights file {path}")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # each format fails in its own many ways
        raise InputError(f"{path} is no state dict in .safetensors or .pt: {first_line(error)}") from error
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{path} is no state dict: wanted a dict of tensors by name")
    return state


def _card(name: str, net: nn.Module) -> Card:
    cfg: dict[str, Any] = {**vars(net)["pretrained_cfg"], **OWN_CARDS.get(name, {})}
    channels = vars(net).get("in_chans", cfg["input_size"][0])
    mean, std = (tuple(cfg[key])[:channels] for key in ("mean", "std"))
    names = cfg.get("label_names")
    return Card(name, cfg["input_size"][-1], cfg.get("crop_pct") or 1.0, mean, std, tuple(names) if names else None)


def _net_config(architecture: str) -> dict[str, Any]:
    """What timm knows of an architecture's default weights."""
    config = timm.get_pretrained_cfg(architecture)
    assert config is not None, f"timm lists {architecture} without a configuration"
    return config.to_dict()
