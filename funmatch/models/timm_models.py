"""Builds timm's networks, without weights or with published ones, and adapts them: head, image size, freezing."""

import ast
import math
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from funmatch.config.choices import EvalResample, TaskName
from funmatch.data.labels import MAX_CLASSES
from funmatch.errors import InputError, first_line, unknown
from funmatch.models.checkpoints.fitting import Wanted
from funmatch.models.classifier import Card, Classifier, timm_config
from funmatch.models.weights import is_fillable
from funmatch.ops.resizing.libraries import FROM_FILTER

DRAWS = {Tensor.normal_, Tensor.uniform_}
"""Methods that fill a tensor with random numbers, of which others are computed."""
LEAST_FRACTION, LARGEST_SIDE = 0.05, 1 << 14
"""The smallest share of an image, and the largest side in pixels, that the configuration of a model may name."""


def parse_options(options: tuple[str, ...]) -> dict[str, Any]:
    """Parses `("channels=16,32", "drop_rate=0.1")` to `{"channels": (16, 32), "drop_rate": 0.1}`, as timm does."""
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals):
            raise InputError(f"option {option!r} is not of the form key=value, e.g. channels=16,32,64,128")
        try:
            # literal_eval and not eval: a value is data, never code.
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value  # a word, such as act_layer=gelu
    # Else the message would be about memory, or the machine would run out of it.
    if isinstance(count := parsed.get("num_classes"), int) and count > MAX_CLASSES:
        raise InputError(f"num_classes={count} is more than the {MAX_CLASSES:,} classes that a network may have")
    return parsed


def create(architecture: str, kwargs: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    """Calls `timm.create_model`, and turns its errors into messages.

    Raises:
        InputError: the constructor fails, or weights cannot be downloaded.
    """
    if pretrained and not architecture.startswith("local-dir:"):
        go_offline_if_unreachable()
    try:
        return timm.create_model(architecture, pretrained=pretrained, **kwargs)
    # First: errors of the network and of the Hub are OSErrors, whichever library raises them.
    except OSError as error:
        raise InputError(offline_message(architecture, error)) from error
    except Exception as error:  # constructors fail in as many ways as they can be called wrongly
        arguments = ", ".join(f"{key}={value}" for key, value in kwargs.items()) or "no options"
        raise InputError(f"timm cannot build {architecture} with {arguments}: {first_line(error)}") from error


def offline_message(architecture: str, error: Exception) -> str:
    """Says that weights cannot be downloaded, and what to do without a network."""
    reason = first_line(error)
    # The Hub's own sentence is three lines long, and asks for a connection that a cluster may not have.
    if "local cache" in reason or "offline" in reason.lower():
        reason = "the Hugging Face Hub cannot be reached, and they are not in its cache on this machine"
    name, _, tag = architecture.partition(".")
    scratch = f"; a student can also start from random weights, as {name}" if tag and ":" not in name else ""
    return (
        f"cannot download the weights of {architecture}: {reason}; without a network, pass a file of weights "
        f"(--teacher-weights, --student-weights; other commands: --weights){scratch}"
    )


class _NoDraws(TorchFunctionMode):
    """Leaves out random initialisation on the device `meta`, where there are no numbers to draw.

    PyTorch would compute the shapes of what it draws in Python, tensor by tensor, and import sympy for that.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS or getattr(func, "__module__", None) == nn.init.__name__:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def create_meta(architecture: str, kwargs: dict[str, Any]) -> nn.Module:
    """Builds a network on the device `meta`: its layers and sizes, without any memory for numbers, to be counted.

    Raises:
        InputError: the constructor fails, or computes with numbers, of which this device has none.
    """
    with torch.device("meta"), _NoDraws():
        return create(architecture, kwargs)


def create_empty(architecture: str, kwargs: dict[str, Any]) -> nn.Module:
    """Builds a network without weights, and without memory for them where its constructor allows that.

    Its weights are to come from `weights.fill`: a large network is then in memory once, not twice, and no time is spent
    on random weights that are thrown away.
    """
    net = _on_meta(architecture, kwargs)
    return net if net is not None and is_fillable(net) else create(architecture, kwargs)


def _on_meta(architecture: str, kwargs: dict[str, Any]) -> nn.Module | None:
    """Builds a network without memory for its tensors; None if its constructor does not allow that."""
    try:
        with torch.device("meta"), _NoDraws():
            return timm.create_model(architecture, **kwargs)
    except Exception:  # some constructors compute with values, which a device without memory does not have
        return None


def wanted_by(architecture: str, kwargs: dict[str, Any], classes: int | None) -> Wanted:
    """Returns what a network needs of a file of weights.

    Args:
        classes: of a student, which may start from weights without a head; None for a network that must classify.
    """
    net = for_weights(architecture, kwargs, classes)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict(keep_vars=True).items()}
    heads = pretrained_config(architecture).get("classifier") or ()
    return Wanted(architecture, shapes, (heads,) if isinstance(heads, str) else tuple(heads), classes is not None)


def for_weights(architecture: str, kwargs: dict[str, Any], classes: int | None) -> nn.Module:
    """Builds a network, on the device `meta` if it can, for its names and shapes alone."""
    # Some networks are features alone by default, so a number of classes is given in any case.
    kwargs = {"num_classes": classes or 2, **kwargs}
    # Without an effect on the random numbers that later networks are drawn from.
    with torch.random.fork_rng(devices=[]):
        return _on_meta(architecture, kwargs) or create(architecture, kwargs)


def pretrained_config(architecture: str) -> dict[str, Any]:
    """Returns timm's configuration of an architecture's default weights."""
    config = timm.get_pretrained_cfg(architecture)
    assert config is not None, f"timm lists {architecture} without a configuration"
    return config.to_dict()


def head_names(net: nn.Module) -> tuple[str, ...]:
    """Returns the names of the modules that turn features into logits."""
    heads = timm_config(net).get("classifier")
    if heads is None and callable(find := getattr(net, "get_classifier", None)):
        try:
            head = find()
        except AttributeError:  # folding may have joined it with another module
            return ()
        # A distilled network has two.
        heads = head if isinstance(head, tuple) else (head,)
        return tuple(name for name, module in net.named_modules() if any(module is each for each in heads))
    return (heads,) if isinstance(heads, str) else tuple(heads or ())


def head_modules(net: nn.Module) -> list[nn.Module]:
    """Returns the modules that turn features into logits, as far as a network says which these are."""
    by_name = dict(net.named_modules())
    return [by_name[name] for name in head_names(net) if name in by_name]


def card_of(name: str, net: nn.Module, overrides: dict[str, Any]) -> Card:
    """Returns the card of a network from timm's configuration.

    Args:
        name: of the model.
        net: built by timm, or with all that is needed in `overrides`.
        overrides: entries that replace those of timm's `pretrained_cfg`.

    Raises:
        InputError: the values are missing or contradictory.
    """
    cfg: dict[str, Any] = {**timm_config(net), **overrides}
    # These values may come from a file that was edited by hand, so nothing about them is certain.
    try:
        channels = vars(net).get("in_chans", cfg["input_size"][0])
        mean, std = (tuple(map(float, cfg[key]))[:channels] for key in ("mean", "std"))
        names, side, fraction = cfg.get("label_names"), cfg["input_size"][-1], cfg.get("crop_pct") or 1.0
        classes = tuple(map(str, names)) if names else None
        card = Card(name, side, fraction, mean, std, classes, cfg.get("top1"))
        resample = cfg.get("resample") or FROM_FILTER.get(str(cfg.get("interpolation")), "antialias")
        card = replace(card, squash=cfg.get("crop_mode") == "squash", resample=resample, floor=bool(cfg.get("floor")))
        card = replace(card, task=cfg.get("task"))
        top1 = 0.0 if card.top1 is None else card.top1
        count = vars(net).get("num_classes") or len(classes or ())
        valid = LEAST_FRACTION <= fraction <= 1 and 0 <= top1 <= 1 and min(std) > 0 and len(mean) == len(std)
        valid = valid and resample in get_args(EvalResample) and card.task in (None, *get_args(TaskName))
        valid = valid and isinstance(side, int) and 1 <= side <= LARGEST_SIDE and all(map(math.isfinite, mean + std))
        if valid and len(mean) == channels and (classes is None or len(classes) == count):
            return card
    except (KeyError, TypeError, ValueError, IndexError):
        pass
    values = {key: cfg.get(key) for key in ("input_size", "crop_pct", "mean", "std", "top1", "task")}
    names = cfg.get("label_names") or ()
    named = len(names) if isinstance(names, list | tuple | dict) else repr(names)
    raise InputError(
        f"the configuration of {name} is not valid: {values}, {named} class names; "
        "expected a size, a fraction, as many means and deviations above 0 as channels, and as many names as classes"
    )


@torch.no_grad()
def with_zero_head(net: nn.Module, classes: int) -> nn.Module:
    """Gives a network a new head of zeros, as the paper's code does: its first outputs favour no class."""
    if not hasattr(net, "reset_classifier"):
        raise InputError(f"{type(net).__name__} cannot get a new head for {classes} classes; only timm's networks can")
    net.reset_classifier(classes)  # pyrefly: ignore[not-callable]
    for name in head_names(net):
        # The bias too: some networks start it elsewhere, and a first output must favour no class.
        for parameter in net.get_submodule(name).parameters():
            parameter.zero_()
    return net


def for_side(net: nn.Module, side: int) -> dict[str, Any]:
    """Fits a network with a fixed input size, such as a vision transformer, to views of another side, as timm does.

    Returns:
        arguments with which its constructor builds it for that side.
    """
    cfg = timm_config(net)
    set_input_size = getattr(net, "set_input_size", None)
    if not cfg.get("fixed_input_size") or not callable(set_input_size) or cfg["input_size"][-1] == side:
        return {}
    try:
        set_input_size(img_size=side)
    except Exception:  # `check_side` tries the network with such views later, and reports why it fails
        return {}
    return {"img_size": side}


def checkpoint_activations(student: Classifier) -> None:
    """Makes a timm network recompute its activations in the backward pass, which needs less memory."""
    switch = getattr(student.net, "set_grad_checkpointing", None)
    try:
        assert callable(switch)
        switch(True)
    except (AssertionError, NotImplementedError):
        raise InputError(f"{student.card.name} does not support --grad-checkpointing; try --micro-batch") from None


def freeze_until(student: Classifier, name: str) -> None:
    """Freezes everything before a module of the network, in the order in which it was built.

    Raises:
        InputError: there is no such module.
    """
    modules = dict(student.net.named_modules())
    if not name or name not in modules:
        short = [each for each in modules if each and each.count(".") < 2]
        raise unknown("module of the network", name, [*modules] if "." in name else short)
    order = list(modules)
    parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)} | {""}
    # Without recursion: the parents of the module come before it, but contain modules that still train.
    for each in order[: order.index(name)]:
        for parameter in modules[each].parameters(recurse=False):
            parameter.requires_grad_(False)
    student.frozen_modules = tuple(each for each in order[: order.index(name)] if each not in parents)
    if not any(parameter.requires_grad for parameter in student.net.parameters()):
        raise InputError(f"--freeze-until {name} leaves nothing to train")
    student.train(student.training)  # puts the frozen modules into eval mode before the first step


def go_offline_if_unreachable() -> None:
    """Makes the Hub's client use its cache at once where there is no network."""
    # Otherwise the client waits for its timeouts again and again, even for files that it has.
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
