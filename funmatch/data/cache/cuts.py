"""Keeps which images of a cache are held out of its training images: several such choices share the decoded images.

A choice is a file in the cache's folder `cuts`, named by the key that a cache of these splits would have. It holds one
number per training image, that of its split.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from funmatch.data.cache.build import BadImages, build, unreadable
from funmatch.data.cache.check import is_complete, read_meta
from funmatch.data.cache.ledger import CUT, CUTS
from funmatch.data.cache.scan import Scan, scan
from funmatch.data.cache.splits import LEFT_OUT, apply_split, choose_splits
from funmatch.data.cache.stores import CachedSplit
from funmatch.data.cache.storing import CacheOptions, choose_way, content_key
from funmatch.data.dataset import ORDER, Dataset, Track
from funmatch.data.label_sets import join_copies
from funmatch.runtime.disk.files import cache_home, write_atomically
from funmatch.runtime.disk.json_files import Damaged


def write_cut(folder: Path, key: str, numbers: np.ndarray) -> Path:
    """Writes a choice into the folder of a cache, and returns its path.

    Args:
        folder: of the cache of all training images.
        key: of the splits that are chosen.
        numbers: of the splits, (n,) uint8, one for each training image of the cache.
    """
    path = folder / CUTS / f"{key}{CUT}"
    path.parent.mkdir(exist_ok=True)
    stored = numbers.astype(np.uint8).tobytes()
    write_atomically(path, zlib.crc32(stored).to_bytes(4, "little") + stored)
    return path


def read_cut(path: Path, count: int) -> np.ndarray:
    """Reads a choice, (count,) uint8.

    Raises:
        OSError: it is missing.
        Damaged: it is not what was written, or not of `count` images.
    """
    stored = path.read_bytes()
    numbers = np.frombuffer(stored[4:], np.uint8)
    sound = zlib.crc32(stored[4:]) == int.from_bytes(stored[:4], "little") and len(numbers) == count
    if not sound or (numbers > LEFT_OUT).any():
        raise Damaged(f"{path} is damaged")
    return numbers


def apply_cut(splits: dict[str, CachedSplit], numbers: np.ndarray) -> dict[str, CachedSplit]:
    """Returns the splits of a cache with some made of its training images, in the same order as images are listed."""
    train = splits["train"]
    parts = {
        name: replace(train.subset(np.flatnonzero(numbers == number)), name=name)
        for number, name in enumerate(ORDER)
        if (numbers == number).any()
    }
    others = {name: split for name, split in splits.items() if name != "train"}
    return {name: (parts | others)[name] for name in ORDER if name in parts or name in others}


def bad_after_cut(bad: BadImages, numbers: np.ndarray) -> BadImages:
    """Returns unreadable images by the split and the index that they have after a choice.

    Args:
        bad: of the cache of all training images.
        numbers: of all images that are listed for training, also of the unreadable ones.
    """
    found = []
    for split, i, reason in bad:
        if split != "train":
            found.append((split, i, reason))
        elif numbers[i] != LEFT_OUT:
            found.append((ORDER[numbers[i]], int((numbers[:i] == numbers[i]).sum()), reason))
    return found


@dataclass(frozen=True)
class Built:
    """A cache that has been built.

    Attributes:
        place: its folder, or the file in it that says which training images are held out.
        dataset, scanned: with all splits made.
        bad: unreadable images of these splits.
    """

    place: Path
    dataset: Dataset
    scanned: Scan
    bad: BadImages


def build_splits(
    listed: Dataset, options: CacheOptions, track: Track, log: Callable[[str], None], *, refresh: bool
) -> Built:
    """Reads every image of a data set and builds its cache, of all training images, whatever is held out of them."""
    home = options.home or cache_home()
    listed, whole = join_copies(listed, scan(listed, home, track, log, limits=options.limits, refresh=refresh))
    numbers = choose_splits(listed, whole)
    dataset, scanned = apply_split(listed, whole, numbers)
    key = content_key(dataset, scanned, options)
    # Earlier versions decoded the images once more for each choice; such a cache is used as it is.
    earlier = home / f"{key}-{choose_way(scanned, options)[0]}"
    if numbers is None or is_complete(earlier):
        folder = build(dataset, scanned, options, home, track, log, check=refresh)
        return Built(folder, dataset, scanned, read_meta(folder)["bad"])
    folder = build(replace(listed, split_spec=None), whole, options, home, track, log, check=refresh)
    bad = read_meta(folder)["bad"]
    readable = np.ones(len(numbers), bool)
    readable[[i for split, i, _ in bad if split == "train"]] = False
    here = bad_after_cut(bad, numbers)
    # As where all images of a published split are unreadable.
    if set(numbers[readable]) - {LEFT_OUT} != set(numbers) - {LEFT_OUT}:
        names = [(dataset.splits[split].names[i], reason) for split, i, reason in here]
        raise unreadable(listed.display_name, names, home)
    return Built(write_cut(folder, key, numbers[readable]), dataset, scanned, here)
