"""Writes what models say of each image as CSV."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from funmatch.ops.tasks import multilabel
from funmatch.shipping.tables import Column, open_table
from funmatch.training.evaluation.evaluate import Evaluation
from funmatch.training.evaluation.figures import Scores

ROWS = 4096
"""Lines that are written at a time."""
SEPARATOR = ";"
"""Between the classes of an image: the default of --label-separator."""
Cells = tuple[str, type[str] | type[float] | type[bool], Sequence[Any]]
"""Name, type and cells of a column."""


def write(path: Path, found: Evaluation, images: Sequence[str]) -> None:
    """Writes a line per image, as `funmatch predict` writes its own: no cell is a formula, and no name breaks a line.

    Args:
        path: the file, which appears when it is complete.
        images: names of the images.
    """
    cells = [*(_columns if found.scores else _columns_of_sets)(found, images)]
    names = [name for name, _, _ in cells]
    lines = zip(*(values for *_, values in cells), strict=True)
    with open_table(path, "csv", [Column(name, kind) for name, kind, _ in cells]) as table:
        while some := [dict(zip(names, line, strict=True)) for line in islice(lines, ROWS)]:
            table.write(some)


def _columns(found: Evaluation, images: Sequence[str]) -> Iterator[Cells]:
    """Yields the columns."""
    scores, names = found.scores, found.names
    assert scores
    yield "image", str, images
    if scores.labels is not None:
        yield "label", str, [names[label] for label in scores.labels.tolist()]
    for name, kind, values in _of_model(scores, names):
        yield name, kind, values
    if "teacher" in scores.columns:
        yield "teacher", str, [names[first] for first in scores.columns["teacher"].tolist()]
        yield "teacher_confidence", float, scores.columns["teacher_confidence"].tolist()
        if "teacher_top1" in scores.columns:
            yield "teacher_correct", bool, _truths(scores, "teacher_top1")
        yield "agreement", bool, _truths(scores, "agreement")
        yield "kl", float, scores.columns["kl"].tolist()
    for each, subject in zip(found.others, found.opened.subjects[1:], strict=True):
        for name, kind, values in _of_model(each, names):
            # The name behind, so that no head of a column begins as a formula.
            yield f"{name} of {subject.name}", kind, values


def _of_model(scores: Scores, names: Sequence[str]) -> Iterator[Cells]:
    yield "predicted", str, [names[first] for first in scores.columns["predicted"].tolist()]
    yield "confidence", float, scores.columns["confidence"].tolist()
    if scores.labels is not None:
        yield "correct", bool, _truths(scores, "top1")
        yield "correct_in_5", bool, _truths(scores, "top5")
        yield "nll", float, scores.columns["nll"].tolist()
    yield "entropy", float, scores.columns["entropy"].tolist()


def _columns_of_sets(found: Evaluation, images: Sequence[str]) -> Iterator[Cells]:
    """Yields the columns where an image has any number of classes, which stand in one cell, the first class first."""
    first, *others = found.answers
    names = found.names
    chosen = multilabel.decisions(first.logits)
    yield "image", str, images
    if first.labels is not None:
        yield "labels", str, _listed(first.labels == 1, names)
    yield "predicted", str, _listed(chosen, names)
    if first.labels is not None:
        yield "correct", bool, (chosen == (first.labels == 1)).all(-1).tolist()
        yield "nll", float, multilabel.cross_entropy(first.logits, first.labels).tolist()
    if first.teacher_logits is not None:
        compared = multilabel.compare(first.logits, first.teacher_logits)
        yield "teacher", str, _listed(multilabel.decisions(first.teacher_logits), names)
        yield "agreement", float, compared["agreement"].tolist()
        yield "kl", float, compared["kl"].tolist()
    for each, subject in zip(others, found.opened.subjects[1:], strict=True):
        yield f"predicted of {subject.name}", str, _listed(multilabel.decisions(each.logits), names)
    probabilities = first.logits.sigmoid()
    for number, name in enumerate(names):
        # The name behind, so that no head of a column begins as a formula.
        yield f"probability of {name}", float, probabilities[:, number].tolist()


def _listed(has: Tensor, names: Sequence[str]) -> list[str]:
    """Returns the names of each image's classes, (n, classes) bool, as tables of labels have them."""
    return [SEPARATOR.join(names[number] for number in row.nonzero().flatten().tolist()) for row in has]


def _truths(scores: Scores, name: str) -> list[bool]:
    return (scores.columns[name] > 0).tolist()
