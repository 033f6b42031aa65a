"""Prepares a classifier for other runtimes: plain convolutions, and normalisation as part of the network."""

import contextlib
import copy
import io
import logging
import re
import traceback
import warnings
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funmatch.errors import InputError
from funmatch.models.classifier import Classifier, to_memory_format
from funmatch.models.inference.fold import fold
from funmatch.ops.tasks.task import task_of


class ExportNet(nn.Module):
    """A classifier whose input are pixels: (n, 3, side, side) in [0, 1], or uint8, to (n, classes).

    Attributes:
        classifier: folded, with its normalisation.
        uint8: whether it takes 0 … 255 in place of [0, 1].
        probabilities: whether it returns probabilities in place of logits.
        task: what its logits mean.
    """

    def __init__(self, classifier: Classifier, *, uint8: bool = False, probabilities: bool = False) -> None:
        super().__init__()
        # A copy: folding is for good.
        self.classifier = copy.deepcopy(classifier).eval().cpu()
        self.classifier.net = to_memory_format(fold(self.classifier.net), torch.contiguous_format)
        self.uint8, self.probabilities, self.task = uint8, probabilities, task_of(classifier.card.task)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        views = images.float() / 255 if self.uint8 else images
        logits = self.classifier(views)
        return self.task.probabilities(logits) if self.probabilities else logits


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
    try:
        with quiet(), torch.no_grad():
            # Not strict: bytecode need not be analysed, which fails on more of timm's networks.
            shapes = None if fixed_batch else ({0: torch.export.Dim("batch", min=1)},)
            return torch.export.export(net, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # code that is recorded can fail in any way
        advice = "it depends on the values of an image" if "data-dependent" in str(error) else ""
        advice = advice or ("" if fixed_batch else "try --fixed-batch 1")
        raise InputError(
            f"the code of {net.classifier.card.name} cannot be exported{_place_in_code(error)}: {_reason(error)}"
            f"{advice and f'; {advice}'}"
        ) from error


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keeps the progress, warnings and graphs that exporters print off the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings(action="ignore"))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        logging.disable(level)


def explain_failure(error: Exception, program: torch.export.ExportedProgram, name: str, advice: str) -> InputError:
    """Says which operator of a network a format does not have, where it stands, and what to try.

    Args:
        error: of the exporter.
        program: what was exported.
        name: of the network.
        advice: what to try.
    """
    causes = list(_causes(error))
    named = re.findall(r"(?:aten|prims)[.:]+([a-z_0-9]+)", " ".join(map(str, causes)))
    used = [node for node in program.graph.nodes if node.op == "call_function" and "." in str(node.target)]
    # Messages also quote operators that can be exported, so the first counts. The exporter may have replaced the
    # network's operator by one of a shorter name: special_bessel_j0 by bessel_j0.
    for operator in dict.fromkeys(named):
        node = next((each for each in used if str(each.target).split(".")[1].endswith(operator)), None)
        if node is not None:
            where = f" in {module_of(node.meta)}" if module_of(node.meta) else ""
            return InputError(f"the operator {node.target}{where} of {name} cannot be exported; {advice}")
    return InputError(f"{name} cannot be exported: {_reason(causes[-1])}; {advice}")


def module_of(meta: Mapping[str, Any]) -> str:
    """Returns the module that an operation belongs to, by its name in the network; empty where that is unknown."""
    stack = list((meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("classifier").removeprefix(".").removeprefix("net").removeprefix(".")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, and those that it comes from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _place_in_code(error: Exception) -> str:
    """Returns the line of the network's own code at which an error arose, as a clause; empty where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [each for each in frames if not re.search(r"/(torch|funmatch)/", each.filename)]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].line})" if own else ""


def _reason(error: BaseException) -> str:
    # torch's messages are pages long; their first line with words tells most.
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"[a-z]{3}", line)]
    return lines[0][:300] if lines else type(error).__name__
