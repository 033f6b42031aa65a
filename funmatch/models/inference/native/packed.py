"""Runs a frozen network's convolutions and linear layers on oneDNN, with weights laid out once for its kernels.

torch lays the weights out anew in every call, and on some processors multiplies matrices by a library that is half as
fast as oneDNN. An activation that follows directly is computed as the results are written.

A module only changes its class, as in `native.layers`. Inputs of another kind are computed by torch as before.
"""

from typing import Any

import torch
from timm.layers import GELU, GELUTanh, Mlp, pad_same
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from funmatch.models.inference.modes import DTYPES
from funmatch.models.inference.tracing import followers

ACTIVATIONS: dict[type[nn.Module], tuple[str, tuple[float, ...], str]] = {
    nn.ReLU: ("relu", (), ""),
    nn.ReLU6: ("hardtanh", (0.0, 6.0), ""),
    nn.SiLU: ("swish", (), ""),
    nn.Hardswish: ("hardswish", (), ""),
    nn.GELU: ("gelu", (), "none"),
    GELU: ("gelu", (), "none"),
    GELUTanh: ("gelu", (), "tanh"),
}
"""oneDNN's name, numbers and algorithm of each activation."""
NONE = ("none", (), "")


def is_available() -> bool:
    """Returns whether torch has oneDNN on this machine."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _is_packable(module: Any, x: Tensor) -> bool:
    weight = module.weight
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in DTYPES.values()
        and x.numel() > 0
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


class _Packed:
    """What packed layers share: their weights in oneDNN's layout, and the activation that follows."""

    # Set by `pack_layers` through `vars`, as `nn.Module` would take a tensor for a parameter of the state.
    _packed: Tensor | None
    _activation: tuple[str, tuple[float, ...], str]
    _activate: nn.Module

    def __getstate__(self) -> dict[str, Any]:
        # A copy packs its weights anew: what oneDNN has laid out cannot be copied.
        return {**vars(self), "_packed": None}

    def forward(self, x: Tensor) -> Tensor:
        if _is_packable(self, x):
            return self._compute(x)
        return self._activate(super().forward(x))  # pyrefly: ignore[missing-attribute]

    def _compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _PackedConv(_Packed):
    def _compute(self, x: Tensor) -> Tensor:
        own: Any = self
        name, numbers, algorithm = self._activation
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._weight_for(x), own.bias, *self._geometry, name, [*numbers], algorithm
        )

    @property
    def _geometry(self) -> tuple[Any, Any, Any, int]:
        own: Any = self
        return own.padding, own.stride, own.dilation, own.groups

    def _weight_for(self, x: Tensor) -> Tensor:
        own: Any = self
        if self._packed is None:
            # For the size of the first batch; others are computed too, only perhaps in another layout.
            packed = torch.ops.mkldnn._reorder_convolution_weight(own.weight, *self._geometry, x.shape)
            vars(self)["_packed"] = packed
        assert self._packed is not None
        return self._packed


class PackedConv2d(_PackedConv, nn.Conv2d):
    """torch's convolution, which may add what is given to its result (`native.sums`)."""

    def forward(  # pyrefly: ignore[bad-override]  (the further arguments are optional)
        self, x: Tensor, other: Tensor | None = None, *, relu: bool = False
    ) -> Tensor:
        if other is None:
            return super().forward(x)
        if not self._can_add(x, other):
            y = super().forward(x) + other
            return y.relu_() if relu else y
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, self._weight_for(x), self.bias, *self._geometry, "add", 1.0, "relu" if relu else None, [], None
        )

    @property
    def has_activation(self) -> bool:
        """Whether it computes an activation of its result, which a sum would come behind."""
        return self._activation != NONE

    def _can_add(self, x: Tensor, other: Tensor) -> bool:
        """Returns whether two tensors may be summed by oneDNN, which does not broadcast."""
        own: Any = self
        size = [
            (edge + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for edge, padding, dilation, kernel, stride in zip(
                x.shape[2:], own.padding, own.dilation, own.kernel_size, own.stride, strict=True
            )
        ]
        return _is_packable(self, x) and other.dtype == x.dtype and other.shape == (len(x), self.out_channels, *size)


class PackedConv2dSame(_PackedConv, Conv2dSame):
    """timm's convolution with TensorFlow's padding."""

    def _compute(self, x: Tensor) -> Tensor:
        # Here, since this padding depends on the image.
        padded = pad_same(x, [*self.kernel_size], [*self.stride], [*self.dilation])
        return super()._compute(padded.contiguous(memory_format=torch.channels_last))


class PackedLinear(_Packed, nn.Linear):  # pyrefly: ignore[inconsistent-inheritance]
    """torch's linear layer."""

    def _compute(self, x: Tensor) -> Tensor:
        name, numbers, algorithm = self._activation
        if self._packed is None:
            rows = x.numel() // x.shape[-1]
            vars(self)["_packed"] = torch.ops.mkldnn._reorder_linear_weight(self.weight, rows)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, name, [*numbers], algorithm)


PACKED_CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: PackedConv2d,
    Conv2dSame: PackedConv2dSame,
    nn.Linear: PackedLinear,
}
"""For each class that oneDNN computes, the class that packs its weights."""


def pack_layers(net: nn.Module) -> nn.Module:
    """Makes a frozen network's convolutions and linear layers use oneDNN with packed weights, in place.

    Args:
        net: folded, in evaluation mode, in the precision in which it stays.

    Returns:
        the network.
    """
    activations = {**followers(net, _is_packed_here, _is_fusible), **_activations_in_mlps(net)}
    for name, module in [*net.named_modules()]:
        if not _is_packed_here(module):
            continue
        activation = net.get_submodule(activations[name]) if name in activations else nn.Identity()
        if name in activations:
            net.set_submodule(activations[name], nn.Identity())
        module.__class__ = PACKED_CLASSES[type(module)]
        vars(module).update(_packed=None, _activate=activation, _activation=ACTIVATIONS.get(type(activation), NONE))
    return net


def _is_packed_here(module: nn.Module) -> bool:
    """Returns whether a layer is packed: exactly these classes, as a subclass may compute something else."""
    if type(module) not in PACKED_CLASSES:
        return False
    return not isinstance(module, nn.Conv2d) or (module.padding_mode == "zeros" and not isinstance(module.padding, str))


def _is_fusible(module: nn.Module) -> bool:
    return type(module) in ACTIVATIONS and getattr(module, "approximate", "none") == "none"


def _activations_in_mlps(net: nn.Module) -> dict[str, str]:
    """Returns the activation behind the first layer of each of timm's MLPs, whose networks cannot always be traced."""
    # Exactly timm's class, whose code is known: the activation follows the first layer.
    return {
        f"{name}.fc1": f"{name}.act"
        for name, module in net.named_modules()
        if type(module) is Mlp and _is_packed_here(module.fc1) and _is_fusible(module.act)
    }
