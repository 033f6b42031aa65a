"""Unpacks downloaded archives into the cache, once, and nothing outside it."""

import errno
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from funmatch.data.formats.compressed import MAX_EXPANSION, largest_content
from funmatch.data.remote.objects import place_of
from funmatch.errors import InputError, first_line
from funmatch.runtime.disk.files import disk_errors
from funmatch.runtime.disk.locks import file_lock
from funmatch.runtime.disk.partials import remove

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
BLOCK = 1 << 20
SMALLEST = 512
"""Bytes that a file counts at least: a million empty ones fill a disk, too."""
OF_ARCHIVE = {errno.EINVAL, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ}
"""Errors of files that come from damaged positions and names, not from the disk."""


def is_archive(name: str) -> bool:
    """Returns whether a file's name is that of an archive of files."""
    return name.lower().endswith(ENDINGS)


def unpack(path: Path, into: Path, shown: str) -> Path:
    """Returns the folder with the files of an archive, and unpacks them if that has not been done.

    Args:
        path: of the archive.
        into: folder for the folder; its name tells this version of the archive from others.
        shown: name of the archive for messages.

    Raises:
        InputError: it is damaged, holds links or names that lead outside, or far more than its size.
    """
    # The longest: x.tar.gz is x.
    ending = max((each for each in ENDINGS if path.name.lower().endswith(each)), key=len)
    folder = into / (path.name[: -len(ending)] or "files")
    into.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(into.with_name(f"{into.name}.lock")):
        if folder.is_dir():
            return folder
        partial = into.with_name(f"{into.name}.partial")
        remove(partial)
        try:
            with disk_errors(into):
                _extract(path, partial / folder.name, shown)
                # Others of this archive are of earlier versions.
                for other in into.parent.glob(f"{into.name.partition('.')[0]}.*"):
                    if other != partial and other.suffix != ".lock":
                        remove(other)
                partial.rename(into)
        finally:
            remove(partial)
    return folder


def _extract(path: Path, folder: Path, shown: str) -> None:
    most, size = largest_content(path.stat().st_size), 0
    folder.mkdir(parents=True)
    try:
        for name, file in _members(path, shown):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as written:
                size += SMALLEST
                while size <= most and (block := file.read(BLOCK)):
                    written.write(block)
                    size += len(block)
            if size > most:
                raise InputError(
                    f"{shown} holds more than {MAX_EXPANSION} times its own size; unpack it yourself, and pass the "
                    "folder"
                )
    except FileExistsError as error:
        raise InputError(f"{shown} holds {Path(str(error.filename)).name!r} twice; unpack it yourself") from None
    except InputError:
        raise
    # Decompressors raise types of their own for damaged input, and OSError without a number.
    except Exception as error:
        if isinstance(error, OSError) and error.errno and error.errno not in OF_ARCHIVE:
            raise
        # What tarfile says of a file that no archive begins like is a list of what it has tried.
        why = (
            "neither a whole zip nor a tar"
            if isinstance(error, tarfile.ReadError) and _is_none(path)
            else first_line(error)
        )
        raise InputError(
            f"{shown} is not a complete archive ({why}); if a browser downloads one there, pass its address, or unpack "
            "it yourself and pass the folder"
        ) from None


def _is_none(path: Path) -> bool:
    """Returns whether a file has no members that could be found, neither as a zip nor as a tar of any compression."""
    return not (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def _members(path: Path, shown: str) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields the name and the content of each file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for one in archive.infolist():
                linked = stat.S_ISLNK(one.external_attr >> 16)
                if one.is_dir() and not linked:
                    continue
                with archive.open(_checked(one, one.filename, shown, linked=linked)) as file:
                    yield one.filename, file
        return
    with tarfile.open(path, "r:*") as tar:
        for member in tar:
            if member.isdir():
                continue
            name = member.name.removeprefix("./")
            _checked(member, name, shown, linked=not member.isfile())
            file = tar.extractfile(member)
            if file:
                yield name, file


def _checked(member: Any, name: str, shown: str, *, linked: bool) -> Any:
    if linked or place_of(name) is None:
        raise InputError(
            f"{shown} holds {name[:200]!r}, which is a link or leads outside; unpack it yourself, and pass the folder"
        )
    return member
