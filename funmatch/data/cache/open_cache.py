"""A data set made ready for a run: surveyed, cut into splits, and either decoded once or packed to be decoded often.

A cache is a folder named by its content's key: `meta.json`, and for each split `<split>.pixels` (decoded images of
(height, width, 3), or encoded ones, one after the other) and `<split>.index.npy`. It is written under another name
and renamed when it is whole, so what has the right name is never partial; a build that was interrupted goes on.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from funmatch.data.cache.build import FORMAT, CacheOptions, build, is_complete, unreadable
from funmatch.data.cache.scan import Scan, fingerprint_files, scan, summary
from funmatch.data.cache.splits import apply_split
from funmatch.data.cache.stores import CachedSplit, Resident, Streaming
from funmatch.data.dataset import Dataset, ReadOptions, Track, untracked
from funmatch.data.decode import pick_decoder
from funmatch.data.readers.catalog import data_home
from funmatch.data.readers.open import open_source, resolve_names
from funmatch.runtime.files import cache_home, write_atomically

NAMES_IN_DIGESTS = {"ReadOptions": "Reading", "CacheOptions": "Keeping", "SplitSpec": "Cut"}
"""Names that these classes had when digests were first written: the same options keep the same digest, so that no
data set is listed again only because a class was renamed."""
WATCHED_AT_MOST = 100_000


@dataclass(frozen=True)
class Cache:
    """A data set, ready.

    Attributes:
        key: digest of its content, and of how it was decoded: the same key gives the same views.
        name: of the data set.
        classes: names by label; empty where nothing is labelled.
        splits: by name: train, val, test, as far as there are.
        unnamed: whether the classes are only numbers.
        way: resident or streaming.
        folder: where it lies.
        found: what the survey found, see `survey.summary`, with `unreadable` (a list of [name, reason]) and `notes`.
    """

    key: str
    name: str
    classes: tuple[str, ...]
    splits: dict[str, CachedSplit]
    unnamed: bool
    way: str
    folder: Path
    found: dict[str, Any]

    def without_labels(self) -> "Cache":
        """The same images with their labels forgotten."""
        splits = {name: split.without_labels() for name, split in self.splits.items()}
        return replace(self, classes=(), unnamed=False, splits=splits)


def open_cache(
    specs: str | Sequence[str],
    reading: ReadOptions | None = None,
    keeping: CacheOptions | None = None,
    *,
    track: Track = untracked,
    tell: Callable[[str], None] = lambda _: None,
    afresh: bool = False,
) -> Cache:
    """The images that a person named, from the cache or put there now.

    Args:
        specs: one data set or several, see `doors.open_source`.
        reading, keeping: how they are read, and kept.
        track: shows progress while files are read and decoded.
        tell: says what was chosen, and what is wrong with the data.
        afresh: reads every file again, and checks what is in the cache.

    Raises:
        InputError: some images cannot be read; all of them are named.
    """
    reading, keeping = _settled(reading or ReadOptions()), keeping or CacheOptions()
    specs = [specs] if isinstance(specs, str) else list(specs)
    home = keeping.home or cache_home()
    keeping = replace(keeping, decoder=pick_decoder(keeping.decoder), home=home)
    ledger = (
        home / "known" / _digest(FORMAT, [resolve_names(spec) for spec in specs], reading, replace(keeping, on_bad=""))
    )
    known = None if afresh else _remembered(ledger)
    if known is None:
        listed = open_source(specs, reading, track)
        watched = _watched(listed)
        seen = fingerprint_files(watched)  # before anything is read, so that what changes later is noticed
        source, found = scan_dataset(listed, keeping, track, afresh=afresh)
        folder = build(source, found, keeping, home, track, tell, check=afresh)
        known = _remember(ledger, folder, source, found, watched, seen)
    cache = _opened(known, keeping)
    bad = cache.found["unreadable"]
    if bad and keeping.on_bad == "stop":
        raise unreadable(known["called"], bad, home)
    for line in list_complaints(cache):
        tell(line)
    return cache


def _settled(reading: ReadOptions) -> ReadOptions:
    """The same with places from the root: the same words may be said elsewhere, or when a variable has changed."""
    file = reading.class_file and reading.class_file.expanduser().absolute()
    return replace(reading, data_dir=data_home(reading.data_dir).absolute(), class_file=file)


def scan_dataset(source: Dataset, keeping: CacheOptions, track: Track, *, afresh: bool = False) -> tuple[Dataset, Scan]:
    """The images of a source, read once and cut into splits."""
    home = keeping.home or cache_home()
    found = scan(source, home, track, max_pixels=keeping.max_pixels, afresh=afresh)
    return apply_split(source, found)


def list_complaints(cache: Cache) -> list[str]:
    """What a person should know before trusting a data set, a line each."""
    lines = [f"note: {note}" for note in cache.found["notes"]]
    for pair, leak in cache.found["leaks"].items():
        one, other = leak["examples"][0]
        lines.append(f"WARNING: {leak['pictures']:,} images are both in {pair} of {cache.name}, e.g. {one} = {other}")
    if twice := cache.found["contradictory"]["pictures"]:
        one, other = cache.found["contradictory"]["examples"][0]
        lines.append(
            f"WARNING: {twice:,} images of {cache.name} are the same with different labels, e.g. {one} = {other}"
        )
    if bad := cache.found["unreadable"]:
        lines.append(f"WARNING: {len(bad):,} unreadable images of {cache.name} are skipped, e.g. {': '.join(bad[0])}")
    return lines


def _opened(known: dict[str, Any], keeping: CacheOptions) -> Cache:
    folder = Path(known["folder"])
    meta = json.loads((folder / "meta.json").read_text())
    splits = {}
    for name in meta["splits"]:
        path = folder / f"{name}.pixels"
        resident = meta["way"] == "resident"
        store = Resident(path) if resident else Streaming(path, meta["cap"], meta["decoder"], keeping.max_pixels)
        index, digests = (np.load(folder / f"{name}.{what}.npy", mmap_mode="r") for what in ("index", "digest"))
        splits[name] = CachedSplit(name, index, store, digests)
    classes, name, unnamed = tuple(meta["classes"]), known["name"], known["unnamed"]
    return Cache(meta["content"], name, classes, splits, unnamed, meta["way"], folder, known["found"])


def _digest(*parts: object) -> str:
    words = repr(parts)
    for now, before in NAMES_IN_DIGESTS.items():
        words = words.replace(f"{now}(", f"{before}(")
    return hashlib.blake2b(words.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _remembered(ledger: Path) -> dict[str, Any] | None:
    """What the same words meant before, if nothing that they mean has changed since."""
    try:
        with open(ledger, "rb") as file:
            known = json.loads(file.readline())
            same = fingerprint_files(_paths(file)) == known["stamp"]
        return known if same and is_complete(Path(known["folder"])) else None
    except (OSError, ValueError, KeyError):
        return None


def _paths(file: IO[bytes]) -> Iterator[bytes]:
    """The paths in a file with a zero between them, never all in memory."""
    rest = b""
    while block := file.read(1 << 16):
        *whole_ones, rest = (rest + block).split(b"\0")
        yield from whole_ones
    yield rest


def _watched(source: Dataset) -> list[str]:
    """The files and folders that are looked at when the same words are said again.

    Of more than 100,000 files, all folders and evenly many of the files, so that a data set like ImageNet is opened at
    once; `prepare` reads all of them.
    """
    watched = list(source.watched)
    if len(watched) <= WATCHED_AT_MOST:
        return watched
    return sorted({os.path.dirname(path) for path in watched}) + watched[:: len(watched) // WATCHED_AT_MOST * 10]


def _remember(
    ledger: Path, folder: Path, source: Dataset, found: Scan, watched: list[str], seen: str
) -> dict[str, Any]:
    """Writes down which files the words meant, and what they are called here: a cache knows only their content."""
    bad = json.loads((folder / "meta.json").read_text())["bad"]
    notes = source.notes
    if len(source.watched) > WATCHED_AT_MOST:
        notes += (
            f"{source.name} has many files: what changes inside one is surely noticed by `funmatch prepare` only",
        )
    about = summary(source, found, {(split, i) for split, i, _ in bad})
    unreadable = [[source.splits[split].names[i], reason] for split, i, reason in bad]
    known = {
        "folder": str(folder),
        "stamp": seen,
        "name": source.name,
        "called": source.called,
        "unnamed": source.unnamed,
        "found": about | {"unreadable": unreadable, "notes": notes},
    }
    ledger.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(ledger, json.dumps(known) + "\n" + "\0".join(watched))
    return known
