"""From the words that a person says to a data set: `pet37`, `~/pictures`, `tfrecord:shards/*`, `hf:user/name`."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from funmatch.data.dataset import Dataset, ReadOptions, SplitSpec, Track, join_datasets, untracked
from funmatch.data.readers.catalog import CATALOG, open_named
from funmatch.data.readers.folder import open_folder
from funmatch.data.readers.huggingface import open_hub
from funmatch.data.readers.tfrecords import open_tfrecords
from funmatch.data.readers.webdataset import open_tars
from funmatch.errors import InputError, unknown

Reader = Callable[[str, ReadOptions, Track], Dataset]


def _folder(place: str, reading: ReadOptions, _track: Track) -> Dataset:
    return open_folder(Path(place).expanduser(), follow_links=reading.follow_links)


READERS: dict[str, Reader] = {
    "folder": _folder,
    "tfrecord": open_tfrecords,
    "wds": open_tars,
    "hf": lambda place, reading, _track: open_hub(place, reading),
}


def open_source(specs: str | Sequence[str], reading: ReadOptions | None = None, track: Track = untracked) -> Dataset:
    """The images that a person named, listed but not read.

    Args:
        specs: one data set or several, which are joined: a name of `CATALOG`; a folder; or `folder:PATH`,
            `tfrecord:PATTERN`, `wds:PATTERN`, `hf:NAME`.
        reading: how.
        track: shows progress.

    Raises:
        InputError: there is none, or it cannot be used.
    """
    reading = reading or ReadOptions()
    sources = [_open_one(spec, reading, track) for spec in ([specs] if isinstance(specs, str) else specs)]
    return _with_cut(join_datasets(sources), reading.cut)


def resolve_names(spec: str) -> str:
    """A spec with its path from the root, so that it means the same wherever it is said."""
    door, colon, place = spec.partition(":")
    if spec in CATALOG:
        return spec
    if not (colon and door in READERS):
        door, place = "", spec
    path = os.path.abspath(os.path.expanduser(place))
    if door == "hf" and not os.path.exists(path):
        return spec
    return f"{door}{colon if door else ''}{path}"


def _open_one(spec: str, reading: ReadOptions, track: Track) -> Dataset:
    if spec in CATALOG:
        return open_named(spec, reading.data_dir)
    door, colon, place = spec.partition(":")
    if colon and door in READERS:
        if not place:
            raise InputError(f"{spec} names no place; wanted {door}:PATH")
        return READERS[door](place, reading, track)
    path = Path(spec).expanduser()
    if path.exists():
        return open_folder(path, follow_links=reading.follow_links)
    if "/" in spec or spec.startswith((".", "~")):
        raise InputError(f"no folder {spec}; wanted a folder of images, or one of: {', '.join(CATALOG)}")
    doors = ", ".join(f"{name}:…" for name in READERS)
    raise unknown("data set", spec, CATALOG, hint=f"there is no folder {spec!r} here; other doors: {doors}")


def _with_cut(source: Dataset, cut: SplitSpec | None) -> Dataset:
    """The source with the cut that a person wants, in place of one that is ours."""
    if cut is None:
        return source
    if not cut.shares:  # only the seed is theirs
        return replace(source, cut=SplitSpec(source.cut.shares, cut.seed)) if source.cut else source
    if "val" in source.splits:
        raise InputError(f"{source.name} has a validation split of its own, so --val cannot cut one")
    if "train" not in source.splits:
        raise InputError(f"{source.name} has no training images to cut --val from")
    return replace(source, cut=SplitSpec({**(source.cut.shares if source.cut else {}), **cut.shares}, cut.seed))
