"""Keeps copies of remote files in the cache, and brings them up to date.

Below `remote` in the cache there is a tree for each server or bucket: its files under their own names, since names tell
splits and classes, and in `.state` what is known of them: `files.jsonl`, a line for each copy that is whole; a listing
for each address, with the files that it named the last time; and what is incomplete.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from funmatch.data.remote.objects import RemoteObject, Wanted
from funmatch.errors import hide_secrets
from funmatch.runtime.addresses import scheme_of
from funmatch.runtime.disk.checksums import crc_of_file
from funmatch.runtime.disk.files import cache_home, write_atomically
from funmatch.runtime.disk.json_files import Damaged, parse_json, read_record, seal, unseal
from funmatch.runtime.disk.partials import remove

FOLDER = "remote"
"""Of all copies, in the cache."""
STATE = ".state"
FORMAT = 1
LISTING = {"address": str, "checked": float, "files": dict[str, int]}
RECORD = {
    "place": str, "size": int | None, "etag": str, "modified": str, "bytes": int, "crc": int, "time": int,
}  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """What an address named when it was looked up.

    Attributes:
        files: CRC-32 of its files by their places in the tree, sorted.
        checked: when, in seconds since the epoch.
    """

    files: dict[str, int]
    checked: float

    @property
    def day(self) -> str:
        """When, for messages."""
        return time.strftime("%Y-%m-%d", time.localtime(self.checked))


class Tree:
    """The copies of the files of one server or bucket.

    Attributes:
        root: folder that holds them, each at its place.
        state: folder of what is known of them.
    """

    def __init__(self, address: str) -> None:
        rest = hide_secrets(address).partition("://")[2]
        self.scheme = scheme_of(address)
        # With the scheme: a bucket may be called as a server.
        name = f"{self.scheme}-{rest.partition('/')[0].replace(':', '-')}"
        self.root = cache_home() / FOLDER / name
        self.state = self.root / STATE

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        """What is recorded of each copy, by its place."""
        found = {}
        try:
            lines = (self.state / "files.jsonl").read_text(errors="surrogateescape").split("\n")
        except OSError:
            return {}
        for line in lines:
            # A line that a killed process left half-written is of a file that is downloaded again.
            with suppress(ValueError, Damaged):
                record = unseal(parse_json(line, RECORD), self.state)
                found[record["place"]] = record
        return found

    def path(self, place: str) -> Path:
        """Returns the path of a copy."""
        return self.root / place

    def address_of(self, path: Path) -> str:
        """Returns the address of a copy."""
        return f"{self.scheme}://{path.relative_to(self.root)}"

    def has(self, place: str, found: RemoteObject | None = None) -> bool:
        """Returns whether a copy is whole, and of this version."""
        record = self.records.get(place)
        try:
            state = self.path(place).stat()
        except OSError:
            return False
        # By size and time, as long as nobody asks for more: checksums of all files would take minutes.
        whole = record is not None and (state.st_size, state.st_mtime_ns) == (record["bytes"], record["time"])
        return whole and (found is None or found.is_version(record))

    def is_intact(self, place: str) -> bool:
        """Returns whether a copy matches its checksum."""
        try:
            return self.has(place) and crc_of_file(self.path(place)) == self.records[place]["crc"]
        except OSError:
            return False

    def was_another(self, found: RemoteObject) -> bool:
        """Returns whether there is a copy of another version."""
        record = self.records.get(found.place)
        return record is not None and self.has(found.place) and not found.is_version(record)

    def add(self, place: str, record: dict[str, Any]) -> None:
        """Records that a copy is whole."""
        self.records[place] = {"place": place, **record}
        self.state.mkdir(parents=True, exist_ok=True)
        # One write, at the end of the file: a kill leaves at most half a line.
        with open(self.state / "files.jsonl", "ab") as file:
            line = json.dumps(seal(self.records[place])) + "\n"
            # A half line of a killed process must not swallow this one.
            file.write(f"\n{line}".encode(errors="surrogateescape"))

    def forget(self, place: str) -> None:
        """Removes a copy that is damaged."""
        self.records.pop(place, None)
        self.path(place).unlink(missing_ok=True)

    def forget_read(self) -> None:
        """Reads the records anew when they are next needed: another process may have added some."""
        self.__dict__.pop("records", None)

    def partial(self, place: str) -> Path:
        """Returns the path of a file while it is incomplete."""
        return self.state / "partial" / _digest(place)

    def listing(self, address: str, wanted: Wanted) -> Listing | None:
        """Returns what an address named the last time; None if that is not known."""
        path = self._listing_path(address, wanted)
        try:
            record = read_record(path, LISTING, FORMAT, f"remove {path}")
        except (OSError, Damaged):
            return None
        return Listing(record["files"], record["checked"])

    def store_listing(self, address: str, wanted: Wanted, places: Sequence[str]) -> Listing:
        """Records what an address names."""
        path = self._listing_path(address, wanted)
        listing = Listing({place: self.records[place]["crc"] for place in sorted(places)}, time.time())
        record = {"format": FORMAT, "address": hide_secrets(address), "checked": listing.checked}
        # A cache that is shared may be read only.
        with suppress(PermissionError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(seal(record | {"files": listing.files})))
            os.utime(self.root)  # `funmatch cache` tells by this when it was last used
        return listing

    def is_whole(self, listing: Listing | None) -> bool:
        """Returns whether every file of a listing is there, as it was then."""
        # Of an update that broke off, some files are new: together with the old ones they are no data set.
        return listing is not None and all(
            self.has(place) and self.records[place]["crc"] == crc for place, crc in listing.files.items()
        )

    def remove_others(self, folder: Path, places: Iterable[str]) -> None:
        """Removes the copies in a folder that are none of these: what is gone from a bucket is no longer data."""
        kept = {str(self.path(place)) for place in places}
        for path in list(_files(folder)):
            if path not in kept:
                remove(Path(path))

    def _listing_path(self, address: str, wanted: Wanted) -> Path:
        return self.state / "listings" / f"{_digest(f'{wanted} {hide_secrets(address)}')}.json"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=12).hexdigest()


def _files(folder: Path) -> Iterator[str]:
    for where, _, names in os.walk(folder):
        yield from (os.path.join(where, name) for name in names)
