"""Trains a student for INT8: rounds the weights and the inputs of its layers as an INT8 model does.

Gradients pass through the rounding as if it were not there (Jacob et al., "Quantization and training of neural networks
for efficient integer-arithmetic-only inference", 2018). BatchNorm is not folded: it scales whole output channels, and
each of these has a scale of its own in INT8, so weights round alike with and without it.
"""

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from funmatch.errors import InputError

CHILD = "fake_quantize"
"""Name under which a layer holds its rounding, whose tensors are in checkpoints, and not in exported students."""
AVERAGING = 0.01
"""Share of a new batch in the moving average of the smallest and the largest input."""
Ranges = dict[str, tuple[float, float]]
"""The smallest and the largest input of each layer, by its name in the network."""


class LayerQuantization(nn.Module):
    """Rounds a layer's inputs to 256 levels, and its weights to 255 for each output channel."""

    def __init__(self) -> None:
        super().__init__()
        fake_quantize, observer = _torchao()
        # The types of ONNX Runtime's fastest kernels for x86: uint8 inputs, int8 weights that are symmetric.
        self.inputs = fake_quantize.FusedMovingAvgObsFakeQuantize(
            observer=observer.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8,
            averaging_constant=AVERAGING,
        )  # fmt: skip
        # A constant of 1: the range of weights is that of the present ones, not an average.
        self.weights = fake_quantize.FakeQuantize(
            observer=observer.MovingAveragePerChannelMinMaxObserver, quant_min=-127, quant_max=127, dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric, ch_axis=0, averaging_constant=1.0,
        )  # fmt: skip

    def train(self, mode: bool = True) -> "LayerQuantization":
        """Sets the mode; in evaluation the ranges of inputs stay as they are."""
        super().train(mode)
        self.inputs.enable_observer(mode)
        return self


class _Rounding(TorchFunctionMode):
    """Rounds inputs and weights of the convolution or matrix product that a layer computes.

    Inside the layer, and not before it: weights that a layer standardises are rounded as they are used.
    """

    def __init__(self, rounding: LayerQuantization) -> None:
        super().__init__()
        self.rounding = rounding

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in (functional.conv2d, functional.linear):
            views, weight, *rest = args
            # In fp32 also under autocast: with bf16 the levels themselves would be rounded.
            args = (self.rounding.inputs(views.float()), self.rounding.weights(weight.float()), *rest)
        return func(*args, **(kwargs or {}))


@functools.cache
def _rounded(kind: Any) -> Any:
    """Returns the class of a layer whose forward pass rounds."""

    # A class, and not a hook or a bound method: copies of the network must use their own ranges.
    class Rounded(kind):
        plain_class = kind

        def forward(self, views: Tensor) -> Tensor:
            with _Rounding(getattr(self, CHILD)):
                return super().forward(views)

    Rounded.__name__, Rounded.__qualname__ = kind.__name__, kind.__qualname__
    return Rounded


def quantize_layers(net: nn.Module) -> nn.Module:
    """Makes convolutions and linear layers of a network round as in INT8, in place, and returns it.

    Raises:
        InputError: it has none, or torchao is not installed.
    """
    layers = [each for each in net.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    if not layers:
        raise InputError("quantize needs a student with convolutions or linear layers, and this one has none")
    for layer in layers:
        layer.add_module(CHILD, LayerQuantization().train(layer.training))
        layer.__class__ = _rounded(type(layer))
    return net


def strip_quantization(net: nn.Module) -> Ranges:
    """Makes the layers of a network plain again, in place; returns the ranges of their inputs."""
    found: Ranges = {}
    for name, layer in list(net.named_modules()):
        plain = getattr(type(layer), "plain_class", None)
        if plain is None:
            continue
        observer: Any = getattr(layer, CHILD).inputs.activation_post_process
        low, high = observer.min_val.item(), observer.max_val.item()
        # A layer that was never used has none.
        if math.isfinite(low) and math.isfinite(high):
            found[name] = low, high
        delattr(layer, CHILD)
        layer.__class__ = plain
    return found


def _torchao() -> tuple[Any, Any]:
    """Imports torchao's modules of fake quantisation and of observers."""
    log = logging.getLogger("torch.utils._pytree")
    level = log.level
    # It warns of a change between versions of torchao and torch, which no user can act upon.
    log.setLevel(logging.ERROR)
    try:
        from torchao.quantization.pt2e import fake_quantize, observer
    except ImportError:
        raise InputError("quantize needs torchao, which is not installed; pip install 'funmatch[ship]'") from None
    finally:
        log.setLevel(level)
    return fake_quantize, observer
