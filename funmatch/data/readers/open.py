"""Opens the images that a data spec names: `pet37`, `~/photos`, `tfrecord:shards/*`, `hf:user/name`.

A new kind of source takes a module with a function like `open_tfrecords`, and a row of `READERS`.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from pathlib import Path

from funmatch.data.dataset import OF_SHARDS, Dataset, ReadOptions, Track, untracked
from funmatch.data.join import hold_out, join_datasets, notes_about_labels
from funmatch.data.readers.catalog import CATALOG, open_named
from funmatch.data.readers.class_notes import class_notes
from funmatch.data.readers.folder import EXPECTED, open_folder, open_remote_folder
from funmatch.data.readers.huggingface import open_hub, resolve_if_local
from funmatch.data.readers.shard_paths import shards_of
from funmatch.data.readers.split_names import SPLIT_NAMES
from funmatch.data.readers.tfrecords import ENDINGS, open_tfrecords
from funmatch.data.readers.webdataset import ENDINGS as TARS
from funmatch.data.readers.webdataset import open_tars
from funmatch.data.remote import fetch
from funmatch.data.remote.archives import is_archive
from funmatch.data.remote.objects import Wanted
from funmatch.data.tables import manifest
from funmatch.errors import InputError, hide_secrets, unknown
from funmatch.runtime.addresses import WEB, canonical, check_scheme_if_any, is_address, scheme_of


def absolute_path(location: str) -> str:
    """Returns a path or a pattern of paths from the root."""
    return os.path.abspath(os.path.expanduser(location))


@dataclass(frozen=True)
class Reader:
    """A kind of data source. A spec chooses it by its prefix: `tfrecord:shards/*`.

    Attributes:
        open: (location, options, track) to the listed data set.
        location: what follows the prefix, as messages call it.
        resolve: makes a location independent of the working directory.
        files: glob patterns of the files that it reads. Where such files are given without the prefix, the message
            recommends it.
        remote: which files of an address it needs.
        single: whether it reads one file, and neither a folder nor a pattern of such files.
    """

    open: Callable[[str, ReadOptions, Track], Dataset]
    location: str
    resolve: Callable[[str], str] = absolute_path
    files: tuple[str, ...] = ()
    remote: Wanted = fetch.EVERYTHING
    single: bool = False


def _open_folder(location: str, options: ReadOptions, track: Track) -> Dataset:
    shown, links = hide_secrets(location), options.follow_links
    if is_address(location):
        folder = open_remote_folder(location, track, follow_links=links, recommend_reader=recommend_reader)
    else:
        path = Path(location).expanduser()
        folder = open_folder(path, follow_links=links, recommend_reader=recommend_reader)
    if options.unlabelled:
        # Classes that are not used need no words.
        about_classes = class_notes(folder.location, folder.classes, folder.splits)
        folder = replace(folder, notes=tuple(note for note in folder.notes if note not in about_classes))
    moved = [field.name for field in fields(options) if getattr(options, field.name) != field.default]
    of_shards = {field.name for field in fields(options) if field.metadata == OF_SHARDS}
    unused = [f"--{name.replace('_', '-')}" for name in moved if name in of_shards]
    # A note only: another source of the same command may need the option.
    note = f"{shown} is a folder: {', '.join(unused)} does not apply to it; labels come from folder names"
    return replace(folder, notes=(*folder.notes, note)) if unused else folder


READERS: dict[str, Reader] = {
    "folder": Reader(_open_folder, "PATH", remote=fetch.AS_FOLDER),
    "tfrecord": Reader(open_tfrecords, "PATTERN", files=("*.tfrec*",), remote=shards_of(ENDINGS)),
    "wds": Reader(open_tars, "PATTERN", files=("*.tar",), remote=shards_of(TARS)),
    "hf": Reader(open_hub, "NAME", resolve=resolve_if_local, files=("*.parquet", "*.arrow")),
    "csv": Reader(manifest.open_manifest, "FILE", files=manifest.FILES, remote=manifest.REMOTE, single=True),
}


def open_dataset(specs: str | Sequence[str], options: ReadOptions | None = None, track: Track = untracked) -> Dataset:
    """Lists the images of one or several data sets without reading them.

    Args:
        specs: one spec, or several that are joined: a name of `CATALOG`, a folder, or a prefix of `READERS` with a
            location, such as `tfrecord:PATTERN`.
        options: for reading.
        track: shows progress.

    Raises:
        InputError: a data set is missing or unusable.
    """
    options = options or ReadOptions()
    specs = [specs] if isinstance(specs, str) else specs
    datasets = [_open_one(spec, options, track) for spec in specs]
    notes = [*_notes_about_splits(specs), *notes_about_labels(datasets)]
    datasets[0] = replace(datasets[0], notes=(*notes, *datasets[0].notes))
    # After joining: a share is meant of all training images together.
    return hold_out(replace(join_datasets(datasets), task=options.task), options.split_spec)


def update_copies(specs: Sequence[str], track: Track, *, at_most: float, refresh: bool = False) -> None:
    """Downloads what specs name by an address, as far as it is missing here or has changed there.

    Args:
        specs: as for `open_dataset`.
        track: shows progress.
        at_most: seconds since this process has asked a server; after more it asks again.
        refresh: compares copies with their checksums.

    Raises:
        InputError: something is gone, or may not be read.
    """
    for prefix, location in _remote(specs):
        _check_address(prefix, location)
        fetch.fetch(location, READERS[prefix].remote, track, at_most=at_most, refresh=refresh)


def check_named(spec: str) -> None:
    """Raises `InputError` for a spec with an address that only a file names, and of which there is no whole copy."""
    for prefix, location in _remote([spec]):
        fetch.check_named(location, READERS[prefix].remote)


def known_copies(specs: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the files that each address of specs named the last time, without contacting a server."""
    return [fetch.known_files(location, READERS[prefix].remote) for prefix, location in _remote(specs)]


def _remote(specs: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the addresses in specs, each with the prefix of its reader."""
    parsed = [_parse(spec) for spec in specs if spec not in CATALOG]
    return [(prefix or "folder", location) for prefix, location in parsed if is_address(location)]


def is_source(spec: str) -> bool:
    """Returns whether a spec names its kind, by a name of the catalog or a prefix, and is not just a path."""
    return spec in CATALOG or bool(_parse(spec)[0])


def resolve_spec(spec: str) -> str:
    """Makes a spec independent of the working directory, so that records of runs can be used from anywhere."""
    if spec in CATALOG:
        return spec
    prefix, location = _parse(spec)
    if is_address(location):
        return hide_secrets(f"{prefix}:{canonical(location)}" if prefix else canonical(location))
    return f"{prefix}:{READERS[prefix].resolve(location)}" if prefix else absolute_path(spec)


def local_folder(spec: str) -> Path | None:
    """Returns the folder on this machine that a spec names by its path, None where it names something else."""
    _, location = _parse(resolve_spec(spec))
    return Path(location) if os.path.isdir(location) else None


def recommend_reader(path: Path) -> str:
    """Returns a clause that recommends the reader for the files at a path, empty where none reads them."""
    for prefix, reader in READERS.items():
        for pattern in reader.files:
            # Only up to the first match: a folder may hold a million files.
            if path.is_file():
                found = path if fnmatch(path.name, pattern) else None
            else:
                found = next(path.rglob(pattern), None)
            if found:
                return f"for {pattern}, pass {prefix}:{found if reader.single else path}"
    return ""


def _parse(spec: str) -> tuple[str, str]:
    """Splits a spec into a prefix of `READERS`, empty where it has none, and the location."""
    prefix, colon, location = spec.partition(":")
    if is_address(spec):
        return "", spec  # hf://… is an address, too
    # Known prefixes only: paths may contain colons.
    if colon and prefix in READERS:
        return prefix, location
    return ("csv", spec) if manifest.is_manifest(spec) else ("", spec)


def _open_one(spec: str, options: ReadOptions, track: Track) -> Dataset:
    # First the catalog: a folder of the same name is meant by ./name only.
    if spec in CATALOG:
        return open_named(spec, options.data_dir)
    check_spec(spec)
    prefix, location = _parse(spec)
    # Before looking at the disk: a folder that is called hf:x is meant by ./hf:x only.
    return READERS[prefix].open(location, options, track) if prefix else _open_folder(spec, options, track)


def check_spec(spec: str) -> None:
    """Raises `InputError` for a spec that names nothing, without reading what it names."""
    prefix, location = _parse(spec)
    if prefix and not location:
        raise InputError(f"{spec} has no location; expected {prefix}:{READERS[prefix].location}")
    if is_address(location):
        _check_address(prefix, location)
        check_named(spec)
        return
    check_scheme_if_any(location)
    path = Path(spec).expanduser()
    if spec in CATALOG or prefix or path.exists():
        # One look, since a folder of images may hold a million files; the reader finds those without any image.
        if not prefix and spec not in CATALOG and path.is_dir() and os.access(path, os.R_OK | os.X_OK):
            with os.scandir(path) as entries:
                if next(entries, None) is None:
                    raise InputError(f"{spec} is empty; {EXPECTED}")
        return
    if re.fullmatch(r"[\w-]+/[\w.-]+", spec):
        raise InputError(f"there is no folder {spec}; for a data set of the Hugging Face Hub, pass hf:{spec}")
    if "/" in spec or spec.startswith((".", "~")):
        raise InputError(f"there is no folder {spec}; expected a folder of images, or one of: {', '.join(CATALOG)}")
    others = ", ".join(f"{name}:{reader.location}" for name, reader in READERS.items())
    raise unknown("data set", spec, CATALOG, hint=f"there is no folder {spec!r} here; other sources: {others}")


def _check_address(prefix: str, address: str) -> None:
    """Raises `InputError` for an address that can be no folder of images, without contacting its server."""
    if prefix not in ("", "folder"):
        return
    shown, is_of_web = hide_secrets(address), scheme_of(address) in WEB
    place = shown.partition("://")[2]
    place = place.partition("?")[0] if is_of_web else place
    name = place.rstrip("/").rpartition("/")[2]
    if is_archive(name) and not set("*{[") & set(place):
        return
    for word, reader in READERS.items():
        if any(fnmatch(name, pattern) for pattern in reader.files):
            raise InputError(f"{shown} is not a folder of images; pass {word}:{shown}")
    if set("*{[") & set(place):
        raise InputError(f"{shown} is a pattern; name the kind of its files: {_words(shown)}")
    if is_of_web:
        raise InputError(
            f"{shown}: web servers have no listing of a folder's files; pass an archive of it (.zip, .tar, .tar.gz), "
            f"or shards: {_words('https://…')}"
        )


def _words(address: str) -> str:
    return ", ".join(f"{word}:{address}" for word, reader in READERS.items() if reader.files and not reader.single)


def _notes_about_splits(specs: Sequence[str]) -> list[str]:
    """Returns notes where splits of one folder are given one by one: `pets/train pets/val`, or `pets/train` alone."""
    folders = [folder.resolve() for spec in specs if spec not in CATALOG and (folder := local_folder(spec))]
    splits = {folder: SPLIT_NAMES[folder.name.lower()] for folder in folders if folder.name.lower() in SPLIT_NAMES}
    given = ", ".join(specs)
    if len(set(splits.values())) > 1:
        return [
            f"WARNING: {given} are joined, and all their images are for training; pass the folder that holds the "
            "splits, or evaluation images as --eval-data"
        ]
    for folder in splits:
        beside = [
            path.name for path in _subfolders_of(folder.parent) if path.name.lower() in SPLIT_NAMES and path != folder
        ]
        if beside:
            return [f"{given}: only this folder is read; {folder.parent} also has {', '.join(sorted(beside))}"]
    return []


def _subfolders_of(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []  # the folder above need not be readable
