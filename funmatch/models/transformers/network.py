"""Makes a network of transformers one that maps normalised images to logits, or to pooled features without a head."""

import inspect
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.models.inference.outputs import describe
from funmatch.models.transformers.library import quiet

POOLED = {
    "pooler": "its pooler's output",
    "projection": "its projection into the space that it shares with texts",
    "class token": "its class token",
    "mean": "the mean of its tokens",
}
"""What stands for a whole image in the outputs of a network without a head."""
PROBE_SIDE = 224
"""Side of the image on which a network that takes any is tried, pixels."""


class TransformersNet(nn.Module):
    """An image network of transformers, with the interface of timm's that this package uses.

    Attributes:
        model: of transformers.
        num_classes: number of logits; 0 where outputs are features.
        pooled: key of `POOLED`, of a network without a head of its own.
        flip: whether the network takes blue, green and red in this order.
        kind: name of its class.
        head: of classes for a network that has none of its own.
        interpolates: whether it can fit its position embedding to images of another size.
        side: of the images that it was built for, pixels; None where any will do.
    """

    def __init__(self, model: nn.Module, *, classes: int, flip: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.num_classes, self.flip, self.kind = classes, flip, type(model).__name__
        self.pooled = None if classes else _pooled_output(self.model)
        self.head: nn.Linear | None = None
        self.interpolates = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        self.side = own_side(self.model.config)

    def forward(self, images: Tensor) -> Tensor:
        output = self.run(images)
        if self.pooled is None:
            return output.logits
        features = self._pool(output)
        return self.head(features) if self.head is not None else features

    def run(self, images: Tensor, *, fit: bool = True) -> Any:
        """Returns the outputs of the network itself.

        Args:
            images: (n, channels, side, side), normalised.
            fit: whether its position embedding is fitted to images of another size.
        """
        more = {"interpolate_pos_encoding": True} if fit and self.interpolates and images.shape[-1] != self.side else {}
        return self.model(images.flip(1) if self.flip else images, **more)

    def read_parts(self, images: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Returns logits or None, pooled features and a map of tokens; arguments and shapes as of `answers.read`.

        Raises:
            InputError: the network has a head of its own, which hides its features.
        """
        if self.pooled is None:
            raise InputError(
                f"{type(self.model).__name__} has a head, so its tokens cannot be read beside it; take the network "
                "without a head (…Model), or leave out --match tokens"
            )
        output = self.run(images)
        features = self._pool(output)
        logits = self.head(features) if self.head is not None else None
        return logits, features, self._places(output.last_hidden_state, images)

    def _places(self, found: Tensor, images: Tensor) -> Tensor:
        """Returns a network's last states as a map, (n, height, width, dimensions)."""
        if found.ndim == 4:
            return found.permute(0, 2, 3, 1)
        patch = getattr(self.model.config, "patch_size", None)
        side = images.shape[-1] // patch if isinstance(patch, int) else 0
        # Deeper layers of some have fewer tokens than patches; class and register tokens come first.
        if not side or side**2 > found.shape[1]:
            side = math.isqrt(found.shape[1])
        return found[:, -(side**2) :].unflatten(1, (side, side))

    def _pool(self, output: Any) -> Tensor:
        match self.pooled:
            case "pooler":
                return output.pooler_output.flatten(1)
            case "projection":
                return output.image_embeds
            case "class token":
                return output.last_hidden_state[:, 0]
            case _:
                tokens = output.last_hidden_state
                return tokens.mean((2, 3)) if tokens.ndim == 4 else tokens.mean(1)

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Returns the layers that turn features into logits: two of a distilled network."""
        if self.pooled is not None:
            return (self.head,) if self.head is not None else ()
        prefix = f"{self.model.base_model_prefix}."
        return tuple(
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == self.num_classes and not name.startswith(prefix)
        )

    def reset_classifier(self, classes: int) -> None:
        """Gives the network new layers for another number of classes; with 0, outputs are what these layers would get.

        Raises:
            InputError: its head is not linear layers.
        """
        if self.pooled is not None:
            self.head = self._linear(self._width(), classes) if classes else None
        else:
            layers = self.get_classifier()
            names = [name for name, module in self.named_modules() if module in layers]
            if not names:
                raise InputError(
                    f"the head of {type(self.model).__name__} is not a torch.nn.Linear, so it cannot get another for "
                    f"{classes} classes"
                )
            for name in names:
                old: Any = self.get_submodule(name)
                new = self._linear(old.in_features, classes, bias=old.bias is not None) if classes else nn.Identity()
                self.set_submodule(name, new)
        self.num_classes = self.model.config.num_labels = classes
        if hasattr(self.model, "num_labels"):
            self.model.num_labels = classes

    def _linear(self, width: int, classes: int, *, bias: bool = True) -> nn.Linear:
        like = next(self.parameters())
        return nn.Linear(width, classes, bias=bias, device=like.device, dtype=like.dtype).train(self.training)

    @torch.no_grad()
    def _width(self) -> int:
        """Returns the number of pooled features."""
        training = self.training
        features = self._pool(self.eval().run(probe(self.model, self.side or PROBE_SIDE)))
        self.train(training)
        return features.shape[-1]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes activations in the backward pass, which needs less memory.

        Raises:
            NotImplementedError: the network cannot.
        """
        if not self.model.supports_gradient_checkpointing:
            raise NotImplementedError
        with quiet():
            self.model.gradient_checkpointing_enable() if enable else self.model.gradient_checkpointing_disable()


def own_side(config: Any) -> int | None:
    """Returns the side of the images that a network was built for, pixels; None where any will do, or none is square.

    Configurations hold a number, a height and a width, or these by name.
    """
    size = getattr(config, "image_size", None)
    size = size.values() if isinstance(size, Mapping) else size
    sides = {size} if isinstance(size, int) else {*size} if isinstance(size, Collection) else set()
    (side,) = sides if len(sides) == 1 else (None,)
    return side if isinstance(side, int) else None


@torch.no_grad()
def _pooled_output(model: Any) -> str:
    """Returns what stands for a whole image in a network's outputs, a key of `POOLED`; the network is tried.

    Raises:
        InputError: the network fails, or gives other outputs each time.
    """
    side, name = own_side(model.config) or PROBE_SIDE, type(model).__name__
    try:
        output, again = (model.eval()(probe(model, side)) for _ in range(2))
    except Exception as error:  # networks fail in as many ways as they are built
        raise InputError(f"{name} cannot take an image of {side} pixels: {first_line(error)}") from error
    if not isinstance(getattr(output, "last_hidden_state", None), Tensor):
        raise InputError(f"{name} returned {describe(output)}, in which its features are not known")
    if not torch.equal(output.last_hidden_state, again.last_hidden_state):
        raise InputError(f"{name} masks images at random, so it has no features to compare")
    if getattr(output, "image_embeds", None) is not None:
        return "projection"
    if getattr(output, "pooler_output", None) is not None:
        return "pooler"
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    return "class token" if {"cls_token", "class_embedding"} & names else "mean"


def probe(model: Any, side: int) -> Tensor:
    """Returns an image of zeros for a network of transformers, (1, channels, side, side)."""
    like = next(model.parameters())
    channels = getattr(model.config, "num_channels", 3)
    return torch.zeros(1, channels, side, side, device=like.device, dtype=like.dtype)
