"""What never changes again is computed once: standardised kernels, and normalisation by fixed statistics.

A frozen network's weight standardisation gives the same kernel every time, and its BatchNorm is a fixed affine map,
which the convolution before it can do by itself.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.utils.model import reparameterize_model
from torch import Tensor, fx, nn

STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


@torch.no_grad()
def fold(net: nn.Module) -> nn.Module:
    """Folds all that is fixed in evaluation mode into plain convolutions, in place.

    Networks whose code cannot be followed (they branch on what they compute) keep their BatchNorm.

    Args:
        net: in evaluation mode, fp32; it is of no use for training afterwards.

    Returns:
        the network, the same function up to rounding.
    """
    net = reparameterize_model(net, inplace=True)  # what timm's own networks offer
    for owner in list(net.modules()):
        for name, conv in owner.named_children():
            if isinstance(conv, STANDARDISED):
                setattr(owner, name, to_plain_conv(conv))
    for conv, norm in foldable_batch_norms(net):
        fold_batch_norm(net, conv, norm)
    return net


def to_plain_conv(conv: Any) -> nn.Conv2d:
    """The convolution with the standardised kernel of one that standardises (Qiao et al., 2019; Brock et al., 2021)."""
    gain = (
        (conv.gain * conv.scale).flatten().double() if isinstance(conv, ScaledStdConv2d | ScaledStdConv2dSame) else None
    )
    weight = conv.weight.double().reshape(1, conv.out_channels, -1)
    weight = F.batch_norm(weight, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps)
    kind = Conv2dSame if getattr(conv, "same_pad", False) else nn.Conv2d
    with torch.device("meta"):
        made = kind(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
            0 if kind is Conv2dSame else conv.padding, conv.dilation, conv.groups, conv.bias is not None,
        )  # fmt: skip
    layout = (
        torch.channels_last if conv.weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    )
    kernel = weight.reshape_as(conv.weight).to(conv.weight.dtype).contiguous(memory_format=layout)
    made.weight = nn.Parameter(kernel, requires_grad=False)
    made.bias = conv.bias
    return made.train(conv.training)


class _Follower(fx.Tracer):
    """Follows a network's code, with convolutions and norms as single steps."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def foldable_batch_norms(net: nn.Module) -> list[tuple[str, str]]:
    """Names of each convolution whose answer goes to one BatchNorm and nowhere else, and of that BatchNorm."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        return []
    try:
        with warnings.catch_warnings(action="ignore"):
            graph = _Follower().trace(net)
    except Exception:  # code can be beyond following in many ways
        return []
    modules = dict(net.named_modules())
    steps = [node for node in graph.nodes if node.op == "call_module"]
    uses = [node.target for node in steps]
    apart = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}  # used by themselves
    return [
        (str(before.target), str(node.target))
        for node in steps
        if type(modules[str(node.target)]) in (nn.BatchNorm2d, BatchNormAct2d)
        and isinstance(before := node.args[0], fx.Node)
        and before.op == "call_module"
        and isinstance(modules[str(before.target)], nn.Conv2d)
        and len(before.users) == 1
        and not apart & {str(before.target), str(node.target)}
        and uses.count(before.target) == uses.count(node.target) == 1
        and modules[str(node.target)].running_mean is not None
    ]


def fold_batch_norm(net: nn.Module, conv_name: str, norm_name: str) -> None:
    """Lets a convolution do what the BatchNorm behind it does; of that only its activation is left."""
    conv, norm = net.get_submodule(conv_name), net.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = (variance.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(scale)
    if norm.affine:
        scale, shift = scale * norm.weight.double(), norm.bias.double()
    before: Tensor | float = conv.bias.double() if conv.bias is not None else 0.0
    bias = (before - mean.double()) * scale + shift
    kernel = conv.weight.double() * scale.reshape(-1, 1, 1, 1)
    conv.weight = nn.Parameter(kernel.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    left = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    owner, _, name = norm_name.rpartition(".")
    setattr(net.get_submodule(owner), name, left.train(norm.training))
