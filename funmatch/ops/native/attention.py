"""Computes attention on the CPU by matrix products of 16 bits, where torch's own kernel is several times slower.

Of 197 tokens and heads of 64 in bf16, two cores of an AMD EPYC take 16 ms in torch's kernel and 3.5 ms in two products
with a softmax between them; with the backward pass 30 and 9.5 ms (batch 32, three heads).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funmatch.ops.native import rows
from funmatch.ops.native.norms import DTYPES

MAX_SCORES = 1 << 25
"""Scores of a call, at most: with more, the memory that they take costs more than the kernel saves."""


class ProductAttention(TorchFunctionMode):
    """Within this context, attention on the CPU without a mask is computed by matrix products where these are faster.

    Whatever else a network computes is left alone, so that any library's attention gains that calls
    `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        native_softmax: compute the softmax by the native kernel, which must be available (`rows`).
    """

    def __init__(self, *, native_softmax: bool = False) -> None:
        super().__init__()
        self.native_softmax = native_softmax

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and is_faster_by_products(*args, **kwargs):
            return attention(*args[:3], scale=kwargs.get("scale"), native_softmax=self.native_softmax)
        return func(*args, **kwargs)


def is_faster_by_products(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Returns whether a call of `scaled_dot_product_attention` with these arguments is better computed by products."""
    # Its third argument is the value; those that follow are a mask, dropout and causality.
    plain = len(args) == 1 and not any(value for name, value in kwargs.items() if name != "scale")
    return (
        plain
        and query.device.type == "cpu"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.ndim == key.ndim == 4
        and query.shape[:2] == key.shape[:2]
        and query.shape[:3].numel() * key.shape[2] <= MAX_SCORES
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, *, native_softmax: bool = False
) -> Tensor:
    """Computes softmax(scale · query keyᵀ) value (Vaswani et al., 2017, eq. 1), differentiable.

    Args:
        query: (n, heads, tokens, width).
        key, value: (n, heads, other tokens, width), (n, heads, other tokens, any width).
        scale: None is 1 / √width.
        native_softmax: as of `ProductAttention`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    is_native = native_softmax and scores.dtype in DTYPES and scores.is_contiguous() and scores.numel() > 0
    return (rows.softmax(scores) if is_native else scores.softmax(-1)) @ value
