"""Tells which inputs and parameters the native kernels can read."""

from typing import Any

import torch
from torch import Tensor

from funmatch.ops.native import norms


def is_enabled(module: Any) -> bool:
    """Returns whether a module uses its kernel in the mode that it is in."""
    return module.training or not module._training_only


def is_plain(parameter: Tensor | None) -> bool:
    """Returns whether the kernels can read a parameter."""
    return parameter is not None and parameter.dtype == torch.float32 and parameter.is_contiguous()


def has_kernel_layout(x: Tensor) -> bool:
    """Returns whether the kernels can read images: on the CPU, with channels last, in fp32 or bf16."""
    return (
        x.ndim == 4
        and x.dtype in norms.DTYPES
        and x.device.type == "cpu"
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the precision in which torch computes a layer of these inputs, under autocast or not."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
