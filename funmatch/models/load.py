"""A name becomes a classifier on [0, 1] pictures; a classifier becomes a folder that timm loads by itself."""

import ast
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from funmatch.errors import InputError, unknown

EMBEDDED = Path(__file__).parent.parent / "embedded"
NAMED: dict[str, str | tuple[str, dict[str, Any]]] = {
    "fashion-mini-teacher": f"local-dir:{EMBEDDED / 'fashion-mini-teacher'}",
    "fashion-mini-student": ("resnet10t", {"channels": (16, 16, 16, 24), "stem_width": 8}),
}
"""Our own names: a folder with weights, or an architecture and what it is built with."""

# What timm says of an architecture's own weights, and is not true of ours.
ABOUT_OTHER_WEIGHTS = (
    "tag",
    "test_input_size",
    "test_crop_pct",
    "pool_size",
    "license",
    "origin_url",
    "paper_ids",
    "notes",
)

# What a network without weights of its own reads where nobody says otherwise.
OWN_CARDS = {"fashion-mini-student": {"input_size": (3, 32, 32), "crop_pct": 1.0}}


@dataclass(frozen=True)
class Card:
    """What a classifier wants to see and can say.

    Attributes:
        name: as a person gave it.
        side: of the pictures it was made for, pixels.
        crop_fraction: share of the resized short side that its evaluation view keeps.
        mean, std: of its normalisation, one number a channel, for pictures in [0, 1].
        classes: names of its classes, or None where it does not know them.
    """

    name: str
    side: int
    crop_fraction: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None = None


class Classifier(nn.Module):
    """A network together with its normalisation: takes (n, 3, side, side) in [0, 1], gives logits (n, classes)."""

    def __init__(self, net: nn.Module, card: Card) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)
        self.card = card
        self.register_buffer("mean", torch.tensor(card.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(-1, 1, 1), persistent=False)

    def forward(self, views: Tensor) -> Tensor:
        if len(self.card.mean) == 1:
            views = views.mean(1, keepdim=True)
        return self.net((views - self.mean) / self.std)

    @property
    def num_classes(self) -> int:
        return vars(self.net)["num_classes"]

    def count(self) -> int:
        """Parameters."""
        return sum(parameter.numel() for parameter in self.net.parameters())


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
    return Classifier(net, _card(name, net))


def model_folder(name: str) -> Path | None:
    """The folder with `config.json` and `model.safetensors` that a name stands for, if it stands for one."""
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


def save(classifier: Classifier, folder: Path, *, card: Card, about: dict[str, Any]) -> None:
    """Writes `model.safetensors` and `config.json` in timm's own layout.

    `timm.create_model("local-dir:<folder>", pretrained=True)` then gives the network with the same logits.

    Args:
        folder: an empty folder.
        card: what the network is to see and its classes' names.
        about: where it came from, kept under the key `funmatch`.
    """
    timm.models.save_for_hf(classifier.net, str(folder), safe_serialization=True)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key in ABOUT_OTHER_WEIGHTS:
        config["pretrained_cfg"].pop(key, None)
    config["pretrained_cfg"] |= {
        "input_size": [len(card.mean), card.side, card.side],
        "crop_pct": card.crop_fraction,
        "interpolation": "bilinear",
        "mean": list(card.mean),
        "std": list(card.std),
    }
    if card.classes:
        config["label_names"] = list(card.classes)
    config["funmatch"] = about
    path.write_text(json.dumps(config, indent=2))


def fingerprint(model: nn.Module) -> str:
    """A digest of all weights and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@torch.inference_mode()
def check_side(classifier: Classifier, side: int) -> None:
    """Raises `InputError` unless the classifier answers a picture of this side."""
    training = classifier.training
    try:
        logits = classifier.eval()(torch.zeros(1, 3, side, side))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            f"{classifier.card.name} cannot take views of {side} × {side} pixels ({_first_line(error)}); "
            f"it was made for {classifier.card.side}: choose another --side, or other model options"
        ) from error
    finally:
        classifier.train(training)
    if logits.ndim != 2:
        raise InputError(f"{classifier.card.name} is no classifier: it answers with a shape of {tuple(logits.shape)}")


def _known(architecture: str, name: str) -> str:
    base, _, tag = architecture.partition(".")
    if not timm.is_model(base):
        raise unknown("model", name, [*NAMED, *timm.list_models()], hint="`timm.list_models()` has them all")
    if tag and architecture not in (tagged := timm.list_pretrained(f"{base}.*")):
        raise unknown("pretrained tag", name, tagged)
    return architecture


def _create(architecture: str, kwargs: dict[str, Any], *, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(architecture, pretrained=pretrained, **kwargs)
    except OSError as error:
        raise InputError(
            f"cannot fetch the weights of {architecture} ({_first_line(error)}); "
            "without a network, give a file by --teacher-weights or --weights"
        ) from error
    except (TypeError, ValueError, AssertionError, RuntimeError, SafetensorError, KeyError) as error:
        asked = ", ".join(f"{key}={value}" for key, value in kwargs.items()) or "no options"
        raise InputError(f"timm cannot build {architecture} with {asked}: {_first_line(error)}") from error


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
        raise InputError(f"{path} is no state dict in .safetensors or .pt: {_first_line(error)}") from error
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


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
