"""Wraps networks that are not timm's: the result of a function in the user's code, or a module passed from Python."""

import inspect
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from funmatch.errors import InputError, first_line
from funmatch.models.classifier import Card, Classifier, timm_config
from funmatch.models.inference.features import lacks_head
from funmatch.models.inference.outputs import logits_of
from funmatch.models.names import GIVEN, is_function
from funmatch.models.transformers.config import is_backbone
from funmatch.models.transformers.network import TransformersNet, own_side
from funmatch.models.weights import is_fillable
from funmatch.runtime.functions import OWN, import_function

DEFAULT_SIDE = 224
"""Image size in pixels of a network that does not state its own."""


def call_function(name: str, kwargs: dict[str, Any], classes: int | None) -> nn.Module:
    """Calls the user's function that builds a network.

    Args:
        name: `package.module:function`; modules in the current folder are found too.
        kwargs: its arguments.
        classes: number of classes, passed as `num_classes` if the function takes it.

    Raises:
        InputError: there is no such function, it fails, or it returns something else.
    """
    build = import_function(name, "model")
    try:
        takes = inspect.signature(build).parameters
        if classes is not None and ("num_classes" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())):
            # In front of the user's own arguments, which may name another number.
            kwargs = {"num_classes": classes, **kwargs}
        # Standard output is for results, which scripts parse.
        with redirect_stdout(sys.stderr):
            net = build(**kwargs)
    except Exception as error:
        raise InputError(f"{name} fails with {kwargs or 'no arguments'}: {first_line(error)}") from error
    if not isinstance(net, nn.Module):
        raise InputError(f"{name} returned {type(net).__name__}, expected a torch.nn.Module or a funmatch.Classifier")
    return net


def build_empty(name: str, kwargs: dict[str, Any], classes: int | None) -> nn.Module:
    """Calls a function that builds a network whose weights come from a file; arguments and errors as `call_function`.

    Networks of `OWN` get no memory for their weights before these come (`weights.fill`), where their code allows that.
    """
    # A user's function may compute with its weights, or know nothing of devices without memory.
    if name in OWN:
        with suppress(InputError):
            with torch.device("meta"):
                net = call_function(name, kwargs, classes)
            if is_fillable(net):
                return net
    return call_function(name, kwargs, classes)


def wrap_module(name: str, net: nn.Module, side: int | None, kwargs: dict[str, Any] | None = None) -> Classifier:
    """Wraps a module as a classifier.

    Image size and normalization are those of its card if it is a classifier, of timm's configuration if it has one,
    else images are passed as they are, in [0, 1]; `funmatch.Classifier(net, funmatch.Card(...))` states others.

    Args:
        name: of the model, `package.module:function` if it came from one.
        net: the module.
        side: image size of a plain network, pixels; `DEFAULT_SIDE` if None.
        kwargs: arguments that the function was called with, saved with the model.

    Raises:
        InputError: its output is not one row of logits per image.
    """
    function = name if is_function(name) and not name.startswith(GIVEN) else None
    if isinstance(net, Classifier):
        net.card = replace(net.card, name=name)
        if function:
            net.options, net.function = kwargs or {}, function
        # Counted even here: the network may have been given another head since it was wrapped.
        net.num_classes = count_classes(net.net, net.card)
        return net
    if is_backbone(net):
        net = TransformersNet(net, classes=0)
    cfg = timm_config(net)
    if cfg:
        # timm keeps the three channels' statistics of a network that was built with another number of channels.
        channels = vars(net).get("in_chans", len(cfg["mean"]))
        mean, std = tuple(cfg["mean"])[:channels], tuple(cfg["std"])[:channels]
        card = Card(name, cfg["input_size"][-1], cfg.get("crop_pct") or 1.0, mean, std)
    else:
        # Networks of transformers say the size that they were built for.
        own = own_side(getattr(net, "config", None)) or getattr(net, "side", None)
        own = own if isinstance(own, int) else DEFAULT_SIDE
        card = Card(name, side or own, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Classifier(net, card, kwargs, count_classes(net, card), function)


@torch.no_grad()
def count_classes(net: nn.Module, card: Card) -> int:
    """Counts a network's classes by a forward pass of one image of the card's size; 0 for one that says it has none.

    Raises:
        InputError: the network fails, or its output is not (1, classes).
    """
    # In evaluation mode: BatchNorm fails on a single image in training mode, and would change its statistics.
    training = net.training
    try:
        output = net.eval()(torch.zeros(1, len(card.mean), card.side, card.side))
    except Exception as error:  # a network that does not fit the image can raise anything
        raise InputError(f"{card.name} cannot take an image of {card.side} pixels: {first_line(error)}") from error
    finally:
        net.train(training)
    logits = logits_of(output, card.name)
    if logits.ndim != 2:
        raise InputError(f"{card.name} is not a classifier: its output is {logits.shape}")
    return 0 if lacks_head(net) else logits.shape[-1]
