"""Lists the arrays and texts in an HDF5 file; a program of its own, since HDF5's library crashes on some damaged files.

    python hdf5_list.py FILE START SIZE

prints JSON: `arrays`, each a path, shape, NumPy's name of its type, offset in the file, and bytes, or in place of the
last two a reason why it cannot be read; and `texts`: those of its attributes by path and name. Values are not read: an
array that is one piece of the file is read by its offset, without this library.

Links to other places and to other files are not followed.
"""

import io
import json
import os
import sys
from typing import Any

import h5py

MAX_OBJECTS = 50_000  # an R152 with its optimizer has some 2,000
MAX_DEPTH = 40
MAX_TEXT = 1 << 26  # bytes of an attribute
MEMORY = 4 << 30  # bytes of address space: a damaged file can ask for any amount


class Part(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, path: str, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = open(path, "rb", buffering=0), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self.size - self.at))
        self.file.seek(self.start + self.at)
        content = self.file.read(wanted)
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)


def texts_of(found: Any) -> dict[str, Any]:
    """Returns the attributes of a group that are texts."""
    texts: dict[str, Any] = {}
    for name in list(found.attrs):
        try:
            value = found.attrs[name]
        except (OSError, KeyError, ValueError, TypeError, RuntimeError):  # of a type that h5py does not know
            continue
        if isinstance(value, bytes | str) and len(value) <= MAX_TEXT:
            texts[name] = _text(value)
    return texts


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def describe(found: Any) -> list[Any]:
    """Returns shape, type, offset and bytes of an array, or in place of the last two why it cannot be read."""
    shape, size = [int(n) for n in found.shape or ()], int(found.size or 0) * found.dtype.itemsize
    kind = found.dtype.str
    if found.external or found.is_virtual:
        return [shape, kind, None, "its values are in another file"]
    if found.chunks or found.compression:
        return [shape, kind, None, "it is stored in chunks, as Keras writes none"]
    if found.dtype.kind not in "fiu":
        return [shape, kind, None, "it is not of numbers"]
    offset = found.id.get_offset()
    if offset is None or found.id.get_storage_size() != size:
        return [shape, kind, None, "it has no values"]
    return [shape, kind, int(offset), size]


def walk(group: Any, path: str, arrays: list[Any], texts: dict[str, Any], depth: int) -> None:
    """Adds what a group holds to `arrays` and `texts`."""
    if depth > MAX_DEPTH:
        raise ValueError("its groups are nested too deep")
    if found := texts_of(group):
        texts[path] = found
    for name in group:
        if len(arrays) + len(texts) > MAX_OBJECTS:
            raise ValueError(f"it holds more than {MAX_OBJECTS:,} objects")
        # A soft or an external link leads elsewhere, perhaps to a file that is not meant to be read.
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        inner = group[name]
        place = f"{path}/{name}" if path else str(name)
        if isinstance(inner, h5py.Group):
            walk(inner, place, arrays, texts, depth + 1)
        elif isinstance(inner, h5py.Dataset):
            arrays.append([place, *describe(inner)])


def main() -> None:
    """Prints what the file holds; ends with 1 and a reason if it cannot be read."""
    path, start, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):  # not on every system
        pass
    arrays: list[Any] = []
    texts: dict[str, Any] = {}
    try:
        with h5py.File(Part(path, start, size), "r") as file:
            walk(file, "", arrays, texts, 0)
    except Exception as error:  # whatever is damaged
        sys.exit(" ".join(str(error).split())[:300] or type(error).__name__)
    json.dump({"arrays": arrays, "texts": texts}, sys.stdout)


if __name__ == "__main__":
    main()
