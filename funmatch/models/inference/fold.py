"""Folds what is fixed in evaluation mode, weight standardization and BatchNorm, into plain convolutions.

A frozen network's weight standardization gives the same kernel every time, and its BatchNorm is a fixed affine map,
which the convolution before it can apply itself.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from timm.utils.model import reparameterize_model
from torch import Tensor, fx, nn

from funmatch.models import bit, timm_models
from funmatch.models.classifier import Classifier
from funmatch.models.inference.tracing import trace

STANDARDIZING = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)
CACHED = 1 << 18
"""Numbers in float64 that a processor keeps near."""


@torch.no_grad()
def fold(net: nn.Module) -> nn.Module:
    """Folds standardization and BatchNorm into convolutions, in place.

    Networks whose code cannot be traced (it branches on what it computes) keep their BatchNorm.

    Args:
        net: in evaluation mode, fp32; it cannot be trained afterwards.

    Returns:
        the network, the same function up to rounding.
    """
    # First of all: timm's own fusing expects the modules as it built them.
    net = reparameterize_model(net, inplace=True)
    # Before BatchNorm, which scales the standardized kernel; a standardization behind it would undo the scale.
    for owner in list(net.modules()):
        for name, conv in owner.named_children():
            if isinstance(conv, STANDARDIZING):
                setattr(owner, name, to_plain_conv(conv))
    for conv, norm in foldable_batch_norms(net):
        fold_batch_norm(net, conv, norm)
    return net


def to_plain_conv(conv: Any) -> nn.Conv2d:
    """Returns the plain convolution with the kernel that a standardizing one computes.

    Args:
        conv: one of `STANDARDIZING` (Qiao et al., 2019; scaled: Brock et al., 2021).
    """
    is_scaled = isinstance(conv, ScaledStdConv2d | ScaledStdConv2dSame)
    gain = (conv.gain * conv.scale).flatten().double() if is_scaled else None
    kind = Conv2dSame if getattr(conv, "same_pad", False) else nn.Conv2d
    # On the meta device: neither memory nor random numbers for weights that are replaced at once.
    with torch.device("meta"):
        plain = kind(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
            0 if kind is Conv2dSame else conv.padding, conv.dilation, conv.groups, conv.bias is not None,
        )  # fmt: skip
    is_channels_last = conv.weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    kernel = _standardize(conv.weight, gain, conv.eps).contiguous(memory_format=layout)
    plain.weight = nn.Parameter(kernel, requires_grad=False)
    plain.bias = conv.bias
    return plain.train(conv.training)


def _standardize(weight: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    """Returns a kernel, (out, in, h, w), whose output channels have mean 0 and variance 1, times the gain of each."""
    rows = weight.reshape(weight.shape[0], -1)
    found = torch.empty_like(rows)
    # A few channels at a time, which stay in the processor's cache in float64: three times as fast for large networks.
    count = max(1, CACHED // rows.shape[1])
    for part in (slice(start, start + count) for start in range(0, len(rows), count)):
        of_part = None if gain is None else gain[part]
        # In float64 and rounded once, so that the folded network is as near to the exact function as the original.
        exact = rows[part].double().unsqueeze(0)
        found[part] = F.batch_norm(exact, None, None, weight=of_part, training=True, momentum=0.0, eps=eps)[0]
    return found.reshape_as(weight)


def bit_for_timm(classifier: Classifier) -> Classifier:
    """Returns a BiT network that timm cannot build (`bit.OWN`) as one that it can: its kernels standardised once.

    timm's `resnetv2_50d_gn` has plain convolutions, and takes sizes and stem as arguments.
    """
    plain, options = copy.deepcopy(classifier.net), {**classifier.options}
    for name, conv in [*plain.named_modules()]:
        if isinstance(conv, StdConv2d):
            plain.set_submodule(name, to_plain_conv(conv))
    width, stem = options.pop("width"), bit.STEM_TYPES[options.pop(bit.PADDING, "zeros")]
    options |= {"layers": [*options.pop("units")], "channels": [4 * width << block for block in range(4)]}
    options |= {"stem_chs": width, "stem_type": stem, "avg_down": False}
    net = timm_models.create("resnetv2_50d_gn", {**options, "num_classes": classifier.num_classes})
    net.load_state_dict(plain.state_dict())
    return Classifier(net, classifier.card, options, classifier.num_classes)


def foldable_batch_norms(net: nn.Module) -> list[tuple[str, str]]:
    """Returns the names of each convolution whose output goes to one BatchNorm only, and of that BatchNorm."""
    if not any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        return []
    graph = trace(net)
    if graph is None:
        return []
    modules = dict(net.named_modules())
    steps = [node for node in graph.nodes if node.op == "call_module"]
    uses = [node.target for node in steps]
    # Modules whose parameters the code also reads directly, e.g. to share a kernel; folding would change that use.
    read_directly = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    return [
        (str(before.target), str(node.target))
        for node in steps
        # Exactly these classes: a subclass may do more than normalize.
        if type(modules[str(node.target)]) in (nn.BatchNorm2d, BatchNormAct2d)
        and isinstance(before := node.args[0], fx.Node)
        and before.op == "call_module"
        and isinstance(modules[str(before.target)], nn.Conv2d)
        and len(before.users) == 1
        and not read_directly & {str(before.target), str(node.target)}
        # Neither module may occur twice: another use would see the folded kernel too.
        and uses.count(before.target) == uses.count(node.target) == 1
        # Without running statistics BatchNorm depends on the batch even in evaluation mode.
        and modules[str(node.target)].running_mean is not None
    ]


def fold_batch_norm(net: nn.Module, conv_name: str, norm_name: str) -> None:
    """Folds a BatchNorm into the convolution before it; of the norm only its activation is left.

    Args:
        net: changed in place.
        conv_name, norm_name: of `foldable_batch_norms`.
    """
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
    # Put where the norm was, so that code that calls it by name still works.
    rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
    owner, _, name = norm_name.rpartition(".")
    setattr(net.get_submodule(owner), name, rest.train(norm.training))
