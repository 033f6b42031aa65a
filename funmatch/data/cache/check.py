"""Reads a finished cache back and checks that it is whole; a damaged one is built again from the data set."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.data.cache.stores import INDEX
from funmatch.data.dataset import Track
from funmatch.runtime.disk.files import read_array
from funmatch.runtime.disk.json_files import FORMAT as FORMAT_KEY
from funmatch.runtime.disk.json_files import Damaged, NewerFormat, read_record

FORMAT = 4
"""Of a cache: the number in its `meta.json`, and part of its name."""
DIGEST = np.dtype("V16")
SHAPE = {
    "format": int, "content": str, "way": {"resident", "streaming"}, "cap": int, "decoder": str,
    "classes": list[str], "splits": list[str], "sizes": dict[str, int], "bad": [(str, int, str)],
    "checks?": dict[str, int],
}  # fmt: skip
"""What `meta.json` holds; older caches have no `checks`, the CRC-32 of each `.npy` file."""
PARTS = ("pixels", "index.npy", "digest.npy")
LABEL_SETS = "label-sets.npy"
"""In a cache of several classes an image: the sets of classes that labels number, (sets, classes) uint8."""


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads `meta.json`.

    Raises:
        OSError: it is missing.
        NewerFormat: a newer version wrote it.
        Damaged: it does not hold what it should.
    """
    path = folder / "meta.json"
    meta = read_record(path, SHAPE, FORMAT, "set FUNMATCH_CACHE to another folder")
    # Exactly these: a file that the list lacks would pass unchecked, and one too many would be looked for in vain.
    files = {f"{split}.{part}" for split in meta["splits"] for part in PARTS}
    whole = meta["splits"] and meta["cap"] > 0
    if meta[FORMAT_KEY] != FORMAT or not whole or meta["sizes"].keys() - {LABEL_SETS} != files:
        raise Damaged(f"{path} is damaged")
    return meta


def read_index(
    folder: Path, split: str, meta: dict[str, Any], sets: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Maps the index of a split and the digests of its images.

    Args:
        sets: of `read_label_sets`, which splits share.

    Raises:
        OSError: they are missing.
        Damaged: they are not what was written, or an image lies outside the pixels.
    """
    paths = [folder / f"{split}.{part}.npy" for part in ("index", "digest")]
    try:
        # Mapped, so that processes that read the same cache share the memory.
        rows, digests = (read_array(path, "r") for path in paths)
    except ValueError as error:
        raise Damaged(str(error)) from None
    for path in paths:
        if meta.get("checks", {}).get(path.name) not in (None, checksum(path)):
            raise Damaged(f"{path} is damaged")
    # Types and shapes first, since `_fits` reads the columns by their names.
    sound = rows.dtype == INDEX and digests.dtype == DIGEST and rows.ndim == 1 and rows.shape == digests.shape
    labels = len(meta["classes"] if sets is None else sets)
    if not sound or not _fits(rows, meta["sizes"][f"{split}.pixels"], meta, labels):
        raise Damaged(f"{folder / f'{split}.index.npy'} is damaged")
    return rows, digests


def read_label_sets(folder: Path, meta: dict[str, Any]) -> np.ndarray | None:
    """Reads the sets of classes that labels number, (sets, classes) uint8; None where labels are classes.

    Raises:
        OSError: they are missing.
        Damaged: they are not what was written.
    """
    if LABEL_SETS not in meta["sizes"]:
        return None
    path = folder / LABEL_SETS
    try:
        sets = read_array(path)
    except ValueError as error:
        raise Damaged(str(error)) from None
    shaped = sets.dtype == np.uint8 and sets.ndim == 2 and sets.shape[1] == len(meta["classes"])
    if not shaped or (sets > 1).any() or meta.get("checks", {}).get(path.name) != checksum(path):
        raise Damaged(f"{path} is damaged")
    return sets


def checksum(path: Path) -> int:
    """Returns the CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = zlib.crc32(block, crc)
    return crc


def _fits(rows: np.ndarray, size: int, meta: dict[str, Any], labels: int) -> bool:
    """Returns whether the images fill `size` bytes of pixels without gaps, and have labels below `labels`."""
    length, height, width = (rows[name].astype(np.int64) for name in ("length", "height", "width"))
    ends = np.cumsum(length)
    good = (length > 0) & (rows["offset"] == ends - length) & (height > 0) & (width > 0)
    good &= (rows["label"] >= -1) & (rows["label"] < labels)
    if meta["way"] == "resident":
        # 3 · height · width of damaged numbers may go beyond 64 bits, and then is of the wrong sign or size.
        good &= (height * width <= length) & (3 * height * width == length)
    # A slice, which an empty index has too: its images end at byte 0.
    return bool(good.all()) and int(ends[-1:].sum()) == size


def is_complete(folder: Path) -> bool:
    """Returns whether a cache exists with every file at its full size, and with indices that can be used.

    Raises:
        NewerFormat: a newer version wrote it.
    """
    # Not the checksums of images: those of a large cache take minutes. `funmatch prepare` verifies them.
    try:
        meta = read_meta(folder)
        if any((folder / name).stat().st_size != size for name, size in meta["sizes"].items()):
            return False
        sets = read_label_sets(folder, meta)
        for split in meta["splits"]:
            read_index(folder, split, meta, sets)
    except NewerFormat:
        raise
    except (OSError, Damaged):
        return False
    return True


def is_intact(folder: Path, track: Track) -> bool:
    """Compares every image in a complete cache with its checksum."""
    meta = read_meta(folder)
    sets = read_label_sets(folder, meta)
    for split in sorted(meta["splits"]):
        rows, _ = read_index(folder, split, meta, sets)
        with open(folder / f"{split}.pixels", "rb") as file:
            for row in track(rows, len(rows), f"checking {split}"):
                file.seek(int(row["offset"]))
                if zlib.crc32(file.read(int(row["length"]))) != row["crc"]:
                    return False
    return True
