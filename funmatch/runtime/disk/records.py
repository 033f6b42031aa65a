"""Keeps folders that hold a record of what was requested there: begins, compares, locks and refuses them.

The record is a JSON file with a format number (1 where it has none: the first version wrote none).
"""

import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from funmatch.errors import InputError
from funmatch.runtime.disk.files import write_atomically
from funmatch.runtime.disk.json_files import (
    FORMAT,
    RUN_RECORD,
    RUN_SHAPE,
    Damaged,
    Shape,
    read_json,
    read_record,
    seal,
)
from funmatch.runtime.disk.locks import FileLock, describe_owner, file_lock, lock_owner, try_lock_file
from funmatch.runtime.disk.partials import PARTIAL, remove, remove_partials


def is_run(folder: Path) -> bool:
    """Returns whether a folder holds the record of a run, finished or not."""
    try:
        # Its format number is not checked: the run of a newer version is a run too, not some other folder.
        read_json(folder / RUN_RECORD, RUN_SHAPE)
    except (OSError, Damaged):
        return False
    return True


def list_differences(
    then: Mapping[str, Any], now: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None
) -> list[str]:
    """Lists the values in which a record differs from what is requested now, a line each.

    Args:
        where: place of the earlier values, for the message: "in the run".
        names: names for messages of values whose keys say too little.
    """
    found = []
    for name in sorted(then.keys() | now.keys()):
        # A missing value counts as None: a record from before an option agrees with a command that leaves it out.
        before, after, shown = then.get(name), now.get(name), (names or {}).get(name, name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += [f"{shown}.{line}" for line in list_differences(before, after, where)]
        elif before != after:
            found.append(f"{shown}: {_shown(before)} {where}, {_shown(after)} now")
    return found


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


@dataclass(frozen=True)
class RecordFolder:
    """A folder that one command began and the same command resumes.

    Attributes:
        folder: where it is, or will be.
        marker: the file that tells such a folder from any other.
        noun: what the folder holds, for messages.
        shape: of the record.
        number: of the record's format.
        option: by which a person chooses the folder.
        record_name: the file that holds the record; the marker, unless named.
        lock_name: the file that is locked while a process uses the folder; the record, unless named.
        closed: whether keys that the shape does not name are damage.
        leftovers: files besides the record that are removed when nothing came of a first begin.
    """

    folder: Path
    marker: str
    noun: str
    shape: dict[str, Shape]
    number: int = 1
    option: str = "--out"
    record_name: str = ""
    lock_name: str = ""
    closed: bool = False
    leftovers: tuple[str, ...] = field(default=(), repr=False)

    @property
    def path(self) -> Path:
        """The record's file."""
        return self.folder / (self.record_name or self.marker)

    @property
    def has_begun(self) -> bool:
        return self.path.is_file()

    def read(self) -> dict[str, Any]:
        """Reads the record.

        Raises:
            InputError: it is damaged, or of a newer format.
        """
        try:
            return read_record(self.path, self.shape, self.number, f"choose another {self.option}", closed=self.closed)
        except Damaged as error:
            raise Damaged(
                f"{error}; restore it from a copy, or choose another {self.option} for the {self.noun}"
            ) from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes the record with its format number and its checksum."""
        # Named twice: once to be the file's first key, once so that a number inside the record cannot replace ours.
        sealed = seal({FORMAT: self.number, **record} | {FORMAT: self.number})
        write_atomically(self.path, json.dumps(sealed, indent=1))

    def check_place(self) -> None:
        """Raises `InputError` unless this may begin or resume here: the folder is new, empty, or holds the marker."""
        try:
            str(self.folder.absolute()).encode()
        except UnicodeEncodeError:
            raise InputError(
                f"{str(self.folder)!r} is not a name in UTF-8, so other programs could not load it; "
                f"choose another {self.option}"
            ) from None
        if self.folder.is_dir():
            # Locks and half-written files are what a process leaves that was killed while it began.
            foreign = any(not _is_leftover(path) for path in self.folder.iterdir())
            if not foreign or (self.folder / self.marker).is_file():
                return
        elif not self.folder.exists():
            return
        raise InputError(f"{self.folder} exists and is not a {self.noun}; choose another {self.option}")

    def begin(
        self, record: Mapping[str, Any], compare: Callable[[dict[str, Any], Mapping[str, Any]], list[str]]
    ) -> dict[str, Any]:
        """Writes the record if there is none, else compares; returns what the file holds.

        Args:
            record: what is requested now.
            compare: lists the differences between the stored record and the requested one.

        Raises:
            InputError: they differ, or the record there is damaged or of a newer format.
        """
        if not self.has_begun:
            self.write(record)
        stored = self.read()
        self.refuse(compare(stored, record))
        return stored

    def refuse(self, differences: list[str], remedy: str = "") -> None:
        """Raises `InputError` where there are differences between the record and what is requested now."""
        if differences:
            lines = "\n  ".join(differences)
            raise InputError(
                f"{self.folder} holds a {self.noun} with other options:\n  {lines}\n"
                f"choose another {self.option}, or pass the {self.noun}'s own values{remedy}"
            )

    @contextmanager
    def beginning(self) -> Generator[None]:
        """Makes the folder and keeps other processes from beginning in it; if nothing comes of it, nothing stays."""
        with ExitStack() as stack:
            created = self._lock_folder(stack)
            had_begun = self.has_begun  # read under the lock: what another process has begun is not ours to clear
            try:
                yield
            except BaseException:
                # BaseException: after Ctrl-C, too, a folder without a record must not stay behind.
                if not had_begun:
                    self._clear(created=created)
                raise

    def _lock_folder(self, stack: ExitStack) -> bool:
        """Makes the folder where it is missing and holds its lock; returns whether it was missing.

        The lock is on the folder itself, since the record is replaced when it is written, and its lock with it.
        """
        while True:
            # Two processes may both find it missing. That does no harm: neither clears what the other has begun.
            created = not self.folder.exists()
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = ExitStack()
            try:
                number = self.folder.stat().st_ino
                lock.enter_context(file_lock(self.folder))
                # By inode: under this name another process may have made a new folder while we waited.
                if self.folder.stat().st_ino == number:
                    stack.enter_context(lock)
                    return created
            except FileNotFoundError:
                pass
            lock.close()  # the process that we waited for has removed the folder, so its lock guards nothing

    def _clear(self, *, created: bool) -> None:
        # The record first: without it the folder is free for the next attempt, even if clearing is interrupted.
        for name in (self.path.name, *self.leftovers):
            (self.folder / name).unlink(missing_ok=True)
        # A file that someone else has put there since is not ours to remove.
        if created and all(map(_is_leftover, self.folder.iterdir())):
            for path in self.folder.iterdir():
                remove(path)
            with suppress(OSError):  # on a drive without locks another process may have begun here meanwhile
                self.folder.rmdir()

    def try_lock(self) -> FileLock | None:
        """Returns a lock that marks the folder as used until it is closed; None if another process uses it."""
        return try_lock_file(self._lock_path)

    @property
    def in_use(self) -> bool:
        """Whether another process is using the folder."""
        # Checked first, since locking would create the file, and the folder would look begun.
        if not self.has_begun:
            return False
        held = self.try_lock()
        if held is not None:
            held.close()
        return held is None

    def check_free(self) -> None:
        """Raises `InputError` if another process is using the folder, as far as the system lists locks."""
        # In this order: looking at the list disturbs nobody, while taking the lock could stop one that begins now.
        if lock_owner(self._lock_path) not in (None, os.getpid()) and self.in_use:
            raise self._in_use_error()

    def _in_use_error(self) -> InputError:
        process = describe_owner(self._lock_path)
        return InputError(f"{process} is using {self.folder}; wait for it or choose another {self.option}")

    @property
    def _lock_path(self) -> Path:
        return self.folder / (self.lock_name or self.path.name)

    @contextmanager
    def lock(self) -> Generator[None]:
        """Marks the folder as used by this process while the block runs.

        Raises:
            InputError: another process uses it.
        """
        held = self.try_lock()
        if held is None:
            raise self._in_use_error()
        with held:
            yield

    @contextmanager
    def opened(
        self,
        record: Mapping[str, Any],
        compare: Callable[[dict[str, Any], Mapping[str, Any]], list[str]],
        update: Callable[[dict[str, Any], Mapping[str, Any]], dict[str, Any] | None] | None = None,
    ) -> Generator[dict[str, Any]]:
        """Begins or resumes, and yields the record; the lock is held while the block runs.

        Args:
            record, compare: as for `begin`.
            update: returns the record to write in place of the stored one when this resumes, or None to leave it.

        Raises:
            InputError: the folder holds something else, other options, or another process uses it.
        """
        self.check_place()
        with ExitStack() as stack:
            with self.beginning():
                stored = self.begin(record, compare)
                if update:
                    # Under the record's own lock too: another process may be using the folder.
                    with self.lock():
                        if (changed := update(stored, record)) is not None:
                            self.write(changed)
                            stored = changed
                # Before the folder's own lock is released, so that no other process gets in between.
                stack.enter_context(self.lock())
            # Only under the lock: otherwise these files may be those that another process is writing.
            remove_partials(self.folder)
            yield stored


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith((PARTIAL, ".lock", ".begin"))
