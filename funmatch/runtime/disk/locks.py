"""Locks files and folders against other processes.

The operating system releases the lock of a process however it ends. On a drive without locks, such as some network
drives, a file beside the locked one says who uses it: its name is created by one process alone, and it is taken over
once its process has ended. A process of another machine cannot be looked at, so there a person removes that file.
"""

import fcntl
import os
import socket
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from funmatch.runtime.log import info

POLL_SECONDS = 0.1
"""Time between two attempts on a drive without locks; elsewhere the system wakes the waiting process."""
_warned: set[str] = set()
"""Not empty once this process has said that a drive has no locks."""


class Owner(NamedTuple):
    """A process that uses a file: its machine, process id and the time it started, in the system's own words.

    The process id means something on this machine, in this namespace (container), since this boot.
    """

    host: str
    pid: int
    started: str


@dataclass
class FileLock:
    """A lock that is held until it is closed or the process ends.

    Attributes:
        file: the locked file, open.
        mark: the file that stands for the lock on a drive without locks.
    """

    file: IO[str]
    mark: Path | None = None

    def close(self) -> None:
        """Releases the lock."""
        if self.mark:
            self.mark.unlink(missing_ok=True)
        self.file.close()

    @property
    def closed(self) -> bool:
        """Whether the lock has been released."""
        return self.file.closed

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def try_lock_file(path: Path) -> FileLock | None:
    """Locks a file for this process, without waiting.

    Args:
        path: the file, created if missing.

    Returns:
        the lock; None if another process holds it.
    """
    while True:
        # Opened for reading only: a finished run may lie on a drive that cannot be written.
        file = open(os.open(path, os.O_RDONLY | os.O_CREAT, 0o644))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            _warn(path, error)
            if _try_mark(path):
                return FileLock(file, _mark_of(path))
            file.close()
            return None
        if is_at(file.fileno(), path):
            return FileLock(file)
        file.close()  # replaced between opening and locking: the lock would be on a file that no other process opens


@contextmanager
def file_lock(path: Path) -> Generator[None]:
    """Holds a lock while the block runs, and waits for it while another process holds it.

    Args:
        path: a folder, or the lock's own file, created if missing.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    mark = None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            _warn(path, error)
            while not _try_mark(path):
                time.sleep(POLL_SECONDS)
            mark = _mark_of(path)
        yield
    finally:
        if mark:
            mark.unlink(missing_ok=True)
        # The file stays: removing it would let a waiting process lock the old one while a third creates it anew.
        os.close(handle)


def lock_owner(path: Path) -> int | None:
    """Returns the id of the process that holds a file's lock, or None where the system does not list locks."""
    try:
        wanted = os.stat(path).st_ino
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE <process> <device>:<inode> …
            # A process in another container is listed as 0, and there is no sense in naming it.
            if words[1] == "FLOCK" and int(words[5].rpartition(":")[2]) == wanted and int(words[4]) > 0:
                return int(words[4])
    except (OSError, ValueError, IndexError):
        pass
    owner = _read_owner(_mark_of(path))
    return owner.pid if owner else None


def describe_owner(path: Path) -> str:
    """Returns words for the process that holds a file's lock, and what to do if that can no longer be asked."""
    mark = _mark_of(path)
    owner = _read_owner(mark)
    if mark.exists() and (owner is None or owner.host != _host()):
        which = f"PID {owner.pid} on {owner.host.partition(' ')[0]}; " if owner else ""
        return f"another process ({which}if it has ended, remove {mark})"
    process = lock_owner(path)
    return f"another process (PID {process})" if process else "another process"


def is_at(handle: int, path: Path) -> bool:
    """Returns whether an open file is still the one under a path."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _warn(path: Path, error: OSError) -> None:
    """Says once that a drive has no locks."""
    if not _warned:
        folder = path if path.is_dir() else path.parent
        _warned.add(str(folder))
        info(
            f"WARNING: the drive of {folder} has no locks ({error.strerror}); files named *.owner.lock mark what is in "
            "use there instead. Do not let two machines use one folder at once"
        )


def _mark_of(path: Path) -> Path:
    # Hidden and named .lock, as what a killed process leaves in a folder that may still be begun.
    return path / ".owner.lock" if path.is_dir() else path.with_name(f".{path.name.lstrip('.')}.owner.lock")


def _try_mark(path: Path) -> bool:
    """Marks a file or folder as used by this process; returns whether it is now, or cannot be marked at all.

    Raises:
        FileNotFoundError: the folder has been removed.
    """
    mark = _mark_of(path)
    try:
        _write_owner(mark)
        return True
    except FileExistsError:
        found = _read_owner(mark)
    except FileNotFoundError:
        raise
    except OSError:
        return True  # a drive that cannot be written: a finished run may be read there
    if found is None or not _has_ended(found):
        return False
    # Under a mark of its own, since two processes that find the same dead owner would else remove each other's mark.
    if not _try_mark(mark):
        return False
    try:
        # Another process may have taken it over, and even released it, before the mark on the mark was ours.
        if _read_owner(mark) != found:
            return False
        mark.unlink(missing_ok=True)
        with suppress(FileExistsError):  # a process that has found no mark at all was faster
            _write_owner(mark)
            return True
        return False
    finally:
        _mark_of(mark).unlink(missing_ok=True)


def _write_owner(mark: Path) -> None:
    """Creates a mark.

    Raises:
        FileExistsError: there is one.
    """
    pid = os.getpid()
    # In one write: a process that is killed in between leaves an empty mark, which only a person may remove.
    handle = os.open(mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.write(handle, f"{_host()}\n{pid}\n{_started(pid)}\n".encode())
    finally:
        os.close(handle)


def _read_owner(mark: Path) -> Owner | None:
    """Returns the process that made a mark; None if there is none, or it does not say."""
    try:
        host, pid, started = mark.read_text(errors="replace").splitlines()
        return Owner(host, int(pid), started)
    except (OSError, ValueError):
        return None


def _has_ended(owner: Owner) -> bool:
    """Returns whether a process has ended; False for one of another machine or container, which cannot be seen."""
    # The start, too: its number may have been given to another process since.
    return owner.host == _host() and owner.started != _started(owner.pid)


def _host() -> str:
    """Returns the name of this machine and the namespace in which process ids count."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = "-"
    return f"{socket.gethostname()} {space}"


def _started(pid: int) -> str:
    """Returns when a process started, by boot and ticks since then; "gone" for one that has ended."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # After the name, which is in brackets and may hold anything: the 20th word is the start.
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except FileNotFoundError:
        pass
    except (OSError, IndexError):
        return "running"
    if Path("/proc/self/stat").exists():
        return "gone"
    # No list of processes, as on macOS: whether it runs is all that can be asked.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except OSError:
        pass
    return "running"
