"""The files that a pattern of shards means, and whether all of a set are there."""

import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from funmatch.errors import InputError

NOTE = "funmatch.json"
"""What `funmatch prepare --to tfrecord` writes beside its shards: among other things, their names."""


def shard_paths(pattern: str, endings: str) -> list[Path]:
    """The files that a pattern means: a file, a folder (searched at any depth), or a glob with `*` and `{a..b}`.

    Args:
        endings: a regular expression for the files of a folder.

    Raises:
        InputError: there is none.
    """
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        inside = glob.glob(os.path.join(glob.escape(expanded), "**", "*"), recursive=True)
        found = [path for path in inside if re.search(endings, os.path.basename(path))]
    elif os.path.isfile(expanded):
        found = [expanded]
    else:
        spelt = list(_braces(expanded))
        missing = [each for each in spelt if not glob.has_magic(each) and not os.path.isfile(each)]
        if missing:
            raise InputError(f"{pattern}: {len(missing)} of {len(spelt)} shards are not there, e.g. {missing[0]}")
        found = [path for each in spelt for path in glob.glob(each, recursive=True)]
    paths = sorted({Path(path) for path in found if os.path.isfile(path)})
    if not paths:
        raise InputError(f"no shard matches {pattern}; wanted a file, a folder, or a pattern like 'data/*/*.tfrec'")
    if os.path.isdir(expanded) or not set("{[?") & set(pattern):  # else a part of a set may be meant
        _check_complete(paths)
    return paths


def _check_complete(paths: Sequence[Path]) -> None:
    """Raises `InputError` unless names like `x-00002-of-00004` are all there."""
    sets: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if found := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(.*)", path.name):
            sets.setdefault((path.parent, found[1], int(found[3])), set()).add(int(found[2]))
    for note in {note for path in paths if (note := path.parent.parent / NOTE).is_file()}:
        try:
            missing = [name for name in json.loads(note.read_text())["shards"] if not (note.parent / name).is_file()]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{note} is damaged, or its shards were not finished; prepare them again") from None
        if missing:
            raise InputError(f"{note.parent}: {len(missing)} shards are not there, e.g. {missing[0]}")
    for (folder, stem, count), numbers in sets.items():
        if missing := sorted(set(range(count)) - numbers):
            raise InputError(
                f"{folder}: of {count} shards {stem}-…, {len(missing)} are not there, e.g. {missing[0]:05}"
            )


def is_noted_unlabelled(paths: Sequence[Path]) -> bool:
    """Whether notes beside all of these shards say that their images have no labels."""
    notes = {path.parent.parent / NOTE for path in paths}
    return all(note.is_file() and json.loads(note.read_text()).get("labelled") is False for note in notes)


def _braces(pattern: str) -> Iterator[str]:
    """`a-{000..002}.tar` and `{train,val}.tar` spelt out."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for piece in pieces[1::2]:
        ends = re.fullmatch(r"(\d+)\.\.(\d+)", piece)
        if ends:
            width = len(ends[1]) if ends[1].startswith("0") else 0
            choices.append([f"{i:0{width}}" for i in range(int(ends[1]), int(ends[2]) + 1)])
        else:
            choices.append(piece.split(","))
    for chosen in product(*choices):
        yield "".join(a + b for a, b in zip(pieces[::2], [*chosen, ""], strict=True))


def search_folder(pattern: str, paths: Sequence[Path]) -> set[Path]:
    """The folders in which a new shard of this pattern could appear."""
    parts = Path(os.path.expanduser(pattern)).parts
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part) or "{" in part), len(parts))
    top = Path(*parts[:magic])
    found = {path.parent for path in paths} | ({top} if top.is_dir() else set())
    if top.is_dir() and (magic == len(parts) or "**" in parts):
        found |= {path for path in top.rglob("*") if path.is_dir()}
    return found
