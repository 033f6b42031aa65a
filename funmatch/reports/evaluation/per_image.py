"""Writes what models say of each image as CSV."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from funmatch.runtime.files import write_atomically
from funmatch.training.evaluation.evaluate import Evaluation
from funmatch.training.evaluation.figures import Scores

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters of a cell that spreadsheets may run as a formula."""


def write(path: Path, found: Evaluation, images: Sequence[str]) -> None:
    """Writes a line per image: UTF-8, all text quoted, numbers as the shortest text that gives them back.

    Text that begins as a formula gets an apostrophe before it, which spreadsheets do not show.

    Args:
        path: the file, which appears when it is complete.
        images: names of the images.
    """
    assert found.scores
    columns = dict(_columns(found, images))
    text = io.StringIO()
    # All text is quoted: before Python 3.13 a carriage return alone is not, and readers would end the line at it.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(map(harmless, columns))
    writer.writerows(zip(*columns.values(), strict=True))
    # Bytes of names that are not UTF-8 are written as \udcNN, so that the file can be read.
    write_atomically(path, text.getvalue().encode(errors="backslashreplace"))


def harmless(text: str) -> str:
    """Returns text that no spreadsheet runs as a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text


def _columns(found: Evaluation, images: Sequence[str]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Yields name and cells of each column."""
    scores = found.scores
    assert scores
    safe = [harmless(name) for name in found.names]
    yield "image", [harmless(name) for name in images]
    if scores.labels is not None:
        yield "label", [safe[label] for label in scores.labels.tolist()]
    yield from _of_model(scores, safe, "")
    if "teacher" in scores.columns:
        yield "teacher", [safe[first] for first in scores.columns["teacher"].tolist()]
        yield "teacher_confidence", _numbers(scores, "teacher_confidence")
        if "teacher_top1" in scores.columns:
            yield "teacher_correct", _truths(scores, "teacher_top1")
        yield "agreement", _truths(scores, "agreement")
        yield "kl", _numbers(scores, "kl")
    for each, subject in zip(found.others, found.opened.subjects[1:], strict=True):
        yield from _of_model(each, safe, f"{subject.name}: ")


def _of_model(scores: Scores, names: Sequence[str], prefix: str) -> Iterator[tuple[str, Sequence[Any]]]:
    yield f"{prefix}predicted", [names[first] for first in scores.columns["predicted"].tolist()]
    yield f"{prefix}confidence", _numbers(scores, "confidence")
    if scores.labels is not None:
        yield f"{prefix}correct", _truths(scores, "top1")
        yield f"{prefix}correct_in_5", _truths(scores, "top5")
        yield f"{prefix}nll", _numbers(scores, "nll")
    yield f"{prefix}entropy", _numbers(scores, "entropy")


def _numbers(scores: Scores, name: str) -> list[float]:
    # Eight digits: these are float32 numbers, whose further ones say nothing.
    return [float(f"{value:.8g}") for value in scores.columns[name].tolist()]


def _truths(scores: Scores, name: str) -> list[str]:
    return ["true" if value else "false" for value in scores.columns[name].tolist()]
