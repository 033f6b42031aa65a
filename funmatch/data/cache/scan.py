"""Reads every image of a data set once, for its digest, size and properties, and summarizes what these show.

Results are written as they come, so that an interrupted scan resumes where it stopped.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.data.cache.resumable import are_intact, chunks, keep_reasons, recover_rows, write_check
from funmatch.data.dataset import UNLABELLED, Dataset, Track, untracked
from funmatch.data.decode import KINDS, header
from funmatch.data.limits import DEFAULT_LIMITS, MAX_SCANS, Limits, is_of_machine
from funmatch.runtime.disk.files import disk_errors
from funmatch.runtime.disk.locks import file_lock
from funmatch.runtime.text import counted

FORMAT = 3
# V16, since numpy cuts zeros off the end of an S16, and a digest may end with some.
ROW = np.dtype(
    [("digest", "V16"), ("length", "<i8"), ("height", "<i4"), ("width", "<i4"), ("kinds", "<u2"), ("bad", "?")]
)
EXAMPLES = 20


@dataclass(frozen=True)
class Scan:
    """Result of reading every image.

    Attributes:
        rows: one `ROW` an image, in the order of `Dataset.jobs`.
        reasons: why an image is unreadable, by its position in `rows`.
    """

    rows: np.ndarray
    reasons: dict[int, str]


def scan(
    dataset: Dataset,
    home: Path,
    track: Track = untracked,
    log: Callable[[str], None] = lambda _: None,
    *,
    limits: Limits = DEFAULT_LIMITS,
    refresh: bool = False,
) -> Scan:
    """Reads every image, or the stored result of an earlier scan of the same files.

    Args:
        dataset: the data set.
        home: folder of all caches.
        track: shows progress.
        log: prints a line where the stored result is damaged.
        limits: images beyond them count as unreadable.
        refresh: reads again although nothing seems to have changed; an interrupted scan is resumed all the same.
    """
    # With the limits: others make other images unreadable. Without scans as earlier versions named it.
    scans = "" if limits.scans == MAX_SCANS else f"-{limits.scans}"
    name = f"{fingerprint(dataset)}-{limits.pixels}{scans}-{FORMAT}"
    folder = home / "surveys"  # the folder's name since version 0.1.0
    folder.mkdir(parents=True, exist_ok=True)
    whole, partial, reasons, check = (folder / f"{name}{end}" for end in (".rows", ".partial", ".reasons", ".check"))

    with file_lock(folder / f"{name}.lock"), disk_errors(folder):
        size = len(dataset.jobs()) * ROW.itemsize
        if whole.exists() and not (whole.stat().st_size == size and are_intact((whole, reasons), check)):
            log(f"{whole} is damaged on the disk; reading the images again")
            refresh = True
        if refresh:
            # Without its checksums, an interrupted scan is taken for one of an earlier version, not for a damaged one.
            check.unlink(missing_ok=True)
            whole.unlink(missing_ok=True)
        if not whole.exists():
            _read_all(dataset, limits, partial, reasons, track)
            partial.replace(whole)
        # Still under the lock: a process with `refresh` removes this file.
        all_rows = np.fromfile(whole, ROW)
        found = Scan(all_rows, keep_reasons(reasons, len(all_rows)))
        if not check.exists():
            write_check((whole, reasons), check)
        return found


def _read_all(dataset: Dataset, limits: Limits, partial: Path, reasons: Path, track: Track) -> None:
    """Reads every image that is not in `partial` yet, and writes rows and reasons as they come."""
    jobs = dataset.jobs()

    def scan_job(job: tuple[str, int]) -> tuple[tuple, str | None]:
        return _scan_image(dataset, job[0], job[1], limits)

    done = len(recover_rows(partial, ROW))
    if done > len(jobs):
        partial.unlink()
        done = 0
    # Reasons of rows that were lost are written again with their rows.
    keep_reasons(reasons, done)
    with open(partial, "ab") as rows, open(reasons, "a") as reason_file:
        for chunk in chunks(jobs[done:], scan_job, track, done, "reading"):
            new_rows = np.array([row for row, _ in chunk], ROW)
            for i, (_, reason) in enumerate(chunk, done):
                if reason:
                    reason_file.write(json.dumps([i, reason]) + "\n")
            # Reasons first, so that a row with "bad" set always has one.
            reason_file.flush()
            rows.write(new_rows.tobytes())
            rows.flush()
            done += len(chunk)


def by_split(dataset: Dataset, scanned: Scan) -> Iterator[tuple[str, np.ndarray, dict[int, str]]]:
    """Yields each split of a scan: its name, its rows, and its reasons by index in the split."""
    begin = 0
    for name, split in dataset.splits.items():
        end = begin + len(split)
        reasons = {i - begin: reason for i, reason in scanned.reasons.items() if begin <= i < end}
        yield name, scanned.rows[begin:end], reasons
        begin = end


def content_digest(encoded: bytes) -> bytes:
    """Returns the digest of an encoded image."""
    # Part of every cache's key: another function here would orphan caches, and runs that recorded them.
    return hashlib.blake2b(encoded, digest_size=16).digest()


def _scan_image(dataset: Dataset, split: str, i: int, limits: Limits) -> tuple[tuple, str | None]:
    try:
        encoded = dataset.read(split, i)
        digest = content_digest(encoded)
    except Exception as error:
        if is_of_machine(error):
            raise
        # The error stands for the content, so that the cache's key changes once the image is readable.
        return (content_digest(repr(error).encode()), 0, 0, 0, 0, True), reason_of(error)
    try:
        # An OSError is the image's own from here on: its bytes are in memory.
        head = header(encoded, limits)
    except Exception as error:  # decoders raise many types
        if isinstance(error, MemoryError):
            raise
        return (digest, len(encoded), 0, 0, 0, True), reason_of(error)
    return (digest, len(encoded), head.height, head.width, head.kinds, False), None


def reason_of(error: Exception) -> str:
    """Returns what is wrong with an image, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:200] or type(error).__name__


def fingerprint(dataset: Dataset) -> str:
    """Returns a digest that is cheap to compute and changes with the listing, or a file's size or time of change."""
    digest = hashlib.blake2b(repr((dataset.name, dataset.classes)).encode(), digest_size=16)
    for name, split in dataset.splits.items():
        digest.update(f"{name} {len(split)}\0".encode() + split.labels.tobytes())
        # Joined by zeros, which no name contains, so that different lists of names never give the same bytes.
        digest.update("\0".join(split.names).encode(errors="surrogateescape"))
    digest.update(fingerprint_files(dataset.watched).encode())
    return digest.hexdigest()


def fingerprint_files(paths: Iterable[str | bytes]) -> str:
    """Returns a digest of the sizes and times of files and folders."""
    digest = hashlib.blake2b(digest_size=16)
    for path in map(os.fsencode, paths):
        try:
            status = os.stat(path)
            # ctime and inode as well: rsync, tar and cp -p set mtime back to that of the original.
            state: tuple[Any, ...] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        except OSError as error:
            state = (error.errno,)  # it is reported when it is read
        digest.update(repr((path, *state)).encode())
    return digest.hexdigest()


def summary(dataset: Dataset, scanned: Scan, bad: Collection[tuple[str, int]] = ()) -> dict[str, Any]:
    """Summarizes a data set: counts by split, classes, sizes, unusual properties, duplicates.

    Args:
        dataset, scanned: the data set and its scan.
        bad: images that cannot be decoded, as (split, index); they are not counted.

    Returns:
        `splits` (images, labelled, classes present), `classes`, `published` counts, `kinds`, `short_side` and
        `long_side` (min, median, max), `bytes`, `leaks` (images of one split that are also in another: count and
        examples), `repeated` (repetitions inside a split), `contradictory` (images of the same content under
        several labels: count and examples). Counts of images have the key `pictures`.
    """
    bad = set(bad)
    usable = np.array([job not in bad for job in dataset.jobs()]) if bad else np.ones(len(scanned.rows), bool)
    good = scanned.rows[usable]
    # One zero where no image is good: the minimum of nothing would be an error.
    sides = np.sort(np.stack([good["height"], good["width"]]), axis=0) if len(good) else np.zeros((2, 1), int)
    spread = [[int(side.min()), int(np.median(side)), int(side.max())] for side in sides]
    kinds = {name: int((good["kinds"] >> bit & 1).sum()) for bit, name in enumerate(KINDS)}
    leaks, repeated, contradictory = _find_duplicates(dataset, scanned, usable)
    begins = dict(zip(dataset.splits, np.cumsum([0, *map(len, dataset.splits.values())]).tolist(), strict=False))
    present = {name: usable[begins[name] : begins[name] + len(split)] for name, split in dataset.splits.items()}
    return {
        "splits": {
            name: {
                "pictures": int(present[name].sum()),
                "labelled": split.labelled,
                "classes": _count_classes(dataset, split.labels[present[name]]),
            }
            for name, split in dataset.splits.items()
        },
        "classes": list(dataset.classes),
        "published": dataset.published_counts,
        "kinds": {name: count for name, count in kinds.items() if count},
        "short_side": spread[0],
        "long_side": spread[1],
        "bytes": int(good["length"].sum()),
        "leaks": leaks,
        "repeated": repeated,
        "contradictory": contradictory,
    }


def list_complaints(name: str, found: dict[str, Any]) -> list[str]:
    """Returns what a user should know before trusting a data set, one line each.

    Args:
        name: of the data set.
        found: its `Cache.summary`.
    """
    # Readers mark what is loud themselves.
    lines = [note if note.startswith("WARNING: ") else f"note: {note}" for note in found["notes"]]
    for pair, leak in found["leaks"].items():
        one, other = leak["examples"][0]
        lines.append(f"WARNING: {leak['pictures']:,} images are both in {pair} of {name}, e.g. {one} = {other}")
    if count := found["contradictory"]["pictures"]:
        one, other = found["contradictory"]["examples"][0]
        lines.append(f"WARNING: {count:,} images of {name} are the same with different labels, e.g. {one} = {other}")
    if bad := found["unreadable"]:
        lines.append(f"WARNING: skipped {counted(len(bad), 'unreadable image')} of {name}, e.g. {': '.join(bad[0])}")
    return lines


def _count_classes(dataset: Dataset, labels: np.ndarray) -> int:
    """Returns the number of classes that occur in labels."""
    known = np.unique(labels[labels != UNLABELLED])
    return len(known) if dataset.label_sets is None else int(dataset.label_sets[known].any(0).sum())


def _find_duplicates(dataset: Dataset, scanned: Scan, usable: np.ndarray) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """Finds images of the same content in two splits, more than once in one, and under different labels."""
    split_of = np.repeat(np.arange(len(dataset.splits)), [len(split) for split in dataset.splits.values()])
    labels = np.concatenate([split.labels for split in dataset.splits.values()])
    content = scanned.rows["digest"].copy().view("S16")
    # Stable, so that copies stay in the order of the listing, and the examples are the same every time.
    order = np.argsort(content, kind="stable")
    # Unreadable files have digests of their errors, which may be equal.
    order = order[usable[order]]
    # It sorts as above, so that its counts are those of the runs of equal digests in `order`.
    _, counts = np.unique(content[order], return_counts=True)
    jobs, splits = dataset.jobs(), list(dataset.splits)
    leaks: dict[str, Any] = {}
    contradictory: dict[str, Any] = {"pictures": 0, "examples": []}
    repeated = 0

    def names_of(*positions: int) -> list[str]:
        return [dataset.splits[split].names[i] for split, i in (jobs[position] for position in positions)]

    ends = np.cumsum(counts)
    for end, count in zip(ends[counts > 1], counts[counts > 1], strict=True):
        copies = order[end - count : end]
        in_split = np.bincount(split_of[copies], minlength=len(splits))
        repeated += int(np.maximum(in_split - 1, 0).sum())
        for a, b in combinations(np.flatnonzero(in_split), 2):
            leak = leaks.setdefault(f"{splits[a]} and {splits[b]}", {"pictures": 0, "examples": []})
            # Those in the later split: their metrics are what the leak improves.
            leak["pictures"] += int(in_split[b])
            if len(leak["examples"]) < EXAMPLES:
                leak["examples"].append(names_of(*(copies[split_of[copies] == k][0] for k in (a, b))))
        if len({int(labels[position]) for position in copies} - {UNLABELLED}) > 1:
            contradictory["pictures"] += len(copies)
            if len(contradictory["examples"]) < EXAMPLES:
                contradictory["examples"].append(names_of(*copies[:2]))
    return leaks, repeated, contradictory
