"""Downloads one file completely or not at all, from where an earlier attempt stopped."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import IO, Any

from funmatch.data.remote import checksums
from funmatch.data.remote.objects import Changed, RemoteObject, Source, Unreachable
from funmatch.errors import InputError
from funmatch.runtime.disk.checksums import crc_of_file
from funmatch.runtime.disk.files import disk_errors, sync_folder, write_atomically
from funmatch.runtime.disk.json_files import Damaged, read_json, seal, unseal
from funmatch.runtime.log import info

SYNCED = 8 << 20
"""Bytes between two notes of how much is safely on the disk: what a power failure loses at most."""
TRIES = 5
"""Attempts in a row of which none brings a byte."""
BLOCK_IN_ONE = 1 << 20
"""Up to this size a file comes in one piece, which is of one version."""
PAUSE_SECONDS = 0.5
"""Before the second attempt; doubled before each later one."""
SHAPE = {"address": str, "size": int | None, "etag": str, "modified": str, "done": int}


class Stopped(Exception):
    """Another file has failed, or the user has stopped the program."""


def download(
    source: Source, found: RemoteObject, partial: Path, target: Path, count: Callable[[int], None], stop: Event
) -> dict[str, Any]:
    """Downloads a file, and gives it its name when all of it is there.

    Args:
        partial: the file while it is incomplete; a note beside it says of which version it is.
        count: called with the number of bytes that have come.
        stop: set where the download shall end soon; what has come is kept.

    Returns:
        the record of the copy: its version, its CRC-32 and its time of change.

    Raises:
        InputError: it has changed meanwhile, is damaged, may not be read, or the connection stays broken.
        OSError: the disk is full.
    """
    note = partial.with_name(f"{partial.name}.json")
    with disk_errors(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        done = _resume_point(found, partial, note)
        count(done)
        try:
            _fetch_checked(source, found, partial, done, count, stop)
        except Changed:
            _discard(partial, note)
            raise InputError(f"{found.shown} has changed while it was read; rerun the command") from None
        crc = crc_of_file(partial)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(target)
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            _discard(partial, note)
            raise InputError(
                f"{found.shown}: a file and a folder have the same name there, which a disk cannot hold; name the "
                "files that you need"
            ) from None
        sync_folder(target.parent)
        note.unlink(missing_ok=True)
        state = target.stat()
        return found.version | {"bytes": state.st_size, "crc": crc, "time": state.st_mtime_ns}


def _fetch_checked(
    source: Source, found: RemoteObject, partial: Path, done: int, count: Callable[[int], None], stop: Event
) -> None:
    """Completes a file, and once more from its beginning if it is not what the server announced."""
    note = partial.with_name(f"{partial.name}.json")
    for is_last in (False, True):
        with open(partial, "r+b" if done else "wb") as file:
            file.truncate(done)
            file.seek(done)
            _fill(source, found, file, note, done, count, stop)
        if found.size is None or found.size > BLOCK_IN_ONE:
            source.confirm(found)
        size = partial.stat().st_size
        if found.size not in (None, size):
            raise Changed
        problem = checksums.difference(partial, source.digests(found))
        if not problem:
            return
        _discard(partial, note)
        if is_last:
            raise InputError(
                f"{found.shown} arrived damaged twice ({problem}); rerun the command, or get the file another way and "
                "compare it with that checksum"
            )
        info(f"{found.shown} arrived damaged ({problem}); downloading it again")
        count(-size)
        done = 0


def _fill(
    source: Source,
    found: RemoteObject,
    file: IO[bytes],
    note: Path,
    done: int,
    count: Callable[[int], None],
    stop: Event,
) -> None:
    """Appends what is missing, and tries again where the connection breaks."""
    tries, synced = 0, done
    try:
        while done != found.size:
            try:
                for block in source.read(found, done):
                    if stop.is_set():
                        raise Stopped
                    done += file.write(block)
                    count(len(block))
                    tries = 0
                    if found.size is not None and done > found.size:
                        raise Changed
                    if done - synced >= SYNCED:
                        synced = _keep(found, file, note, done)
                if found.size is None or done == found.size:
                    return
                problem = "the connection was cut"
            except Unreachable as error:
                problem = str(error)
            tries += 1
            if tries >= TRIES:
                raise InputError(
                    f"cannot download {found.shown}: {problem}; {_share(done, found.size)} kept, so rerun the command "
                    "to continue"
                )
            # A file of unknown length cannot be asked for its rest.
            if found.size is None or not (found.etag or found.modified):
                count(-done)
                done = synced = 0
                file.seek(0)
                file.truncate()
            if tries > 1:
                info(f"{found.shown}: {problem}; trying again")
            if stop.wait(PAUSE_SECONDS * 2 ** (tries - 1)):
                raise Stopped
    finally:
        with suppress(OSError):  # a full disk has an error of its own already
            _keep(found, file, note, done)


def _share(done: int, size: int | None) -> str:
    return f"{done:,} of {size:,} bytes are" if size else f"{done:,} bytes are"


def _keep(found: RemoteObject, file: IO[bytes], note: Path, done: int) -> int:
    """Notes how much of which version is on the disk."""
    # In this order: the note must not tell of bytes that a power failure loses.
    file.flush()
    os.fsync(file.fileno())
    write_atomically(note, json.dumps(seal({"address": found.shown, **found.version, "done": done})))
    return done


def _resume_point(found: RemoteObject, partial: Path, note: Path) -> int:
    """Returns how many bytes an earlier attempt has left of this very version."""
    try:
        known = unseal(read_json(note, SHAPE), note)
        kept = partial.stat().st_size
    except (OSError, Damaged):
        return 0
    # Without a tag or a time, two versions of one size could be mixed.
    tells = (found.etag or found.modified) and found.size is not None
    return known["done"] if tells and found.is_version(known) and 0 <= known["done"] <= kept else 0


def _discard(partial: Path, note: Path) -> None:
    note.unlink(missing_ok=True)
    partial.unlink(missing_ok=True)
