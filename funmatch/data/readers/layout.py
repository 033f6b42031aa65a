"""Finds what the folders of a data set are: splits, classes, or containers that are looked through."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from funmatch.data.dataset import ORDER, check_classes
from funmatch.data.readers.class_notes import first_of
from funmatch.data.readers.folder_listing import FolderListing
from funmatch.data.readers.split_names import SPLIT_NAMES, assign_splits, is_container, says_split
from funmatch.errors import InputError

DEEPEST = 6  # folders that are looked through, one inside the other
OF_OTHER_TASKS = {"label", "labels", "mask", "masks", "annotation", "annotations", "segmentation", "bounding boxes"}
"""Names of folders beside `images` in data sets of detection and segmentation."""


@dataclass(frozen=True)
class Layout:
    """What the folders below a root are.

    Attributes:
        top: folder that holds the splits, or the classes where there are none, relative to the root; "" is the root.
        splits: folder of each split, relative to the root; empty without splits.
        classes: names of the class folders by split; none where it is unlabelled.
        notes: what was taken for what.
    """

    top: str
    splits: dict[str, str] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_layout(listing: FolderListing) -> Layout:
    """Finds the splits of a folder and the classes of each.

    Raises:
        InputError: folders name splits in a way that has several meanings.
    """
    top, named = _find_top(listing)
    where = listing.path(top)
    if not named:
        return Layout(
            top, notes=(f"{listing.root}: looked through {top}/, whose folders are the classes",) if top else ()
        )
    others = [
        name for name in listing.folders(top) if name not in named.values() and listing.has_images(_join(top, name))
    ]
    # Silently leaving images out would be worse: "prediction/" is easily taken for a split.
    if others:
        raise InputError(
            f"{where} has images in {', '.join(others[:5])} beside the splits {', '.join(named.values())}; move "
            "them out, or rename them to train, val or test"
        )
    plain = {split: _join(top, name) for split, name in named.items()}
    splits = _look_through(listing, plain)
    classes = {split: listing.folders(folder) for split, folder in splits.items()}
    layout = Layout(top, splits, {split: classes[split] for split in ORDER if split in splits})
    # Plain names are what everyone expects, so they need no words.
    if any(folder.lower() not in SPLIT_NAMES for folder in splits.values()):
        # Said only where others have labels: a validation split without some is a surprise then.
        labels = {split: " (unlabelled)" if any(classes.values()) and not classes[split] else "" for split in classes}
        taken = ", ".join(f"{splits[split]} as {split}{labels[split]}" for split in ORDER if split in splits)
        layout = replace(layout, notes=(f"{listing.root}: read {taken}",))
    elif flat := [splits[split] for split in layout.classes if any(classes.values()) and not classes[split]]:
        # ImageNet's validation images are published so.
        layout = replace(layout, notes=(f"{listing.root}: {', '.join(flat)} without class folders: unlabelled",))
    return _without_strange_classes(listing, layout)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _find_top(listing: FolderListing) -> tuple[str, dict[str, str]]:
    """Looks through folders that hold nothing but one folder; returns where this ends, and the splits there by name.

    Without splits or several folders of images there, the root is returned: what is in it has no labels.
    """
    top = ""
    for _ in range(DEEPEST):
        names = listing.folders(top)
        named = assign_splits(names, lambda name: listing.has_images(_join(top, name)), listing.path(top))  # noqa: B023
        if named:
            return top, named
        if listing.has_images(top, deep=False):
            return "", {}
        filled = listing.filled(top, names, 2)
        if len(filled) != 1:
            return top if filled else "", {}
        top = _join(top, filled[0])
    return "", {}


def _look_through(listing: FolderListing, splits: dict[str, str]) -> dict[str, str]:
    """Returns the folders of the splits, where they hold nothing but `train/` or `images/` that folder's."""
    # A class may have the name of a container or a split (vehicles: bus, train) where it stands beside others.
    inside = {split: listing.folders(folder) for split, folder in splits.items()}
    several = {s: names for s, names in inside.items() if len(listing.filled(splits[s], names, 2)) > 1}
    found = {}
    for split, folder in splits.items():
        classes = {name for other, names in several.items() if other != split for name in names}
        found[split] = _look_through_split(listing, split, folder, classes)
    lone = {split: listing.folders(folder) for split, folder in found.items() if listing.folders(folder)}
    # All of a single class, which has classes in it: train/animal/dog, train/animal/cat.
    if len({tuple(names) for names in lone.values()}) == 1 and all(len(names) == 1 for names in lone.values()):
        inner = {split: _join(found[split], names[0]) for split, names in lone.items()}
        if all(
            len(listing.filled(folder, listing.folders(folder), 2)) == 2
            and not listing.has_images(folder, deep=False)
            and not listing.has_images(found[split], deep=False)
            for split, folder in inner.items()
        ):
            found |= inner
    return found


def _look_through_split(listing: FolderListing, split: str, folder: str, classes: set[str]) -> str:
    for _ in range(DEEPEST):
        names = listing.folders(folder)
        if not names or listing.has_images(folder, deep=False):
            return folder
        if len(names) > 1 and not set(names) & classes:
            _check_no_splits(listing, folder, names)
        filled = listing.filled(folder, names, 2)
        if len(filled) != 1 or filled[0] in classes:
            return folder
        said = says_split(filled[0])
        if said and said not in (split, "eval"):
            raise InputError(
                f"{listing.path(folder)} holds nothing but {filled[0]}/, which names another split; rename one of them"
            )
        if not said and not is_container(filled[0]):
            return folder
        folder = _join(folder, filled[0])
    return folder


def _check_no_splits(listing: FolderListing, folder: str, names: Sequence[str]) -> None:
    """Raises `InputError` where the classes of a split are splits themselves, or images with their masks."""
    where = listing.path(folder)
    if all(says_split(name) for name in names) and len({says_split(name) for name in names}) > 1:
        raise InputError(f"{where} holds splits itself ({', '.join(names[:4])}); pass {where}")
    check_not_masks(listing, folder, names)


def check_not_masks(listing: FolderListing, folder: str, names: Sequence[str]) -> None:
    """Raises `InputError` where folders that would be classes are images and their masks."""
    kinds = {name: name.lower().replace("_", " ") for name in names}
    masks = [name for name, kind in kinds.items() if kind in OF_OTHER_TASKS and listing.has_images(_join(folder, name))]
    images = [name for name in names if is_container(name)]
    if masks and images and len(names) == len(masks) + len(images):
        raise InputError(
            f"{listing.path(folder)} holds {', '.join(images)} and {', '.join(masks)}, as data sets of segmentation "
            f"do, and no classes; move {', '.join(masks)} out to use the images without labels"
        )


def _without_strange_classes(listing: FolderListing, layout: Layout) -> Layout:
    """Takes splits without labels whose classes are none of the training images: `test/unknown/`."""
    # First the twins: Cat in one split and cat in another are one class that is spelt in two ways.
    check_classes(sorted({name for names in layout.classes.values() for name in names}), listing.root)
    train = layout.classes.get("train")
    if not train:
        return layout
    classes, notes = dict(layout.classes), list(layout.notes)
    filled = listing.filled(layout.splits["train"], train, 2)
    elsewhere = {split: names for split, names in classes.items() if split != "train"}
    alone = len(filled) == 1 and not any(filled[0] in names for names in elsewhere.values())
    if alone and any(len(listing.filled(layout.splits[split], names, 2)) > 1 for split, names in elsewhere.items()):
        notes.append(
            f"WARNING: {listing.path(layout.splits['train'])} has a single folder, {filled[0]}, which no other split "
            "has; its images are taken as unlabelled"
        )
        return replace(layout, classes=classes | {"train": []}, notes=tuple(notes))
    for split, names in elsewhere.items():
        # By name first: only where a name is strange, folders are searched for images.
        if not names or not set(names) - set(train):
            continue
        present = listing.filled(layout.splits[split], names)
        if present and not set(present) & set(train):
            classes[split] = []
            notes.append(
                f"WARNING: {listing.path(layout.splits[split])} has images only in {first_of(present, 'folders')}, "
                f"which {listing.path(layout.splits['train'])} lacks; this split is taken as unlabelled"
            )
    if len(notes) > len(layout.notes) and "val" not in classes and not classes["test"]:
        notes[-1] += "; --val 10% holds out training images to evaluate on"
    return replace(layout, classes=classes, notes=tuple(notes))
