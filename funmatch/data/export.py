"""Pictures written as TFRecord shards, in the form of the earlier project, which TensorFlow reads."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from funmatch.data.build import Keeping, unreadable
from funmatch.data.cache import cache_home, surveyed
from funmatch.data.decode import decode, header
from funmatch.data.sources import Reading, Source, Track, untracked
from funmatch.data.survey import Survey, reason_of, stamp, summary
from funmatch.data.tfrecord import DamagedRecord, example, framed, records
from funmatch.draws import shuffled
from funmatch.errors import InputError
from funmatch.files import disk_errors, write_atomically

QUALITY = 95
KEPT_AS_THEY_ARE = {b"\xff\xd8\xff": "JPEG"}
NOTE = "funmatch.json"

Named = list[tuple[str, str]]
"""Name and reason of pictures that cannot be decoded."""


def write_shards(
    data: Sequence[str],
    reading: Reading,
    keeping: Keeping,
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
        reading, keeping: how it is read; of `keeping`, the decoder, the limits and what to do about bad pictures.
        folder: for the shards, the class names (`class.labels.txt`) and a note of what they are (`funmatch.json`).
        side: pictures are resized to this square whatever their aspect (bilinear, antialiased), pixels; None keeps
            size, and upright ordinary JPEGs to the byte.
        size: pictures a shard.

    Returns:
        `survey.summary`, with `name`, `data`, `folder`, `shards` and `unreadable`.
    """
    source, found = surveyed(data, reading, keeping, track)
    about = {"side": side, "shard_size": size, "content": stamp_of(source, found)}
    partial = _begin(folder, source, about)
    with disk_errors(folder):
        written, bad = _write_all(partial, source, found, keeping, side, size, track)
        if bad and keeping.on_bad == "stop":
            raise unreadable(source.name, bad, keeping.home or cache_home())
        if partial != folder:
            partial.rename(folder)
    shards = [str(folder / path.relative_to(partial)) for path in written]
    figures = {"name": source.name, "data": list(data), "folder": str(folder), "shards": shards}
    return figures | summary(source, found) | {"unreadable": bad}


def _write_all(
    folder: Path, source: Source, found: Survey, keeping: Keeping, side: int | None, size: int, track: Track
) -> tuple[list[Path], Named]:
    """Writes every split; gives the shards, and the pictures that cannot be decoded."""
    written: list[Path] = []
    bad: Named = []
    name = re.sub(r"[^A-Za-z0-9.]+", "_", source.name).strip("_") or "pictures"
    begin = 0
    for split, content in source.splits.items():
        known = {i - begin: reason for i, reason in found.reasons.items() if 0 <= i - begin < len(content)}
        bad += [(content.names[i], reason) for i, reason in sorted(known.items())]
        begin += len(content)
        order = [int(i) for i in shuffled(0, np.arange(len(content)), len(content)) if int(i) not in known]
        where = folder / split
        where.mkdir(exist_ok=True)
        groups = [order[at : at + size] for at in range(0, len(order), size)]
        for number, group in enumerate(track(groups, len(groups), f"writing {split}")):
            path, failed = _write_shard(where, f"{split}_{name}-{number:02d}", source, split, group, side, keeping)
            written += [path] if path else []
            bad += failed
    return written, bad


def stamp_of(source: Source, found: Survey) -> str:
    """What the shards hold: contents, labels and splits, wherever the files lie."""
    return stamp(Source("", source.classes, source.splits, source.read, [])) + found.rows["digest"].tobytes().hex()[:32]


def _begin(folder: Path, source: Source, about: dict[str, Any]) -> Path:
    """Where to write: a folder beside, until all is there; or the folder itself, if it holds these very shards."""
    partial = folder.with_name(f".{folder.name}.partial")
    if (folder / NOTE).is_file():
        if _note(folder) != about:
            raise InputError(f"{folder} holds shards of other pictures or of another form; choose another --out")
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; choose another --out")
    if partial.exists() and _note(partial) != about:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_atomically(partial / NOTE, json.dumps(about))
    if source.classes and not source.unnamed:
        write_atomically(partial / "class.labels.txt", "".join(f"{name}\n" for name in source.classes))
    return partial


def _note(folder: Path) -> Any:
    try:
        return json.loads((folder / NOTE).read_text())
    except (OSError, ValueError):
        return None


def _write_shard(
    where: Path, stem: str, source: Source, split: str, group: list[int], side: int | None, keeping: Keeping
) -> tuple[Path | None, Named]:
    """Writes one shard under another name, and renames it when it is whole; keeps one that is there."""
    there = list(where.glob(f"{stem}-*.tfrec"))
    if len(there) == 1 and _whole(there[0], len(group)):
        return there[0], []
    for path in there:
        path.unlink()

    def payload(i: int) -> bytes | str:
        try:
            image = jpeg(source.read(split, i), side, keeping)
        except Exception as error:  # decoders raise many kinds
            return reason_of(error)
        label = int(source.splits[split].labels[i])
        return framed(example(image, label if label >= 0 else None))

    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
        made = list(pool.map(payload, group))
    bad = [(source.splits[split].names[i], told) for i, told in zip(group, made, strict=True) if isinstance(told, str)]
    good = [record for record in made if isinstance(record, bytes)]
    if not good or (bad and keeping.on_bad == "stop"):
        return None, bad
    handle, partial = tempfile.mkstemp(prefix=f".{stem}.", suffix=".partial", dir=where)
    try:
        with open(handle, "wb") as file:
            os.fchmod(handle, 0o644)
            file.writelines(good)
            file.flush()
            os.fsync(handle)
        path = where / f"{stem}-{len(good)}.tfrec"
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return path, bad


def _whole(shard: Path, count: int) -> bool:
    try:
        return sum(1 for _ in records(shard)) == count
    except DamagedRecord:
        return False


def jpeg(encoded: bytes, side: int | None, keeping: Keeping) -> bytes:
    """A picture as a JPEG: as it is where that will do, else decoded, resized and encoded again."""
    if side is None and encoded[:3] in KEPT_AS_THEY_ARE and not header(encoded, keeping.max_pixels).kinds:
        decode(encoded, decoder=keeping.decoder, max_pixels=keeping.max_pixels)  # whether it can be
        return encoded
    picture = Image.fromarray(decode(encoded, decoder=keeping.decoder, max_pixels=keeping.max_pixels))
    if side is not None:
        picture = picture.resize((side, side), Image.Resampling.BILINEAR)
    file = BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()
