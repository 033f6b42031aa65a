"""Computes the features of a classifier: what its last layer turns into logits."""

from typing import Any

from torch import Tensor, nn

from funmatch.errors import InputError
from funmatch.models.classifier import Classifier
from funmatch.models.timm_models import head_names


def is_headless(classifier: Classifier) -> bool:
    """Returns whether a network was built without classes (num_classes=0), so that its outputs are features."""
    return vars(classifier.net).get("num_classes") == 0


class Features(nn.Module):
    """A classifier without its last layer: (n, 3, side, side) in [0, 1] to features (n, dimensions) float32.

    Args:
        classifier: stays as it is.

    Raises:
        InputError: it is not known which layer is its last.
    """

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        net: Any = classifier.net
        # timm's own way, which knows of norms and activations between features and head.
        self.by_timm = hasattr(net, "forward_features") and hasattr(net, "forward_head")
        self.head = None if self.by_timm or is_headless(classifier) else _last_layer(classifier)

    def forward(self, views: Tensor) -> Tensor:
        classifier: Any = self.classifier
        if is_headless(classifier):
            return classifier(views).flatten(1).float()
        if self.by_timm:
            net = classifier.net
            return (
                net.forward_head(net.forward_features(classifier.normalize(views)), pre_logits=True).flatten(1).float()
            )
        found: list[Tensor] = []
        assert self.head is not None
        hook = self.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            classifier(views)
        finally:
            hook.remove()
        return found[-1].flatten(1).float()


def _last_layer(classifier: Classifier) -> nn.Module:
    """Returns the layer that gives the logits: as timm names it, else the last linear one."""
    names = head_names(classifier.net)
    if len(names) == 1:
        return classifier.net.get_submodule(names[0])
    linear = [module for module in classifier.net.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].out_features != classifier.num_classes:
        raise InputError(
            f"{classifier.card.name} has no last linear layer, so its features are not known; build it without classes "
            "(--model-kwargs num_classes=0)"
        )
    return linear[-1]
