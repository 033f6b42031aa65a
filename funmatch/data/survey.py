"""Every picture of a source read once: its digest, size and kind; then the cut into splits, which depends on these.

What is found is written down as it is found, so that an interrupted survey goes on where it was.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.data.decode import KINDS, MAX_PIXELS, header
from funmatch.data.sources import ORDER, Source, Split, Track, untracked
from funmatch.errors import InputError
from funmatch.files import disk_errors, exclusively

FORMAT = 2
ROW = np.dtype(
    [("digest", "V16"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4"), ("kinds", "<u2"), ("bad", "?")]
)
CHUNK = 256
EXAMPLES = 20


@dataclass(frozen=True)
class Survey:
    """What reading every picture found.

    Attributes:
        rows: of `ROW`, in the order of `Source.jobs`.
        reasons: why a picture cannot be used, by its place in `rows`.
    """

    rows: np.ndarray
    reasons: dict[int, str]


def survey(
    source: Source, home: Path, track: Track = untracked, *, max_pixels: int = MAX_PIXELS, afresh: bool = False
) -> Survey:
    """Reads every picture, or what an earlier survey of the same files wrote down.

    Args:
        source: the data set.
        home: folder of the caches.
        track: shows progress.
        max_pixels: larger pictures are bad.
        afresh: reads again although nothing seems to have changed; an interrupted survey is still gone on with.
    """
    name = f"{stamp(source)}-{max_pixels}-{FORMAT}"
    folder = home / "surveys"
    folder.mkdir(parents=True, exist_ok=True)
    whole, partial, reasons = (folder / f"{name}{end}" for end in (".rows", ".partial", ".reasons"))

    def look(job: tuple[str, int]) -> tuple[tuple, str | None]:
        return _look(source, job[0], job[1], max_pixels)

    with exclusively(folder / f"{name}.lock"), disk_errors(folder):
        if afresh:
            whole.unlink(missing_ok=True)
        if not whole.exists():
            jobs = source.jobs()
            done = len(recovered(partial, ROW))
            with open(partial, "ab") as rows, open(reasons, "a" if done else "w") as told:
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
        lines = [json.loads(line) for line in reasons.read_text().splitlines() if line.endswith("]")]
        return Survey(found, {i: reason for i, reason in lines if i < len(found)})


def _look(source: Source, split: str, i: int, max_pixels: int) -> tuple[tuple, str | None]:
    try:
        encoded = source.read(split, i)
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
    except Exception as error:  # a row of its own, so that a picture that comes back is noticed
        return (hashlib.blake2b(repr(error).encode(), digest_size=16).digest(), 0, 0, 0, 0, True), reason_of(error)
    try:
        head = header(encoded, max_pixels)
    except Exception as error:  # decoders raise many kinds
        return (digest, len(encoded), 0, 0, 0, True), reason_of(error)
    return (digest, len(encoded), head.height, head.width, head.kinds, False), None


def reason_of(error: Exception) -> str:
    """What is wrong with a picture, in a line."""
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


def stamp(source: Source) -> str:
    """A digest that is cheap to make and changes whenever the listing, a size or a time of change does."""
    digest = hashlib.blake2b(repr((source.name, source.classes)).encode(), digest_size=16)
    for name, split in source.splits.items():
        digest.update(f"{name} {len(split)}\0".encode() + split.labels.tobytes())
        digest.update("\0".join(split.names).encode(errors="surrogateescape"))
    digest.update(stamp_of_files(source.watched).encode())
    return digest.hexdigest()


def stamp_of_files(paths) -> str:
    """A digest of the sizes and times of files and folders."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        try:
            status = os.stat(path)
            known: tuple[Any, ...] = (status.st_size, status.st_mtime_ns, status.st_ino)
        except OSError as error:
            known = (error.errno,)  # it will be named when it is read
        digest.update(repr((path, *known)).encode(errors="surrogateescape"))
    return digest.hexdigest()


def apply_cut(source: Source, found: Survey) -> tuple[Source, Survey]:
    """Cuts the training pictures as the source asks, by content and seed alone.

    The pictures are ranked by a keyed digest of their content; the first share is test, if one is cut, the next
    validation. Neither names nor places count, and pictures of the same content stay on one side.

    Raises:
        InputError: a split would be empty.
    """
    if source.cut is None:
        return source, found
    count = len(source.splits["train"])
    start = sum(len(split) for name, split in list(source.splits.items())[: list(source.splits).index("train")])
    content = found.rows["digest"][start : start + count]
    ranks = _ranks(content.tolist(), source.cut.seed)
    order = np.argsort(ranks, kind="stable")
    chosen: dict[str, np.ndarray] = {}
    begin = 0
    for name in ("test", "val"):
        if share := source.cut.shares.get(name):
            end = begin + (int(share * count) if isinstance(share, Fraction) else share)
            while begin < end < count and ranks[order[end]] == ranks[order[end - 1]]:
                end += 1
            chosen[name] = np.sort(order[begin:end]) + start
            begin = end
    chosen["train"] = np.sort(order[begin:]) + start
    for name, places in chosen.items():
        if not len(places):
            raise InputError(f"of {count} training pictures of {source.name}, the cut leaves none for {name}")
    return _rearranged(source, found, chosen)


def _ranks(digests: list[bytes], seed: int) -> np.ndarray:
    key = seed.to_bytes(8, "little")
    keyed = (hashlib.blake2b(digest, digest_size=8, key=key).digest() for digest in digests)
    return np.frombuffer(b"".join(keyed), "<u8")


def _rearranged(source: Source, found: Survey, chosen: dict[str, np.ndarray]) -> tuple[Source, Survey]:
    """Source and survey with splits made of the pictures at these places of the old order."""
    jobs = source.jobs()
    begin = 0
    for name, split in source.splits.items():
        if name != "train":
            chosen[name] = np.arange(begin, begin + len(split))
        begin += len(split)
    chosen = {name: chosen[name] for name in ORDER if name in chosen}
    splits = {name: _picked(source, [jobs[i] for i in places]) for name, places in chosen.items()}

    def read(split: str, index: int) -> bytes:
        return source.read(*jobs[chosen[split][index]])

    order = np.concatenate(list(chosen.values()))
    where = {int(old): new for new, old in enumerate(order)} if found.reasons else {}
    reasons = {where[i]: reason for i, reason in found.reasons.items()}
    return replace(source, splits=splits, read=read, cut=None), Survey(found.rows[order], reasons)


def _picked(source: Source, jobs: list[tuple[str, int]]) -> Split:
    names = [source.splits[split].names[i] for split, i in jobs]
    return Split(names, np.array([source.splits[split].labels[i] for split, i in jobs], np.int32))


def summary(source: Source, found: Survey) -> dict[str, Any]:
    """What was found, for people: counts a split, classes, sizes, kinds, pictures that are there twice.

    Returns:
        `splits` (pictures, labelled, classes present), `classes`, `published` counts, `kinds`, `short_side` and
        `long_side` (min, median, max), `bytes`, `leaks` (pictures of one split that are also in another: count and
        examples), `repeated` (pictures that are in a split more than once).
    """
    good = found.rows[~found.rows["bad"]]
    sides = np.sort(np.stack([good["height"], good["width"]]), axis=0) if len(good) else np.zeros((2, 1), int)
    spread = [[int(side.min()), int(np.median(side)), int(side.max())] for side in sides]
    kinds = {name: int((good["kinds"] >> bit & 1).sum()) for bit, name in enumerate(KINDS)}
    leaks, repeated = _twice(source, found)
    return {
        "splits": {
            name: {
                "pictures": len(split),
                "labelled": split.labelled,
                "classes": len(set(split.labels.tolist()) - {-1}),
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
    }


def _twice(source: Source, found: Survey) -> tuple[dict[str, Any], int]:
    """Pictures of the same content in two splits, and how many are in one split more than once."""
    split_of = np.repeat(np.arange(len(source.splits)), [len(split) for split in source.splits.values()])
    content = found.rows["digest"].copy().view("S16")
    order = np.argsort(content, kind="stable")
    _, counts = np.unique(content, return_counts=True)
    jobs, names = source.jobs(), list(source.splits)
    leaks: dict[str, Any] = {}
    repeated = 0
    begins = np.concatenate([[0], np.cumsum(counts)])
    for begin, end in zip(begins[:-1][counts > 1], begins[1:][counts > 1], strict=True):
        places = order[begin:end]
        places = places[~found.rows["bad"][places]]
        inside = np.bincount(split_of[places], minlength=len(names))
        repeated += int(np.maximum(inside - 1, 0).sum())
        present = np.flatnonzero(inside)
        for a in range(len(present)):
            for b in range(a + 1, len(present)):
                pair = leaks.setdefault(f"{names[present[a]]} and {names[present[b]]}", {"pictures": 0, "examples": []})
                pair["pictures"] += int(inside[present[b]])
                if len(pair["examples"]) < EXAMPLES:
                    one, two = (places[split_of[places] == k][0] for k in (present[a], present[b]))
                    pair["examples"].append([source.splits[s].names[i] for s, i in (jobs[one], jobs[two])])
    return leaks, repeated
