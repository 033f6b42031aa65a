"""Computes the features of images, what a classifier's last layer gets, and writes them with the images' paths."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from funmatch.config import Embed, ImageOptions
from funmatch.models.classifier import Classifier
from funmatch.models.inference.features import Features, count_features
from funmatch.runtime import devices
from funmatch.shipping import tables
from funmatch.shipping.counter import Counter
from funmatch.shipping.inference import Answers, Image, Network, answer, decoding_of, ready
from funmatch.shipping.predictor import open_model
from funmatch.shipping.sources.find import open_images
from funmatch.shipping.sources.given import read_given
from funmatch.shipping.tables import Column
from funmatch.training.student.trained_model import TrainedModel

PURPOSE = "write"
HEADER = 128
"""Bytes of the header of an .npy file; numpy wants a multiple of 64."""
PATHS = (Column("path", str), Column("error", str))


def run(config: Embed, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Computes the features of the images of a configuration, and writes a row for each.

    Args:
        given: modules from Python, by the names that stand for them.

    Returns:
        `images`, `unreadable` (of these), `features` (numbers in a row), `out`, `paths` (the file of paths beside an
        .npy file, else None), `model`, `seconds`.

    Raises:
        InputError: a file exists, there are no images, or the model cannot be loaded or has no features; with `strict`,
            an image cannot be read, after all rows are written.
    """
    config.check()
    out = config.out.expanduser()
    paths = out.with_name(f"{out.stem}.paths.csv") if out.suffix.lower() == ".npy" else None
    for each in (out, paths):
        tables.check_out(each, overwrite=config.overwrite)
    if paths is None:
        tables.pick_format(None, out)
    # Before the model, which takes seconds to load.
    stream = open_images(config, config.paths)
    embedder, counter = _open(config, given), Counter("embed", stream.count)
    with _open_output(out, paths, embedder.size) as output, counter:
        for each in embedder.answer(stream.images):
            output.write(each.paths, each.reasons, with_gaps(each, embedder.size))
            counter.add(each.paths, each.reasons)
    counter.report(strict=config.strict)
    return {
        "images": counter.images, "unreadable": counter.unreadable, "features": embedder.size, "out": str(out),
        "paths": str(paths) if paths else None, "model": config.model, "seconds": round(counter.seconds, 3),
    }  # fmt: skip


def embed_given(config: ImageOptions, images: Any, given: Mapping[str, Any]) -> tuple[np.ndarray, list[str | None]]:
    """Computes the features of images that are given in Python.

    Args:
        images: as `sources.given.read_given` takes them.
        given: modules, by the names that stand for them.

    Returns:
        (images, features) float32, NaN for images that cannot be read; and for each why it cannot be, or None.
    """
    embedder = _open(config, given)
    answers = [*embedder.answer(read_given(images, config))]
    rows = [with_gaps(each, embedder.size) for each in answers]
    found = np.concatenate(rows) if rows else np.empty((0, embedder.size), np.float32)
    return found, [reason for each in answers for reason in each.reasons]


@dataclass(frozen=True)
class _Embedder:
    """A model that is ready to compute features, `size` of them for an image."""

    trained: TrainedModel
    network: Network
    size: int
    config: ImageOptions
    device: torch.device

    def answer(self, images: Iterable[Image]) -> Iterator[Answers]:
        """Yields the features of images, in batches and in order."""
        how = decoding_of(self.config, self.trained)
        return answer([self.network], images, how, self.config.batch, self.device)


def _open(config: ImageOptions, given: Mapping[str, Any] | None) -> _Embedder:
    # Before loading, so that a wrong --device does not cost a download.
    device = devices.pick_device(config.device)
    trained = open_model(config, given)
    size = count_features(trained.classifier, trained.preprocessing.side, PURPOSE)
    network = ready(trained, device, devices.resolve_precision(config.precision, device), features_of)
    return _Embedder(trained, network, size, config, device)


def features_of(classifier: Classifier) -> Features:
    """Returns what computes a classifier's features, (n, features), of views (n, 3, side, side)."""
    return Features(classifier, PURPOSE)


def with_gaps(answers: Answers, size: int) -> np.ndarray:
    """Returns a row of features for each image, (n, size) float32; NaN for those that cannot be read."""
    rows = np.full((len(answers.paths), size), np.nan, np.float32)
    if answers.outputs:
        rows[[reason is None for reason in answers.reasons]] = answers.outputs[0].numpy()
    return rows


class _Parquet:
    """Features and paths in one parquet file."""

    def __init__(self, table: tables.Table) -> None:
        self.table = table

    def write(self, paths: Sequence[str], reasons: Sequence[str | None], rows: np.ndarray) -> None:
        each = zip(paths, rows, reasons, strict=True)
        self.table.write([{"path": path, "features": row, "error": reason} for path, row, reason in each])


class _Npy:
    """Features in an .npy file, and the paths in a table beside it."""

    def __init__(self, file: IO[bytes], table: tables.Table, size: int) -> None:
        self.file, self.table, self.size, self.count = file, table, size, 0
        file.write(npy_header(0, size))

    def write(self, paths: Sequence[str], reasons: Sequence[str | None], rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, "<f4").tobytes())
        self.count += len(rows)
        self.table.write([{"path": path, "error": reason} for path, reason in zip(paths, reasons, strict=True)])

    def finish(self) -> None:
        """Writes the number of rows, which is known only at the end."""
        self.file.seek(0)
        self.file.write(npy_header(self.count, self.size))
        self.file.seek(0, 2)


def npy_header(count: int, size: int) -> bytes:
    """Returns the header of an .npy file (version 1.0) of (count, size) float32, which always has the same length."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count}, {size}), }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


@contextmanager
def _open_output(out: Path, paths: Path | None, size: int) -> Generator[_Parquet | _Npy]:
    """Yields what features are written to; its files appear when the block succeeds."""
    if paths is None:
        columns = [Column("path", str), Column("features", float, several=True, size=size), Column("error", str)]
        with tables.open_table(out, "parquet", columns) as table:
            yield _Parquet(table)
        return
    # Closed from the last to the first: where there are features, there are their paths.
    with tables.open_output(out) as file, tables.open_table(paths, "csv", PATHS) as table:
        output = _Npy(file, table, size)
        yield output
        output.finish()
