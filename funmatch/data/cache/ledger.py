"""What an entry of the ledger holds (see `open_cache`), for all who read it, torch or none."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from funmatch.runtime.disk.json_files import EACH, Damaged, misfit, parse_json, unseal

PAIRS = {"pictures": int, "examples": [(str, str)]}
ENTRY = {
    "folder": str, "stamp": str, "name": str, "called": str, "unnamed": bool,
    "found": {
        "splits": {EACH: {"pictures": int, "labelled": bool, "classes": int}}, "classes": list[str],
        "published": dict[str, int], "kinds": dict[str, int], "short_side": (int, int, int),
        "long_side": (int, int, int), "bytes": int, "leaks": {EACH: PAIRS}, "repeated": int,
        "contradictory": PAIRS, "unreadable": [(str, str)], "notes": list[str],
    },
    "sources?": list[int],
}  # fmt: skip
"""What the first line of a ledger entry holds: `found` is `Cache.summary`; `sources`, which entries of earlier versions
lack, are the numbers of training images of each source, where several are joined."""


CUTS, CUT = "cuts", ".cut"
"""Folder of a cache, and ending of the files in it, that say which training images are held out (see `cuts`).

An entry's `folder` is such a file where some are. To an earlier version, which would train on all images, it is no
cache, so it builds one of its own."""


def folder_of(place: Path) -> Path:
    """Returns the folder of the cache that an entry's `folder` names."""
    return place.parent.parent if place.suffix == CUT else place


def read_entry(file: IO[bytes], path: Path) -> dict[str, Any]:
    """Reads the first line of a ledger entry; those of earlier versions have no checksum.

    Args:
        file: the entry, opened; it is left at the first watched path.
        path: of the entry, for messages.

    Raises:
        Damaged: it does not hold what it should, or does not match its checksum.
    """
    try:
        entry = unseal(parse_json(file.readline(), dict[str, Any]), path)
    except Damaged:
        raise
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    if problem := misfit(entry, ENTRY):
        raise Damaged(f"{path} is damaged ({problem})")
    return entry


def read_paths(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the paths in a file, separated by zero bytes, without holding all of them in memory."""
    rest = b""
    while block := file.read(1 << 16):
        *paths, rest = (rest + block).split(b"\0")
        yield from paths
    yield rest
