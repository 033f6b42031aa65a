"""Notes about the classes of a folder that may surprise: absent ones, copies, parts, folders inside them."""

import re
from collections.abc import Sequence

import numpy as np

from funmatch.data.dataset import SplitListing
from funmatch.data.readers.folder_listing import FolderListing
from funmatch.errors import InputError

NAMED = 5  # classes that a note names
PART = re.compile(r"(fold|part|batch|chunk|shard|subset|split)s?[ _-]*\d+", re.IGNORECASE)
COPY = re.compile(r"(.+?)( - copy| copy|[ _]?\(\d+\))( \(\d+\))?", re.IGNORECASE)


def first_of(names: Sequence[str], counted: str = "in all") -> str:
    """Returns the first names of a list for a message, and how many there are: "… (12 in all)"."""
    return ", ".join(names[:NAMED]) + (f", … ({len(names)} {counted})" if len(names) > NAMED else "")


def class_notes(root: object, classes: tuple[str, ...], splits: dict[str, SplitListing], first: int = 0) -> list[str]:
    """Returns notes about classes that cannot be learned from these images, or are no classes by their names.

    Args:
        root: names the source.
        classes: class names.
        splits: of the source.
        first: index of the first class that has to have images; of those before it, something else was said.
    """
    if len(classes) == 1:
        return [f"{root} has a single class, {classes[0]}, so accuracy on it means nothing"]
    notes = []
    if classes and all(PART.fullmatch(name) for name in classes):
        notes.append(
            f"WARNING: {root}: the classes {first_of(classes)} look like parts of one data set, not like classes"
        )
    copies = [name for name in classes if (found := COPY.fullmatch(name)) and found[1] in classes]
    if copies:
        notes.append(f"WARNING: {root}: classes that look like copies of others: {first_of(copies)}")
    return notes + _absent(root, classes, splits, first)


def _absent(root: object, classes: tuple[str, ...], splits: dict[str, SplitListing], first: int) -> list[str]:
    train = splits.get("train")
    if train is None or not train.labelled:
        return []
    counts = {
        name: np.bincount(split.labels, minlength=len(classes)) for name, split in splits.items() if split.labelled
    }
    absent = np.flatnonzero(counts["train"] == 0)
    elsewhere = [i for i in absent if any(count[i] for count in counts.values())]
    empty = [classes[i] for i in absent if i >= first and i not in elsewhere]
    notes = []
    if elsewhere:
        where = ", ".join(name for name, count in counts.items() if count[elsewhere].any())
        notes.append(
            f"WARNING: {root} has no training images of {len(elsewhere)} of {len(classes)} classes, which only {where} "
            f"has: {first_of([classes[i] for i in elsewhere])}"
        )
    # Unless it is a split of a few classes on purpose, its metrics are taken for those of all.
    for name, count in counts.items():
        if unseen := [classes[i] for i in np.flatnonzero((counts["train"] > 0) & (count == 0))]:
            notes.append(
                f"{root}: {name} has no images of {len(unseen)} of {len(classes)} classes, about which its metrics say "
                f"nothing: {first_of(unseen)}"
            )
    if empty:
        notes.append(f"{root}: {len(empty)} of {len(classes)} classes have no images in any split: {first_of(empty)}")
    return notes


def folders_in_classes(listing: FolderListing, parents: Sequence[str], classes: tuple[str, ...]) -> list[str]:
    """Returns a note where all classes have folders in them, which are not read as classes.

    Args:
        listing: after the images of all classes have been listed.
        parents: folders that hold the class folders, relative to the root.

    Raises:
        InputError: a class holds a copy of the classes beside it, as some archives of Kaggle do.
    """
    inside: dict[str, set[str]] = {}
    for folder in listing.nested:
        for parent in parents:
            name, _, rest = folder.removeprefix(f"{parent}/" if parent else "").partition("/")
            if (not parent or folder.startswith(f"{parent}/")) and name in classes and rest:
                inside.setdefault(name, set()).add(rest.split("/")[0])
    for name, folders in inside.items():
        copied = sorted(folders & set(classes) - {name})
        if len(copied) > 1 and 2 * len(copied) >= len(classes) - 1:
            raise InputError(
                f"{listing.root}: the folder {name} holds a copy of the classes beside it ({first_of(copied)}); "
                "remove it, or pass the folder that was meant"
            )
    if len(classes) > 1 and all(len(inside.get(name, ())) > 1 for name in classes):
        example = f"{classes[0]}/{min(inside[classes[0]])}"
        return [f"{listing.root}: folders inside classes, e.g. {example}, are not read as classes of their own"]
    return []
