"""Opens a data set for runs: lists and scans it, makes its splits, and decodes or packs its images, each only once.

A cache is a folder named by the key of its content: `meta.json`, and for each split `<split>.pixels` (decoded images of
(height, width, 3), or encoded ones, one after the other) and `<split>.index.npy`. It is written under another name and
renamed when it is complete, so a folder of the right name is never partial; an interrupted build resumes.

The folder `known` is a ledger: for specs and options that were opened before, it says which cache they meant and which
files to look at, so that a data set is opened without listing it again.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from funmatch.config.choices import TaskName
from funmatch.data.cache.bit_depth import depth_notes
from funmatch.data.cache.build import unreadable
from funmatch.data.cache.check import FORMAT, is_complete, read_index, read_label_sets, read_meta
from funmatch.data.cache.cuts import Built, apply_cut, build_splits, read_cut
from funmatch.data.cache.ledger import folder_of, read_entry, read_paths
from funmatch.data.cache.scan import Scan, fingerprint_files, list_complaints, scan, summary
from funmatch.data.cache.splits import apply_split, choose_splits
from funmatch.data.cache.stores import CachedSplit, Resident, Streaming, label_table
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.dataset import Dataset, ReadOptions, Track, untracked
from funmatch.data.join import count_sources
from funmatch.data.jpeg import pick_decoder
from funmatch.data.label_sets import join_copies
from funmatch.data.limits import MAX_SCANS
from funmatch.data.readers.catalog import data_home
from funmatch.data.readers.open import known_copies, open_dataset, resolve_spec, update_copies
from funmatch.data.remote.fetch import CHECKED_SECONDS
from funmatch.runtime.disk.files import cache_home, write_atomically
from funmatch.runtime.disk.json_files import Damaged, seal

NAMES_IN_DIGESTS = {
    "ReadOptions(": "Reading(",
    "CacheOptions(": "Keeping(",
    "SplitSpec(": "Cut(",
    "split_spec=": "cut=",
    # Options that came later, where they have their defaults.
    f", max_scans={MAX_SCANS}": "",
    ", task='multiclass'": "",
    ", split_column=None, image_root=None, label_separator=';', on_bad='stop'": "",
}
"""Names as version 0.1.0 wrote them into digests: the same options keep the same digest, so that no data set is listed
again only because a class or a field was renamed."""

READING = 5
"""Number of how sources are read: raised where the same files give other images, splits or classes than before, so that
they are listed again. The cache's own key is that of its content, and does not depend on it."""

MAX_WATCHED = 100_000


@dataclass(frozen=True)
class Cache:
    """A data set that runs can read.

    Attributes:
        key: digest of its content and of how it was decoded; the same key gives the same views.
        name: of the data set.
        classes: class names by label; empty where nothing is labelled.
        splits: train, val and test, those that exist.
        unnamed: whether class names are only numbers.
        way: `resident` or `streaming`.
        folder: of the cache.
        summary: see `scan.summary`; also `unreadable`, a list of [name, reason], and `notes`.
        task: `multiclass`, one class an image, or `multilabel`, any number of them.
    """

    key: str
    name: str
    classes: tuple[str, ...]
    splits: dict[str, CachedSplit]
    unnamed: bool
    way: str
    folder: Path
    summary: dict[str, Any]
    task: TaskName = "multiclass"

    def without_labels(self) -> "Cache":
        """Returns the same images without labels."""
        splits = {name: split.without_labels() for name, split in self.splits.items()}
        # The summary too, which commands print: it must not tell of classes that are not used.
        unlabelled = {"labelled": False, "classes": 0}
        about = {name: split | unlabelled for name, split in self.summary["splits"].items()}
        summary = self.summary | {"splits": about, "classes": [], "contradictory": {"pictures": 0, "examples": []}}
        return replace(self, classes=(), unnamed=False, splits=splits, summary=summary)


def open_cache(
    specs: str | Sequence[str],
    options: ReadOptions | None = None,
    cache_options: CacheOptions | None = None,
    *,
    track: Track = untracked,
    log: Callable[[str], None] = lambda _: None,
    refresh: bool = False,
) -> Cache:
    """Opens the images that specs name, and builds their cache if it is missing.

    Args:
        specs: one data set or several, see `open_dataset`.
        options: for reading.
        cache_options: for storing.
        track: shows progress while files are read and decoded.
        log: prints a line: what was chosen, and what is wrong with the data.
        refresh: reads every file again, and verifies an existing cache.

    Raises:
        InputError: some images are unreadable; all of them are listed.
    """
    specs = [specs] if isinstance(specs, str) else list(specs)
    # First, since a change at a server changes the files that the entry tells to look at.
    update_copies(specs, track, at_most=CHECKED_SECONDS, refresh=refresh)
    ledger, options, cache_options = _ledger(specs, options or ReadOptions(), cache_options or CacheOptions())
    entry = None if refresh else _load_entry(ledger, log)
    # An entry of an earlier version does not say from which of several sources an image is.
    if entry is None or (len(specs) > 1 and "sources" not in entry):
        listed = open_dataset(specs, options, track)
        watched = _watched_paths(listed)
        # Before anything is read: a file that changes during the scan then differs from its entry the next time.
        stamp = fingerprint_files(watched)
        built = build_splits(listed, cache_options, track, log, refresh=refresh)
        # Last, so that an entry never names a cache that is still being built.
        entry = _store_entry(ledger, built, watched, stamp)
    cache = _open_entry(entry, cache_options, options.task)
    # Before the complaints: labels that contradict each other do not matter then.
    cache = cache.without_labels() if options.unlabelled else cache
    bad = cache.summary["unreadable"]
    if bad and cache_options.on_bad == "stop":
        raise unreadable(entry["called"], bad, ledger.parent.parent)
    # On every opening, not only after building: each run's own log shows what is wrong with its data.
    for line in list_complaints(cache.name, cache.summary):
        log(line)
    return cache


def open_known_cache(specs: Sequence[str], options: ReadOptions, cache_options: CacheOptions) -> Cache | None:
    """Opens images that were opened on this machine before, by the same specs and options; None if they were not.

    Nothing is listed, decoded or downloaded: for specs that a file names, which may be a stranger's.
    """
    ledger, options, cache_options = _ledger(specs, options, cache_options)
    entry = _load_entry(ledger)
    if entry is None:
        return None
    cache = _open_entry(entry, cache_options, options.task)
    return cache.without_labels() if options.unlabelled else cache


def _ledger(
    specs: Sequence[str], options: ReadOptions, cache_options: CacheOptions
) -> tuple[Path, ReadOptions, CacheOptions]:
    """Returns the path of the ledger entry of specs and options, and the options as they count."""
    options, home = absolute(options), cache_options.home or cache_home()
    # Before the digest: `auto` stands for two decoders, whose pixels differ a little.
    cache_options = replace(cache_options, decoder=pick_decoder(cache_options.decoder), home=home)
    # Without on_bad: both values mean the same cache, and differ only in whether bad images are an error.
    reading = replace(options, on_bad="stop")
    parts = FORMAT, READING, [resolve_spec(spec) for spec in specs], reading, replace(cache_options, on_bad="")
    # A shard that is gone from a bucket has left no trace in the files that are looked at.
    if copies := known_copies(specs):
        parts = (*parts, copies)
    return home / "known" / _digest(*parts), options, cache_options


def absolute(options: ReadOptions) -> ReadOptions:
    """Makes paths absolute, so that the digest means the same in another folder or with another FUNMATCH_DATA."""
    file = options.class_file and options.class_file.expanduser().absolute()
    root = options.image_root and options.image_root.expanduser().absolute()
    return replace(options, data_dir=data_home(options.data_dir).absolute(), class_file=file, image_root=root)


def scan_dataset(dataset: Dataset, cache_options: CacheOptions, track: Track) -> tuple[Dataset, Scan]:
    """Reads every image of a data set once, and makes its splits."""
    home = cache_options.home or cache_home()
    dataset, scanned = join_copies(dataset, scan(dataset, home, track, limits=cache_options.limits))
    return apply_split(dataset, scanned, choose_splits(dataset, scanned))


def _open_entry(entry: dict[str, Any], cache_options: CacheOptions, task: TaskName) -> Cache:
    """Opens the cache of a ledger entry."""
    place = Path(entry["folder"])
    folder = folder_of(place)
    meta = read_meta(folder)
    key, splits, sets = meta["content"], {}, read_label_sets(folder, meta)
    table = label_table(sets)
    for name in meta["splits"]:
        path = folder / f"{name}.pixels"
        resident = meta["way"] == "resident"
        index, digests = read_index(folder, name, meta, sets)
        cap, decoder = meta["cap"], meta["decoder"]
        store = Resident(path, index) if resident else Streaming(path, cap, decoder, cache_options.max_pixels)
        splits[name] = CachedSplit(name, index, store, digests, task, table)
    if place != folder:
        key, splits = place.stem, apply_cut(splits, read_cut(place, len(splits["train"])))
    if "train" in splits and sum(sources := entry.get("sources", [])) == len(splits["train"]):
        splits["train"] = replace(splits["train"], sources=tuple(sources))
    classes, name, unnamed = tuple(meta["classes"]), entry["name"], entry["unnamed"]
    return Cache(key, name, classes, splits, unnamed, meta["way"], folder, entry["found"], task)


def _digest(*parts: object) -> str:
    # By repr: a new field of the options changes every digest, and data sets are listed once more.
    text = repr(parts)
    for now, before in NAMES_IN_DIGESTS.items():
        text = text.replace(now, before)
    # Paths may have bytes that are not UTF-8.
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def _load_entry(ledger: Path, log: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
    """Reads a ledger entry; None if there is none, a watched file has changed, or its cache is incomplete."""
    try:
        with open(ledger, "rb") as file:
            entry = read_entry(file, ledger)
            pairs = [*entry["found"]["leaks"].values(), entry["found"]["contradictory"]]
            same = fingerprint_files(read_paths(file)) == entry["stamp"]
            same &= all(each["examples"] or not each["pictures"] for each in pairs)
        # Users delete caches to make room.
        if not same or not _is_there(Path(entry["folder"])):
            return None
    # A damaged entry is as good as none: the data set is listed again, which also says what is wrong with its cache.
    except Damaged as error:
        log(f"{error}; listing the data set again")
        return None
    except (OSError, ValueError):
        return None
    # `funmatch cache` tells by this when a data set was last used; a cache that is shared may be read only.
    with suppress(OSError):
        os.utime(ledger)
    return entry


def _is_there(place: Path) -> bool:
    """Returns whether what an entry leads to can be used."""
    folder = folder_of(place)
    if not is_complete(folder):
        return False
    if place != folder:
        # Raises where it is missing or damaged.
        meta = read_meta(folder)
        read_cut(place, len(read_index(folder, "train", meta, read_label_sets(folder, meta))[0]))
    return True


def _watched_paths(dataset: Dataset) -> list[str]:
    """Returns the files and folders whose changes are noticed when the same specs are opened again.

    Of more than `MAX_WATCHED` files, these are all folders and an even sample of the files: a data set like ImageNet
    then opens at once. `funmatch prepare` reads all of them.
    """
    watched = list(dataset.watched)
    if len(watched) <= MAX_WATCHED:
        return watched
    # All folders: their times tell of files that came or went. Only a change inside a file needs the file itself.
    return sorted({os.path.dirname(path) for path in watched}) + watched[:: len(watched) // MAX_WATCHED * 10]


def _store_entry(ledger: Path, built: Built, watched: list[str], stamp: str) -> dict[str, Any]:
    """Writes a ledger entry: the watched files, and names of this data set, since a cache knows only its content."""
    dataset, scanned, bad = built.dataset, built.scanned, built.bad
    notes = (*dataset.notes, *depth_notes(dataset, scanned))
    if len(dataset.watched) > MAX_WATCHED:
        notes += (f"{dataset.name} has many files: only `funmatch prepare` is sure to notice a change inside one",)
    about = summary(dataset, scanned, {(split, i) for split, i, _ in bad})
    unreadable = [[dataset.splits[split].names[i], reason] for split, i, reason in bad]
    # Keys as version 0.1.0 wrote them.
    entry = {
        "folder": str(built.place),
        "stamp": stamp,
        "name": dataset.name,
        "called": dataset.display_name,
        "unnamed": dataset.unnamed,
        "found": about | {"unreadable": unreadable, "notes": notes},
        "sources": count_sources(dataset, {i for split, i, _ in bad if split == "train"}),
    }
    ledger.parent.mkdir(parents=True, exist_ok=True)
    # The first line is read alone; paths follow with zeros between them, since a path may contain a line break.
    write_atomically(ledger, json.dumps(seal(entry)) + "\n" + "\0".join(watched))
    return entry
