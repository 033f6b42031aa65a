"""Gives a network a linear head that was fitted to its features, in the place of its own last layer."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from funmatch.errors import InputError
from funmatch.models.classifier import Classifier
from funmatch.models.inference.features import Features, find_last_linear
from funmatch.models.inference.outputs import is_close
from funmatch.models.timm_models import head_names
from funmatch.ops.heads.logistic import LinearHead

PROBES = 2

Layer = nn.Linear | nn.Conv2d


@torch.no_grad()
def put_linear(classifier: Classifier, head: LinearHead, names: tuple[str, ...] | None, side: int) -> bool:
    """Replaces the last layer of a classifier by a linear head for its features, in place.

    Args:
        classifier: in evaluation mode, on the CPU; without classes or with others.
        head: for what `Features` computes.
        names: of the classes.
        side: of views, pixels.

    Returns:
        whether its logits now are the head's; if not, its layers are as good as random.
    """
    views = torch.rand(PROBES, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        expected = Features(classifier)(views).double() @ head.weight + head.bias
    except InputError:
        return False
    classes = len(head.bias)
    layers = _new_layers(classifier, classes, views)
    classifier.num_classes = classes
    classifier.card = replace(classifier.card, classes=names, top1=None)
    for chosen in _ways(layers, len(head.weight)):
        for layer in layers:
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
        for layer, weight in chosen:
            layer.weight.copy_((head.weight[weight].T * len(chosen) ** _is_split(chosen)).reshape(layer.weight.shape))
            if layer.bias is None:
                return False
            layer.bias.copy_(head.bias)
        if is_close(classifier(views), expected):
            return True
    return False


def _new_layers(classifier: Classifier, classes: int, views: Tensor) -> list[Layer]:
    """Gives a network new last layers for a number of classes, and returns those that are linear."""
    net = classifier.net
    if not callable(reset := getattr(net, "reset_classifier", None)):
        name = find_last_linear(classifier, views)
        own = net.get_submodule(name)
        assert isinstance(own, nn.Linear)
        layer = nn.Linear(own.in_features, classes, dtype=own.weight.dtype)
        net.set_submodule(name, layer)
        return [layer]
    reset(classes)
    net.eval()
    layers, there = [], dict(net.named_modules())
    # Of two heads that timm names, RepViT's networks without distillation have one.
    for name in filter(there.__contains__, head_names(net)):
        parent = net.get_submodule(name.rpartition(".")[0])
        for norm in parent.children() if parent is not net else ():
            # The new norm before the layer, of LeViT and RepViT, which the features do not pass: it changes nothing.
            if isinstance(norm, nn.BatchNorm1d) and norm.running_var is not None and _is_new(norm):
                norm.running_var.fill_(1 - norm.eps)
        layers += [
            module
            for module in net.get_submodule(name).modules()
            if isinstance(module, Layer) and module.weight.shape[0] == classes
        ]
    return layers


def _is_new(norm: nn.BatchNorm1d) -> bool:
    """Returns whether a norm is as it was built; an older one is what the features have passed."""
    new = nn.BatchNorm1d(norm.num_features, norm.eps).state_dict()
    return all(torch.equal(value, new[key]) for key, value in norm.state_dict().items() if "num_batches" not in key)


Way = list[tuple[Layer, slice]]


def _ways(layers: list[Layer], features: int) -> Iterator[Way]:
    """Yields which layers get which of the features: networks differ in what they do with several heads."""
    whole = [(layer, slice(None)) for layer in layers if layer.weight[0].numel() == features]
    # Distilled transformers have two, of whose logits the mean counts; others a second for training alone.
    if whole:
        yield whole
        yield whole[:1]
    sizes = [layer.weight[0].numel() for layer in layers]
    # CrossViT: a head for each branch, whose features stand side by side.
    if len(layers) > 1 and sum(sizes) == features:
        ends = torch.tensor(sizes).cumsum(0).tolist()
        yield [(layer, slice(end - size, end)) for layer, size, end in zip(layers, sizes, ends, strict=True)]


def _is_split(way: Way) -> bool:
    return any(part != slice(None) for _, part in way)
