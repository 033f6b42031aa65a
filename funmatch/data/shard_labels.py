"""Turns the labels in the records of shards into those of a data set, and decides which labels records can hold."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice

import numpy as np

from funmatch.data.dataset import UNLABELLED, Dataset, ReadOptions
from funmatch.data.label_sets import Sets, number_sets
from funmatch.data.labels import Classes, Label
from funmatch.errors import InputError

Labels = Label | tuple[Label, ...]
"""One label of a record, or all of them where it may have several; empty for an image without any class."""
NO_LABEL: tuple[Labels, ...] = (UNLABELLED, ())


def labels_of(label: Labels) -> tuple[Label, ...]:
    """Returns the labels of a record as a tuple."""
    return label if isinstance(label, tuple) else (label,)


def number_labels(
    names: Mapping[str, Sequence[str]], labels: Mapping[str, Sequence[Labels]], classes: Classes, options: ReadOptions
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Returns the labels of each split, (n,) int32, and where records have several, the sets of classes they number.

    Args:
        names: of the records of each split, for messages.
        labels: of the same records.
        classes: of the labels.
        options: for the number of the first class.

    Raises:
        InputError: a label is outside the classes.
    """
    # As tables: a record without labels shows no class, but where no record of its split has one.
    known = {
        split: own if any(each not in NO_LABEL for each in own) else [UNLABELLED] * len(own)
        for split, own in labels.items()
    }
    if not any(isinstance(each, tuple) for own in known.values() for each in own):
        single = {split: [each for one in own for each in labels_of(one)] for split, own in known.items()}
        return {split: _number(names[split], own, classes, options) for split, own in single.items()}, None
    sets = {split: _sets_of(names[split], own, classes, options) for split, own in known.items()}
    return number_sets(sets, len(classes.names))


def _sets_of(names: Sequence[str], labels: Sequence[Labels], classes: Classes, options: ReadOptions) -> Sets:
    """Returns the classes of the records of a split, ascending."""
    without = [label == UNLABELLED for label in labels]
    # With --unlabelled, as for single labels: one that is missing makes the whole split unlabelled.
    if all(without) or (options.unlabelled and any(without)):
        return [None] * len(labels)
    several = [() if label == UNLABELLED else labels_of(label) for label in labels]
    repeated = [name for name, each in zip(names, several, strict=True) for _ in each]
    numbers = _number(repeated, list(chain.from_iterable(several)), classes, options)
    # With --unlabelled, they may have been unusable.
    if (numbers == UNLABELLED).any():
        return [None] * len(labels)
    rest = iter(numbers.tolist())
    return [tuple(sorted(islice(rest, len(each)))) for each in several]


def _number(names: Sequence[str], labels: Sequence[Label], classes: Classes, options: ReadOptions) -> np.ndarray:
    """Returns the class indices of labels, (n,) int32, and checks that they are within the classes."""
    numbers = classes.indices(labels, options.first_label)
    outside = np.flatnonzero((numbers < 0) | (numbers >= len(classes.names)))
    # With --unlabelled, labels that are missing or unusable do not matter.
    if (numbers == UNLABELLED).all() or (len(outside) and options.unlabelled):
        return np.full(len(labels), UNLABELLED, np.int32)
    if len(outside):
        name, first = names[outside[0]], labels[outside[0]]
        such = f"({len(outside)} such records)"
        if first == UNLABELLED:
            raise InputError(
                f"{name}: there is no label, though others have one {such}; pass --label-feature none to ignore labels"
            )
        if classes.positions is not None:
            raise InputError(
                f"{name}: {str(first)!r} is not among the {len(classes.names)} names in {classes.file} {such}; add it"
            )
        hint = ""
        if classes.first is not None:
            hint = f"; {classes.file} numbers its classes from {classes.first}, so it is not the list of these labels"
        # Labels that end at the number of classes are most likely counted from 1.
        elif first == len(classes.names):
            hint = "; if the first class has number 1, pass --first-label 1"
        raise InputError(f"{name}: label {first} is outside the {len(classes.names)} classes {such}{hint}")
    return numbers.astype(np.int32)


def labels_to_write(dataset: Dataset, *, unlabelled: bool) -> Dataset:
    """Returns a data set with the labels that its shards are to hold.

    Args:
        dataset: the images.
        unlabelled: whether labels are left out.

    Raises:
        InputError: shards cannot hold these labels, so that reading them would give others.
    """
    if unlabelled:
        none = {name: np.full_like(split.labels, UNLABELLED) for name, split in dataset.splits.items()}
        splits = {name: replace(split, labels=none[name]) for name, split in dataset.splits.items()}
        return replace(dataset, classes=(), unnamed=False, splits=splits, label_sets=None)
    for name, split in dataset.splits.items():
        if not split.labelled and (split.labels >= 0).any():
            raise InputError(
                f"some images of {name} have labels and some have none; export labelled and unlabelled images "
                "separately"
            )
        if dataset.label_sets is not None and split.labelled and not dataset.label_sets[split.labels].any():
            raise InputError(
                f"no image of {name} has a class, which shards cannot tell from images without labels; hold out other "
                "images (--val, --val-seed), or leave this split out"
            )
    for name in dataset.classes:
        if "\n" in name or "\r" in name or not name.strip():
            raise InputError(f"the class name {name!r} is empty or has a line break; rename the class")
    return dataset
