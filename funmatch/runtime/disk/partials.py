"""What is written under a temporary name, until it is complete: how it is named, locked, and cleared after a kill."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from funmatch.runtime.disk.locks import is_at

PARTIAL = ".partial"
"""Suffix of files and folders being written; a process that is killed leaves them behind."""
ABANDONED_SECONDS = 86_400.0
"""Time since a half-written file changed, on a drive without locks, after which nobody is taken to be writing it."""


def create_partial(prefix: str, make: Callable[[str], tuple[int, str]]) -> tuple[int, Path]:
    """Creates a file or folder under a temporary name, locked as long as it is open.

    Args:
        prefix: with which its name begins.
        make: creates it, and returns its handle and its path.
    """
    while True:
        try:
            handle, name = make(prefix)
        except FileNotFoundError:  # another process has taken the folder for abandoned before it was opened
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another process has taken it for abandoned before it was locked
        except OSError:
            return handle, Path(name)  # some mounted drives have no locks
        if is_at(handle, Path(name)):
            return handle, Path(name)
        os.close(handle)


def remove_abandoned(parent: Path, prefix: str, *, folders: bool = False) -> None:
    """Removes files or folders that killed processes left half-written: those that no process is writing."""
    with suppress(OSError):
        for entry in os.scandir(parent):
            kind = entry.is_dir if folders else entry.is_file
            if not (entry.name.startswith(prefix) and entry.name.endswith(PARTIAL) and kind(follow_symlinks=False)):
                continue
            with suppress(OSError):
                handle = os.open(entry.path, os.O_RDONLY)
                try:
                    if _is_abandoned(handle):
                        remove(Path(entry.path))
                finally:
                    os.close(handle)


def _is_abandoned(handle: int) -> bool:
    """Returns whether no process is writing a half-written file or folder any more."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # On a drive without locks only its age tells. A file that is wrongly removed would end a run; one that stays
        # takes room for a day.
        return time.time() - os.fstat(handle).st_mtime > ABANDONED_SECONDS
    return True


@contextmanager
def scratch_folder(parent: Path, name: str) -> Generator[Path]:
    """Yields an empty folder for what is needed in between, and removes it; first those that killed processes left.

    Args:
        parent: where it is.
        name: what it is for.
    """

    def make(prefix: str) -> tuple[int, str]:
        path = tempfile.mkdtemp(prefix=prefix, suffix=PARTIAL, dir=parent)
        return os.open(path, os.O_RDONLY), path

    prefix = f".{name}."
    remove_abandoned(parent, prefix, folders=True)
    handle, folder = create_partial(prefix, make)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # what it cannot remove is cleared next time
        os.close(handle)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with its contents; does nothing if the path does not exist."""
    # A link to a folder is removed itself; `rmtree` refuses links, and what they point to is not ours.
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.endswith(PARTIAL):
        # Renamed first: what a kill leaves of the folder must not pass for all of it, and is cleared by its name.
        _, half = beside(path)
        remove(half)
        path = path.rename(half)
    shutil.rmtree(path)


def remove_partials(folder: Path) -> None:
    """Removes the files and folders that killed processes left half-written in a folder."""
    for partial in folder.glob(f".*{PARTIAL}"):
        remove(partial)


def remove_beside(folder: Path) -> None:
    """Removes what killed processes left of a folder that is complete: half of it, and what it has replaced."""
    for partial in beside(folder):
        remove(partial)


def beside(folder: Path) -> list[Path]:
    """Returns the names of a folder that is being written, and of the one that it replaces."""
    return [folder.with_name(f".{folder.name}{end}{PARTIAL}") for end in ("", ".old")]
