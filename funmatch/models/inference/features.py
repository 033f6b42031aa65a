"""Computes the features of a classifier: what its last layer turns into logits."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.models.classifier import Classifier
from funmatch.models.timm_models import head_modules


def is_headless(classifier: Classifier) -> bool:
    """Returns whether a network was built without classes (num_classes=0), so that its outputs are features."""
    return classifier.num_classes == 0


def lacks_head(net: Any) -> bool:
    """Returns whether a network was built without classes and has got no head since: its output is features."""
    if vars(net).get("num_classes") != 0:
        return False
    # A head that was put on afterwards leaves timm's number of classes at 0.
    return not any(True for head in head_modules(net) for _ in head.parameters())


def is_in_halves(net: nn.Module) -> bool:
    """Returns whether a network computes features and head apart, as timm's do."""
    return all(callable(getattr(net, name, None)) for name in ("forward_features", "forward_head"))


class Features(nn.Module):
    """A classifier without its last layer: (n, 3, side, side) in [0, 1] to features (n, dimensions) float32.

    They are timm's pooled features before the head; of other networks, what the last linear layer gets; of a network
    without classes, its outputs.

    Args:
        classifier: stays as it is.
        purpose: what they are computed for, in the message where a network has none.
    """

    def __init__(self, classifier: Classifier, purpose: str = "measure") -> None:
        super().__init__()
        self.classifier, self.purpose = classifier, purpose

    def forward(self, views: Tensor) -> Tensor:
        """Computes features.

        Raises:
            InputError: the network has no such layer.
        """
        classifier, net = self.classifier, self._net()
        if is_headless(classifier):
            found = classifier(views)
        elif is_in_halves(net):
            # timm: the same as the whole forward pass, without the last layer.
            found = net.forward_head(net.forward_features(classifier.normalize(views)), pre_logits=True)
        else:
            found = self._before_last_linear(views)
        return found.flatten(1).float()

    def _net(self) -> Any:
        return self.classifier.net

    def _before_last_linear(self, views: Tensor) -> Tensor:
        return _last_linear(self.classifier, views, self.purpose)[1]


@torch.inference_mode()
def count_features(classifier: Classifier, side: int, purpose: str = "measure") -> int:
    """Returns the number of a classifier's features for views of a side, pixels.

    Args:
        purpose: what they are computed for, in the message where there are none.

    Raises:
        InputError: it has none, or its network fails at them.
    """
    try:
        return Features(classifier, purpose)(torch.zeros(1, 3, side, side, device=classifier.mean.device)).shape[-1]
    except InputError:
        raise
    except Exception as error:  # a network may have methods of these names for something else
        raise InputError(f"{classifier.card.name} cannot compute its features: {first_line(error)}") from error


def find_last_linear(classifier: Classifier, views: Tensor, purpose: str = "measure") -> str:
    """Returns the name of the linear layer that gives a network's logits of views (n, 3, side, side).

    Args:
        purpose: what its inputs are computed for, in the message where there is none.

    Raises:
        InputError: there is none.
    """
    layer, _ = _last_linear(classifier, views, purpose)
    return next(name for name, module in classifier.net.named_modules() if module is layer)


def _last_linear(classifier: Classifier, views: Tensor, purpose: str) -> tuple[nn.Linear, Tensor]:
    """Returns the linear layer that gives a network's logits of views, and what it gets: (n, features)."""
    _, seen = watch_last_linear(classifier.net, lambda: classifier(views))
    # Another layer, such as one of attention, is followed by more than the classes.
    if not seen or seen[0][0].out_features != classifier.num_classes or seen[0][1].ndim != 2:
        raise InputError(
            f"{classifier.card.name} has no features to {purpose}: it is not a timm network, and its "
            f"last layer is not a torch.nn.Linear with {classifier.num_classes} outputs for rows of features"
        )
    return seen[0][0], mean_given(seen)


Seen = list[tuple[nn.Linear, Tensor]]
"""The last linear layer of a network with what it got, (n, features); of a distilled network, both of its heads."""


def mean_given(seen: Seen) -> Tensor:
    """Returns what the last layer got, (n, features)."""
    # The mean of a distilled network's logits counts, and so that of what its heads get.
    return torch.stack([each for _, each in seen]).mean(0) if len(seen) > 1 else seen[0][1]


def watch_last_linear(net: nn.Module, run: Callable[[], Any]) -> tuple[Any, Seen]:
    """Runs a network, and sees what its last linear layer gets.

    Args:
        run: calls the network.

    Returns:
        what `run` returned; and the last layer with what it got, empty where none was called.
    """
    heads = found if len(found := head_modules(net)) > 1 else []
    seen: Seen = []
    thread = threading.get_ident()

    def keep(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        # Teachers run in several threads at once, and hooks are called in all of them.
        if threading.get_ident() != thread:
            return
        # The last one stays, whatever the order of the modules is; of a distilled network with two heads, both.
        if not seen or module not in heads or seen[0][0] not in heads:
            seen.clear()
        seen.append((module, given[0]))

    hooks = [layer.register_forward_pre_hook(keep) for layer in net.modules() if isinstance(layer, nn.Linear)]
    try:
        return run(), seen
    finally:
        for hook in hooks:
            hook.remove()
