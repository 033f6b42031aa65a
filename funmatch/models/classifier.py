"""A network with its normalisation: what it wants to see, and how it becomes a folder that timm loads by itself."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn

from funmatch.errors import InputError, first_line

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

GIVEN = "python:"
"""Before the class name of a module that was given from Python, where a run's record needs a name for it."""

OTHER_SIZES = "funmatch.models.bit:network"
"""What stands for the architecture of a network that is built as BiT is, but is of none of timm's sizes."""

PUBLISHED_EPS, TIMM_EPS = 1e-10, 1e-8
"""Of the weight standardisation in BiT networks: as they were published, and as timm builds them."""


@dataclass(frozen=True)
class Card:
    """What a classifier wants to see and can say.

    Attributes:
        name: as a person gave it.
        side: of the images it was made for, pixels.
        crop_fraction: share of the resized short side that its evaluation view keeps.
        mean, std: of its normalisation, one number a channel, for images in [0, 1].
        classes: names of its classes, or None where it does not know them.
        top1: its accuracy when it was saved, in [0, 1], or None where nobody said.
        squash: whether evaluation resizes both sides alike, whatever shape that gives things (timm's crop_mode).
    """

    name: str
    side: int
    crop_fraction: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None = None
    top1: float | None = None
    squash: bool = False


class Classifier(nn.Module):
    """A network together with its normalisation: takes (n, 3, side, side) in [0, 1], gives logits (n, classes)."""

    def __init__(
        self,
        net: nn.Module,
        card: Card,
        options: dict[str, Any] | None = None,
        num_classes: int | None = None,
        function: str | None = None,
    ) -> None:
        """Wraps a network.

        Args:
            net: takes normalised images, gives logits (or an object that has them as `logits`).
            card: what it wants to see.
            options: what its constructor was given, so that it can be given it again.
            num_classes: how many classes it answers; by default as `net.num_classes` says.
            function: `package.module:function` that makes such a network, if it is not timm's.
        """
        super().__init__()
        self.options, self.function = options or {}, function
        self.frozen_modules: tuple[str, ...] = ()
        self.compiled_net: Callable[[Tensor], Any] | None = None  # the network compiled, for training
        self.notes: tuple[str, ...] = ()  # what a person should know of it
        self.num_classes: int = vars(net)["num_classes"] if num_classes is None else num_classes
        self.net = to_memory_format(net, torch.channels_last)
        self.card = card
        self.register_buffer("mean", torch.tensor(card.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Classifier":
        """As of any module; but the modules of the network that `still` names, which are not taught, stay in eval."""
        super().train(mode)
        for name in self.frozen_modules:
            self.net.get_submodule(name).eval()
        return self

    def normalize(self, views: Tensor) -> Tensor:
        """Views as the network itself wants them."""
        if len(self.card.mean) == 1:
            views = views.mean(1, keepdim=True)
        return (views - self.mean) / self.std

    def forward(self, views: Tensor) -> Tensor:
        net = self.compiled_net if self.compiled_net and self.training else self.net
        answer = net(self.normalize(views))
        return getattr(answer, "logits", answer)

    def count_parameters(self) -> int:
        """Parameters."""
        return sum(parameter.numel() for parameter in self.net.parameters())


def timm_config(net: nn.Module) -> Mapping[str, Any]:
    """What timm wrote on a network that it built; empty for any other."""
    found: Any = getattr(net, "pretrained_cfg", None)
    return found or {}


def to_memory_format(net: nn.Module, layout: torch.memory_format) -> nn.Module:
    """The network with its kernels laid out anew in memory, in place. (`Module.to` refuses kernels of five axes.)"""
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.ndim == 4 and not tensor.is_meta:
            tensor.data = tensor.data.contiguous(memory_format=layout)
    return net


def save(classifier: Classifier, folder: Path, *, card: Card, about: dict[str, Any]) -> None:
    """Writes `model.safetensors` and `config.json` in timm's own layout.

    `timm.create_model("local-dir:<folder>", pretrained=True)` then gives the network with the same logits. (A network
    that is not timm's, or not as timm builds it, is written alike, for this package alone to load.)

    Args:
        classifier: on the CPU; it is laid out anew in memory, and its BiT kernels may be scaled, so that timm's own
            eps gives the same function.
        folder: an empty folder.
        card: what the network is to see and its classes' names.
        about: where it came from, kept under the key `funmatch`.
    """
    to_memory_format(classifier.net, torch.contiguous_format)
    _untie(classifier.net)
    if classifier.function or not _as_timms(classifier, folder, card, about):
        for file in folder.iterdir():
            file.unlink()
        if classifier.function == OTHER_SIZES:
            rescale_for_timm(classifier.net)
        save_file(classifier.net.state_dict(), folder / "model.safetensors")
        architecture = classifier.function or classifier.card.name
        config = {"architecture": architecture, "num_classes": classifier.num_classes, "pretrained_cfg": {}}
        _complete(config, classifier, folder, card, about)


def _as_timms(classifier: Classifier, folder: Path, card: Card, about: dict[str, Any]) -> bool:
    """Writes a network that timm built; False if it is none, or timm would build another."""
    net = classifier.net
    if not timm_config(net):
        return False
    given = classifier.card.name.startswith(GIVEN)  # a module can have been changed by hand
    before = copy.deepcopy(net) if given else net
    rescale_for_timm(net)
    try:
        timm.models.save_for_hf(net, str(folder), safe_serialization=True)
        (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone
        _complete(json.loads((folder / "config.json").read_text()), classifier, folder, card, about)
        if not given or _same(before, timm.create_model(f"local-dir:{folder}", pretrained=True), card):
            return True
    except (ValueError, TypeError, RuntimeError):
        if not given:
            raise
    classifier.net = before
    return False


@torch.no_grad()
def _same(net: nn.Module, other: nn.Module, card: Card) -> bool:
    """Whether two networks answer alike."""
    probe = torch.randn(2, len(card.mean), card.side, card.side, generator=torch.Generator().manual_seed(0))
    wanted, got = net.eval()(probe), other.eval()(probe)
    return torch.allclose(wanted, got, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def _complete(config: dict[str, Any], classifier: Classifier, folder: Path, card: Card, about: dict[str, Any]) -> None:
    """Writes the configuration of a network with what its card says."""
    for key in ABOUT_OTHER_WEIGHTS:
        config["pretrained_cfg"].pop(key, None)
    config["pretrained_cfg"] |= {
        "input_size": [len(card.mean), card.side, card.side],
        "crop_pct": card.crop_fraction,
        "crop_mode": "squash" if card.squash else "center",
        "interpolation": "bilinear",
        "mean": list(card.mean),
        "std": list(card.std),
    }
    if card.classes:
        config["label_names"] = list(card.classes)
    config["model_args"] = config.get("model_args", {}) | classifier.options
    config["funmatch"] = about
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def _untie(net: nn.Module) -> None:
    """Gives tensors that share their memory a place each, since a file of tensors cannot say that they are one."""
    seen: set[int] = set()
    for owner in net.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.data_ptr() in seen and parameter.numel():
                setattr(owner, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
            seen.add(parameter.data_ptr())


@torch.no_grad()
def rescale_for_timm(net: nn.Module) -> None:
    """Scales standardised kernels so that with timm's eps they are the same function as with the published one.

    (c·w − c·μ) / √(c²·σ² + eps) is (w − μ) / √(σ² + eps / c²), so c² is the ratio of the two.
    """
    for conv in net.modules():
        if isinstance(conv, StdConv2d) and conv.eps == PUBLISHED_EPS:
            conv.weight.mul_((TIMM_EPS / PUBLISHED_EPS) ** 0.5)
            conv.eps = TIMM_EPS


def fingerprint(model: nn.Module) -> str:
    """A digest of all weights and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


PLAIN = (bool, int, float, str, type(None))


def function_of(classifier: Classifier) -> str:
    """A digest of what a classifier computes beside its weights: its normalisation, its modules and their settings.

    Settings are the public attributes of modules that are plain values: a stride, an eps, a number of heads.
    """
    told = [
        (name, f"{type(module).__module__}.{type(module).__qualname__}", sorted(_settings(module)))
        for name, module in classifier.net.named_modules()
    ]
    words = repr((classifier.card.mean, classifier.card.std, told))
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def _settings(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Names and values; whether it is being taught, and who listens to it, is no setting."""
    for name, value in vars(module).items():
        parts = value if isinstance(value, tuple) else (value,)
        if not name.startswith("_") and name != "training" and all(isinstance(part, PLAIN) for part in parts):
            yield name, repr(value)


@torch.inference_mode()
def check_side(classifier: Classifier, side: int, *, batch: int | None = None) -> None:
    """Raises `InputError` unless the classifier answers images of this side, and can be taught `batch` at a time."""
    probe = copy.deepcopy(classifier).train() if batch else classifier.eval()
    try:
        logits = probe(torch.zeros(min(batch or 1, 2), 3, side, side))
    except Exception as error:  # networks fail in as many ways as they can be built wrongly
        batches = f" in batches of {batch}" if batch else ""
        raise InputError(
            f"{classifier.card.name} cannot take views of {side} × {side} pixels{batches} ({first_line(error)}); "
            f"it was made for {classifier.card.side}: choose another --side, a larger --batch, or other model options"
        ) from error
    if logits.ndim != 2:
        raise InputError(f"{classifier.card.name} is no classifier: it answers with a shape of {tuple(logits.shape)}")
