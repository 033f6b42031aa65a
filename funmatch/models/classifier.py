"""Wraps a network with its normalisation as a classifier on [0, 1] images, and identifies what it computes."""

import copy
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.config.choices import EvalResample, TaskName
from funmatch.errors import InputError, first_line
from funmatch.models.inference.outputs import logits_of
from funmatch.models.names import GIVEN
from funmatch.runtime.functions import OWN
from funmatch.runtime.measured import code_stamp

LIBRARIES = {"funmatch", "timm", "torch", "torchvision", "transformers", "open_clip"}
"""Packages whose networks compute what they did, until another version of them is installed."""
TRAINING_ONLY = "matching_projector"
"""Name under which a student's network holds what training alone uses: in checkpoints, and not in finished students."""


@dataclass(frozen=True)
class Card:
    """Input and classes of a classifier.

    Attributes:
        name: as the user gave it.
        side: of the images that it was made for, pixels.
        crop_fraction: fraction of the resized short side that the evaluation view keeps.
        mean, std: of its normalisation, one number per channel, for images in [0, 1].
        classes: class names, or None where they are unknown.
        top1: accuracy when it was saved, in [0, 1], or None where it is unknown.
        squash: whether evaluation resizes images to a square regardless of their aspect (timm's crop_mode).
        side_known: whether `side` comes with the weights; else it is timm's default for the architecture.
        resample: how evaluation resizes images.
        floor: whether evaluation rounds half a pixel at the corner of its square down, as transformers does.
        task: what its outputs mean, a key of `ops.tasks.task.TASKS`; None where that is unknown.
    """

    name: str
    side: int
    crop_fraction: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None = None
    top1: float | None = None
    squash: bool = False
    side_known: bool = True
    resample: EvalResample = "antialias"
    floor: bool = False
    task: TaskName | None = None

    @property
    def side_notes(self) -> list[str]:
        """A note where the image size is a guess, else nothing."""
        if self.side_known:
            return []
        return [f"image size {self.side} is timm's default, not known from the file; set it with --side N"]


def crop_fraction(side: int, short_side: int) -> float:
    """Returns the fraction from which timm computes the short side: floor(side / fraction).

    Args:
        side: of the central crop, pixels.
        short_side: of the resized image, pixels.
    """
    fraction = side / short_side
    # Division and its inverse are rounded: without the next smaller number, timm would resize to a pixel less.
    return fraction if math.floor(side / fraction) == short_side else math.nextafter(fraction, 0)


class Classifier(nn.Module):
    """A network with its normalisation: (n, 3, side, side) in [0, 1] to logits (n, classes).

    Attributes:
        net: the network, for normalised images.
        card: its input and classes.
        num_classes: number of logits.
        options: arguments with which its constructor builds it again.
        function: `package.module:function` that makes the network, if it is not timm's.
        frozen_modules: modules of the network that are not trained and stay in eval mode.
        compiled_net: the network compiled for training, with its `readout`; or None.
        attention: makes the context in which the network computes in training mode (`ops.native.attention`).
        readout: reads what training compares of the network and normalised images, rows (n, width); None for logits.
        notes: sentences that a user should know.
        alternatives: options of its constructor (`key=value`) with which the same file is another network, where the
            file does not decide between them.
        content: digest of what its weights were computed from, where they are computed as it is loaded, since their
            last bits then depend on the machine; None where they were read.
    """

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
            net: maps normalised images to logits, or to an object that has them as `logits`.
            card: its input and classes.
            options: arguments of its constructor.
            num_classes: number of logits; None is `net.num_classes`.
            function: `package.module:function` that makes the network, if it is not timm's.
        """
        super().__init__()
        self.options, self.function = options or {}, function
        self.frozen_modules: tuple[str, ...] = ()
        self.compiled_net: Callable[[Tensor], Any] | None = None
        self.attention: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.readout: Callable[[nn.Module, Tensor], Tensor] | None = None
        self.notes: tuple[str, ...] = ()
        self.alternatives: tuple[str, ...] = ()
        self.content: str | None = None
        self.num_classes: int = vars(net)["num_classes"] if num_classes is None else num_classes
        self.net = with_safe_layouts(to_memory_format(net, torch.channels_last))
        self.card = card
        # Not persistent: the card is saved as configuration, and state dicts keep the network's own names.
        self.register_buffer("mean", torch.tensor(card.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(card.std).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Classifier":
        """Sets the mode as for any module, but leaves `frozen_modules` in eval mode."""
        super().train(mode)
        # Otherwise BatchNorm would keep changing the statistics of layers that are frozen.
        for name in self.frozen_modules:
            self.net.get_submodule(name).eval()
        return self

    def normalize(self, views: Tensor) -> Tensor:
        """Normalises views as the network expects."""
        if len(self.card.mean) == 1:  # a network for greyscale images
            views = views.mean(1, keepdim=True)
        return (views - self.mean) / self.std

    def forward(self, views: Tensor) -> Tensor:
        # What was compiled with a readout gives its rows.
        return self._answer_by(self.net if self.readout else self._net_in_mode(self.net), views)

    def answers(self, views: Tensor) -> Tensor:
        """Computes what training compares: rows of `readout`, or logits where there is none."""
        return self._answer_by(self._net_in_mode(self.answer_net), views)

    def answer_net(self, inputs: Tensor) -> Any:
        """Computes `answers` of normalised images."""
        return self.net(inputs) if self.readout is None else self.readout(self.net, inputs)

    def _net_in_mode(self, plain: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        # Compiled only in training mode: each other shape of evaluation would be compiled anew.
        return self.compiled_net if self.compiled_net and self.training else plain

    def _answer_by(self, net: Callable[[Tensor], Any], views: Tensor) -> Tensor:
        with self.attention() if self.training else nullcontext():
            output = net(self.normalize(views))
        return output if isinstance(output, Tensor) else logits_of(output, self.card.name)

    def __repr__(self) -> str:
        """One line, since a notebook shows it; `print(classifier.net)` shows the layers."""
        size = f"{self.count_parameters():,} parameters, {self.card.side} × {self.card.side} pixels"
        return f"Classifier({self.card.name}: {size}, {self.num_classes:,} classes)"

    def count_parameters(self) -> int:
        """Returns the number of parameters."""
        named = self.net.named_parameters()
        return sum(parameter.numel() for name, parameter in named if not name.startswith(TRAINING_ONLY))


def strip_training_only(classifier: Classifier) -> None:
    """Makes a student a plain network again, in place: without what training alone uses."""
    classifier.readout = None
    classifier.net._modules.pop(TRAINING_ONLY, None)


def weight_bytes(net: nn.Module) -> int:
    """Returns the size of a network's weights and buffers, bytes: that of its safetensors file without the header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in net.state_dict().values())


def timm_config(net: nn.Module) -> Mapping[str, Any]:
    """Returns timm's configuration of a network that it built; empty for any other."""
    config: Any = getattr(net, "pretrained_cfg", None)
    return config or {}


def to_memory_format(net: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Changes the memory layout of a network's kernels in place, and returns the network."""
    # `Module.to(memory_format=...)` fails for networks that have tensors of five axes.
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.ndim == 4 and not tensor.is_meta:
            tensor.data = tensor.data.contiguous(memory_format=layout)
    return net


def with_safe_layouts(net: nn.Module) -> nn.Module:
    """Gives some convolutions their input in the plain layout in training on the CPU, and returns the network.

    oneDNN, in torch 2.14 on CPUs with AVX-512, writes outside its memory in the backward pass of a 1 × 1 convolution of
    stride 2 with 3 to 8 input channels, if these come last: first layers of RepVGG, MobileOne and FastViT.
    """
    for conv in net.modules():
        if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (1, 1) or max(conv.stride) == 1:
            continue
        # Not twice, if a network is wrapped again.
        if 3 <= conv.in_channels <= 8 and _in_plain_layout not in conv._forward_pre_hooks.values():
            conv.register_forward_pre_hook(_in_plain_layout)
    return net


def _in_plain_layout(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Forward passes alone are safe, and stay as fast and as exact as they were.
    if torch.is_grad_enabled() and inputs[0].device.type == "cpu":
        return (inputs[0].contiguous(), *inputs[1:])
    return inputs


def fingerprint(model: nn.Module) -> str:
    """Returns a digest of all weights and buffers."""
    # Runs record it and refuse to resume with another, so names, order and bytes must stay as they are.
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


PLAIN_TYPES = (bool, int, float, str, type(None))


def function_of(classifier: Classifier) -> str:
    """Returns a digest of what a classifier computes apart from its weights: normalisation, modules, their settings.

    Settings are the public attributes of modules that are plain values: a stride, an eps, a number of heads.
    """
    # Two networks of equal weights can still differ (pooling, heads), and tapes and fixed teachers' logits with them.
    modules = [
        (name, f"{type(module).__module__}.{type(module).__qualname__}", sorted(_settings(module)))
        for name, module in classifier.net.named_modules()
    ]
    text = repr((classifier.card.mean, classifier.card.std, modules))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _settings(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yields names and values of a module's settings."""
    # "training" is a state, and private attributes hold hooks: neither changes what the network computes.
    for name, value in vars(module).items():
        parts = value if isinstance(value, tuple) else (value,)
        if not name.startswith("_") and name != "training" and all(isinstance(part, PLAIN_TYPES) for part in parts):
            yield name, repr(value)


def libraries_of(classifier: Classifier) -> dict[str, str] | None:
    """Returns the libraries whose code a network is, with their versions, and our own code; None for code of others.

    Others' code may change while all digests of the network stay, so what it computed must not be remembered.
    """
    packages = {type(module).__module__.partition(".")[0] for module in classifier.net.modules()}
    if classifier.function not in (None, *OWN) or classifier.card.name.startswith(GIVEN) or not packages <= LIBRARIES:
        return None
    versions = {name: str(getattr(sys.modules[name], "__version__", "")) for name in sorted(packages)}
    return versions | {"funmatch": code_stamp()}


@torch.inference_mode()
def check_side(classifier: Classifier, side: int, *, batch: int | None = None) -> None:
    """Raises `InputError` unless a classifier takes images of this side, and trains on batches of `batch` if given."""
    # A copy, since BatchNorm changes its statistics in training mode. At a batch of 1 it fails, as training would.
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
        raise InputError(f"{classifier.card.name} is not a classifier: its output has the shape {tuple(logits.shape)}")
