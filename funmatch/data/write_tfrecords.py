"""Writes images as TFRecord shards in the format of the earlier project, for use with TensorFlow."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.data.cache.build import read_again, unreadable
from funmatch.data.cache.open_cache import scan_dataset
from funmatch.data.cache.scan import Scan, by_split, content_digest, fingerprint, reason_of, summary
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.dataset import Dataset, ReadOptions, Track, untracked
from funmatch.data.formats.tfrecord import DamagedRecord, example, frame, records
from funmatch.data.label_sets import set_of
from funmatch.data.labels import CLASS_FILES
from funmatch.data.limits import is_of_machine
from funmatch.data.readers.open import open_dataset
from funmatch.data.readers.shard_paths import NOTE
from funmatch.data.shard_images import Resizing, jpeg
from funmatch.data.shard_labels import labels_to_write
from funmatch.errors import InputError
from funmatch.ops.order import shuffle_positions
from funmatch.runtime.disk.files import cache_home, disk_errors, write_atomically
from funmatch.runtime.disk.json_files import Damaged, read_json
from funmatch.runtime.disk.locks import file_lock

CLASS_FILE = CLASS_FILES[0]
FOLDERS = {"val": "validation"}
"""Names of splits in shards where they differ from ours: those that notebooks of the earlier project look for."""
FORMAT = 2
"""Version of these names in the note; without one, shards for validation lie in `val/`, where they are still read."""

NamedBadImages = list[tuple[str, int, str, str]]
"""Split, index, name and reason of images that cannot be decoded."""


def write_shards(
    data: Sequence[str],
    options: ReadOptions,
    cache_options: CacheOptions,
    folder: Path,
    *,
    resizing: Resizing | None = None,
    size: int = 128,
    track: Track = untracked,
) -> dict[str, Any]:
    """Writes a data set as shards `<split>/<split>_<name>-<shard>-<count>.tfrec`, each complete or absent.

    Splits are called train, validation and test.

    A record is a `tf.train.Example` of `image` (JPEG of quality 95 without chroma subsampling) and `class` (int64, of
    several labels an image all of them; absent where nothing is labelled), in random order. Complete shards of an
    interrupted attempt are kept.

    Args:
        data: specs of the data sets to write.
        options, cache_options: of the latter only the decoder, the limits, and `on_bad` matter. With `unlabelled`,
            records have no `class`.
        folder: for the shards, the class names (`class.labels.txt`) and a description (`funmatch.json`).
        resizing: of the images; None keeps their size, and the very bytes of upright RGB JPEGs.
        size: images per shard.
        track: shows progress.

    Returns:
        `scan.summary`, with `name`, `data`, `folder`, `shards`, `unreadable` and `notes`.

    Raises:
        InputError: images are unreadable, the folder holds something else, or shards cannot hold these labels.
    """
    home = cache_options.home or cache_home()
    folder = Path(os.path.realpath(folder))  # the finished folder cannot be renamed to a link
    dataset, scanned = scan_dataset(open_dataset(data, options, track), cache_options, track)
    dataset = labels_to_write(dataset, unlabelled=options.unlabelled)
    description = _describe(dataset, scanned, resizing, size)
    # The lock lies with the caches, since the folder itself does not exist until it is complete.
    with file_lock(home / f"shards-{hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()}.lock"):
        done = _finished_shards(folder, description, dataset)
        written, bad = done or _write_folder(folder, description, dataset, scanned, resizing, cache_options, track)
    if bad and cache_options.on_bad == "stop":
        raise unreadable(dataset.display_name, [(name, reason) for _, _, name, reason in bad], home)
    written_paths = [str(folder / path) for path in written]
    place = {"name": dataset.name, "data": list(data), "folder": str(folder), "shards": written_paths}
    old = f"{folder} is of an earlier version, with validation shards in val/; for validation/, choose another --out"
    notes = (*dataset.notes, *([old] if any(path.startswith("val/") for path in written) else []))
    return place | _summarize(replace(dataset, notes=notes), scanned, bad)


def _describe(dataset: Dataset, scanned: Scan, resizing: Resizing | None, size: int) -> dict[str, Any]:
    """Describes shards as their note does, by which those of an earlier attempt are recognised."""
    description = {
        "name": dataset.name,
        "labelled": bool(dataset.classes),
        "side": resizing and resizing.side,
        "shard_size": size,
        "content": fingerprint_of(dataset, scanned),
        "format": FORMAT,
    }
    # Only where they are chosen: notes of earlier versions do not name them.
    if dataset.label_sets is not None:
        description["task"] = dataset.task
    if resizing and (resizing.fit, resizing.resample) != (Resizing.fit, Resizing.resample):
        description |= {"fit": resizing.fit, "resample": resizing.resample}
    return description


def _write_folder(
    folder: Path,
    description: dict[str, Any],
    dataset: Dataset,
    scanned: Scan,
    resizing: Resizing | None,
    cache_options: CacheOptions,
    track: Track,
) -> tuple[list[str], NamedBadImages]:
    """Writes into a folder beside the final one, and renames it once all images are there that should be."""
    size = description["shard_size"]
    with disk_errors(folder):
        partial = _begin(folder, dataset, description)
        written, bad = _write_splits(partial, dataset, scanned, resizing, cache_options, size, track)
        # Otherwise the attempt stays: the same command with --on-bad skip goes on from there.
        if not bad or cache_options.on_bad == "skip":
            write_atomically(partial / NOTE, json.dumps(description | {"shards": written, "unreadable": bad}))
            # Onto an empty folder too, which POSIX allows.
            partial.rename(folder)
    return written, bad


def _summarize(dataset: Dataset, scanned: Scan, bad: NamedBadImages) -> dict[str, Any]:
    counts = summary(dataset, scanned, {(split, i) for split, i, *_ in bad})
    return counts | {"unreadable": [[name, reason] for _, _, name, reason in bad], "notes": dataset.notes}


def _write_splits(
    folder: Path,
    dataset: Dataset,
    scanned: Scan,
    resizing: Resizing | None,
    cache_options: CacheOptions,
    size: int,
    track: Track,
) -> tuple[list[str], NamedBadImages]:
    """Writes every split; returns the shards' names, and the images that cannot be decoded."""
    written: list[str] = []
    bad: NamedBadImages = []
    # Hyphens separate the numbers in a shard's name, and other signs are special in globs and shells.
    stem = re.sub(r"[^A-Za-z0-9.]+", "_", dataset.name).strip("_") or "pictures"
    for split, rows, scan_reasons in by_split(dataset, scanned):
        listing = dataset.splits[split]
        bad += [(split, i, listing.names[i], reason) for i, reason in sorted(scan_reasons.items())]
        # Shuffled, since readers of shards shuffle only nearby records; always alike, so that an interrupted export
        # can keep the shards that it has.
        order = [
            int(i) for i in shuffle_positions(0, np.arange(len(listing)), len(listing)) if int(i) not in scan_reasons
        ]
        place = folder / FOLDERS.get(split, split)
        place.mkdir(exist_ok=True)
        groups = [order[at : at + size] for at in range(0, len(order), size)]
        for number, group in enumerate(track(groups, len(groups), f"writing {split}")):
            where = place / f"{place.name}_{stem}-{number:02d}"
            path, failed = _write_shard(where, dataset, split, group, rows["digest"], resizing, cache_options)
            written += [path.relative_to(folder).as_posix()] if path else []
            bad += failed
    return written, bad


def fingerprint_of(dataset: Dataset, scanned: Scan) -> str:
    """Returns a digest of what the shards hold: contents, labels and splits, but not where the files are."""
    # Without name and watched files: the same images in another place make the same shards.
    listing = fingerprint(Dataset("", dataset.classes, dataset.splits, dataset.read, []))
    sets = b"" if dataset.label_sets is None else dataset.label_sets.tobytes()
    # "bad" too: a smaller --max-pixels leaves images out whose content is the same.
    rows = content_digest(scanned.rows["digest"].tobytes() + scanned.rows["bad"].tobytes() + sets)
    return listing + rows.hex()


def _finished_shards(
    folder: Path, description: dict[str, Any], dataset: Dataset
) -> tuple[list[str], NamedBadImages] | None:
    """Returns the shards and unreadable images of a folder that the same command finished; None if there is none.

    Raises:
        InputError: the folder holds other shards, or some are damaged.
    """
    note = _read_note(folder)
    if note is None:
        return None
    # Notes of earlier versions lack `format`; what they describe is the same but for the name of a folder.
    found = {"format": FORMAT} | {
        key: note.get(key) for key in {*description, "fit", "resample", "task"} if key in note
    }
    # Only a finished folder lists its shards.
    if found != description or "shards" not in note:
        raise InputError(f"{folder} holds shards of other images or of another format; choose another --out")
    damaged = [name for name in note["shards"] if not _is_intact(folder / name)]
    if damaged:
        raise InputError(
            f"{len(damaged)} shards in {folder} are damaged, e.g. {damaged[0]}; delete the folder and rerun the command"
        )
    _write_class_names(folder, dataset)
    return note["shards"], [tuple(each) for each in note["unreadable"]]


def _write_class_names(folder: Path, dataset: Dataset) -> None:
    # Without the file, classes that are only numbers are read as numbers again.
    if dataset.classes and not dataset.unnamed:
        write_atomically(folder / CLASS_FILE, "".join(f"{name}\n" for name in dataset.classes))


def _begin(folder: Path, dataset: Dataset, description: dict[str, Any]) -> Path:
    """Makes the folder to write into, or finds the one that an interrupted attempt at the same left."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; choose another --out")
    if folder.is_mount():
        raise InputError(
            f"{folder} is a mounted disk, which no folder can be renamed to; choose a folder in it as --out"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists() and _read_note(partial) != description:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    # Before any shard: only an attempt with the same description may use what is in this folder.
    write_atomically(partial / NOTE, json.dumps(description))
    _write_class_names(partial, dataset)
    return partial


def _read_note(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(folder / NOTE, dict)
    except (OSError, Damaged):
        return None


def _write_shard(
    where: Path,
    dataset: Dataset,
    split: str,
    group: list[int],
    digests: np.ndarray,
    resizing: Resizing | None,
    cache_options: CacheOptions,
) -> tuple[Path | None, NamedBadImages]:
    """Writes `<where>-<count>.tfrec`, unless an interrupted attempt has; returns its path and the unreadable images."""
    # With the full count: a shard that lacks unreadable images is written anew, so that they are listed again.
    existing = where.with_name(f"{where.name}-{len(group)}.tfrec")
    if _is_intact(existing):
        return existing, []

    def record_or_reason(i: int) -> bytes | str:
        # Outside `try`: a file that has changed since the scan ends the export, whatever is wrong with it now.
        encoded = read_again(dataset, split, i, digests[i].tobytes())
        try:
            image = jpeg(encoded, resizing, cache_options)
        except Exception as error:  # decoders raise many types
            if is_of_machine(error):
                raise
            return reason_of(error)
        return frame(example(image, set_of(dataset, int(dataset.splits[split].labels[i]))))

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        # Threads, since Pillow decodes without Python's lock; `map`, since a shard's order must be reproducible.
        results = list(pool.map(record_or_reason, group))
    names = dataset.splits[split].names
    bad = [(split, i, names[i], reason) for i, reason in zip(group, results, strict=True) if isinstance(reason, str)]
    good = [record for record in results if isinstance(record, bytes)]
    if not good or (bad and cache_options.on_bad == "stop"):
        return None, bad
    path = where.with_name(f"{where.name}-{len(good)}.tfrec")
    write_atomically(path, b"".join(good))
    return path, bad


def _is_intact(shard: Path) -> bool:
    """Returns whether a shard exists and has as many valid records as its name says."""
    try:
        return sum(1 for _ in records(shard)) == int(shard.stem.rpartition("-")[2])
    except (DamagedRecord, OSError):
        return False
