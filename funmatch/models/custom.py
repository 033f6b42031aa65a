"""Networks that are not timm's: a function of the user's own code that returns one, or a module given from Python."""

import importlib
import inspect
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from funmatch.errors import InputError, first_line
from funmatch.models.classifier import GIVEN, Card, Classifier, timm_config

DEFAULT_SIDE = 224  # pixels, where nobody says for which the network was made


def is_function(name: str) -> bool:
    """Whether a name is of the form `package.module:function`."""
    module, colon, function = name.partition(":")
    return bool(colon) and function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def call_function(name: str, kwargs: dict[str, Any], classes: int | None) -> nn.Module:
    """What the user's function returns.

    Args:
        name: `package.module:function`; modules in the current folder are found too.
        kwargs: its arguments.
        classes: given as `num_classes`, if the function takes that.

    Raises:
        InputError: there is no such function, it fails, or it returns something else.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        with redirect_stdout(sys.stderr):
            make = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise InputError(f"cannot import {module} for the model {name}: {first_line(error)}") from error
    except AttributeError as error:
        raise InputError(f"module {module} has no {function}; wanted package.module:function") from error
    except Exception as error:  # the user's code fails in its own ways
        raise InputError(f"{module} fails when it is imported: {first_line(error)}") from error
    finally:
        sys.path.remove("")
    try:
        takes = inspect.signature(make).parameters
        if classes is not None and ("num_classes" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())):
            kwargs = {"num_classes": classes, **kwargs}
        with redirect_stdout(sys.stderr):  # standard output is for figures
            made = make(**kwargs)
    except Exception as error:
        raise InputError(f"{name} fails with {kwargs or 'no arguments'}: {first_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} returned {type(made).__name__}, wanted a torch.nn.Module or a funmatch.Classifier")
    return made


def wrap_module(name: str, net: nn.Module, side: int | None, kwargs: dict[str, Any] | None = None) -> Classifier:
    """A module as a classifier: as its card says if it is one, as timm says if it is timm's, else plain.

    A plain network sees images as they are, in [0, 1]; `funmatch.Classifier(net, funmatch.Card(...))` says more.

    Raises:
        InputError: it does not answer images with one row of numbers each.
    """
    function = name if is_function(name) and not name.startswith(GIVEN) else None
    if isinstance(net, Classifier):
        net.card = replace(net.card, name=name)
        if function:
            net.options, net.function = kwargs or {}, function
        net.num_classes = count_classes(net.net, net.card)
        return net
    cfg = timm_config(net)
    if cfg:
        channels = vars(net).get("in_chans", len(cfg["mean"]))
        mean, std = tuple(cfg["mean"])[:channels], tuple(cfg["std"])[:channels]
        card = Card(name, cfg["input_size"][-1], cfg.get("crop_pct") or 1.0, mean, std)
    else:
        card = Card(name, side or DEFAULT_SIDE, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    return Classifier(net, card, kwargs, count_classes(net, card), function)


@torch.no_grad()
def count_classes(net: nn.Module, card: Card) -> int:
    """How many numbers a network answers an image with."""
    training = net.training
    try:
        made = net.eval()(torch.zeros(1, len(card.mean), card.side, card.side))
    except Exception as error:  # networks fail in as many ways as they can be built wrongly
        raise InputError(f"{card.name} cannot take an image of {card.side} pixels: {first_line(error)}") from error
    finally:
        net.train(training)
    logits = getattr(made, "logits", made)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise InputError(f"{card.name} is no classifier: it answers with {getattr(logits, 'shape', type(logits))}")
    return logits.shape[-1]
