"""timm's networks, built without weights or with published ones."""

import ast
import socket
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from torch import nn

from funmatch.errors import InputError, first_line, unknown
from funmatch.models.classifier import Card, Classifier, timm_config


def parse_options(options: tuple[str, ...]) -> dict[str, Any]:
    """`("channels=16,32", "drop_rate=0.1")` to `{"channels": (16, 32), "drop_rate": 0.1}`, as timm reads them."""
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not (key and equals):
            raise InputError(f"option {option!r} is not of the form key=value, e.g. channels=16,32,64,128")
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def is_known(architecture: str, name: str, others: tuple[str, ...] = ()) -> str:
    """The architecture again, if timm has it, and its tag.

    Raises:
        InputError: with near names.
    """
    base, _, tag = architecture.partition(".")
    if not timm.is_model(base):
        raise unknown("model", name, [*others, *timm.list_models()], hint="`funmatch models PATTERN` lists them")
    if tag and architecture not in (tagged := timm.list_pretrained(f"{base}.*")):
        raise unknown("pretrained tag", name, tagged)
    return architecture


def create(architecture: str, kwargs: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    """`timm.create_model`, with errors for people."""
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


def create_empty(architecture: str, kwargs: dict[str, Any]) -> nn.Module:
    """The same without weights, and without memory for them where the network's constructor allows that.

    Tensors that no state dict holds have to be made, so a network that has such is built as usual.
    """
    try:
        with torch.device("meta"):
            net = timm.create_model(architecture, **kwargs)
    except Exception:  # some constructors compute with numbers that a device without memory cannot have
        return create(architecture, kwargs)
    kept = net.state_dict(keep_vars=True)
    everything = [*net.named_parameters(), *net.named_buffers()]
    return net if all(name in kept for name, _ in everything) else create(architecture, kwargs)


def net_config(architecture: str) -> dict[str, Any]:
    """What timm knows of an architecture's default weights."""
    config = timm.get_pretrained_cfg(architecture)
    assert config is not None, f"timm lists {architecture} without a configuration"
    return config.to_dict()


def head_names(net: nn.Module) -> tuple[str, ...]:
    """Names of the modules that turn features into logits."""
    heads = timm_config(net).get("classifier")
    if heads is None and callable(find := getattr(net, "get_classifier", None)):
        try:
            found = find()
        except AttributeError:  # folding may have joined it with something else
            return ()
        return tuple(name for name, module in net.named_modules() if module is found)
    return (heads,) if isinstance(heads, str) else tuple(heads or ())


def card_of(name: str, net: nn.Module, known_of_it: dict[str, Any]) -> Card:
    """What a network wants to see, as timm says and, before that, as `known_of_it` says in timm's words.

    Raises:
        InputError: it cannot be so.
    """
    cfg: dict[str, Any] = {**timm_config(net), **known_of_it}
    try:
        channels = vars(net).get("in_chans", cfg["input_size"][0])
        mean, std = (tuple(map(float, cfg[key]))[:channels] for key in ("mean", "std"))
        names, side, fraction = cfg.get("label_names"), cfg["input_size"][-1], cfg.get("crop_pct") or 1.0
        named = tuple(map(str, names)) if names else None
        card = Card(name, side, fraction, mean, std, named, cfg.get("top1"))
        card = replace(card, squash=cfg.get("crop_mode") == "squash")
        top1 = 0.0 if card.top1 is None else card.top1
        count = vars(net).get("num_classes") or len(named or ())
        sound = side >= 1 and 0 < fraction <= 1 and 0 <= top1 <= 1 and min(std) > 0 and len(mean) == len(std)
        if sound and len(mean) == channels and (named is None or len(named) == count):
            return card
    except (KeyError, TypeError, ValueError, IndexError):
        pass
    said = {key: cfg.get(key) for key in ("input_size", "crop_pct", "mean", "std", "top1")}
    raise InputError(
        f"what is said of {name} cannot be: {said}, {len(cfg.get('label_names') or ())} names of classes; wanted a "
        "side, a share, as many means and deviations above 0 as channels, and as many names as classes"
    )


@torch.no_grad()
def with_zero_head(net: nn.Module, classes: int) -> nn.Module:
    """Gives a network a new head, all zeros, as the paper's code begins: the first answer favours no class."""
    vars_of = net.__class__.__name__
    if not hasattr(net, "reset_classifier"):
        raise InputError(f"{vars_of} cannot be given a head for {classes} classes; wanted a network of timm")
    net.reset_classifier(classes)  # pyrefly: ignore[not-callable]
    for name in head_names(net):
        for parameter in net.get_submodule(name).parameters():
            parameter.zero_()
    return net


def for_side(net: nn.Module, side: int) -> dict[str, Any]:
    """Fits a network of a fixed input, such as a vision transformer, to views of another side, as timm does.

    Returns:
        what its constructor has to be given to build it so.
    """
    cfg = timm_config(net)
    fitted = getattr(net, "set_input_size", None)
    if not cfg.get("fixed_input_size") or not callable(fitted) or cfg["input_size"][-1] == side:
        return {}
    try:
        fitted(img_size=side)
    except Exception:  # who tries the network with such views will say why
        return {}
    return {"img_size": side}


def checkpoint_activations(student: Classifier) -> None:
    """Has a network of timm compute its activations again on the way back, which needs less memory."""
    switch = getattr(student.net, "set_grad_checkpointing", None)
    try:
        assert callable(switch)
        switch(True)
    except (AssertionError, NotImplementedError):
        raise InputError(f"{student.card.name} has no --grad-checkpointing; try --micro-batch") from None


def freeze_until(student: Classifier, name: str) -> None:
    """Freezes all that comes before a module of the network, in the order in which it was built.

    Raises:
        InputError: there is no such module.
    """
    modules = dict(student.net.named_modules())
    if not name or name not in modules:
        short = [each for each in modules if each and each.count(".") < 2]
        raise unknown("module of the network", name, [*modules] if "." in name else short)
    order = list(modules)
    parents = {name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)} | {""}
    for each in order[: order.index(name)]:
        for parameter in modules[each].parameters(recurse=False):
            parameter.requires_grad_(False)
    student.frozen_modules = tuple(each for each in order[: order.index(name)] if each not in parents)
    if not any(parameter.requires_grad for parameter in student.net.parameters()):
        raise InputError(f"nothing is left to teach with --freeze-until {name}")
    student.train(student.training)  # lets `still` count from the first step on


def _give_up_on_an_unreachable_hub() -> None:
    """Without a network, what was fetched before is used at once, and anything else fails at once."""
    try:
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, None)
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = True
