"""Data sets of the Hugging Face Hub, or their files on disk, through the library `datasets`."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.data.dataset import (
    SPLIT_NAMES,
    UNLABELLED,
    Dataset,
    ReadOptions,
    SplitListing,
    check_classes,
    read_class_file,
    read_file,
    sort_splits,
)
from funmatch.errors import InputError, first_line

FILES = {".parquet": "parquet", ".arrow": "arrow"}
WHOLE = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
LABELS = ("label", "labels", "class", "cls", "fine_label", "category")


def open_hub(spec: str, reading: ReadOptions) -> Dataset:
    """A data set with a column of images.

    Args:
        spec: `user/name`, `user/name:config`, a parquet or arrow file, a folder of such files, or one that
            `save_to_disk` wrote.

    Raises:
        InputError: the library is missing, there is no such data set, or it has no images.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("hf: needs the library datasets; pip install 'funmatch[hf]'") from None
    tables = _tables(_load(datasets, spec), spec)
    first = next(iter(tables.values()))
    image = _image_column(datasets, first, spec, reading)
    label = _label_column(datasets, first, spec, reading)
    try:
        classes, unnamed = _classes(datasets, tables, label, reading)
        splits = {name: _split(spec, name, table, label, classes) for name, table in tables.items()}
    except InputError:
        if not reading.unlabelled:
            raise
        classes, unnamed = (), False
        splits = {name: _split(spec, name, table, None, ()) for name, table in tables.items()}
    encoded = {name: _encoded(datasets, table, spec, image) for name, table in tables.items()}

    def read(split: str, index: int) -> bytes:
        found = encoded[split][int(index)][image]
        if not found or not (found["bytes"] or found["path"]):
            raise ValueError("there is no image")
        return found["bytes"] or read_file(found["path"])

    watched = sorted({file["filename"] for table in tables.values() for file in table.cache_files})
    here = Path(spec).expanduser()
    watched += [str(here), *sorted(str(path) for path in here.rglob("*"))] if here.exists() else []
    watched += [str(reading.class_file)] if reading.class_file else []
    name = Path(spec.partition(":")[0]).stem if watched else spec
    return Dataset(name, classes, sort_splits(splits), read, watched, unnamed=unnamed, place=spec)


def _tables(loaded: Any, spec: str) -> dict[str, Any]:
    """The tables of a data set by the names of their splits here."""
    if not isinstance(loaded, dict):
        loaded = {str(getattr(loaded, "split", None) or "train"): loaded}
    tables: dict[str, Any] = {}
    for called, table in loaded.items():
        split = SPLIT_NAMES.get(called.lower())
        if split in tables:
            raise InputError(f"hf:{spec} has two splits for {split}")
        if split:
            tables[split] = table
    if not tables:
        raise InputError(f"hf:{spec} has the splits {', '.join(loaded)}; wanted train, validation or test")
    for split, table in tables.items():
        if not len(table):
            raise InputError(f"hf:{spec}: the split {split} holds no image")
    return tables


def _load(datasets: Any, spec: str) -> Any:
    path = Path(spec).expanduser()
    try:
        if path.is_file() and path.suffix in FILES:
            return datasets.load_dataset(FILES[path.suffix], data_files={"train": str(path)})
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            return datasets.load_from_disk(str(path))
        if path.is_dir():
            return datasets.load_dataset(str(path))
        if spec.startswith((".", "~", os.sep)):
            raise InputError(f"hf: there is nothing at {spec}")
        name, _, config = spec.partition(":")
        return datasets.load_dataset(name, config or None)
    except InputError:
        raise
    except Exception as error:  # of many kinds: no network, no such name, a damaged file
        raise InputError(
            f"hf:{spec} cannot be loaded: {first_line(error)}; wanted a data set of the Hub (with a network, or "
            "fetched before), a .parquet or .arrow file, or a folder of them"
        ) from None


def _encoded(datasets: Any, table: Any, spec: str, image: str) -> Any:
    """The column of images alone, as bytes."""
    try:
        return table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    except Exception as error:  # arrow's own kinds
        raise InputError(f"hf:{spec}: the column {image!r} holds no images ({first_line(error)})") from None


def _image_column(datasets: Any, table: Any, spec: str, reading: ReadOptions) -> str:
    columns = table.features
    if reading.image_feature:
        if reading.image_feature not in columns:
            raise InputError(f"hf:{spec} has no column {reading.image_feature!r}, but: {', '.join(columns)}")
        return reading.image_feature
    found = [name for name, feature in columns.items() if isinstance(feature, datasets.Image)]
    found += [name for name in ("image", "img", "jpg") if name in columns and name not in found]
    if not found:
        raise InputError(f"hf:{spec} has no column of images, but: {', '.join(columns)}; choose by --image-feature")
    return found[0]


def _label_column(datasets: Any, table: Any, spec: str, reading: ReadOptions) -> str | None:
    columns = table.features
    if reading.label_feature == "none":
        return None
    if reading.label_feature:
        if reading.label_feature not in columns:
            raise InputError(f"hf:{spec} has no column {reading.label_feature!r}, but: {', '.join(columns)}")
        return reading.label_feature
    found = [name for name, feature in columns.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) > 1:
        raise InputError(f"hf:{spec} has several labels: {', '.join(found)}; choose by --label-feature")
    return next(iter(found + [name for name in LABELS if name in columns]), None)


def _classes(
    datasets: Any, tables: dict[str, Any], label: str | None, reading: ReadOptions
) -> tuple[tuple[str, ...], bool]:
    """The classes, and whether they are only numbers."""
    if label is None:
        return (), False
    if reading.class_file:
        return read_class_file(reading.class_file.expanduser()), False
    feature = next(iter(tables.values())).features[label]
    if not isinstance(feature, datasets.ClassLabel) and getattr(feature, "dtype", "") not in WHOLE | {
        "string",
        "large_string",
    }:
        raise InputError(f"hf: the column {label!r} holds no labels but {feature}; choose another by --label-feature")
    if isinstance(feature, datasets.ClassLabel):
        return check_classes(feature.names, "hf"), False
    values = {value for table in tables.values() if label in table.features for value in table.unique(label)} - {None}
    if all(isinstance(value, str) for value in values):
        return check_classes(sorted(values), "hf"), False
    highest = max(values, default=-1)
    if highest > 1_000_000:
        raise InputError(f"hf: the column {label!r} holds {highest:,}, which cannot be the number of a class")
    return tuple(map(str, range(highest + 1))), True


def _split(spec: str, name: str, table: Any, label: str | None, classes: tuple[str, ...]) -> SplitListing:
    names = [f"hf:{spec} {name}[{i}]" for i in range(len(table))]
    if label is None or label not in table.features:
        return SplitListing(names, np.full(len(table), UNLABELLED, np.int32))
    values = table[label][:]
    places = {called: i for i, called in enumerate(classes)}
    numbers = [value if isinstance(value, int) else places.get(value, -2) for value in values]  # None has no place
    labels = np.array(numbers, np.int64)
    if not (labels == UNLABELLED).all() and (labels.min() < 0 or labels.max() >= len(classes)):
        wrong = int(np.flatnonzero((labels < 0) | (labels >= len(classes)))[0])
        raise InputError(
            f"{names[wrong]}: label {values[wrong]!r} is outside the {len(classes)} classes; or --unlabelled"
        )
    return SplitListing(names, labels.astype(np.int32))
