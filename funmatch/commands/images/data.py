"""Draws a contact sheet of a data set: some images of each class, as runs read them, with the class names."""

import math
import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from funmatch.commands.images import prepare
from funmatch.config import Data
from funmatch.data.cache.open_cache import Cache, cache_home
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.readers.open import local_folder
from funmatch.errors import InputError
from funmatch.reports.result import Result
from funmatch.runtime.disk.files import disk_errors
from funmatch.training import datasets

TILE = 1.5  # inches
COLUMNS = 8
ROWS = 12
MAX_IMAGES = COLUMNS * ROWS


def run(config: Data) -> Result:
    """Writes the contact sheet.

    Returns:
        the summary of `prepare.summarize`, with the sheet's path as `sheet`.

    Raises:
        InputError: `--sheet` does not end in `.png`.
    """
    # Before images are read, which may take minutes.
    if config.sheet and config.sheet.suffix.lower() != ".png":
        raise InputError(f"--sheet {config.sheet} does not end in .png; the sheet is a PNG file")
    cache = datasets.open_data_set(config, config.data)
    # Names of several data sets joined, and of sources with a prefix, hold signs that files must not.
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in cache.name)
    path = (config.sheet or _sheet_folder(config.data) / f"{name}-sheet.png").expanduser()
    draw(cache, path)
    return Result(None, prepare.summarize(cache, config.data) | {"sheet": str(path)})


def _sheet_folder(data: tuple[str, ...]) -> Path:
    """Picks the current folder, or the cache folder if the current one is inside the data set.

    A sheet among the images would be read as one of them by the next command.
    """
    here = Path.cwd().resolve()
    folders = [folder.resolve() for spec in data if (folder := local_folder(spec))]
    return cache_home() if any(here.is_relative_to(folder) for folder in folders) else Path()


def choose_images(cache: Cache) -> tuple[CachedSplit, list[int]]:
    """Picks a split and indices of images: a row for each of up to 12 classes, else one image of each of up to 96."""
    split = cache.splits.get("train") or next(iter(cache.splits.values()))
    # Numbers of classes, or of sets of classes.
    labels = split.index["label"]
    # Spread over the whole split: the first images may all be of one kind.
    if not split.labelled:
        return split, np.linspace(0, len(split) - 1, min(len(split), MAX_IMAGES)).astype(int).tolist()
    present = np.unique(labels)
    # A row for each class only where all of them fit on the sheet.
    each = COLUMNS if len(present) <= ROWS else 1
    some = present[np.linspace(0, len(present) - 1, min(len(present), MAX_IMAGES)).astype(int)]
    return split, [int(i) for label in some for i in _spread(np.flatnonzero(labels == label), each)]


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    return indices[np.linspace(0, len(indices) - 1, min(len(indices), count)).astype(int)]


def _printable(name: str) -> str:
    # Class names are folder names, whose bytes need not be valid UTF-8; matplotlib rejects lone surrogates.
    return name.encode(errors="replace").decode()


def draw(cache: Cache, path: Path) -> None:
    """Draws the contact sheet of a data set as a PNG file."""
    split, indices = choose_images(cache)
    rows = math.ceil(len(indices) / COLUMNS)
    columns = min(COLUMNS, len(indices))
    labels = split.classes_of(indices)
    # Class names may hold dollar signs.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # class names in scripts that the font lacks
        figure = Figure(figsize=(columns * TILE, rows * (TILE + 0.35) + 0.4), layout="constrained")
        figure.suptitle(f"{_printable(cache.name)}: {len(split):,} images of {split.name}", fontsize=10)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        # All of them, since the last row may have fewer images than columns.
        for axis in axes:
            axis.axis("off")
        for axis, image, own in zip(axes, split.images(indices), labels, strict=False):
            axis.imshow(image.numpy())
            if own:
                title = _printable(", ".join(cache.classes[label] for label in own))
                axis.set_title("\n".join(textwrap.wrap(title, 18)[:2]), fontsize=7, pad=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path):
            # Without the library's version, so that the same images give the same file.
            figure.savefig(path, dpi=100, metadata={"Software": None})
