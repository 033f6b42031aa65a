"""What an entry of the ledger holds (see `open_cache`), for all who read it, torch or none."""

from collections.abc import Iterator
from typing import IO

from funmatch.runtime.json_files import EACH

PAIRS = {"pictures": int, "examples": [(str, str)]}
ENTRY = {
    "folder": str, "stamp": str, "name": str, "called": str, "unnamed": bool,
    "found": {
        "splits": {EACH: {"pictures": int, "labelled": bool, "classes": int}}, "classes": list[str],
        "published": dict[str, int], "kinds": dict[str, int], "short_side": (int, int, int),
        "long_side": (int, int, int), "bytes": int, "leaks": {EACH: PAIRS}, "repeated": int,
        "contradictory": PAIRS, "unreadable": [(str, str)], "notes": list[str],
    },
}  # fmt: skip
"""What the first line of a ledger entry holds: `found` is `Cache.summary`."""


def read_paths(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the paths in a file, separated by zero bytes, without holding all of them in memory."""
    rest = b""
    while block := file.read(1 << 16):
        *paths, rest = (rest + block).split(b"\0")
        yield from paths
    yield rest
