"""Lets packed convolutions of a frozen network add the shortcut of their block, and compute the ReLU behind it.

Both are passes over memory, which the convolution saves: it adds while its results are in registers.
Only timm's own blocks are changed, whose code is known; a block only changes its class, as in `native.layers`.
"""

import operator
from typing import Any

import torch
from timm.layers import DropPath
from torch import fx, nn

from funmatch.models.inference.native.packed import PackedConv2d
from funmatch.models.inference.tracing import trace

SUMS = (operator.add, operator.iadd, torch.add)
PASSING = (nn.Identity, nn.Dropout, DropPath)
"""What passes a frozen network's numbers on as they are."""


def fuse_sums(net: nn.Module) -> int:
    """Makes the convolutions before sums in a network's blocks compute them too, in place.

    Args:
        net: in evaluation mode, with packed layers.

    Returns:
        how many convolutions do.
    """
    return sum(_fuse_block(block) for block in net.modules() if _is_changeable(block))


def _is_changeable(block: nn.Module) -> bool:
    parts = [*block.modules()]
    # A hook would see other calls than before.
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    known = type(block).__module__.startswith("timm.models.") and not block.training
    return known and not hooked and any(type(part) is PackedConv2d for part in parts)


def _fuse_block(block: nn.Module) -> int:
    """Replaces the sums that a block's own code computes, not those of blocks in it."""
    if (graph := trace(block, nn.GroupNorm, *PASSING)) is None:
        return 0
    sums = [node for node in graph.nodes if node.op == "call_function" and node.target in SUMS]
    fused = [node for node in sums if not node.meta.get("nn_module_stack") and _fuse(node, graph, block)]
    if fused:
        forward: Any = type(fx.GraphModule(block, graph)).forward
        block.__class__ = type(type(block).__name__, (type(block),), {"forward": forward})
    return len(fused)


def _fuse(node: fx.Node, graph: fx.Graph, block: nn.Module) -> bool:
    """Replaces a sum and the ReLU behind it by a call of the convolution before it; returns whether it could."""
    for first, other in (node.args, reversed(node.args)):
        conv = _convolution_of(first, block)
        if conv is None or not isinstance(other, fx.Node):
            continue
        last = _relu_behind(node, block)
        with graph.inserting_before(node):
            fused = graph.call_module(str(conv.target), (conv.args[0], other), {"relu": last is not node})
        last.replace_all_uses_with(fused)
        for step in [*_chain(last, node), *_chain(first, conv)]:
            graph.erase_node(step)
        return True
    return False


def _chain(last: Any, first: fx.Node) -> list[fx.Node]:
    """Returns the steps from the last one of a chain, of which each reads the one before, back to its first."""
    steps = [last]
    while steps[-1] is not first:
        steps.append(steps[-1].args[0])
    return steps


def _convolution_of(step: Any, block: nn.Module) -> fx.Node | None:
    """Returns the packed convolution whose result a step is, if nothing else reads it."""
    while isinstance(step, fx.Node) and step.op == "call_module" and len(step.users) == 1:
        module = block.get_submodule(str(step.target))
        if type(module) is PackedConv2d:
            # Where a block ends narrow, the sum is a small part of it, and oneDNN loses more than a pass costs.
            gains = module.out_channels >= module.in_channels
            return step if gains and not module.has_activation and len(step.args) == 1 else None
        if not isinstance(module, PASSING):
            return None
        step = step.args[0]
    return None


def _relu_behind(node: fx.Node, block: nn.Module) -> fx.Node:
    """Returns the ReLU that alone reads a sum, or the sum itself."""
    step = node
    while len(step.users) == 1:
        (step,) = step.users
        module = block.get_submodule(str(step.target)) if step.op == "call_module" else None
        if type(module) is nn.ReLU:
            return step
        if not isinstance(module, PASSING):
            break
    return node
