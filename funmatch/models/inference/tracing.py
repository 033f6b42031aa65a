"""Reads from a network's code which module's output goes to which other one."""

import warnings
from collections.abc import Callable

from timm.layers import GELU
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _Tracer(fx.Tracer):
    """Traces a network's code with convolutions, norms, activations and further modules as single steps."""

    def __init__(self, further: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.further = further

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # timm's subclasses of these are no leaves by themselves, since they do not belong to torch.
        is_single = isinstance(m, nn.Conv2d | _BatchNorm | nn.LayerNorm) or type(m).__module__ == GELU.__module__
        return is_single or isinstance(m, self.further) or super().is_leaf_module(m, module_qualified_name)


def trace(net: nn.Module, *further: type[nn.Module]) -> fx.Graph | None:
    """Returns the steps of a network; None if it cannot be traced, because its code branches on what it computes.

    Args:
        net: the network, or a part of one.
        further: modules that are single steps, besides convolutions, norms and activations.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            return _Tracer(further).trace(net)
    except Exception:  # tracing a user's code can raise anything
        return None


def followers(
    net: nn.Module, is_first: Callable[[nn.Module], bool], is_second: Callable[[nn.Module], bool]
) -> dict[str, str]:
    """Returns, by name, the module that alone reads the output of another one, where both are called once.

    Args:
        net: a network; nothing is found if it cannot be traced.
        is_first, is_second: which modules count.
    """
    modules = dict(net.named_modules())
    if not any(map(is_first, modules.values())) or (graph := trace(net)) is None:
        return {}
    steps = [node for node in graph.nodes if node.op == "call_module"]
    uses = [node.target for node in steps]
    found: dict[str, str] = {}
    for node in steps:
        following = _next_step(node, modules) if is_first(modules[str(node.target)]) else None
        # Elsewhere the second would be missing, or the first would have it too.
        once = following and uses.count(node.target) == uses.count(following.target) == 1
        if following and once and is_second(modules[str(following.target)]):
            found[str(node.target)] = str(following.target)
    return found


def _next_step(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """Returns the module that alone reads the output of a step, identities left out; None if there is none."""
    while len(readers := _readers(node)) == 1:
        (node,) = readers
        if node.op != "call_module":
            return None
        if not isinstance(modules[str(node.target)], nn.Identity):
            return node
    return None


def _readers(node: fx.Node) -> list[fx.Node]:
    """Returns the steps that read the numbers of a step's output, not only its shape."""
    return [user for user in node.users if not (user.target is getattr and user.args[1:] == ("shape",))]
