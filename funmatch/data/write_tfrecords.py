"""Images written as TFRecord shards, in the form of the earlier project, which TensorFlow reads."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from funmatch.data.cache.build import CacheOptions, read_again, unreadable
from funmatch.data.cache.open_cache import scan_dataset
from funmatch.data.cache.scan import Scan, by_split, content_digest, fingerprint, reason_of, summary
from funmatch.data.dataset import Dataset, ReadOptions, Track, untracked
from funmatch.data.decode import decode, header
from funmatch.data.formats.tfrecord import DamagedRecord, example, frame, records
from funmatch.data.readers.open import open_source
from funmatch.data.readers.shard_paths import NOTE
from funmatch.data.readers.tfrecords import CLASS_FILES
from funmatch.errors import InputError
from funmatch.ops.sampling import shuffle_positions
from funmatch.runtime.files import cache_home, disk_errors, file_lock, write_atomically

QUALITY = 95
CLASS_FILE = CLASS_FILES[0]
KEPT_AS_THEY_ARE = {b"\xff\xd8\xff": "JPEG"}

Named = list[tuple[str, int, str, str]]
"""Split, index, name and reason of images that cannot be decoded."""


def write_shards(
    data: Sequence[str],
    reading: ReadOptions,
    keeping: CacheOptions,
    folder: Path,
    *,
    side: int | None = None,
    size: int = 128,
    track: Track = untracked,
) -> dict[str, Any]:
    """Writes a data set as shards `<split>/<split>_<name>-<shard>-<count>.tfrec`, each whole or not there.

    A record is a `tf.train.Example` of `image` (JPEG of quality 95 without chroma subsampling) and `class` (int64; not
    there where nothing is labelled). Records are shuffled, since readers of shards shuffle only nearby ones. Shards
    that an earlier try wrote, and that are whole, are kept.

    Args:
        data: what to write.
        reading, keeping: how it is read; of `keeping`, the decoder, the limits and what to do about bad images.
        folder: for the shards, the class names (`class.labels.txt`) and a note of what they are (`funmatch.json`).
        side: images are resized to this square whatever their aspect (bilinear, antialiased), pixels; None keeps
            size, and upright ordinary JPEGs to the byte.
        size: images a shard.

    Returns:
        `survey.summary`, with `name`, `data`, `folder`, `shards` and `unreadable`.
    """
    home = keeping.home or cache_home()
    folder = Path(os.path.realpath(folder))
    source, found = scan_dataset(open_source(data, reading, track), keeping, track)
    _check_labels(source)
    labelled = bool(source.classes)
    about = {
        "name": source.name,
        "labelled": labelled,
        "side": side,
        "shard_size": size,
        "content": fingerprint_of(source, found),
    }
    with file_lock(home / f"shards-{hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest()}.lock"):
        done = _finished(folder, about, source)
        written, bad = done or _write_anew(folder, about, source, found, keeping, track)
    if bad and keeping.on_bad == "stop":
        raise unreadable(source.called, [(name, reason) for _, _, name, reason in bad], home)
    places = [str(folder / path) for path in written]
    figures = {"name": source.name, "data": list(data), "folder": str(folder), "shards": places}
    return figures | _told(source, found, bad)


def _write_anew(
    folder: Path, about: dict[str, Any], source: Dataset, found: Scan, keeping: CacheOptions, track: Track
) -> tuple[list[str], Named]:
    """Writes beside the folder, and gives it its name if all images are there that should be."""
    with disk_errors(folder):
        partial = _begin(folder, source, about)
        written, bad = _write_all(partial, source, found, keeping, about["side"], about["shard_size"], track)
        if not bad or keeping.on_bad == "skip":
            write_atomically(partial / NOTE, json.dumps(about | {"shards": written, "unreadable": bad}))
            partial.rename(folder)
    return written, bad


def _told(source: Dataset, found: Scan, bad: Named) -> dict[str, Any]:
    about = summary(source, found, {(split, i) for split, i, *_ in bad})
    return about | {"unreadable": [[name, reason] for _, _, name, reason in bad], "notes": source.notes}


def _check_labels(source: Dataset) -> None:
    """Raises `InputError` for what shards cannot hold."""
    for name, split in source.splits.items():
        if not split.labelled and (split.labels >= 0).any():
            raise InputError(f"some images of {name} have labels and some have none; write them into shards apart")
    for name in source.classes:
        if "\n" in name or "\r" in name or not name.strip():
            raise InputError(f"a file of class names cannot hold {name!r}, a name with a line break; rename the class")


def _write_all(
    folder: Path, source: Dataset, found: Scan, keeping: CacheOptions, side: int | None, size: int, track: Track
) -> tuple[list[str], Named]:
    """Writes every split; gives the shards' names, and the images that cannot be decoded."""
    written: list[str] = []
    bad: Named = []
    stem = re.sub(r"[^A-Za-z0-9.]+", "_", source.name).strip("_") or "pictures"
    for split, rows, known in by_split(source, found):
        content = source.splits[split]
        bad += [(split, i, content.names[i], reason) for i, reason in sorted(known.items())]
        order = [int(i) for i in shuffle_positions(0, np.arange(len(content)), len(content)) if int(i) not in known]
        (folder / split).mkdir(exist_ok=True)
        groups = [order[at : at + size] for at in range(0, len(order), size)]
        for number, group in enumerate(track(groups, len(groups), f"writing {split}")):
            where = folder / split / f"{split}_{stem}-{number:02d}"
            path, failed = _write_shard(where, source, split, group, rows["digest"], side, keeping)
            written += [path.relative_to(folder).as_posix()] if path else []
            bad += failed
    return written, bad


def fingerprint_of(source: Dataset, found: Scan) -> str:
    """What the shards hold: contents, labels and splits, wherever the files lie."""
    listing = fingerprint(Dataset("", source.classes, source.splits, source.read, []))
    rows = content_digest(found.rows["digest"].tobytes() + found.rows["bad"].tobytes())  # limits make more of them bad
    return listing + rows.hex()


def _finished(folder: Path, about: dict[str, Any], source: Dataset) -> tuple[list[str], Named] | None:
    """The shards and the bad images of a folder that was written with the same words, if every shard is whole."""
    note = _note(folder)
    if note is None:
        return None
    if {key: note.get(key) for key in about} != about or "shards" not in note:
        raise InputError(f"{folder} holds shards of other images or of another form; choose another --out")
    broken = [name for name in note["shards"] if not _whole(folder / name)]
    if broken:
        raise InputError(
            f"{len(broken)} shards in {folder} are damaged, e.g. {broken[0]}; remove the folder, and again"
        )
    _name_classes(folder, source)
    return note["shards"], [tuple(each) for each in note["unreadable"]]


def _name_classes(folder: Path, source: Dataset) -> None:
    if source.classes and not source.unnamed:
        write_atomically(folder / CLASS_FILE, "".join(f"{name}\n" for name in source.classes))


def _begin(folder: Path, source: Dataset, about: dict[str, Any]) -> Path:
    """A folder beside the one that is wanted, to write in until all is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; choose another --out")
    if folder.is_mount():
        raise InputError(f"{folder} is a mounted disk, which cannot be renamed to; choose a folder in it for --out")
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.exists() and _note(partial) != about:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_atomically(partial / NOTE, json.dumps(about))
    _name_classes(partial, source)
    return partial


def _note(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return None


def _write_shard(
    where: Path,
    source: Dataset,
    split: str,
    group: list[int],
    digests: np.ndarray,
    side: int | None,
    keeping: CacheOptions,
) -> tuple[Path | None, Named]:
    """Writes `<where>-<count>.tfrec` under another name, and renames it when it is whole; keeps one that is there."""
    there = where.with_name(f"{where.name}-{len(group)}.tfrec")
    if _whole(there):
        return there, []

    def payload(i: int) -> bytes | str:
        encoded = read_again(source, split, i, digests[i].tobytes())
        try:
            image = jpeg(encoded, side, keeping)
        except Exception as error:  # decoders raise many kinds
            return reason_of(error)
        label = int(source.splits[split].labels[i])
        return frame(example(image, label if label >= 0 else None))

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        made = list(pool.map(payload, group))
    names = source.splits[split].names
    bad = [(split, i, names[i], told) for i, told in zip(group, made, strict=True) if isinstance(told, str)]
    good = [record for record in made if isinstance(record, bytes)]
    if not good or (bad and keeping.on_bad == "stop"):
        return None, bad
    path = where.with_name(f"{where.name}-{len(good)}.tfrec")
    write_atomically(path, b"".join(good))
    return path, bad


def _whole(shard: Path) -> bool:
    """Whether a shard is there with as many sound records as its name says."""
    try:
        return sum(1 for _ in records(shard)) == int(shard.stem.rpartition("-")[2])
    except (DamagedRecord, OSError):
        return False


def jpeg(encoded: bytes, side: int | None, keeping: CacheOptions) -> bytes:
    """An image as a JPEG: as it is where that will do, else decoded, resized and encoded again."""
    if side is None and encoded[:3] in KEPT_AS_THEY_ARE and not header(encoded, keeping.max_pixels).kinds:
        decode(encoded, decoder=keeping.decoder, max_pixels=keeping.max_pixels)  # whether it can be
        return encoded
    image = Image.fromarray(decode(encoded, decoder=keeping.decoder, max_pixels=keeping.max_pixels))
    if side is not None:
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    file = BytesIO()
    image.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()
