"""Filling a cache: every image decoded once and kept as runs will read it; an interrupted build goes on."""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from funmatch.data.cache.scan import Scan, by_split, chunks, content_digest, keep_reasons, reason_of, recovered
from funmatch.data.cache.stores import INDEX
from funmatch.data.dataset import NAMED_AT_MOST, Dataset, Track
from funmatch.data.decode import MAX_PIXELS, decode
from funmatch.errors import InputError
from funmatch.runtime.files import disk_errors, file_lock, write_atomically

FORMAT = 4
ROOM = 256 << 20  # bytes that a disk should keep free beside a cache
BLOCK = 16 << 20

Bad = list[tuple[str, int, str]]
"""Split, index and reason of images that cannot be decoded."""


@dataclass(frozen=True)
class CacheOptions:
    """How images are kept.

    Attributes:
        cap: images whose short side is longer are scaled down to it, pixels.
        decoder: `pillow`, `torchcodec`, or `auto`, which is torchcodec where it is installed.
        way: `resident`, `streaming`, or `auto`, which is resident up to `resident_gb`.
        resident_gb: of decoded pixels, 10⁹ bytes.
        max_pixels: larger images are bad.
        on_bad: `stop` at images that cannot be decoded, or `skip` them.
        home: where caches lie, by default `cache.cache_home()`.
    """

    cap: int = 512
    decoder: str = "auto"
    way: str = "auto"
    resident_gb: float = 32.0
    max_pixels: int = MAX_PIXELS
    on_bad: str = "stop"
    home: Path | None = None


def build(
    source: Dataset,
    found: Scan,
    keeping: CacheOptions,
    home: Path,
    track: Track,
    tell: Callable[[str], None],
    *,
    check: bool = False,
) -> Path:
    """The folder of a surveyed data set's cache, filled if it is not there.

    Args:
        source, found: listed, surveyed, and cut.
        keeping: with its decoder picked.
        home: where caches lie.
        track: shows progress.
        tell: says what was chosen.
        check: holds what is there against its checksums, and makes it again where it is damaged.

    Raises:
        InputError: images that cannot be decoded, all of them named; or too little room.
    """
    content = content_key(source, found, keeping)
    way, size = choose_way(found, keeping)
    folder = home / f"{content}-{way}"
    with file_lock(home / f"{folder.name}.lock"):
        if is_complete(folder) and not (check and _damaged(folder, track, tell)):
            return folder
        _check_room(home, size, source.name, way)
        what = "decoded once" if way == "resident" else "packed as they are and decoded in every step"
        count = sum(map(len, source.splits.values()))
        tell(f"{source.name}: {way}: {count:,} images, {what}; {size / 1e9:.2g} GB in {home}")
        partial = folder.with_name(f"{folder.name}.partial")
        with disk_errors(home):
            bad = _fill(partial, source, found, keeping, way, track)
            empty = any(len(split) == sum(where == name for where, *_ in bad) for name, split in source.splits.items())
            if bad and (keeping.on_bad == "stop" or empty):
                shutil.rmtree(partial)
                raise unreadable(source.called, [(source.splits[split].names[i], why) for split, i, why in bad], home)
            _finish(partial, source, found, keeping, way, content, bad)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    return folder


def content_key(source: Dataset, found: Scan, keeping: CacheOptions) -> str:
    """Digest of what views depend on: every image's content, its split, its label, and how it is decoded."""
    digest = hashlib.blake2b(repr((FORMAT, keeping.cap, keeping.decoder, source.classes)).encode(), digest_size=16)
    for name, split in source.splits.items():
        digest.update(f"{name} {len(split)}\0".encode() + split.labels.tobytes())
    digest.update(found.rows["digest"].tobytes() + found.rows["bad"].tobytes())  # a limit makes more of them bad
    return digest.hexdigest()


def choose_way(found: Scan, keeping: CacheOptions) -> tuple[str, int]:
    """Resident or streaming, and the bytes that it takes."""
    rows = found.rows[~found.rows["bad"]]
    short = np.minimum(rows["height"], rows["width"]).clip(1)
    scale = np.minimum(1, keeping.cap / short)
    decoded = int((3 * rows["height"].astype(np.int64) * rows["width"] * scale**2).sum())
    way = keeping.way
    if way == "auto":
        way = "resident" if decoded <= keeping.resident_gb * 1e9 else "streaming"
    return way, decoded if way == "resident" else int(rows["length"].sum())


def _check_room(home: Path, size: int, name: str, way: str) -> None:
    free = shutil.disk_usage(home).free
    if size + ROOM > free:
        other = ", or say --pixels streaming, which keeps them as they are" if way == "resident" else ""
        raise InputError(
            f"{name} needs {size / 1e9:.2f} GB in {home}, {(size + ROOM - free) / 1e9:.2f} GB more than can be taken "
            f"({ROOM / 1e9:.1f} GB are left to others); make room, or choose another folder by FUNMATCH_CACHE{other}"
        )


def _fill(partial: Path, source: Dataset, found: Scan, keeping: CacheOptions, way: str, track: Track) -> Bad:
    """Puts every image into `<split>.pixels` and its row into `<split>.rows`, from where an earlier try left off."""
    partial.mkdir(exist_ok=True)
    bad: Bad = []
    for split, rows, known in by_split(source, found):
        told = _fill_split(partial, source, split, rows["digest"].tolist(), known, keeping, way, track)
        bad += [(split, i, reason) for i, reason in sorted(told.items())]
    return bad


def _fill_split(
    partial: Path,
    source: Dataset,
    split: str,
    digests: list[bytes],
    known: dict[int, str],
    keeping: CacheOptions,
    way: str,
    track: Track,
) -> dict[int, str]:
    """One split of `_fill`; gives the reasons why images are bad, by index."""
    content = source.splits[split]
    rows, pixels, reasons = (partial / f"{split}.{end}" for end in ("rows", "pixels", "reasons"))
    pixels.touch()
    done, end = _taken_up(rows, pixels)

    def kept(i: int) -> tuple[tuple[int, int], bytes, str]:
        if i in known:
            return (0, 0), b"", known[i]
        encoded = read_again(source, split, i, digests[i])
        try:
            image = decode(encoded, cap=keeping.cap, decoder=keeping.decoder, max_pixels=keeping.max_pixels)
        except Exception as error:  # decoders raise many kinds; each is told to the person with the file's name
            return (0, 0), b"", reason_of(error) or "unreadable"
        return (image.shape[0], image.shape[1]), image.tobytes() if way == "resident" else encoded, ""

    keep_reasons(reasons, done)
    with open(rows, "ab") as index, open(pixels, "ab") as data, open(reasons, "a") as told:
        jobs = list(range(done, len(content)))
        for chunk in chunks(jobs, kept, track, done, f"decoding {split}"):
            fresh = np.zeros(len(chunk), INDEX)
            for row, ((height, width), bytes_kept, reason) in enumerate(chunk):
                label = content.labels[done + row]
                fresh[row] = (end, len(bytes_kept), height, width, label, zlib.crc32(bytes_kept))
                end += data.write(bytes_kept)
                if reason:
                    told.write(json.dumps([done + row, reason]) + "\n")
            told.flush()
            data.flush()  # before the rows, so that no row speaks of what is not there
            index.write(fresh.tobytes())
            index.flush()
            done += len(chunk)
    return keep_reasons(reasons, done)


def read_again(source: Dataset, split: str, i: int, digest: bytes) -> bytes:
    """An image that was read before.

    Raises:
        InputError: it is gone, or no longer what it was.
    """
    name = source.splits[split].names[i]
    try:
        encoded = source.read(split, i)
    except Exception as error:  # it could be read a while ago
        raise InputError(f"{name}: {reason_of(error)}; it could be read before. Start the command again") from None
    if content_digest(encoded) != digest:
        raise InputError(f"{name} has changed since it was read first; start the same command again")
    return encoded


def _taken_up(rows: Path, pixels: Path) -> tuple[int, int]:
    """How many rows an earlier try left that can be trusted, and where the next image goes."""
    done = recovered(rows, INDEX)
    end = int((done["offset"] + done["length"]).max(initial=0))
    if pixels.stat().st_size < end:  # a machine that lost its power may have lost these
        rows.unlink()
        done, end = done[:0], 0
    os.truncate(pixels, end)
    return len(done), end


def _finish(
    partial: Path, source: Dataset, found: Scan, keeping: CacheOptions, way: str, content: str, bad: Bad
) -> None:
    """Turns rows into indices, without the bad images, and writes what is in the cache."""
    for split, seen, _ in by_split(source, found):
        rows = np.fromfile(partial / f"{split}.rows", INDEX)
        good = rows["length"] > 0
        for name, array in (("index", rows[good]), ("digest", seen["digest"][good])):
            encoded = BytesIO()  # numpy writing into a file by itself forgets why it failed
            np.save(encoded, array)
            (partial / f"{split}.{name}.npy").write_bytes(encoded.getvalue())
        for done_with in ("rows", "reasons"):
            (partial / f"{split}.{done_with}").unlink()
        with open(partial / f"{split}.pixels", "rb") as written:
            os.fsync(written.fileno())
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir()) if path.name != "meta.json"}
    meta = {
        "format": FORMAT, "content": content, "way": way, "cap": keeping.cap, "decoder": keeping.decoder,
        "classes": source.classes, "splits": list(source.splits), "sizes": sizes, "bad": bad,
    }  # fmt: skip
    write_atomically(partial / "meta.json", json.dumps(meta))


def is_complete(folder: Path) -> bool:
    """Whether a cache is there with every file at its full size."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in meta["sizes"].items())
    except (OSError, ValueError, KeyError):
        return False


def _damaged(folder: Path, track: Track, tell: Callable[[str], None]) -> bool:
    """Holds every image in a cache against its checksum."""
    for path in sorted(folder.glob("*.index.npy")):
        rows = np.load(path)
        with open(folder / path.name.replace(".index.npy", ".pixels"), "rb") as file:
            for row in track(rows, len(rows), f"checking {path.name.partition('.')[0]}"):
                file.seek(int(row["offset"]))
                if zlib.crc32(file.read(int(row["length"]))) != row["crc"]:
                    tell(f"{folder} is damaged on the disk; it is made again")
                    return True
    return False


def unreadable(name: str, bad: Sequence[Sequence[str]], home: Path) -> InputError:
    """The error that names all images that cannot be decoded: the first in words, all of them in a file."""
    lines = [f"{image}: {reason}" for image, reason in bad]
    text = "\n  ".join(lines[:NAMED_AT_MOST])
    if len(lines) > NAMED_AT_MOST:
        listed = home / f"unreadable-{hashlib.blake2b(text.encode(errors='replace'), digest_size=6).hexdigest()}.txt"
        write_atomically(listed, "".join(line.encode(errors="replace").decode() + "\n" for line in lines))
        text += f"\n  … and {len(lines) - NAMED_AT_MOST} more, all in {listed}"
    return InputError(f"{len(lines)} unreadable images in {name}; mend or remove them, or say --on-bad skip:\n  {text}")
