"""Makes the files that an address names readable on this machine: downloads what is missing or has changed.

A server is asked once in a while whether its files are those of the copy. Where it cannot be reached, the copy is used
if it is whole. An address that only a file names is never contacted: its copy is used, or the command stops.
"""

import math
import shutil
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from funmatch.data.dataset import Track, untracked
from funmatch.data.remote import archives
from funmatch.data.remote.buckets import MAGIC, BucketFiles
from funmatch.data.remote.copies import Listing, Tree
from funmatch.data.remote.download import Stopped, download
from funmatch.data.remote.objects import RemoteObject, Source, Unreachable, Wanted
from funmatch.data.remote.web import WebFiles
from funmatch.errors import InputError, hide_secrets
from funmatch.runtime import addresses
from funmatch.runtime.disk.locks import file_lock, try_lock_file
from funmatch.runtime.log import info
from funmatch.runtime.text import counted

EVERYTHING = Wanted()
"""Every file of a folder, as it is."""
AS_FOLDER = Wanted(unpacked=True)
"""A folder, or an archive of one."""
AT_ONCE = 8
"""Files that are downloaded at a time."""
FREE_BYTES = 256 << 20
"""Left free on the disk."""
CHECKED_SECONDS = 300.0
"""How long a process relies on what it has looked up: a command opens its images several times."""
UNIT = 10**6
"""Bytes of a step of the progress bar."""
_checked: dict[tuple[Path, Wanted, str], float] = {}
"""When addresses were last looked up by this process, on the monotonic clock."""


@dataclass(frozen=True)
class Fetched:
    """The copies of the files that an address names.

    Attributes:
        folder: that holds them; the folder of the address, or what an archive was unpacked to.
        files: their paths, sorted, without those that are read besides.
        names: their addresses, in the same order.
    """

    folder: Path
    files: tuple[Path, ...]
    names: tuple[str, ...]

    @property
    def is_folder(self) -> bool:
        """Whether the address is that of a folder, and not of a file or a pattern."""
        return all(self.folder in path.parents for path in self.files)


def fetch(
    address: str, wanted: Wanted, track: Track = untracked, *, at_most: float = math.inf, refresh: bool = False
) -> Fetched:
    """Returns the copies of the files that an address names, downloading what is missing or has changed.

    Args:
        address: of a file, a pattern with `*` and `{a..b}`, or a folder of a bucket.
        wanted: which of the files.
        track: shows progress.
        at_most: seconds since this process has asked the server; after more it asks again.
        refresh: asks the server again, and compares the copies with their checksums.

    Raises:
        InputError: the files are gone, may not be read, or are on a server that only a file names.
        OSError: the disk is full.
    """
    addresses.check_scheme(address)
    address = addresses.canonical(address)
    tree = Tree(address)
    key = (tree.root, wanted, hide_secrets(address))
    listing = tree.listing(address, wanted)
    recent = key in _checked and time.monotonic() - _checked[key] <= at_most
    if refresh or not recent or listing is None or not tree.is_whole(listing):
        listing = _bring_up_to_date(address, tree, wanted, listing, track, refresh=refresh)
        _checked[key] = time.monotonic()
    return _fetched(address, tree, wanted, listing)


def fetch_if_remote(spec: str, track: Track = untracked) -> tuple[str, tuple[Path, ...]]:
    """Returns the path of the copy of an address, or a spec as it is where it is none.

    Returns:
        the path of a file or a folder; and the files, where a pattern names several, which may lie beside others.
    """
    if not addresses.is_address(spec):
        return spec, ()
    copies = fetch(spec, EVERYTHING, track)
    files = () if copies.is_folder or len(copies.files) == 1 else copies.files
    return str(copies.folder if copies.is_folder or files else copies.files[0]), files


def check_named(address: str, wanted: Wanted) -> None:
    """Raises `InputError` for an address that only a file names, and of which there is no whole copy."""
    address = addresses.canonical(address)
    given, tree = addresses.given_address(address), Tree(address)
    if given is None and not tree.is_whole(tree.listing(address, wanted)):
        raise InputError(_advice(hide_secrets(address), given))


def known_files(address: str, wanted: Wanted) -> tuple[str, ...]:
    """Returns the files that an address named when it was last looked up, without contacting its server."""
    listing = Tree(address).listing(addresses.canonical(address), wanted)
    return tuple(listing.files) if listing else ()


def known_paths(address: str, wanted: Wanted) -> set[Path]:
    """Returns the copies of the files that an address named when it was last looked up, with those read besides."""
    return set(map(Tree(address).path, known_files(address, wanted)))


def _fetched(address: str, tree: Tree, wanted: Wanted, listing: Listing) -> Fetched:
    places = [place for place in listing.files if not wanted.is_beside(place.rpartition("/")[2])]
    files, names = tuple(map(tree.path, places)), tuple(f"{tree.scheme}://{place}" for place in places)
    if wanted.unpacked and len(files) == 1 and archives.is_archive(files[0].name):
        place = places[0]
        crc = tree.records[place]["crc"]
        into = tree.state / "unpacked" / f"{tree.partial(place).name}.{crc:08x}"
        return Fetched(archives.unpack(files[0], into, hide_secrets(address)), files, names)
    return Fetched(_folder(address, tree), files, names)


def _folder(address: str, tree: Tree) -> Path:
    """Returns the folder of the tree that an address without a pattern names, or that of its pattern."""
    inner = hide_secrets(address).partition("://")[2]
    # In buckets, ? is part of a pattern.
    inner = inner.partition("?")[0] if tree.scheme in addresses.WEB else inner
    fixed = [part for part in inner.split("/") if part]
    for number, part in enumerate(fixed):
        if MAGIC.search(part) or "{" in part:
            fixed = fixed[:number]
            break
    return tree.path("/".join(fixed))


def _bring_up_to_date(
    address: str, tree: Tree, wanted: Wanted, known: Listing | None, track: Track, *, refresh: bool
) -> Listing:
    shown, given = hide_secrets(address), addresses.given_address(address)
    copy = known if known and tree.is_whole(known) else None
    if refresh and known and copy and (damaged := [place for place in known.files if not tree.is_intact(place)]):
        info(f"{shown}: {counted(len(damaged), 'file')} damaged on the disk; downloading again")
        for place in damaged:
            tree.forget(place)
        copy = None
    if given is None or addresses.is_offline():
        if copy:
            why = "only a file names it" if given is None else "offline"
            info(f"{shown}: {why}, so its server is not asked; using the copy of {copy.day}")
            return copy
        raise InputError(_advice(shown, given))
    try:
        source = open_source(given)
        found = source.find(given, wanted)
        _download_missing(shown, tree, source, found, track)
    except Unreachable as error:
        if copy:
            info(f"{shown} cannot be reached ({error}); using the copy of {copy.day}")
            return copy
        raise InputError(f"{shown} cannot be reached: {error}; check the network and rerun the command") from None
    except InputError as error:
        hint = f". {addresses.OFFLINE}=1 uses the copy of {copy.day}" if copy and tree.is_whole(copy) else ""
        raise InputError(f"{error}{hint}") from None
    places = [each.place for each in found]
    if wanted.unpacked and isinstance(source, BucketFiles):
        tree.remove_others(_folder(address, tree), places)
    return tree.store_listing(address, wanted, places)


def _advice(shown: str, given: str | None) -> str:
    if given is None:
        return (
            f"{shown} is an address that a file names, and a file must not decide which server is contacted; if you "
            f"trust it, name it yourself: pass it as --data, or set {addresses.ALLOWED}='{shown}'"
        )
    return f"{shown}: there is no whole copy of it, and {addresses.OFFLINE} or HF_HUB_OFFLINE is set; unset it"


def open_source(address: str) -> Source:
    """Returns the kind of server that an address names.

    Raises:
        InputError: a library or credentials are missing.
    """
    scheme = addresses.scheme_of(address)
    return WebFiles() if scheme in addresses.WEB else BucketFiles(scheme)


def _download_missing(shown: str, tree: Tree, source: Source, found: Sequence[RemoteObject], track: Track) -> None:
    if all(tree.has(each.place, each) for each in found):
        return
    tree.state.mkdir(parents=True, exist_ok=True)
    with _lock(tree, shown):
        # Another process may have downloaded them meanwhile.
        tree.forget_read()
        missing = [each for each in found if not tree.has(each.place, each)]
        if not missing:
            return
        if changed := [each for each in missing if tree.was_another(each)]:
            info(f"{shown}: {counted(len(changed), 'file')} changed since the copy was made, e.g. {changed[0].shown}")
        size = sum(each.size or 0 for each in missing)
        _check_space(shown, tree, missing, size)
        info(f"{shown}: downloading {counted(len(missing), 'file')}, {_amount(size)}, to {tree.root}")
        units = -(-size // UNIT)
        label = f"downloading {shown.rpartition('/')[2] or shown} (MB)"
        # Closed at once if the user stops the program, or its threads would download all that is left.
        with closing(_download_all(tree, source, missing, units)) as steps:
            for _ in track(steps, units, label):
                pass


@contextmanager
def _lock(tree: Tree, shown: str) -> Generator[None]:
    path = tree.state / "lock"
    lock = try_lock_file(path)
    if lock:
        with lock:
            yield
        return
    info(f"{shown}: another process downloads from there; waiting for it")
    with file_lock(path):
        yield


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _check_space(shown: str, tree: Tree, missing: Sequence[RemoteObject], size: int) -> None:
    partials = (tree.partial(each.place) for each in missing)
    kept = sum(path.stat().st_size for path in partials if path.exists())
    free = shutil.disk_usage(tree.state).free + kept
    if size + FREE_BYTES > free:
        raise InputError(
            f"{shown} needs {size / 1e9:.2f} GB in {tree.root}, {(size + FREE_BYTES - free) / 1e9:.2f} GB more than it "
            f"may take ({FREE_BYTES / 1e9:.1f} GB stay free); make room, or set FUNMATCH_CACHE to another folder"
        )


def _download_all(tree: Tree, source: Source, missing: Sequence[RemoteObject], units: int) -> Generator[None]:
    """Downloads files in threads; yields once for each unit of bytes."""
    stop, events = Event(), SimpleQueue()

    def one(found: RemoteObject) -> None:
        try:
            if stop.is_set():
                raise Stopped
            path = tree.path(found.place)
            record = download(source, found, tree.partial(found.place), path, events.put, stop)
            events.put((found.place, record))
        except BaseException as error:  # it is raised by the thread that waits for it
            events.put(error)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for found in missing:
                pool.submit(one, found)
            left, done, shown = len(missing), 0, 0
            while left:
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, tuple):
                    tree.add(*event)
                    left -= 1
                else:
                    done += event
                while shown < min(units, done // UNIT):
                    shown += 1
                    yield
            yield from (None for _ in range(units - shown))
        finally:
            # The threads end after their next piece; what they have is kept.
            stop.set()
