"""Files that are there whole or not at all."""

import fcntl
import io
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
from safetensors import SafetensorError


def user_cache() -> Path:
    """Our folder in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "funmatch"


def cache_home() -> Path:
    """Where what can be made again lies: `$FUNMATCH_CACHE`, else our folder in the user's cache folder."""
    if home := os.environ.get("FUNMATCH_CACHE"):
        return Path(home).expanduser()
    return user_cache()


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Writes a file: first under another name, then renamed. A text may hold file names, whatever bytes they are."""
    encoded = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    partial = Path(name)
    try:
        with disk_errors(path), open(handle, "wb") as file:
            os.fchmod(handle, 0o644)  # a temporary file is made for its owner alone
            file.write(encoded)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes an array as .npy, whole or not at all."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    write_atomically(path, file.getbuffer())


@contextmanager
def write_folder_atomically(folder: Path) -> Generator[Path]:
    """Gives an empty folder to fill, which becomes `folder` when the block ends well and vanishes when it does not.

    A folder that already had the name makes way at the very end.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with disk_errors(folder):
            yield partial
        for file in filter(Path.is_file, partial.rglob("*")):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Generator[None]:
    """Makes an `OSError` that names the place of what goes wrong on the disk inside.

    safetensors reports a full disk as an error of its own, and Python forgets the file's name when a write fails.
    """
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    except OSError as error:
        if error.errno and not error.filename:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def try_lock_file(path: Path) -> IO[str] | None:
    """An open file that this process alone holds until it is closed, or the process ends; None where another has it."""
    file = open(os.open(path, os.O_RDONLY | os.O_CREAT, 0o644))  # a finished run may lie where nothing can be written
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        pass  # some mounted drives know no locks
    return file


@contextmanager
def file_lock(path: Path) -> Generator[None]:
    """Holds a lock while the block runs; whoever comes second waits. The lock's file stays, empty."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):  # some mounted drives know no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
