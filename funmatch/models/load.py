"""Loads the model that a name means as a classifier on [0, 1] images."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from funmatch.errors import InputError, is_out_of_memory
from funmatch.models import bit, custom, timm_models
from funmatch.models.checkpoints.checkpoint import Checkpoint
from funmatch.models.checkpoints.fitting import Wanted, fit
from funmatch.models.classifier import Card, Classifier
from funmatch.models.clip.class_texts import ClassTexts
from funmatch.models.names import (
    GIVEN,
    HUB,
    LOCAL,
    NAMED,
    OWN_CARDS,
    check_architecture,
    is_function,
    is_timm_name,
    own_architecture,
    renaming_note,
)
from funmatch.models.origins.find import find_origin
from funmatch.models.origins.origin import Origin
from funmatch.models.tensorflow.preprocessing import Inputs
from funmatch.models.weights import fill


def load(
    name: str | nn.Module,
    *,
    weights: Path | None = None,
    options: tuple[str, ...] = (),
    classes: int | None = None,
    side: int | None = None,
    pretrained: bool = False,
    inputs: Inputs | None = None,
    empty: bool = False,
    texts: ClassTexts | None = None,
) -> Classifier:
    """Loads or builds a classifier.

    Args:
        name: a timm name, with or without a tag; `hf-hub:user/model`; `local-dir:path`, or the folder of a model or of
            a run; a BiT checkpoint `path.npz`, or `bit:` and one of `download.PAPER_FILES`; `savedmodel:path`, or
            a file of Keras, `.keras` or `.h5`, of a BiT network; `clip:MODEL` (`clip.names.parse`);
            `package.module:function`; one of `NAMED`; or a module.
        weights: a file of safetensors or `torch.save`, or `.npz`, for a timm name; its head decides the number of
            classes.
        options: `key=value` arguments of the constructor.
        classes: of a student: weights with another number get a new head of zeros, for 0 none. None keeps the head.
        side: of the views, pixels; networks with a fixed input are built for it.
        pretrained: whether a bare timm name means its pretrained weights.
        inputs: mean and deviation, for images in [0, 1], that a SavedModel was trained with; None: those of its graph.
        empty: whether the caller fills in the weights: those that a timm name means are then not fetched.
        texts: the classes of a network of image and text; None for its image tower alone.

    Raises:
        InputError: the name is unknown (near names are listed), weights do not fit, or a folder has no model.
    """
    kwargs = timm_models.parse_options(options)
    weights = Path(weights).expanduser() if weights else None
    if isinstance(name, nn.Module):
        if kwargs or weights:
            raise InputError(f"a module is used as it is; leave out {weights or ', '.join(options)}")
        return custom.wrap_module(GIVEN + type(name).__name__, name, side)
    # Here, since `_with_head` drops `num_classes` and would take the data's number without a word.
    if classes is not None and kwargs.get("num_classes", classes) != classes:
        raise InputError(f"{name}: num_classes={kwargs['num_classes']} conflicts with the data's {classes} classes")
    with _memory_for(name):
        # Before functions and timm: with `weights`, names of both kinds have an origin.
        if origin := find_origin(name, kwargs, weights=weights, side=side, inputs=inputs, classes=classes, texts=texts):
            return _from_origin(name, origin, classes, side)
        if is_function(name):
            return custom.wrap_module(name, custom.call_function(name, kwargs, classes), side, kwargs)
        return _from_timm(name, kwargs, classes=classes, side=side, pretrained=pretrained, empty=empty)


@contextmanager
def _memory_for(name: str) -> Generator[None]:
    """Says which network there is too little memory for, if the block fails for that reason."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Often no lack of memory, but a configuration that asks for a billion classes.
        tried = re.search(r"allocate (\d+) bytes", str(error))
        size = f", one tensor of which takes {int(tried[1]) / 1e9:,.1f} GB" if tried else ""
        raise InputError(
            f"too little memory for the weights of {name}{size}; check the number of classes and the sizes in its "
            "configuration and options, or choose a smaller network"
        ) from error


def _from_origin(name: str, origin: Origin, classes: int | None, side: int | None) -> Classifier:
    """Builds the network of an origin for views of a side, and fills it with the weights."""
    if origin.net is not None:
        net = origin.net
    elif is_function(origin.architecture):
        net = custom.build_empty(origin.architecture, origin.kwargs, origin.card.get("num_classes"))
        net = net.net if isinstance(net, Classifier) else net
    else:
        net = timm_models.create_empty(origin.architecture, origin.kwargs)
    if origin.published:
        bit.with_published_eps(net)
    weights, notes, what = origin.weights, origin.notes, origin.architecture.removeprefix(LOCAL)
    if isinstance(weights, Checkpoint):
        shapes = {key: tuple(tensor.shape) for key, tensor in net.state_dict(keep_vars=True).items()}
        found = fit(weights, Wanted(what, shapes))
        weights, notes = found.state, notes + found.notes
    if weights is not None:
        fill(net, weights, what, origin.where)
    # After filling: fitting a transformer to another side resamples its position embedding.
    kwargs = origin.kwargs | (timm_models.for_side(net, side) if side else {})
    card = replace(timm_models.card_of(name, net, origin.card), side_known=origin.side_known)
    classifier = _with_head(net, card, kwargs, classes)
    classifier.function = origin.architecture if is_function(origin.architecture) else None
    classifier.notes, classifier.alternatives, classifier.content = notes, origin.alternatives, origin.content
    return classifier


def _from_timm(
    name: str, kwargs: dict[str, Any], *, classes: int | None, side: int | None, pretrained: bool, empty: bool
) -> Classifier:
    """Has timm build a network, with its published weights where the name means these."""
    own, kwargs = own_architecture(name, kwargs)
    is_hub = own.startswith(HUB)
    architecture = own if is_hub else check_architecture(own, name)
    if notes := renaming_note(own, architecture):
        # Without a tag a name means the architecture; timm's earlier names had their weights' names in them.
        architecture = architecture if pretrained else architecture.partition(".")[0]
    # Built for the side, without resampling; whether a network of the Hub has a fixed input shows only afterwards.
    may_fit = not is_hub and side and "img_size" not in kwargs
    if may_fit and timm_models.pretrained_config(architecture).get("fixed_input_size"):
        kwargs["img_size"] = side
    has_weights = pretrained or is_hub or "." in architecture
    # Pretrained weights keep their own head first: `_with_head` decides whether it can stay.
    if classes is not None and not has_weights:
        kwargs["num_classes"] = classes
    net = timm_models.create(architecture, kwargs, pretrained=has_weights and not empty)
    if not isinstance(vars(net).get("num_classes"), int):
        raise InputError(f"{name} with these options is not a classifier")
    cfg = vars(net)["pretrained_cfg"]
    # timm serves the published BiT weights, but builds the network with another eps; see `bit.with_published_eps`.
    if has_weights and "_bit" in (cfg.get("architecture") or "") and (cfg.get("tag") or "").startswith("goog"):
        bit.with_published_eps(net)
    classifier = _with_head(net, timm_models.card_of(name, net, OWN_CARDS.get(name, {})), kwargs, classes)
    classifier.notes = notes
    return classifier


def _with_head(net: nn.Module, card: Card, kwargs: dict[str, Any], classes: int | None) -> Classifier:
    """Wraps a network, with a new head where another number of classes is requested."""
    own_classes = vars(net).get("num_classes") or custom.count_classes(net, card)
    if classes is not None and own_classes != classes:
        # Names and accuracy belong to the old head.
        net, card = timm_models.with_zero_head(net, classes), replace(card, classes=None, top1=None)
    kwargs = {key: value for key, value in kwargs.items() if key != "num_classes"}  # stored separately
    return Classifier(net, card, kwargs, own_classes if classes is None else classes)


def brings_weights(name: str) -> bool:
    """Returns whether a name alone means weights, too."""
    own = NAMED.get(name, name)
    return isinstance(own, str) and not is_timm_name(own) and not is_function(own)
