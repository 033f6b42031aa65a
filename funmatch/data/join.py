"""Joins several data sets into one, and notes which of its images are to be held out."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from funmatch.data.dataset import ORDER, UNLABELLED, Dataset, SplitListing, SplitSpec, check_classes
from funmatch.data.label_sets import number_sets, sets_of
from funmatch.errors import InputError


def join_datasets(datasets: Sequence[Dataset]) -> Dataset:
    """Joins several data sets into one: splits of the same name and classes of the same name are merged.

    Raises:
        InputError: some have class names and some only numbers, or they hold out splits in different ways.
    """
    if len(datasets) == 1:
        return datasets[0]
    classes, unnamed = _join_classes(datasets)
    # Again, since "Cat" and "cat" may come from two of them.
    check_classes(classes, " + ".join(dataset.name for dataset in datasets))
    # Two folders may both be called "photos"; then only their paths tell images apart.
    same_name = len({dataset.name for dataset in datasets}) < len(datasets)
    positions = {name: i for i, name in enumerate(classes)}
    having = {name: found for name in ORDER if (found := [each for each in datasets if name in each.splits])}
    labels, sets = _join_labels(having, positions)
    images: dict[str, list[tuple[Dataset, int]]] = {}
    splits: dict[str, SplitListing] = {}
    for name, some in having.items():
        images[name] = [(dataset, i) for dataset in some for i in range(len(dataset.splits[name]))]
        names = [
            f"{dataset.location if same_name else dataset.name}/{each}"
            for dataset in some
            for each in dataset.splits[name].names
        ]
        sources = [
            np.full(len(dataset.splits[name]), number, np.int32)
            for number, dataset in enumerate(datasets)
            if name in dataset.splits
        ]
        splits[name] = SplitListing(names, labels[name], np.concatenate(sources))

    def read(split: str, index: int) -> bytes:
        # Several threads call it at once, as they do every `read`: it must not keep anything between calls.
        dataset, i = images[split][index]
        return dataset.read(split, i)

    specs = [dataset.split_spec for dataset in datasets if dataset.split_spec]
    # A validation split of only some of them would mix held-out images with published ones.
    if any(spec != specs[0] for spec in specs) or (specs and len(specs) < len(datasets) and "val" in splits):
        raise InputError("these data sets hold out splits in different ways; prepare them one by one")
    watched = [path for dataset in datasets for path in dataset.watched]
    name = " + ".join(dataset.name for dataset in datasets)
    notes = tuple(note for dataset in datasets for note in dataset.notes)
    spec = specs[0] if specs else None
    return Dataset(
        name, classes, splits, read, watched, spec, unnamed, notes=notes, label_sets=sets, joined=len(datasets)
    )


def _join_classes(datasets: Sequence[Dataset]) -> tuple[tuple[str, ...], bool]:
    """Returns the class names of all data sets, and whether they are only numbers."""
    labelled = [dataset for dataset in datasets if dataset.classes]
    if len({dataset.unnamed for dataset in labelled}) > 1:
        raise InputError("some of these data sets name their classes, others only number them; pass --class-file")
    unnamed = bool(labelled) and labelled[0].unnamed
    # Equal lists keep their own order, which may differ from the alphabet (WordNet numbers, TFDS label files).
    if len({dataset.classes for dataset in labelled}) == 1:
        return labelled[0].classes, unnamed
    names = {name for dataset in labelled for name in dataset.classes}
    # Numbers by value: as text, 10 comes before 2.
    return tuple(sorted(names, key=int if unnamed else None)), unnamed


def _join_labels(
    having: dict[str, list[Dataset]], positions: dict[str, int]
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Returns the labels of all data sets by split, and the sets of classes that they number, if they do.

    Args:
        having: the data sets that have a split, by its name.
        positions: of the joint classes, by their names.
    """
    if all(dataset.label_sets is None for some in having.values() for dataset in some):
        labels = {
            name: np.concatenate([_joint_labels(dataset, name, positions) for dataset in some])
            for name, some in having.items()
        }
        return labels, None
    joint = {
        name: [
            None if each is None else tuple(sorted(positions[dataset.classes[i]] for i in each))
            for dataset in some
            for each in sets_of(dataset, name)
        ]
        for name, some in having.items()
    }
    return number_sets(joint, len(positions))


def _joint_labels(dataset: Dataset, split: str, positions: dict[str, int]) -> np.ndarray:
    """Returns the labels of a split as indices into the joint classes."""
    # The last entry stands for `UNLABELLED`: -1 indexes it.
    table = np.array([positions[name] for name in dataset.classes] + [UNLABELLED], np.int32)
    return table[dataset.splits[split].labels]


def count_sources(dataset: Dataset, unreadable: Collection[int]) -> list[int]:
    """Returns how many training images are of each of the data sets that were joined; empty for a single one.

    Args:
        unreadable: numbers of training images that do not count.
    """
    train = dataset.splits.get("train")
    if train is None or train.sources is None:
        return []
    readable = np.ones(len(train), bool)
    readable[[*unreadable]] = False
    return np.bincount(train.sources[readable], minlength=dataset.joined).tolist()


def notes_about_labels(datasets: Sequence[Dataset]) -> list[str]:
    """Returns notes about sources without any label, whose splits are unlabelled beside those of others.

    Raises:
        InputError: such a source is alone, or adds to a split that has labels: a feature's name is likely a mistake.
    """
    labelled = {name for dataset in datasets for name, split in dataset.splits.items() if split.labelled}
    notes = []
    for dataset in datasets:
        if dataset.lacking and (not labelled or labelled & set(dataset.splits)):
            raise InputError(dataset.lacking)
        if dataset.lacking:
            splits = " and ".join(dataset.splits)
            notes.append(f"{dataset.location}: no record has a label, so {splits} is taken as unlabelled")
    return notes


def hold_out(dataset: Dataset, spec: SplitSpec | None) -> Dataset:
    """Adds the split that the user requested, which replaces the default one of the catalog."""
    if spec is None:
        return dataset
    if not spec.shares:  # --val-seed alone: the catalog's shares, another selection
        own = dataset.split_spec
        return replace(dataset, split_spec=SplitSpec(own.shares, spec.seed)) if own else dataset
    if "val" in dataset.splits and any(spec.shares.values()):
        raise InputError(f"{dataset.name} has its own validation split; leave out --val")
    if "train" not in dataset.splits and any(spec.shares.values()):
        raise InputError(f"{dataset.name} has no training images to hold out --val from")
    # Merged, so that the catalog's share for testing stays when the user chooses another for validation.
    own = dataset.split_spec.shares if dataset.split_spec else {}
    # A share of 0 is --val none, which takes the catalog's own validation split away, too.
    shares = {name: share for name, share in {**own, **spec.shares}.items() if share}
    return replace(dataset, split_spec=SplitSpec(shares, spec.seed) if shares else None)
