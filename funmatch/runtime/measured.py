"""Stores measurements of this machine, so that each is made once and equal runs are computed equally."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from funmatch.runtime.disk.files import cache_home, write_atomically
from funmatch.runtime.disk.json_files import Damaged, Shape, read_json
from funmatch.runtime.log import info

PACKAGE, CODE = Path(__file__).parent.parent, (".py", ".cpp", ".h")


@cache
def code_stamp(package: Path = PACKAGE) -> str:
    """Returns a text that changes with the code of a package: by default ours, which may change between two versions.

    By sizes and times of its files, since to read them all would take longer than most of what is remembered.
    """
    files = sorted(path for path in package.rglob("*.*") if path.suffix in CODE)
    stats = [(str(path.relative_to(package)), path.stat()) for path in files]
    text = repr([(name, found.st_size, found.st_mtime_ns) for name, found in stats])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Measurement:
    """One measurement, stored under a digest of all that decides it.

    Attributes:
        kind: the folder in the cache.
        key: everything that decides the outcome, the machine among it, as text.
        subject: what is measured, for messages.
    """

    kind: str
    key: str
    subject: str

    @property
    def path(self) -> Path:
        # A digest, since the key describes a whole machine and is too long for a file's name.
        digest = hashlib.blake2b(self.key.encode(), digest_size=12).hexdigest()
        return cache_home() / self.kind / f"{digest}.json"

    def read(self, shape: Shape) -> Any | None:
        """Returns the stored result; None if there is none, or the file is damaged."""
        try:
            # A damaged file costs one more measurement, which then replaces it.
            return read_json(self.path, shape)
        except (OSError, Damaged):
            return None

    def write(self, result: dict[str, Any]) -> None:
        """Stores a result; if the cache cannot be written, the next run measures again, and nothing else is lost."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Several runs may measure the same thing at once while another one reads.
            write_atomically(self.path, json.dumps(result))
        except OSError as error:
            folder = self.path.parent
            info(f"the next run will measure {self.subject} again: {folder} cannot be written ({error.strerror})")
