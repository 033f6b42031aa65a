"""Prepares a classifier for other runtimes: plain convolutions, and normalisation as part of the network."""

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.errors import InputError, first_line
from funmatch.models.classifier import Classifier, to_memory_format
from funmatch.models.inference.fold import fold


class ExportNet(nn.Module):
    """A classifier whose input are pixels: (n, 3, side, side) in [0, 1], or uint8, to (n, classes).

    Attributes:
        classifier: folded, with its normalisation.
        uint8: whether it takes 0 … 255 in place of [0, 1].
        probabilities: whether it returns probabilities in place of logits.
    """

    def __init__(self, classifier: Classifier, *, uint8: bool = False, probabilities: bool = False) -> None:
        super().__init__()
        # A copy: folding is for good.
        self.classifier = copy.deepcopy(classifier).eval().cpu()
        self.classifier.net = to_memory_format(fold(self.classifier.net), torch.contiguous_format)
        self.uint8, self.probabilities = uint8, probabilities
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        views = images.float() / 255 if self.uint8 else images
        logits = self.classifier(views)
        return logits.softmax(-1) if self.probabilities else logits


def with_plain_attention(net: ExportNet) -> ExportNet:
    """Returns a network whose attention is matrix products and a softmax, in place of one fused operation.

    ONNX has no such operation that all runtimes know, and torch's replacement for it has other strides, on which the
    `view` of some networks fails.
    """
    fused = [name for name, module in net.named_modules() if getattr(module, "fused_attn", False)]
    plain = copy.deepcopy(net) if fused else net
    for name in fused:
        plain.get_submodule(name).fused_attn = False  # pyrefly: ignore  # timm's switch
    return plain


def trace(net: ExportNet, side: int, fixed_batch: int | None = None) -> torch.export.ExportedProgram:
    """Records the operations of a network.

    Args:
        net: of the classifier.
        side: of its images, pixels.
        fixed_batch: number of images; None: any.

    Raises:
        InputError: its code cannot be recorded; the message says where.
    """
    example = torch.zeros(fixed_batch or 2, 3, side, side, dtype=torch.uint8 if net.uint8 else torch.float32)
    name = net.classifier.card.name
    try:
        with warnings.catch_warnings(action="ignore"), torch.no_grad():
            # Not strict: bytecode need not be analysed, which fails on more of timm's networks.
            shapes = None if fixed_batch else ({0: torch.export.Dim("batch", min=1)},)
            return torch.export.export(net, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # code that is recorded can fail in any way
        advice = "" if fixed_batch else "; try --fixed-batch 1"
        raise InputError(f"the code of {name} cannot be exported: {_reason(error)}{advice}") from error


def explain_failure(error: Exception, name: str, advice: str) -> InputError:
    """Says which operator of a network a format does not have, where it stands, and what to try."""
    text = str(error)
    operators = sorted(set(re.findall(r"aten\.[a-z_0-9]+(?:\.\w+)?", text)))
    what = f"the operator {operators[0]} of {name}" if len(operators) == 1 else f"{name} ({', '.join(operators[:3])})"
    where = re.findall(r'File "[^"]*?([\w]+/[\w]+\.py)", line (\d+), in (\w+)', text)
    place = f", in {where[-1][2]} ({where[-1][0]}:{where[-1][1]})," if where else ""
    subject = what if operators else name
    return InputError(f"{subject}{place} cannot be exported: {_reason(error)}; {advice}")


def module_of(node_meta: Mapping[str, Any]) -> str:
    """Returns the module that an operation belongs to, by its name in the network; empty where it is unknown."""
    stack = node_meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("classifier.").removeprefix("net.")


def _reason(error: Exception) -> str:
    # torch's messages are pages long; their first line with words tells most.
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"[a-z]{3}", line)]
    return lines[0][:300] if lines else first_line(error)
