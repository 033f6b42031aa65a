"""Predicts the classes of images, and writes a row for each."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from funmatch.config import Predict
from funmatch.shipping import tables
from funmatch.shipping.counter import Counter
from funmatch.shipping.predictor import PredictedBatch, Predictor, open_predictor
from funmatch.shipping.sources.find import open_images
from funmatch.shipping.tables import Column

AVERAGED = ("agreement", "kl")
"""Columns whose means are part of the result."""


def run(config: Predict, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Predicts the images of a configuration, and writes a row for each.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        `images`, `unreadable` (of these), `out` (the file, None for standard output), `format`, `model`, `teacher`,
        `agreement` and `kl` (means over the images that can be read; None without a teacher), `seconds`.

    Raises:
        InputError: the file exists, there are no images, or a model cannot be loaded; with `strict`, an image cannot be
            read, after all rows are written.
    """
    config.check()
    out = config.out.expanduser() if config.out else None
    kind = tables.pick_format(config.format, out)
    tables.check_out(out, overwrite=config.overwrite)
    # Both before the model, which takes seconds to load.
    stream = open_images(config, config.paths)
    predictor = open_predictor(config, given)
    counter, sums = Counter("predict", stream.count, beside_rows=out is None), dict.fromkeys(AVERAGED, 0.0)
    with tables.open_table(out, kind, _columns(predictor, kind)) as table, counter:
        for each in predictor.predict(stream.images):
            table.write(_rows(each, predictor, kind))
            counter.add(each.answers.paths, each.answers.reasons)
            for name in AVERAGED if each.columns else ():
                # float64: over a million images, float32 would lose the digits that differ.
                sums[name] += each.columns[name].double().sum().item()
    counter.report(strict=config.strict)
    readable = counter.images - counter.unreadable
    has_means = config.teacher is not None and readable
    return {
        "images": counter.images, "unreadable": counter.unreadable, "out": str(out) if out else None, "format": kind,
        "model": config.model, "teacher": config.teacher, "seconds": round(counter.seconds, 3),
        **{name: total / readable if has_means else None for name, total in sums.items()},
    }  # fmt: skip


def _columns(predictor: Predictor, kind: str) -> list[Column]:
    """Returns the columns: lists of classes and probabilities where the format has lists, else a column for each."""
    topk = min(predictor.config.topk, len(predictor.classes))
    columns = [Column("path", str), Column("class", str), Column("probability", float)]
    if kind == "csv":
        for rank in range(2, topk + 1):
            columns += [Column(f"class_{rank}", str), Column(f"probability_{rank}", float)]
    else:
        columns += [Column("classes", str, several=True), Column("probabilities", float, several=True)]
    if predictor.config.teacher is not None:
        columns += [Column("teacher_class", str), Column("teacher_probability", float)]
        columns += [Column("agreement", bool), Column("kl", float)]
    return [*columns, Column("error", str)]


def _rows(predictions: PredictedBatch, predictor: Predictor, kind: str) -> list[dict[str, Any]]:
    config, classes = predictor.config, predictor.classes
    best = predictions.probabilities.topk(min(config.topk, len(classes)))
    ranked = iter(zip(best.values.tolist(), best.indices.tolist(), strict=True))
    compared = iter(_compared(predictions, classes))
    rows = []
    empty = dict.fromkeys(column.name for column in _columns(predictor, kind))
    for path, reason in zip(predictions.answers.paths, predictions.answers.reasons, strict=True):
        row: dict[str, Any] = empty | {"path": path, "error": reason}
        found = []
        if reason is None:
            values, indices = next(ranked)
            found = [(classes[i], value) for value, i in zip(values, indices, strict=True) if value >= config.threshold]
            row |= next(compared, {})
        for rank, (name, value) in enumerate(found, 1):
            if rank == 1 or kind == "csv":
                end = "" if rank == 1 else f"_{rank}"
                row |= {f"class{end}": name, f"probability{end}": value}
        if kind != "csv":
            row |= {"classes": [name for name, _ in found], "probabilities": [value for _, value in found]}
        rows.append(row)
    return rows


def _compared(predictions: PredictedBatch, classes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the teacher's cells of each readable image."""
    if predictions.teacher is None:
        return
    values, indices = predictions.teacher.max(-1)
    agreement, kl = predictions.columns["agreement"], predictions.columns["kl"]
    for value, index, agrees, divergence in zip(
        values.tolist(), indices.tolist(), agreement.tolist(), kl.tolist(), strict=True
    ):
        yield {
            "teacher_class": classes[index], "teacher_probability": value, "agreement": agrees == 1, "kl": divergence,
        }  # fmt: skip
