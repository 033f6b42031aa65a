"""Every image of a source read once: its digest, size and kind; and what these tell about the data set.

What is found is written down as it is found, so that an interrupted survey goes on where it was.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import EDQUOT, EIO, EMFILE, ENFILE, ENOMEM, ENOSPC
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.data.dataset import UNLABELLED, Dataset, Track, untracked
from funmatch.data.decode import KINDS, MAX_PIXELS, header
from funmatch.runtime.files import disk_errors, file_lock, write_atomically

FORMAT = 3
ROW = np.dtype(
    [("digest", "V16"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4"), ("kinds", "<u2"), ("bad", "?")]
)
CHUNK = 256
EXAMPLES = 20
OURS = {ENOSPC, EDQUOT, EMFILE, ENFILE, EIO, ENOMEM}
"""Troubles of the machine, which say nothing about an image."""


@dataclass(frozen=True)
class Scan:
    """What reading every image found.

    Attributes:
        rows: of `ROW`, in the order of `Source.jobs`.
        reasons: why an image cannot be used, by its place in `rows`.
    """

    rows: np.ndarray
    reasons: dict[int, str]


def scan(
    source: Dataset, home: Path, track: Track = untracked, *, max_pixels: int = MAX_PIXELS, afresh: bool = False
) -> Scan:
    """Reads every image, or what an earlier survey of the same files wrote down.

    Args:
        source: the data set.
        home: folder of the caches.
        track: shows progress.
        max_pixels: larger images are bad.
        afresh: reads again although nothing seems to have changed; an interrupted survey is still gone on with.
    """
    name = f"{fingerprint(source)}-{max_pixels}-{FORMAT}"
    folder = home / "surveys"
    folder.mkdir(parents=True, exist_ok=True)
    whole, partial, reasons = (folder / f"{name}{end}" for end in (".rows", ".partial", ".reasons"))

    def look(job: tuple[str, int]) -> tuple[tuple, str | None]:
        return _look(source, job[0], job[1], max_pixels)

    with file_lock(folder / f"{name}.lock"), disk_errors(folder):
        if afresh:
            whole.unlink(missing_ok=True)
        if not whole.exists():
            jobs = source.jobs()
            done = len(recovered(partial, ROW))
            keep_reasons(reasons, done)
            with open(partial, "ab") as rows, open(reasons, "a") as told:
                for chunk in chunks(jobs[done:], look, track, done, "reading"):
                    rows_of_chunk = np.array([row for row, _ in chunk], ROW)
                    for i, (_, reason) in enumerate(chunk, done):
                        if reason:
                            told.write(json.dumps([i, reason]) + "\n")
                    told.flush()  # first the reasons, so that a row that says "bad" always has one
                    rows.write(rows_of_chunk.tobytes())
                    rows.flush()
                    done += len(chunk)
            partial.replace(whole)
        found = np.fromfile(whole, ROW)
        return Scan(found, keep_reasons(reasons, len(found)))


def by_split(source: Dataset, found: Scan) -> Iterator[tuple[str, np.ndarray, dict[int, str]]]:
    """What a survey found, split by split: its name, its rows, and the reasons by index in it."""
    begin = 0
    for name, split in source.splits.items():
        end = begin + len(split)
        yield name, found.rows[begin:end], {i - begin: why for i, why in found.reasons.items() if begin <= i < end}
        begin = end


def content_digest(encoded: bytes) -> bytes:
    """Digest of an encoded image."""
    return hashlib.blake2b(encoded, digest_size=16).digest()


def _look(source: Dataset, split: str, i: int, max_pixels: int) -> tuple[tuple, str | None]:
    try:
        encoded = source.read(split, i)
        digest = content_digest(encoded)
    except Exception as error:  # a row of its own, so that an image that comes back is noticed
        if isinstance(error, OSError) and error.errno in OURS:
            raise
        return (content_digest(repr(error).encode()), 0, 0, 0, 0, True), reason_of(error)
    try:
        head = header(encoded, max_pixels)
    except Exception as error:  # decoders raise many kinds
        return (digest, len(encoded), 0, 0, 0, True), reason_of(error)
    return (digest, len(encoded), head.height, head.width, head.kinds, False), None


def reason_of(error: Exception) -> str:
    """What is wrong with an image, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def recovered(path: Path, dtype: np.dtype) -> np.ndarray:
    """The whole rows that a file holds; what a kill left of another is cut off."""
    if not path.exists():
        return np.zeros(0, dtype)
    whole = path.stat().st_size // dtype.itemsize
    os.truncate(path, whole * dtype.itemsize)
    return np.fromfile(path, dtype)


def keep_reasons(path: Path, done: int) -> dict[int, str]:
    """The reasons in a file for the first `done` images; what a kill or a full disk left of others is cut off."""
    kept: dict[int, str] = {}
    if path.exists():
        for line in path.read_text(errors="replace").split("\n"):
            try:
                i, reason = json.loads(line)
            except (ValueError, TypeError):
                continue
            if isinstance(i, int) and i < done:
                kept[i] = str(reason)
    write_atomically(path, "".join(json.dumps(each) + "\n" for each in kept.items()))
    return kept


def chunks(jobs: list, function: Callable, track: Track, done: int, what: str) -> Iterator[list]:
    """A function of every job, by threads, in order, a chunk at a time so that results do not pile up."""
    total = done + len(jobs)
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:

        def one_by_one():
            yield from (None for _ in range(done))  # the bar begins where the work was left
            for start in range(0, len(jobs), CHUNK):
                yield from pool.map(function, jobs[start : start + CHUNK])

        chunk: list = []
        for i, result in enumerate(track(one_by_one(), total, what), 1):
            if i > done:
                chunk.append(result)
            if chunk and (len(chunk) == CHUNK or i == total):
                yield chunk
                chunk = []


def fingerprint(source: Dataset) -> str:
    """A digest that is cheap to make and changes whenever the listing, a size or a time of change does."""
    digest = hashlib.blake2b(repr((source.name, source.classes)).encode(), digest_size=16)
    for name, split in source.splits.items():
        digest.update(f"{name} {len(split)}\0".encode() + split.labels.tobytes())
        digest.update("\0".join(split.names).encode(errors="surrogateescape"))
    digest.update(fingerprint_files(source.watched).encode())
    return digest.hexdigest()


def fingerprint_files(paths: Iterable[str | bytes]) -> str:
    """A digest of the sizes and times of files and folders."""
    digest = hashlib.blake2b(digest_size=16)
    for path in map(os.fsencode, paths):
        try:
            status = os.stat(path)
            known: tuple[Any, ...] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        except OSError as error:
            known = (error.errno,)  # it will be named when it is read
        digest.update(repr((path, *known)).encode())
    return digest.hexdigest()


def summary(source: Dataset, found: Scan, bad: Collection[tuple[str, int]] = ()) -> dict[str, Any]:
    """What was found, for people: counts a split, classes, sizes, kinds, images that are there twice.

    Args:
        bad: images that cannot be decoded, as (split, index): they do not count.

    Returns:
        `splits` (images, labelled, classes present), `classes`, `published` counts, `kinds`, `short_side` and
        `long_side` (min, median, max), `bytes`, `leaks` (images of one split that are also in another: count and
        examples), `repeated` (images that are in a split more than once), `contradictory` (images of one content
        under several labels: count and examples).
    """
    bad = set(bad)
    usable = np.array([job not in bad for job in source.jobs()]) if bad else np.ones(len(found.rows), bool)
    good = found.rows[usable]
    sides = np.sort(np.stack([good["height"], good["width"]]), axis=0) if len(good) else np.zeros((2, 1), int)
    spread = [[int(side.min()), int(np.median(side)), int(side.max())] for side in sides]
    kinds = {name: int((good["kinds"] >> bit & 1).sum()) for bit, name in enumerate(KINDS)}
    leaks, repeated, contradictory = _twice(source, found, usable)
    begins = dict(zip(source.splits, np.cumsum([0, *map(len, source.splits.values())]).tolist(), strict=False))
    present = {name: usable[begins[name] : begins[name] + len(split)] for name, split in source.splits.items()}
    return {
        "splits": {
            name: {
                "pictures": int(present[name].sum()),
                "labelled": split.labelled,
                "classes": len(set(split.labels[present[name]].tolist()) - {-1}),
            }
            for name, split in source.splits.items()
        },
        "classes": list(source.classes),
        "published": source.counts,
        "kinds": {name: count for name, count in kinds.items() if count},
        "short_side": spread[0],
        "long_side": spread[1],
        "bytes": int(good["length"].sum()),
        "leaks": leaks,
        "repeated": repeated,
        "contradictory": contradictory,
    }


def _twice(source: Dataset, found: Scan, usable: np.ndarray) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Images of the same content: in two splits, more than once in one, and under different labels."""
    split_of = np.repeat(np.arange(len(source.splits)), [len(split) for split in source.splits.values()])
    labels = np.concatenate([split.labels for split in source.splits.values()])
    content = found.rows["digest"].copy().view("S16")
    order = np.argsort(content, kind="stable")
    order = order[usable[order]]
    _, counts = np.unique(content[order], return_counts=True)
    jobs, splits = source.jobs(), list(source.splits)
    leaks: dict[str, Any] = {}
    contradictory: dict[str, Any] = {"pictures": 0, "examples": []}
    repeated = 0

    def named(*places: int) -> list[str]:
        return [source.splits[split].names[i] for split, i in (jobs[place] for place in places)]

    ends = np.cumsum(counts)
    for end, count in zip(ends[counts > 1], counts[counts > 1], strict=True):
        places = order[end - count : end]
        inside = np.bincount(split_of[places], minlength=len(splits))
        repeated += int(np.maximum(inside - 1, 0).sum())
        for a, b in combinations(np.flatnonzero(inside), 2):
            leak = leaks.setdefault(f"{splits[a]} and {splits[b]}", {"pictures": 0, "examples": []})
            leak["pictures"] += int(inside[b])
            if len(leak["examples"]) < EXAMPLES:
                leak["examples"].append(named(*(places[split_of[places] == k][0] for k in (a, b))))
        if len({int(labels[place]) for place in places} - {UNLABELLED}) > 1:
            contradictory["pictures"] += len(places)
            if len(contradictory["examples"]) < EXAMPLES:
                contradictory["examples"].append(named(*places[:2]))
    return leaks, repeated, contradictory
