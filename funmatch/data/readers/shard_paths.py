"""Finds the shards that a pattern matches, and checks that a numbered set is complete."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from funmatch.data.dataset import Track, untracked
from funmatch.data.readers.split_names import find_split, says_split
from funmatch.data.remote.fetch import fetch, known_paths
from funmatch.data.remote.objects import Wanted
from funmatch.errors import InputError, hide_secrets
from funmatch.runtime.addresses import is_address
from funmatch.runtime.disk.json_files import Damaged, Shape, read_json
from funmatch.runtime.text import expand_braces

NOTE = "funmatch.json"
"""File that `funmatch prepare --to tfrecord` writes beside its shards; among other things, it lists their names."""
BESIDE = rf"(^|[._-])(labels|classes|class_names)\.txt$|^{re.escape(NOTE)}$"
"""Names of files that are read besides shards."""


def shards_of(endings: str) -> Wanted:
    """Returns which files of an address are needed: shards, by the endings of their names, and what is read besides."""
    return Wanted(endings, BESIDE)


def shard_paths(pattern: str, endings: str, track: Track = untracked) -> list[Path]:
    """Finds the files that a pattern matches: a file, a folder (at any depth), or a glob with `*` and `{a..b}`.

    Args:
        pattern: of the shards; files of an address are downloaded.
        endings: regular expression for the names of shards in a folder.
        track: shows the progress of a download.

    Raises:
        InputError: no file matches, or a numbered set is incomplete.
    """
    if is_address(pattern):
        return _fetch_shards(pattern, endings, track)
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        # Escaped: brackets in the folder's own name are not a pattern.
        inside = glob.glob(os.path.join(glob.escape(expanded), "**", "*"), recursive=True)
        files = [path for path in inside if re.search(endings, os.path.basename(path))]
    elif os.path.isfile(expanded):
        files = [expanded]
    else:
        # Braces spell out names, so each must exist; glob itself would silently skip the missing ones.
        globs = list(expand_braces(expanded))
        missing = [each for each in globs if not glob.has_magic(each) and not os.path.isfile(each)]
        if missing:
            raise InputError(f"{pattern}: {len(missing)} of {len(globs)} shards are missing, e.g. {missing[0]}")
        files = [path for each in globs for path in glob.glob(each, recursive=True)]
    # Sorted, since an image's number, and with it all that is drawn for it, depends on the order.
    paths = sorted({Path(path) for path in files if os.path.isfile(path)})
    if not paths:
        hint = "; for a folder of images, leave out the prefix" if os.path.isdir(expanded) else ""
        raise InputError(
            f"no shard matches {pattern}; expected a file, a folder, or a pattern like 'data/*/*.tfrec'{hint}"
        )
    # Such a pattern may deliberately select a part of a set.
    if os.path.isdir(expanded) or not set("{[?") & set(pattern):
        _check_complete(paths)
    return paths


def _fetch_shards(address: str, endings: str, track: Track) -> list[Path]:
    found = fetch(address, shards_of(endings), track)
    if not found.files:
        raise InputError(f"no shard is in {hide_secrets(address)}; for a folder of images, leave out the prefix")
    if found.is_folder or not set("{[?") & set(address):
        # The note lists shards of all splits; a pattern may be of one, and the others have no copy here.
        _check_complete([*found.files], noted=found.is_folder)
    return [*found.files]


def listed_beside(pattern: str, endings: str, files: Sequence[Path]) -> list[Path]:
    """Returns which of the files beside shards are theirs: of an address, those that its server listed.

    Args:
        pattern, endings: of the shards, as in `shard_paths`.
        files: that may be there.
    """
    # A copy of another file, which an option named or which is gone from the bucket, may lie beside those of shards.
    known = known_paths(pattern, shards_of(endings)) if is_address(pattern) else None
    return [path for path in files if not known or path in known]


def splits_of(paths: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Returns the split of each shard by the names of its file and its folder, train without one; and notes."""
    splits, read_as = [], {}
    for path in paths:
        # The file's name before its folder's: a folder "dev" may hold shards of train and val.
        words = [*re.split(r"[-_.]", path.name), path.parent.name]
        split = find_split(words[:-1]) or find_split(words[-1:])
        said = next(((word, found) for word in words if not split and (found := says_split(word))), None)
        if said:
            split = read_as[said[0]] = "val" if said[1] == "eval" else said[1]
        splits.append(split or "train")
    # All shards of one folder test_data are what somebody has, not what is held out from training.
    if read_as and len(set(splits)) == 1:
        return ["train"] * len(splits), []
    taken = ", ".join(f"{word} as {split}" for word, split in sorted(read_as.items()))
    return splits, [f"read {taken}"] if taken else []


def _check_complete(paths: Sequence[Path], *, noted: bool = True) -> None:
    """Raises `InputError` where shards of a set are missing, by names like `x-00002-of-00004` or by our own note."""
    sets: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if found := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(.*)", path.name):
            sets.setdefault((path.parent, found[1], int(found[3])), set()).add(int(found[2]))
    for note in {note for path in paths if noted and (note := path.parent.parent / NOTE).is_file()}:
        names = _read_note(note, {"shards": list[str]})["shards"]
        missing = [name for name in names if not os.path.isfile(note.parent / name)]
        if missing:
            raise InputError(f"{note.parent}: {len(missing)} shards are missing, e.g. {missing[0]}")
    for (folder, stem, count), numbers in sets.items():
        if missing := sorted(set(range(count)) - numbers):
            raise InputError(f"{folder}: of {count} shards {stem}-…, {len(missing)} are missing, e.g. {missing[0]:05}")


def is_noted(paths: Sequence[Path], key: str, value: object) -> bool:
    """Returns whether the notes beside all of these shards, which we wrote then, have this value at a key."""
    notes = {path.parent.parent / NOTE for path in paths}
    return all(note.is_file() and _read_note(note, dict).get(key) == value for note in notes)


def _read_note(note: Path, shape: Shape) -> dict[str, Any]:
    try:
        return read_json(note, shape)
    except Damaged:
        raise InputError(f"{note} is damaged, or its shards are unfinished; prepare them again") from None


def watched_folders(pattern: str, paths: Sequence[Path]) -> set[Path]:
    """Returns the folders in which a new shard of this pattern could appear."""
    if is_address(pattern):
        return {path.parent for path in paths}  # what is new at its server is looked up there
    # A folder's time of change tells of a new file in it, but not of one deeper down: hence all that `**` searches.
    parts = Path(os.path.expanduser(pattern)).parts
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part) or "{" in part), len(parts))
    top = Path(*parts[:magic])
    folders = {path.parent for path in paths} | ({top} if top.is_dir() else set())
    if top.is_dir() and (magic == len(parts) or "**" in parts):
        folders |= {path for path in top.rglob("*") if path.is_dir()}
    return folders
