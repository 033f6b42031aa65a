"""Lists data sets of the Hugging Face Hub, or their files on disk, through the library `datasets`."""

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from funmatch.data.dataset import Dataset, ReadOptions, SplitListing, Track, read_file, sort_splits, untracked
from funmatch.data.readers.shard_paths import splits_of
from funmatch.data.readers.split_names import SPLIT_NAMES, says_split
from funmatch.data.readers.table_labels import read_labels
from funmatch.data.remote.fetch import fetch_if_remote
from funmatch.errors import InputError, first_line, hide_secrets

FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
LOOKED_AT = 100  # rows whose first image tells what a column holds


def resolve_if_local(spec: str) -> str:
    """Returns the absolute path where there is such a file or folder; otherwise the name on the Hub, unchanged."""
    path = os.path.abspath(os.path.expanduser(spec))
    return path if os.path.exists(path) else spec


def open_hub(spec: str, options: ReadOptions, track: Track = untracked) -> Dataset:
    """Lists a data set that has a column of images.

    Args:
        spec: `user/name`, `user/name:config`, a parquet or arrow file, a folder of such files, one that `save_to_disk`
            wrote, or the address of any of these, or of several files.
        options: for columns and class names.
        track: shows the progress of downloads; the library shows its own besides.

    Raises:
        InputError: the library is missing, there is no such data set, or it has no images.
    """
    try:
        import datasets
    except ImportError:
        raise InputError("hf: needs the library datasets; pip install 'funmatch[hf]'") from None
    address = spec
    spec, files = fetch_if_remote(spec, track)
    loaded = _by_split(_load(datasets, spec, files))
    tables = _tables(loaded, spec)
    image, notes = _image_column(datasets, next(iter(tables.values())).features, spec, options)
    labels = read_labels(datasets, f"hf:{spec}", tables, options)
    encoded = {name: _encoded(datasets, table, spec, image) for name, table in tables.items()}
    splits = labels.splits
    if options.image_feature:
        # Scans are kept by the names of images: with another column, the same row is another image.
        splits = {split: _named(listing, image) for split, listing in splits.items()}
    inside = _allowed_folders(datasets, spec)

    def read(split: str, index: int) -> bytes:
        row = encoded[split][int(index)][image]
        if not row or not (row["bytes"] or row["path"]):
            raise ValueError("there is no image")
        # Tables hold the bytes; folders of images hold paths alone.
        return row["bytes"] or _read_inside(row["path"], inside)

    watched = [*_watched(tables, spec, options), *map(str, files)]
    name, shown = Path(spec.partition(":")[0]).stem if watched else spec, hide_secrets(address)
    unread = [name for name, table in loaded.items() if all(table is not each for each in tables.values())]
    notes += [f"hf:{spec}: splits that are not read: {', '.join(unread)}"] if unread else []
    return Dataset(
        name, labels.classes, sort_splits(splits), read, watched, location=shown, lacking=labels.lacking,
        unnamed=labels.unnamed, notes=(*notes, *labels.notes),
    )  # fmt: skip


def _named(listing: SplitListing, column: str) -> SplitListing:
    return replace(listing, names=[f"{name} ({column})" for name in listing.names])


def _watched(tables: dict[str, Any], spec: str, options: ReadOptions) -> list[str]:
    """Returns the files and folders whose changes make another data set."""
    watched = sorted({file["filename"] for table in tables.values() for file in table.cache_files})
    # `cache_files` are the library's own copies, which do not change when the original files do.
    local = Path(spec).expanduser()
    watched += [str(local), *sorted(str(path) for path in local.rglob("*"))] if local.exists() else []
    # The class names too: with another file, or the same one edited, the data set is another.
    return watched + ([str(options.class_file)] if options.class_file else [])


def _allowed_folders(datasets: Any, spec: str) -> tuple[str, ...]:
    """Returns the folders in which a table may name files: the data set's own, and where the library puts downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    local = Path(spec).expanduser()
    own = [local if local.is_dir() else local.parent] if local.exists() else []
    # Where the library unpacks archives, of folders on disk, too.
    downloads = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    return tuple(os.path.realpath(each) for each in (*own, *downloads))


def _read_inside(path: str, folders: tuple[str, ...]) -> bytes:
    """Reads a file that a table names; a table from elsewhere must not make us read other files of this machine.

    Raises:
        ValueError: it lies outside the folders, by its name or by a link.
    """
    # Links are followed first, of the folders above, too.
    real = os.path.realpath(path)
    if not any(os.path.commonpath((real, folder)) == folder for folder in folders):
        raise ValueError(f"the table names {path[:200]!r}, which is outside {folders[0]}; move the images into it")
    return read_file(real)


def _by_split(loaded: Any) -> dict[str, Any]:
    """Returns the tables of a data set by the library's names of their splits."""
    return loaded if isinstance(loaded, dict) else {str(getattr(loaded, "split", None) or "train"): loaded}


def _tables(loaded: dict[str, Any], spec: str) -> dict[str, Any]:
    """Returns the tables of a data set by our names of their splits."""
    tables: dict[str, Any] = {}
    # Names such as train2017 count only where no split has a plain name, which then is the one that is meant.
    plain = any(name.lower() in SPLIT_NAMES for name in loaded)
    for name, table in loaded.items():
        said = SPLIT_NAMES.get(name.lower()) if plain else says_split(name)
        split = "val" if said == "eval" else said
        if split in tables:
            raise InputError(f"hf:{spec} has two splits for {split}")
        if split:
            tables[split] = table
    if not tables:
        raise InputError(f"hf:{spec} has the splits {', '.join(loaded)}; expected train, validation or test")
    for split, table in tables.items():
        if not len(table):
            raise InputError(f"hf:{spec}: the split {split} has no images")
    return tables


def _load(datasets: Any, spec: str, files: Sequence[Path] = ()) -> Any:
    """Loads whatever a spec names, or several files of one kind: a `datasets.Dataset`, or a dict of them by split."""
    path = Path(spec).expanduser()
    try:
        if files:
            named: dict[str, list[str]] = {}
            for file, split in zip(files, splits_of(files)[0], strict=True):
                named.setdefault(split, []).append(str(file))
            return datasets.load_dataset(FORMATS.get(files[0].suffix, files[0].suffix), data_files=named)
        if path.is_file() and path.suffix in FORMATS:
            return datasets.load_dataset(FORMATS[path.suffix], data_files={"train": str(path)})
        if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
            # `load_dataset` refuses what `save_to_disk` has written.
            return datasets.load_from_disk(str(path))
        if path.is_dir():
            return datasets.load_dataset(str(path))
        if path.is_file():
            raise InputError(f"hf:{spec} is a file; expected {' or '.join(FORMATS)}, or a folder of such files")
        if spec.startswith((".", "~", os.sep)):
            # Not to the Hub, where such a name would end in an error about the network.
            raise InputError(f"hf: {spec} is missing")
        name, _, config = spec.partition(":")
        return datasets.load_dataset(name, config or None)
    except InputError:
        raise
    except Exception as error:  # the library raises many types: no network, no such name, a damaged file
        raise InputError(
            f"hf:{spec} cannot be loaded: {first_line(error)}; expected a data set of the Hub (with a network, or "
            "downloaded before), a .parquet or .arrow file, or a folder of them"
        ) from None


def _check_images(table: Any, spec: str, image: str) -> None:
    """Raises `InputError` where the first value of the column of images is something else."""
    # As stored: the library's own features would already fetch or decode it.
    column = table.with_format("arrow")[:LOOKED_AT][image].to_pylist()
    value = next((each for each in column if each is not None), None)
    where = f"hf:{spec}: the column {image!r}"
    if isinstance(value, dict) and value.get("bytes") is None:
        value = value.get("path")
    if value is None:
        # A few empty ones are told one by one, by name.
        problem = "is empty" if len(column) == len(table) else ""
    elif isinstance(value, list):
        # Lists of rows of numbers are pixels, which the library encodes; a flat list has lost its height and width.
        first = next(iter(value), None)
        if isinstance(first, list):
            problem = ""
        elif isinstance(first, int | float):
            problem = f"holds flat lists of {len(value)} numbers; encode each as PNG or JPEG"
        else:
            problem = "holds lists of images; write one image a row"
    elif not isinstance(value, str):
        problem = ""  # the library's own error is clear
    elif re.match(r"(https?|s3|gs|ftp)://", value):
        problem = f"holds addresses, e.g. {value[:80]}; download the images first"
    elif value.startswith("data:") or (len(value) > 200 and re.fullmatch(r"[A-Za-z0-9+/=\s]+", value)):
        problem = "holds images in base64; write their bytes instead"
    else:
        problem = "" if os.path.exists(value) else f"holds names of files, e.g. {value[:80]!r}, which are not there"
    if problem:
        raise InputError(f"{where} {problem}")


def _encoded(datasets: Any, table: Any, spec: str, image: str) -> Any:
    """Returns a table of the image column alone, with images as bytes."""
    _check_images(table, spec, image)
    # decode=False: the library would decode images itself, without our handling of EXIF, palettes and transparency.
    try:
        return table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    except Exception as error:  # arrow's own types
        raise InputError(f"hf:{spec}: the column {image!r} has no images ({first_line(error)})") from None


def _image_column(datasets: Any, columns: dict[str, Any], spec: str, options: ReadOptions) -> tuple[str, list[str]]:
    """Returns the column of images, and a note where there are several."""
    if options.image_feature:
        if options.image_feature not in columns:
            raise InputError(f"hf:{spec} has no column {options.image_feature!r}, but: {', '.join(columns)}")
        return options.image_feature, []
    candidates = [name for name, feature in columns.items() if isinstance(feature, datasets.Image)]
    candidates += [name for name in ("image", "img", "jpg") if name in columns and name not in candidates]
    if not candidates:
        raise InputError(f"hf:{spec} has no column of images, but: {', '.join(columns)}; pass --image-feature")
    first, *others = candidates
    note = f"hf:{spec}: the image is read from {first}, not {', '.join(others)}; choose with --image-feature"
    return first, [note] if others else []
