"""Modules that compute LayerNorm and linear layers by native kernels, as `convnets` those of convolutional networks."""

from typing import Any

import torch
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from funmatch.models.inference.native.inputs import compute_dtype, is_enabled, is_plain
from funmatch.ops.native import linear, norms, rows


class NativeLinear(nn.Linear):
    """torch's linear layer."""

    def forward(self, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override-param-name]
        dtype = compute_dtype(x)
        supported = dtype in norms.DTYPES and x.device.type == "cpu" and self.weight.dtype == torch.float32
        enough = is_enabled(self) and x.numel() >= linear.MIN_ROWS * x.shape[-1]
        if supported and enough and not linear.why_unavailable(dtype):
            return linear.linear(x, self.weight, self.bias, dtype)
        return super().forward(x)


def _layer_norm(norm: Any, x: Tensor) -> Tensor | None:
    """Returns what the kernel computes of rows, or None if it does not support them."""
    supported = is_enabled(norm) and x.dtype in norms.DTYPES and x.device.type == "cpu"
    if not supported or not x.is_contiguous() or not x.numel() or not (is_plain(norm.weight) and is_plain(norm.bias)):
        return None
    # torch's has the dtype of its input, which the layer behind it then rounds.
    dtype = compute_dtype(x) if norm._rounded else x.dtype
    return rows.layer_norm(x, norm.weight, norm.bias, norm.eps, dtype if dtype in norms.DTYPES else x.dtype)


class _RowNorm:
    """Forward pass of a LayerNorm; comes before torch's or timm's class in the order of methods."""

    # Whether only linear layers read the result, which then may be as they would round it; set through `vars`.
    _rounded: bool

    def forward(self, x: Tensor) -> Tensor:
        y = _layer_norm(self, x)
        return super().forward(x) if y is None else y  # pyrefly: ignore[missing-attribute]


class NativeLayerNorm(_RowNorm, nn.LayerNorm):  # pyrefly: ignore[inconsistent-inheritance]
    """torch's LayerNorm."""


class NativeTimmLayerNorm(_RowNorm, TimmLayerNorm):
    """timm's LayerNorm."""


class NativeLayerNorm2d(LayerNorm2d):
    """timm's LayerNorm of images over their channels."""

    _rounded: bool

    def forward(self, x: Tensor) -> Tensor:
        # With channels last, the pixels are rows.
        y = _layer_norm(self, x.permute(0, 2, 3, 1))
        return super().forward(x) if y is None else y.permute(0, 3, 1, 2)


def is_row_norm(norm: nn.LayerNorm) -> bool:
    """Returns whether a LayerNorm normalises rows, with weights and biases."""
    return len(norm.normalized_shape) == 1 and norm.weight is not None and norm.bias is not None


def is_wide(layer: nn.Linear) -> bool:
    """Returns whether a linear layer is large enough for its weights to be laid out in every step."""
    return min(layer.in_features, layer.out_features) >= linear.MIN_WIDTH
