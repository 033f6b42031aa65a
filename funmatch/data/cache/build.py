"""Builds a cache: decodes every image once and stores it as runs read it; an interrupted build resumes."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from funmatch.data.cache.check import FORMAT, LABEL_SETS, checksum, is_complete, is_intact
from funmatch.data.cache.resumable import chunks, keep_reasons, recover_rows
from funmatch.data.cache.scan import Scan, by_split, content_digest, reason_of
from funmatch.data.cache.stores import INDEX
from funmatch.data.cache.storing import CacheOptions, choose_way, content_key
from funmatch.data.dataset import NAMED_AT_MOST, Dataset, Track
from funmatch.data.decode import decode
from funmatch.data.limits import ALONE, OutOfMemory
from funmatch.errors import InputError
from funmatch.runtime.disk.files import array_bytes, disk_errors, write_atomically
from funmatch.runtime.disk.json_files import seal
from funmatch.runtime.disk.locks import file_lock
from funmatch.runtime.disk.partials import remove_partials
from funmatch.runtime.text import counted

FREE_BYTES = 256 << 20  # left free on the disk beside a cache

BadImages = list[tuple[str, int, str]]
"""Split, index and reason of images that cannot be decoded."""


def build(
    dataset: Dataset,
    scanned: Scan,
    options: CacheOptions,
    home: Path,
    track: Track,
    log: Callable[[str], None],
    *,
    check: bool = False,
) -> Path:
    """Returns the folder of a data set's cache, and builds it if it is missing.

    Args:
        dataset, scanned: with all splits made.
        options: with the decoder resolved.
        home: folder of all caches.
        track: shows progress.
        log: prints a line.
        check: verifies the checksums of an existing cache, and rebuilds it where it is damaged.

    Raises:
        InputError: some images cannot be decoded (all are listed), or the disk is too full.
    """
    content = content_key(dataset, scanned, options)
    way, size = choose_way(scanned, options)
    # The way is not part of the key: views are the same in both, so that a run may resume with either.
    folder = home / f"{content}-{way}"
    # Two runs that start together want the same cache: the second waits, and then finds it complete.
    with file_lock(home / f"{folder.name}.lock"):
        if is_complete(folder) and (not check or is_intact(folder, track)):
            return folder
        if folder.exists():
            log(f"{folder} is damaged on the disk; rebuilding it")
        partial = folder.with_name(f"{folder.name}.partial")
        _check_space(home, size, partial, dataset.name, way)
        stored = "decoded once" if way == "resident" else "packed as they are and decoded in every step"
        log(f"{dataset.name}: {way}: {len(dataset.jobs()):,} images, {stored}; {size / 1e9:.2g} GB in {home}")
        with disk_errors(home):
            bad = _fill(partial, dataset, scanned, options, way, track)
            lost = {name: sum(split == name for split, *_ in bad) for name in dataset.splits}
            # Skipping all images of a split is an error, too: there would be nothing to train or to evaluate on.
            empty = any(len(split) == lost[name] for name, split in dataset.splits.items())
            if bad and (options.on_bad == "stop" or empty):
                shutil.rmtree(partial)
                raise unreadable(dataset.display_name, [(dataset.splits[k].names[i], why) for k, i, why in bad], home)
            _finish(partial, dataset, scanned, options, way, content, bad)
            # The rename comes last, so that a folder of this name is always complete.
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    return folder


def _check_space(home: Path, size: int, partial: Path, name: str, way: str) -> None:
    """Raises `InputError` unless the disk has room for a cache, beside what an interrupted build has left of it."""
    free = shutil.disk_usage(home).free + sum(path.stat().st_size for path in partial.glob("*.pixels"))
    if size + FREE_BYTES > free:
        other = ", or pass --pixels streaming, which stores them as they are" if way == "resident" else ""
        raise InputError(
            f"{name} needs {size / 1e9:.2f} GB in {home}, {(size + FREE_BYTES - free) / 1e9:.2f} GB more than it may "
            f"take ({FREE_BYTES / 1e9:.1f} GB stay free); make room, or set FUNMATCH_CACHE to another folder{other}"
        )


def _fill(partial: Path, dataset: Dataset, scanned: Scan, options: CacheOptions, way: str, track: Track) -> BadImages:
    """Appends every image to `<split>.pixels` and its row to `<split>.rows`, from where an earlier attempt stopped."""
    partial.mkdir(exist_ok=True)
    bad: BadImages = []
    for split, rows, scan_reasons in by_split(dataset, scanned):
        reasons = _fill_split(partial, dataset, split, rows["digest"].tolist(), scan_reasons, options, way, track)
        bad += [(split, i, reason) for i, reason in sorted(reasons.items())]
    return bad


def _fill_split(
    partial: Path,
    dataset: Dataset,
    split: str,
    digests: list[bytes],
    scan_reasons: dict[int, str],
    options: CacheOptions,
    way: str,
    track: Track,
) -> dict[int, str]:
    """Fills one split, and returns why images are unreadable, by their index."""
    listing = dataset.splits[split]
    rows, pixels, reasons = (partial / f"{split}.{end}" for end in ("rows", "pixels", "reasons"))
    pixels.touch()
    done, end = _resume_point(rows, pixels, len(listing))

    def encode(i: int) -> tuple[tuple[int, int], bytes, str]:
        # A row without bytes stands for it, so that rows keep the numbers of the listing until `_finish`.
        if i in scan_reasons:
            return (0, 0), b"", scan_reasons[i]
        encoded = read_again(dataset, split, i, digests[i])
        image = decode_or_reason(listing.names[i], encoded, options)
        if isinstance(image, str):
            return (0, 0), b"", image
        return (image.shape[0], image.shape[1]), image.tobytes() if way == "resident" else encoded, ""

    # Those beyond the last valid row are written again below.
    keep_reasons(reasons, done)
    with open(rows, "ab") as index, open(pixels, "ab") as data, open(reasons, "a") as reason_file:
        jobs = list(range(done, len(listing)))
        for chunk in chunks(jobs, encode, track, done, f"decoding {split}"):
            new_rows = np.zeros(len(chunk), INDEX)
            for row, ((height, width), stored, reason) in enumerate(chunk):
                label = listing.labels[done + row]
                new_rows[row] = (end, len(stored), height, width, label, zlib.crc32(stored))
                end += data.write(stored)
                if reason:
                    reason_file.write(json.dumps([done + row, reason]) + "\n")
            # Rows last: a resumed build trusts a row, so its pixels and its reason must already be in their files.
            reason_file.flush()
            data.flush()
            index.write(new_rows.tobytes())
            index.flush()
            done += len(chunk)
    return keep_reasons(reasons, done)


def decode_or_reason(name: str, encoded: bytes, options: CacheOptions) -> np.ndarray | str:
    """Decodes an image to (height, width, 3) uint8, or returns why that is impossible.

    Raises:
        OutOfMemory: there is too little memory. Such an image is good; recorded as unreadable, it would be missing
            for good.
    """
    try:
        try:
            return decode(encoded, cap=options.cap, decoder=options.decoder, limits=options.limits)
        except Exception:
            # Again, while no large image takes memory: a lack of it that has passed meanwhile looks like damage.
            with ALONE:
                return decode(encoded, cap=options.cap, decoder=options.decoder, limits=options.limits)
    except Exception as error:  # decoders raise many types; each is reported with the file's name
        if isinstance(error, OutOfMemory | MemoryError):
            raise OutOfMemory(f"{name}: {reason_of(error)}") from None
        # Never empty: an empty reason stands for a good image.
        return reason_of(error) or "unreadable"


def read_again(dataset: Dataset, split: str, i: int, digest: bytes) -> bytes:
    """Reads an image for the second time.

    Raises:
        InputError: it is gone, or has changed since the scan.
    """
    name = dataset.splits[split].names[i]
    try:
        encoded = dataset.read(split, i)
    except Exception as error:  # it was readable during the scan, so the image itself is not at fault
        raise InputError(f"{name}: {reason_of(error)}; it was readable before. Start the command again") from None
    # The cache is named by the contents that the scan read; others would be stored under a wrong name for good.
    if content_digest(encoded) != digest:
        raise InputError(f"{name} has changed since it was first read; start the command again")
    return encoded


def _resume_point(rows: Path, pixels: Path, count: int) -> tuple[int, int]:
    """Returns how many valid rows an earlier attempt left, `count` at most, and the offset of the next image."""
    done = recover_rows(rows, INDEX)
    end = int((done["offset"] + done["length"]).max(initial=0))
    # After a power failure, rows may have reached the disk without the pixels that were written before them.
    if not 0 <= end <= pixels.stat().st_size or len(done) > count:
        rows.unlink()
        done, end = done[:0], 0
    # Bytes behind the last row belong to images whose rows were lost; these are decoded again.
    os.truncate(pixels, end)
    return len(done), end


def _finish(
    partial: Path, dataset: Dataset, scanned: Scan, options: CacheOptions, way: str, content: str, bad: BadImages
) -> None:
    """Writes the indices, without the unreadable images, and `meta.json`."""
    for split, scan_rows, _ in by_split(dataset, scanned):
        rows = np.fromfile(partial / f"{split}.rows", INDEX)
        good = rows["length"] > 0
        for name, array in (("index", rows[good]), ("digest", scan_rows["digest"][good])):
            (partial / f"{split}.{name}.npy").write_bytes(array_bytes(array))
        for temporary in ("rows", "reasons"):
            (partial / f"{split}.{temporary}").unlink()
        # Before meta.json, by which a cache counts as complete.
        with open(partial / f"{split}.pixels", "rb") as written:
            os.fsync(written.fileno())
    if dataset.label_sets is not None:
        (partial / LABEL_SETS).write_bytes(array_bytes(dataset.label_sets))
    # Without meta.json, whole or half-written, which an interrupted attempt may have left here.
    remove_partials(partial)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir()) if path.name != "meta.json"}
    meta = {
        "format": FORMAT, "content": content, "way": way, "cap": options.cap, "decoder": options.decoder,
        "classes": dataset.classes, "splits": list(dataset.splits), "sizes": sizes, "bad": bad,
        # Not of the pixels: each image has its own checksum in the index.
        "checks": {name: checksum(partial / name) for name in sizes if name.endswith(".npy")},
    }  # fmt: skip
    write_atomically(partial / "meta.json", json.dumps(seal(meta)))


def unreadable(name: str, bad: Sequence[Sequence[str]], home: Path) -> InputError:
    """Returns the error that lists unreadable images: the first ones in its message, all of them in a file."""
    lines = [f"{image}: {reason}" for image, reason in bad]
    text = "\n  ".join(lines[:NAMED_AT_MOST])
    if len(lines) > NAMED_AT_MOST:
        # Named by its content, so that repeated attempts do not pile up files.
        listed = home / f"unreadable-{hashlib.blake2b(text.encode(errors='replace'), digest_size=6).hexdigest()}.txt"
        # Names may hold bytes that are not UTF-8.
        write_atomically(listed, "".join(line.encode(errors="replace").decode() + "\n" for line in lines))
        text += f"\n  … and {len(lines) - NAMED_AT_MOST} more, all in {listed}"
    found, them = counted(len(lines), "unreadable image"), "it" if len(lines) == 1 else "them"
    return InputError(f"{found} in {name}; fix or remove {them}, or pass --on-bad skip:\n  {text}")
