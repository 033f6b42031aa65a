"""Keeps the labels of images that have any number of classes: numbered sets, of which each image has one.

A data set with `Dataset.label_sets` has in `SplitListing.labels`, and so in the index of its cache, the number of a set
of classes in place of that of a class. Whatever selects, sorts or joins images by their listing need not know of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from funmatch.data.cache.scan import Scan, by_split
from funmatch.data.cache.splits import pick_images
from funmatch.data.dataset import UNLABELLED, Dataset
from funmatch.runtime.text import counted

Sets = Sequence[tuple[int, ...] | None]
"""The classes of each image, ascending; None for an image without labels, which is not the same as without classes."""


def number_sets(sets: Mapping[str, Sets], classes: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Numbers the sets of classes that occur.

    Args:
        sets: of the images of each split.
        classes: number of classes.

    Returns:
        the number of each image's set, (n,) int32 by split, `UNLABELLED` where it has none; and the sets, (sets,
        classes) uint8 in {0, 1}, sorted, so that they do not depend on the order of the images.
    """
    known = sorted({each for one in sets.values() for each in one if each is not None})
    numbers = {each: number for number, each in enumerate(known)} | {None: UNLABELLED}
    table = np.zeros((len(known), classes), np.uint8)
    for number, each in enumerate(known):
        table[number, list(each)] = 1
    return {name: np.array([numbers[each] for each in one], np.int32) for name, one in sets.items()}, table


def set_of(dataset: Dataset, label: int) -> tuple[int, ...] | None:
    """Returns the classes that a label stands for, whether the data set has label sets or one class an image."""
    if label == UNLABELLED:
        return None
    return (label,) if dataset.label_sets is None else tuple(np.flatnonzero(dataset.label_sets[label]).tolist())


def sets_of(dataset: Dataset, split: str) -> Sets:
    """Returns the classes of each image of a split; see `set_of`."""
    count = len(dataset.classes if dataset.label_sets is None else dataset.label_sets)
    # UNLABELLED, which is -1, indexes the last.
    table = [set_of(dataset, label) for label in (*range(count), UNLABELLED)]
    return [table[label] for label in dataset.splits[split].labels.tolist()]


def join_copies(dataset: Dataset, scanned: Scan) -> tuple[Dataset, Scan]:
    """Makes one image of all that have the same content in a split, with the classes of all of them.

    So folders hold several classes of an image: it lies in the folder of each. Other data sets are left as they are:
    those of one class an image, and those whose labels are sets already.
    """
    labelled = any((split.labels != UNLABELLED).any() for split in dataset.splits.values())
    if dataset.task != "multilabel" or dataset.label_sets is not None or not labelled:
        return dataset, scanned
    kept, sets, begin = {}, {}, 0
    for name, rows, reasons in by_split(dataset, scanned):
        merged: dict[object, tuple[int, set[int] | None]] = {}
        for i, (digest, own) in enumerate(zip(rows["digest"].tolist(), sets_of(dataset, name), strict=True)):
            # Unreadable images, whose digests are those of their errors, are told one by one.
            first, classes = merged.get(key := (i if i in reasons else digest), (i, None))
            merged[key] = first, classes if own is None else {*(classes or ()), *own}
        kept[name] = np.array([first for first, _ in merged.values()]) + begin
        sets[name] = [None if classes is None else tuple(sorted(classes)) for _, classes in merged.values()]
        begin += len(rows)
    labels, table = number_sets(sets, len(dataset.classes))
    listed, left = pick_images(dataset, scanned, kept)
    splits = {name: replace(split, labels=labels[name]) for name, split in listed.splits.items()}
    joined = len(scanned.rows) - len(left.rows)
    note = (
        f"{dataset.name}: {counted(joined, 'image')} of the same content as others joined with them, with all classes"
    )
    notes = (*dataset.notes, note) if joined else dataset.notes
    return replace(listed, splits=splits, label_sets=table, notes=notes), left
