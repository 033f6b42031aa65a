"""Makes one file readable that an option names by its path or by an address."""

from pathlib import Path

from funmatch.data.dataset import Track, untracked
from funmatch.data.remote.fetch import EVERYTHING, check_named, fetch_if_remote
from funmatch.errors import InputError, hide_secrets
from funmatch.runtime.addresses import check_scheme_if_any, is_address


def local_file(place: str | None, track: Track = untracked) -> Path | None:
    """Returns the path of a file, of its copy where an address names it; None for None.

    Raises:
        InputError: the address names no file or several, or may not be read.
    """
    if place is None:
        return None
    check_scheme_if_any(place)
    path, files = fetch_if_remote(place, track)
    if files or (is_address(place) and Path(path).is_dir()):
        raise InputError(f"{hide_secrets(place)} is not one file; pass the address of a file")
    return Path(path).expanduser()


def check_file_named(place: str) -> None:
    """Raises `InputError` for the address of a file that only another file names, and of which there is no copy."""
    if is_address(place):
        check_named(place, EVERYTHING)
