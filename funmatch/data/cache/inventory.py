"""Lists what the cache holds: each data set with its size, its last use, and whether its images are still there."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from funmatch.data.cache.ledger import folder_of, read_entry, read_paths
from funmatch.runtime.disk.partials import remove

SAMPLE = 20
"""Watched files of a data set that are looked for: if none of them is there, the data set is gone."""
OTHERS = {
    "weights": "downloaded weights",
    "answers": "logits of fixed teachers",
    "predictions": "logits of teachers",
    "features": "features for heads",
    "kernels": "compiled kernels",
    "remote": "downloaded images",
    "selections": "what a teacher said of a pool",
}
"""Folders of other things that can be made or fetched again."""


@dataclass(frozen=True)
class Item:
    """One thing in the cache that can be removed by itself: what needs it makes it again.

    Attributes:
        name: of the data set, or what it is.
        path: of its folder or file.
        bytes: on the disk.
        used: when it was last used, in seconds since the epoch.
        missing: whether the images that it was made from are gone.
        entries: ledger entries that lead to it.
    """

    name: str
    path: Path
    bytes: int
    used: float
    missing: bool = False
    entries: tuple[Path, ...] = ()

    @property
    def days(self) -> float:
        """Days since it was last used."""
        return max(0.0, time.time() - self.used) / 86400


def list_items(home: Path) -> list[Item]:
    """Returns everything in a cache that can be removed by itself, the largest first."""
    return sorted([*_data_sets(home), *_other_items(home)], key=lambda item: (-item.bytes, item.path))


def _data_sets(home: Path) -> Iterator[Item]:
    # By the folder's name: the cache may be reached by another path than when it was written.
    entries: dict[str, list[tuple[Path, str, bool]]] = {}
    for ledger in sorted((home / "known").glob("*")):
        try:
            with open(ledger, "rb") as file:
                entry = read_entry(file, ledger)
                watched = [path for path, _ in zip(read_paths(file), range(SAMPLE), strict=False)]
        except (OSError, ValueError):
            continue  # it leads to nothing, and opening its data set replaces it
        # A name of the Hub has no files to watch, and cannot be found missing.
        gone = any(map(len, watched)) and not any(map(os.path.exists, watched))
        entries.setdefault(folder_of(Path(entry["folder"])).name, []).append((ledger, entry["called"], gone))
    for meta in sorted(home.glob("*/meta.json")):
        folder = meta.parent
        known = entries.get(folder.name, [])
        # Equal images share a cache; those that are still there name it.
        names = list(dict.fromkeys(called for _, called, _ in sorted(known, key=lambda each: each[2])))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        # Opening a data set touches its entry; a cache without one was made by something that is gone.
        used = max([meta.stat().st_mtime, *(ledger.stat().st_mtime for ledger, _, _ in known)])
        gone = all(gone for *_, gone in known)
        ledgers = tuple(ledger for ledger, *_ in known)
        yield Item(names[0] + more if names else "unknown", folder, _size(folder), used, gone, ledgers)


def _other_items(home: Path) -> Iterator[Item]:
    for kind, name in OTHERS.items():
        for path in sorted((home / kind).glob("[!.]*")):
            yield Item(name, path, _size(path), path.stat().st_mtime)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.is_file())


def remove_item(item: Item) -> None:
    """Removes a thing from the cache; runs that are reading it keep what they have opened."""
    # The entries first: without them no run takes a folder that is half removed for a whole one.
    for ledger in item.entries:
        ledger.unlink(missing_ok=True)
    remove(item.path)
    item.path.with_name(f"{item.path.name}.lock").unlink(missing_ok=True)
