"""Writes files and folders that are complete or absent."""

import io
import os
import re
import tempfile
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

import numpy as np
from safetensors import SafetensorError

from funmatch.errors import InputError
from funmatch.runtime.disk.partials import PARTIAL, beside, create_partial, remove, remove_abandoned


def user_cache() -> Path:
    """Returns funmatch's folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "funmatch"


def cache_home() -> Path:
    """Returns the folder of everything that can be computed again: `$FUNMATCH_CACHE`, else `user_cache()`."""
    if home := os.environ.get("FUNMATCH_CACHE"):
        return Path(home).expanduser()
    return user_cache()


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Writes a file under a temporary name in the same folder, then renames it.

    Args:
        path: the file.
        content: its bytes, or a text to be encoded as UTF-8.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    # surrogateescape: a text may hold file names whose bytes are not valid UTF-8.
    encoded = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    with open_atomically(path) as file:
        file.write(encoded)


@contextmanager
def open_atomically(path: Path) -> Generator[IO[bytes]]:
    """Yields a file under a temporary name in the same folder, and renames it when the block succeeds.

    Args:
        path: the final name. If the block fails, a file that already has it stays.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    # A name of its own each time, so that two processes that write the same file do not share a partial one. Cut, since
    # the longest names that a system allows have no room for more.
    prefix = f".{path.name[:48]}."
    remove_abandoned(path.parent, prefix)
    handle, partial = create_partial(prefix, lambda prefix: tempfile.mkstemp(PARTIAL, prefix, path.parent))
    try:
        with disk_errors(path), open(handle, "w+b") as file:
            os.fchmod(handle, 0o644)  # mkstemp makes files that only their owner can read
            yield file
            file.flush()
            os.fsync(file.fileno())  # before the rename, or a power loss leaves an empty file under the right name
            # While it is open, and so locked: else another that writes the same file could clear it as abandoned.
            partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def array_bytes(array: np.ndarray) -> memoryview:
    """Returns an array as a `.npy` file holds it.

    It is written from memory: if numpy itself fails to write a file, its error does not say why (a full disk).
    """
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getbuffer()


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as `.npy`, completely or not at all."""
    write_atomically(path, array_bytes(array))


def read_array(path: Path, mmap_mode: Literal["r", "c"] | None = None) -> np.ndarray:
    """Reads a `.npy` file.

    Args:
        path: the file.
        mmap_mode: maps the file into memory instead of reading it, as for `numpy.load`.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is damaged.
    """
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # numpy evaluates the header as Python, so damage there raises nearly anything
        raise ValueError(f"{path} is damaged: {error}") from error


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, in the order in which they were made."""
    with suppress(OSError):  # some mounted drives cannot sync folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def write_folder_atomically(folder: Path) -> Generator[Path]:
    """Yields an empty folder to fill, and renames it to `folder` when the block succeeds.

    If the block fails, what it has written is removed. A folder that already has the name is replaced at the very end.

    Args:
        folder: the final name, whose parents are created. A link is followed: the folder it points to is replaced.
    """
    folder = Path(os.path.realpath(folder)) if folder.is_symlink() else folder
    partial, old = beside(folder)
    remove(partial)
    partial.mkdir(parents=True)
    try:
        with disk_errors(folder):
            yield partial
        # Contents before the name: a checkpoint that has its name is complete, whenever the power fails.
        for path in (*partial.rglob("*"), partial):
            if path.is_dir():
                sync_folder(path)
            else:
                with open(path, "rb") as written:
                    os.fsync(written.fileno())
        if folder.exists():
            # Renamed before it is removed, so that the name is missing for an instant and not as long as that takes.
            remove(old)
            folder.rename(old)
        partial.rename(folder)
        sync_folder(folder.parent)
        remove(old)
    finally:
        remove(partial)


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Turns disk errors inside the block into an `OSError` that names the path."""
    try:
        yield
    except SafetensorError as error:
        # safetensors reports a full disk as an error of its own, with the number only in its text.
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    except OSError as error:
        # Python knows the file's name when it opens a file, not when a later write fails.
        if error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def close_with(owner: object, handle: int) -> None:
    """Closes an open file when an object is gone; at the end of the process the system does."""
    # Not `__del__`, which at the end of the process may find the modules gone that it needs.
    weakref.finalize(owner, os.close, handle).atexit = False


def read_lines(path: Path, what: str) -> list[str]:
    """Reads a text file that people wrote with something a line; empty lines, as editors leave one, are left out.

    Args:
        what: stands on the lines, for messages.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        # Some editors begin a file with a mark, which would be a part of the first line.
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {what} in {path}: {getattr(error, 'strerror', None) or error}") from None
    return [line.strip() for line in lines if line.strip()]
