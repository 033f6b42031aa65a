"""Compares the outputs of an exported model with those of PyTorch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from funmatch.errors import InputError
from funmatch.runtime.text import number

MAX_RELATIVE = 1e-4
"""Largest difference of an output in fp32, relative to the image's largest output."""
ROUNDINGS = 8
"""Where PyTorch's own rounding is large: how many times as large the difference may be."""


@dataclass(frozen=True)
class Comparison:
    """How far a model's outputs are from PyTorch's.

    Attributes:
        images: that were compared.
        max_relative: largest difference of an output, relative to the largest output of its image.
        same_top1: share of the images with the same first class, in [0, 1].
        ties: images with another first class whose two outputs are nearer to each other than the differences found.
        worst: index of the image with the largest difference.
        others: indices of the images with another first class that are no ties.
        rounding: PyTorch's own error in fp32, measured where the difference is large: that of its outputs from those in
            float64, relative to the largest. A network that amplifies rounding cannot be nearer to itself elsewhere.
    """

    images: int
    max_relative: float
    same_top1: float
    ties: int
    worst: int
    others: tuple[int, ...] = ()
    rounding: float | None = None

    @property
    def allowed(self) -> float:
        """The largest difference that is rounding."""
        return max(MAX_RELATIVE, ROUNDINGS * (self.rounding or 0.0))

    @property
    def agrees(self) -> bool:
        """Whether the model is the same function, up to rounding in fp32."""
        return self.max_relative <= self.allowed and not self.others

    @property
    def row(self) -> int:
        """Index of the image that shows best how the model differs."""
        return self.others[0] if self.others else self.worst

    def to_json(self) -> dict[str, Any]:
        """The figures for `verify.json`."""
        figures = asdict(self)
        del figures["others"], figures["worst"]
        return figures


def compare(reference: np.ndarray, found: np.ndarray) -> Comparison:
    """Compares outputs, (n, classes) each.

    Raises:
        InputError: they have another shape.
    """
    if reference.shape != found.shape:
        raise InputError(f"the outputs have the shape {found.shape}, PyTorch's {reference.shape}")
    difference = np.abs(found.astype(np.float64) - reference).max(1)
    # NaN compares false to everything, and would pass.
    difference[~np.isfinite(found).all(1)] = np.inf
    relative = difference / np.maximum(np.abs(reference).max(1), np.finfo(np.float32).tiny)
    first, second = reference.argmax(1), found.argmax(1)
    rows = np.arange(len(reference))
    margin = reference[rows, first] - reference[rows, second]
    differs = first != second
    # Two outputs that differ by less than both may have moved can change places by rounding.
    tied = differs & (margin <= 2 * difference) & (relative <= MAX_RELATIVE)
    return Comparison(
        len(reference), float(relative.max()), float(1 - differs.mean()), int(tied.sum()), int(relative.argmax()),
        tuple(np.flatnonzero(differs & ~tied).tolist()),
    )  # fmt: skip


def refuse_unless_equal(
    what: str, comparison: Comparison, reference: np.ndarray, found: np.ndarray, names: Sequence[str], where: str = ""
) -> None:
    """Raises `InputError` unless a model agrees with PyTorch; the message says on which image, by how much, and where.

    Args:
        what: the format.
        names: of the classes.
        where: where in the network the difference begins, if that is known.
    """
    if comparison.agrees:
        return
    row = comparison.row
    first, second = int(reference[row].argmax()), int(found[row].argmax())
    mine, theirs = number(float(reference[row, first])), number(float(found[row, second]))
    raise InputError(
        f"the {what} export differs from PyTorch: on {comparison.images:,} images outputs differ by up to "
        f"{comparison.max_relative:.1e} of the largest (allowed {comparison.allowed:.0e}), and "
        f"{len(comparison.others):,} have another class; e.g. image {row}: {names[first]} ({mine}) in PyTorch, "
        f"{names[second]} ({theirs}) in {what}{where and f'; {where}'}. Nothing was written; try another --opset or "
        "--format, or keep the file anyway with --no-verify"
    )
