"""What tests of native kernels have in common."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from funmatch.ops.native import build


def build_quickly(monkeypatch) -> None:
    """Builds kernels without optimization, in a third of the time, for tests of what is wrong in their sources."""
    flags = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)
    assert flags != build.FLAGS
    monkeypatch.setattr(build, "FLAGS", flags)
    monkeypatch.setattr(build, "FURTHER_FLAGS", {})


def errors(actual: Iterable[Tensor], truth: Iterable[Tensor]) -> list[float]:
    """Largest error of each tensor, relative to its largest value."""
    return [
        float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(1e-30))
        for a, b in zip(actual, truth, strict=True)
    ]


def gradients(net: nn.Module, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a network, and the gradients of all its parameters by name, in fp64."""
    net.zero_grad()
    logits = net(views)
    logits.square().mean().backward()
    return logits.detach(), {name: parameter.grad.double() for name, parameter in net.named_parameters()}


def assert_threads_change_no_bit(compute: Callable[[], list[Tensor]], threads: int) -> None:
    """Computes the same tensors with another number of threads."""
    before, first = torch.get_num_threads(), compute()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(a, b) for a, b in zip(first, compute(), strict=True))
    finally:
        torch.set_num_threads(before)
