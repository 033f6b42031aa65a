"""Describes files on servers, and what can go wrong with them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from funmatch.errors import hide_secrets


class Unreachable(Exception):
    """A server does not respond, or a connection broke: trying again may help, and a whole copy may be used instead."""


class Changed(Exception):
    """A file on a server is no longer the one that was looked up."""


@dataclass(frozen=True)
class RemoteObject:
    """A file on a server.

    Attributes:
        address: with all that is needed to read it; never to be shown.
        place: the folders and the name that its copy gets, joined by slashes: the server or bucket first.
        size: bytes; None where the server does not say.
        etag, modified: what its server calls this version, and when it was written, in the server's own words; empty
            where it does not say.
        digests: its checksums in hexadecimal, as far as the server says them, by `hashlib`'s name of the algorithm, or
            crc32 or crc32c.
    """

    address: str
    place: str
    size: int | None = None
    etag: str = ""
    modified: str = ""
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """Its address for messages."""
        return hide_secrets(self.address)

    @property
    def version(self) -> dict[str, Any]:
        """What tells this version from others, for a record."""
        return {"size": self.size, "etag": self.etag, "modified": self.modified}

    def is_version(self, recorded: dict[str, Any]) -> bool:
        """Returns whether a recorded version is this one, as far as the server lets one tell."""
        if self.size is not None and recorded["size"] != self.size:
            return False
        # The first that both have: a server that restores a backup changes times and not contents.
        for name in ("etag", "modified"):
            if recorded[name] and self.version[name]:
                return recorded[name] == self.version[name]
        return True


@dataclass(frozen=True)
class Wanted:
    """Which files of an address a reader needs.

    Attributes:
        endings: regular expression for the names of files in a folder; None is all.
        beside: regular expression for the names of files that are read, too, where they lie in the folder of a file or
            above it.
        unpacked: whether an archive is to be unpacked, and a folder to hold nothing else than the bucket's.
    """

    endings: str | None = None
    beside: str | None = None
    unpacked: bool = False

    def is_beside(self, name: str) -> bool:
        """Returns whether a file is one of those that are read besides."""
        return self.beside is not None and re.search(self.beside, name) is not None

    def counts(self, name: str) -> bool:
        """Returns whether a file in a folder counts, by its name."""
        return self.endings is None or re.search(self.endings, name) is not None or self.is_beside(name)


class Source(Protocol):
    """A kind of server."""

    def find(self, address: str, wanted: Wanted) -> list[RemoteObject]:
        """Looks up the files that an address names.

        Args:
            address: of a file or a pattern, or of a folder.
            wanted: which files count.

        Raises:
            InputError: there is none, or it may not be read or listed.
            Unreachable: the server does not respond.
        """
        ...

    def read(self, found: RemoteObject, start: int) -> Iterator[bytes]:
        """Yields the content from a position on.

        Raises:
            Changed: it is another version now.
            InputError: it is gone, or may not be read.
            Unreachable: the connection broke, maybe after some of it.
        """
        ...

    def digests(self, found: RemoteObject) -> dict[str, str]:
        """Returns the checksums of a file that was read, as of `RemoteObject`.

        Raises:
            Changed: it is another version by now.
        """
        ...

    def confirm(self, found: RemoteObject) -> None:
        """Raises `Changed` if a file that was read in several pieces is another version by now."""
        ...


def place_of(*parts: str) -> str | None:
    """Joins folders and a name to a place below a folder; None where they would lead elsewhere or nowhere."""
    pieces = [piece for part in parts for piece in part.split("/")]
    bad = any(piece in ("", ".", "..") or "\0" in piece or len(piece.encode()) > 255 for piece in pieces)
    return None if bad else "/".join(pieces)
