"""Opens an HDF5 file, or the part of a file that is one, and reads single arrays from it on access."""

import math
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.errors import InputError
from funmatch.runtime.disk.json_files import parse_json

SIGNATURE = b"\x89HDF\r\n\x1a\n"
SECONDS = 120  # that the list may take; that of an R152 takes one
LISTED = {"arrays": [list], "texts": dict[str, dict]}


@dataclass(frozen=True)
class Array:
    """Array in a file, not read yet.

    Attributes:
        shape: of the array.
        kind: NumPy's name of its type.
        offset, size: its place in the file, bytes.
        why: reason why it cannot be read; empty if it can.
    """

    shape: tuple[int, ...]
    kind: str
    offset: int = 0
    size: int = 0
    why: str = ""

    @property
    def is_weight(self) -> bool:
        """Whether it may be a weight: counters are not floats, or single ones."""
        return bool(self.shape) and self.kind[1:2] == "f"


@dataclass(frozen=True)
class Hdf5File:
    """Content of an HDF5 file.

    Attributes:
        path: of the file.
        arrays: by path in the file.
        texts: attributes that are texts, by the path of what they belong to, and name.
    """

    path: Path
    arrays: dict[str, Array]
    texts: dict[str, dict[str, Any]]

    def read(self, name: str) -> np.ndarray:
        """Reads an array.

        Raises:
            InputError: it is not one piece of this file, or the file ends before it does.
        """
        array = self.arrays[name]
        if array.why:
            raise InputError(f"{self.path}: {name} cannot be read: {array.why}; save the model again")
        with open(self.path, "rb") as file:
            file.seek(array.offset)
            content = file.read(array.size)
        if len(content) < array.size:
            raise InputError(f"{self.path} is cut off: it ends within {name}; copy it again")
        return np.frombuffer(content, np.dtype(array.kind)).reshape(array.shape)


def open_hdf5(path: Path, start: int = 0, size: int | None = None) -> Hdf5File:
    """Lists what is in an HDF5 file.

    Args:
        path: of the file.
        start, size: the part of it that is in HDF5; without a size all that follows.

    Raises:
        InputError: h5py is not installed, or the file is damaged.
    """
    if find_spec("h5py") is None:
        raise InputError(f"{path} is a model of Keras, which h5py reads; pip install 'funmatch[keras]'")
    size = path.stat().st_size - start if size is None else size
    program = Path(__file__).with_name("hdf5_list.py")
    # -P: modules beside the program must not be imported in place of libraries.
    command = [sys.executable, "-P", str(program), str(path), str(start), str(size)]
    try:
        found = subprocess.run(command, capture_output=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise InputError(f"{path} is damaged: to list its arrays takes more than {SECONDS} s; copy it again") from None
    if found.returncode:
        # The library itself ends with a signal on some damaged files.
        lines = found.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if found.returncode == 1 and lines else "HDF5's library fails on it"
        raise InputError(f"{path} is damaged, or not a file of Keras ({reason}); copy it again")
    try:
        listed = parse_json(found.stdout, LISTED)
        arrays = {str(row[0]): _array(row[1:], start, start + size) for row in listed["arrays"]}
    except (ValueError, IndexError, TypeError):
        raise InputError(f"{path} is damaged: its arrays have no valid places; copy it again") from None
    return Hdf5File(path, arrays, listed["texts"])


def _array(row: list[Any], start: int, end: int) -> Array:
    """Returns an array as it was listed; its offset counts from the start of the part.

    Raises:
        ValueError: it is not inside of the part, or its bytes are not those of its shape.
    """
    shape, kind, offset, size = tuple(map(int, row[0])), str(row[1]), row[2], row[3]
    if offset is None:
        return Array(shape, kind, why=str(size))
    if offset < 0 or start + offset + size > end or size != math.prod(shape) * np.dtype(kind).itemsize:
        return Array(shape, kind, why="the file ends before it does")
    return Array(shape, kind, start + offset, size)
