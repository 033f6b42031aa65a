"""Puts a head of ours behind a network: a network that timm does not have, and that funmatch loads from its folder."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.errors import InputError
from funmatch.models import bit, custom, timm_models
from funmatch.models.classifier import Classifier, timm_config
from funmatch.models.heads.last_layer import put_linear
from funmatch.models.heads.modules import HEADS, LinearLayer, OwnHead
from funmatch.models.inference.features import Features, find_last_linear
from funmatch.models.inference.outputs import is_close, logits_of
from funmatch.ops.heads.logistic import LinearHead

HEADED = "funmatch.models.heads.headed:network"
"""Architecture of a network with a head of ours, in the `config.json` of saved models: it must stay."""
AnyHead = LinearHead | OwnHead


class Headed(nn.Module):
    """A backbone without its last layer, and a head for its features."""

    def __init__(self, backbone: nn.Module, head: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.head, self.num_classes = backbone, head, num_classes

    def forward_features(self, images: Tensor) -> Tensor:
        """Computes features (n, d) of normalised images."""
        return logits_of(self.backbone(images), type(self.backbone).__name__).flatten(1).float()

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Computes logits of features; with `pre_logits` returns these, as timm's networks do."""
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Computes logits (n, classes) of normalised images."""
        return self.forward_head(self.forward_features(images))


def network(
    backbone: str,
    backbone_args: dict[str, Any],
    head: str,
    head_args: dict[str, Any],
    num_classes: int,
    last: str | None = None,
    backbone_classes: int | None = None,
) -> nn.Module:
    """Builds a network with a head of ours.

    Args:
        backbone: timm's name, or `package.module:function`.
        backbone_args: arguments of its constructor.
        head: one of `HEADS`.
        head_args: arguments of its constructor.
        num_classes: number of classes.
        last: name of the backbone's last layer, which is left out; None for timm's networks, which have none then.
        backbone_classes: of a function's network, before that layer is left out.
    """
    if last is None:
        net = timm_models.create(backbone, {**backbone_args, "num_classes": 0})
    else:
        net = custom.call_function(backbone, backbone_args, backbone_classes)
        net = _without(net.net if isinstance(net, Classifier) else net, last)
    return Headed(net, HEADS[head](**head_args), num_classes)


def attach(classifier: Classifier, head: AnyHead, names: tuple[str, ...] | None, side: int) -> None:
    """Gives a classifier a head that was fitted to its features, in place.

    A linear one takes the place of the network's own last layer; one that cannot, and any other, is put behind it.

    Args:
        classifier: in evaluation mode, on the CPU.
        head: for what `Features` computes.
        names: of the classes.
        side: of views, pixels.

    Raises:
        InputError: the network cannot be built without its last layer.
    """
    if not isinstance(head, LinearHead) or not put_linear(classifier, head, names, side):
        put_behind(classifier, head, names, side)


@torch.no_grad()
def put_behind(classifier: Classifier, head: AnyHead, names: tuple[str, ...] | None, side: int) -> None:
    """Puts a head behind a network without its last layer; arguments and errors as of `attach`."""
    views = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    own, net = _as_module(head).eval(), classifier.net
    expected = own(Features(classifier)(views))
    # As they are built again: with the eps of timm.
    bit.rescale_for_timm(net)
    architecture, last = architecture_behind(classifier), None
    if classifier.function:
        last = find_last_linear(classifier, views)
        net = _without(net, last)
    elif callable(reset := getattr(net, "reset_classifier", None)):
        reset(0)
    word = next(word for word, kind in HEADS.items() if type(own) is kind)
    classifier.options = {
        "backbone": architecture, "backbone_args": classifier.options, "head": word, "head_args": own.arguments(),
    }  # fmt: skip
    if last is not None:
        classifier.options |= {"last": last, "backbone_classes": classifier.num_classes}
    classifier.net, classifier.function = Headed(net.eval(), own, len(expected[0])), HEADED
    classifier.num_classes = len(expected[0])
    classifier.card = replace(classifier.card, classes=names, top1=None)
    if not is_close(classifier(views), expected):
        raise InputError(
            f"{classifier.card.name} has no last layer that can be left out, so no head can be put in its place"
        )


def architecture_behind(classifier: Classifier) -> str:
    """Returns the name by which the network in front of a head of ours is built again.

    Raises:
        InputError: it has none, as networks of transformers.
    """
    name = classifier.function or timm_config(classifier.net).get("architecture")
    if name is None:
        raise InputError(
            f"{classifier.card.name} is built neither by timm nor by a function, so no head can be put behind it; one "
            "takes the place of its last layer with --kind linear, or --kind means --distance euclidean"
        )
    return name


def _as_module(head: AnyHead) -> OwnHead:
    if not isinstance(head, LinearHead):
        return head
    layer = LinearLayer(*head.weight.shape)
    layer.weight.copy_(head.weight.T)
    layer.bias.copy_(head.bias)
    return layer


def _without(net: nn.Module, last: str) -> nn.Module:
    """Returns a network with nothing in the place of a layer."""
    net.set_submodule(last, nn.Identity())
    return net
