"""Pictures decoded once: one memory-mapped file of uint8 pixels a split, with an index.

A cache is a folder named by its content's key: `meta.json`, and for each split `<split>.pixels` (the pictures of
(height, width, 3) one after the other) and `<split>.index.npy`. It is written under another name and renamed when it
is whole, so what has the right name is never partial. Nothing of it is read before it is needed, and processes share
what is, so memory does not grow with the number of pictures.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from funmatch.data.sources import Source
from funmatch.errors import InputError
from funmatch.files import disk_errors, lock_file, write_atomically

FORMAT = 1
INDEX = np.dtype([("offset", "<i8"), ("height", "<i4"), ("width", "<i4"), ("label", "<i4")])
CHUNK = 256
NAMED_AT_MOST = 200

Track = Callable[[Iterable, int, str], Iterable]
"""(things, how many pictures in all, what is done) to the same things, shown as progress."""


@dataclass(frozen=True)
class CachedSplit:
    """The pictures of one split, mapped from disk."""

    name: str
    pixels: Tensor
    index: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labelled(self) -> bool:
        return bool(self.index["label"][0] >= 0)

    def pictures(self, indices) -> list[Tensor]:
        """Each (height, width, 3) uint8, a view of the mapped file."""
        return [
            self.pixels[offset : offset + height * width * 3].view(height, width, 3)
            for offset, height, width, _ in self.index[indices].tolist()
        ]

    def picture(self, i: int) -> Tensor:
        """(height, width, 3) uint8, a view of the mapped file."""
        return self.pictures([i])[0]

    def labels(self, indices) -> Tensor:
        """(n,) int64."""
        return torch.from_numpy(self.index["label"][indices].astype(np.int64))

    def sizes(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Heights and widths in pixels, each (n,)."""
        rows = self.index[indices]
        return rows["height"], rows["width"]


@dataclass(frozen=True)
class Cache:
    """A data set, decoded.

    Attributes:
        key: digest of its content, and of how it was decoded.
        name: of the data set.
        classes: names by label; empty where nothing is labelled.
        splits: by name: train, val, test, as far as there are.
    """

    key: str
    name: str
    classes: tuple[str, ...]
    splits: dict[str, CachedSplit]


def cache_home() -> Path:
    """`$FUNMATCH_CACHE`, else `funmatch` in the user's cache folder."""
    if home := os.environ.get("FUNMATCH_CACHE"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "funmatch"


def open_cache(source: Source, *, cap: int = 512, home: Path | None = None, track: Track | None = None) -> Cache:
    """The decoded pictures of a data set, from the cache or put there now.

    Args:
        source: the data set.
        cap: pictures whose short side is longer are scaled down to it, pixels.
        home: where caches lie, by default `cache_home()`.
        track: shows progress while files are read and decoded.

    Raises:
        InputError: some pictures cannot be read; all of them are named.
    """
    home = home or cache_home()
    track = track or (lambda things, _total, _what: things)
    key = _key(source, cap, home, track)
    folder = home / key
    if not _whole(folder):
        _build(source, cap, folder, track)
    meta = json.loads((folder / "meta.json").read_text())
    splits = {name: _open_split(folder, name) for name in meta["splits"]}
    return Cache(key, source.name, tuple(meta["classes"]), splits)


def _open_split(folder: Path, name: str) -> CachedSplit:
    # Mode "c" (copy on write) because torch warns about read-only memory; nothing ever writes there.
    pixels = np.memmap(folder / f"{name}.pixels", np.uint8, mode="c")
    return CachedSplit(name, torch.from_numpy(pixels), np.load(folder / f"{name}.index.npy", mmap_mode="r"))


def _key(source: Source, cap: int, home: Path, track: Track) -> str:
    """Digest of every picture's content. Files whose size, time and place are known are not read again."""
    stamp = home / "stamps" / f"{source.stamp()}-{cap}-{FORMAT}"
    if stamp.exists():
        return stamp.read_text()
    digest = hashlib.blake2b(repr((FORMAT, cap, source.classes)).encode(), digest_size=16)
    digests = _threaded(source, source.digest, track, "reading")
    for split, i, content, error in digests:
        if error:
            content = repr(error).encode()  # it will be named when it is decoded
        digest.update(repr((split, i, int(source.splits[split].labels[i]))).encode() + content)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(stamp, digest.hexdigest())
    return digest.hexdigest()


def _threaded(source: Source, function, track: Track, what: str) -> Iterator[tuple]:
    """(split, index, result or None, error or None) of a function of every picture, in order, a few at a time."""

    def attempt(split: str, i: int):
        try:
            return split, i, function(split, i), None
        except Exception as error:  # decoders raise many kinds; each is told to the person with the file's name
            return split, i, None, error

    jobs = [(split, i) for split, content in source.splits.items() for i in range(len(content.names))]
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:

        def in_order():
            for start in range(0, len(jobs), CHUNK):  # in chunks, so that decoded pictures do not pile up
                yield from pool.map(lambda job: attempt(*job), jobs[start : start + CHUNK])

        yield from track(in_order(), len(jobs), what)


def _build(source: Source, cap: int, folder: Path, track: Track) -> None:
    """Decodes everything into a folder beside `folder`, then gives it its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.partial-", dir=folder.parent))
    lock = lock_file(partial / ".lock")
    try:
        with disk_errors(folder.parent):
            _decode_into(partial, source, cap, track)
        try:
            partial.rename(folder)
        except OSError:
            if not _whole(folder):  # else another process was first
                shutil.rmtree(folder)
                partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if lock:
            lock.close()


def _decode_into(partial: Path, source: Source, cap: int, track: Track) -> None:
    bad: list[str] = []
    files = {name: open(partial / f"{name}.pixels", "wb") for name in source.splits}
    indices = {name: np.zeros(len(content.names), INDEX) for name, content in source.splits.items()}
    try:
        for split, i, picture, error in _threaded(
            source, lambda split, i: _capped(source.pixels(split, i), cap), track, "decoding"
        ):
            if error:
                bad.append(f"{source.splits[split].names[i]}: {_reason(error)}")
            elif not bad:
                height, width = picture.shape[:2]
                indices[split][i] = (files[split].tell(), height, width, source.splits[split].labels[i])
                files[split].write(picture.tobytes())
    finally:
        for file in files.values():
            file.close()
    if bad:
        more = [f"… and {len(bad) - NAMED_AT_MOST} more"] if len(bad) > NAMED_AT_MOST else []
        lines = "\n  ".join(bad[:NAMED_AT_MOST] + more)
        raise InputError(f"{len(bad)} unreadable pictures in {source.name}; mend or remove them:\n  {lines}")
    for name, index in indices.items():
        encoded = BytesIO()  # numpy writing into a file by itself forgets why it failed
        np.save(encoded, index)
        (partial / f"{name}.index.npy").write_bytes(encoded.getvalue())
    sizes = {path.name: path.stat().st_size for path in partial.iterdir() if path.name != ".lock"}
    meta = {"format": FORMAT, "name": source.name, "cap": cap, "classes": source.classes}
    (partial / "meta.json").write_text(json.dumps(meta | {"splits": list(source.splits), "sizes": sizes}))


def _capped(picture: np.ndarray, cap: int) -> np.ndarray:
    height, width = picture.shape[:2]
    if min(height, width) <= cap:
        return picture
    scale = cap / min(height, width)
    size = (max(cap, round(width * scale)), max(cap, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))


def _reason(error: Exception) -> str:
    return "not a picture" if type(error).__name__ == "UnidentifiedImageError" else str(error) or type(error).__name__


def _whole(folder: Path) -> bool:
    """Whether a cache is there with every file at its full size."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return all((folder / name).stat().st_size == size for name, size in meta["sizes"].items())
    except (OSError, ValueError, KeyError):
        return False


def _remove_abandoned(folder: Path) -> None:
    """Removes what killed processes left half-written for this key."""
    for partial in folder.parent.glob(f"{folder.name}.partial-*"):
        if lock := lock_file(partial / ".lock"):  # whoever is at work there holds it
            shutil.rmtree(partial, ignore_errors=True)
            lock.close()
