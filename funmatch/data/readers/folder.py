"""Lists folders of images, in every common layout."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from funmatch.data.dataset import SPLIT_NAMES, UNLABELLED, Dataset, SplitListing, check_classes, read_file, sort_splits
from funmatch.data.decode import EXTENSIONS
from funmatch.errors import InputError

EXPECTED = "expected <split>/<class>/*.jpg, <class>/*.jpg, or a folder of unlabelled images"
BESIDE_IMAGES = {".txt", ".md", ".json", ".csv", ".html", ".ini", ".db", ".mat", ".xml"}
"""Endings of files that usually lie beside images and are skipped without a note."""
TABLES = {".csv", ".tsv"}


@dataclass
class FolderListing:
    """Lists one folder, and collects what was found on the way.

    Attributes:
        root: the folder.
        follow_links: whether symbolic links may lead out of it.
        watched: folders and images, for `Dataset.watched`.
        skipped: files that are not images, relative to the root.
    """

    root: str
    follow_links: bool = False
    watched: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The root may be a link itself; what lies where it leads counts as inside.
        self.real = os.path.realpath(self.root)

    def folders(self, inside: str = "") -> list[str]:
        """Returns the names of the folders in a folder, sorted."""
        with os.scandir(os.path.join(self.root, inside)) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name[0] != "." and entry.is_dir() and self._allowed(entry) and not _is_cycle(entry)
            )

    def images(self, inside: str = "", *, deep: bool = True) -> list[str]:
        """Returns the paths of the images in a folder relative to the root, sorted."""
        images: list[str] = []
        waiting = [inside]
        while waiting:
            folder = waiting.pop()
            prefix = f"{folder}/" if folder else ""
            # The folder too: its time of change tells of images that were added or removed.
            self.watched.append(os.path.join(self.root, folder))
            with os.scandir(self.watched[-1]) as entries:
                for entry in entries:
                    # macOS leaves a `._x.jpg`, which is not an image, beside an x.jpg on other systems' disks.
                    if entry.name[0] == ".":
                        continue
                    # Before endings: a folder may be called x.jpg.
                    if entry.is_dir():
                        if deep and self._allowed(entry) and not _is_cycle(entry):
                            waiting.append(prefix + entry.name)
                    # In lower case, since cameras write .JPG.
                    elif os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
                        self.skipped.append(prefix + entry.name)
                    elif self._allowed(entry):
                        images.append(prefix + entry.name)
        self.watched += [os.path.join(self.root, name) for name in images]
        # File systems list in different orders; indices, and with them whole runs, depend on this one.
        return sorted(images)

    def notes(self) -> list[str]:
        """Returns a note about skipped files that may have been meant as images."""
        odd = sorted({name for name in self.skipped if _ending(name) not in BESIDE_IMAGES | TABLES})
        if not odd:
            return []
        return [
            f"skipped {len(odd):,} files in {self.root}, e.g. {odd[0]}; images end in {', '.join(sorted(EXTENSIONS))}"
        ]

    def table_notes(self) -> list[str]:
        """Returns a note about tables, which an unlabelled folder may have its labels in."""
        tables = sorted(name for name in self.skipped if _ending(name) in TABLES)
        if not tables:
            return []
        return [f"{self.root}: {tables[0]} is not read; labels come from folder names, <class>/*.jpg"]

    def _allowed(self, entry: os.DirEntry) -> bool:
        """Returns True unless an entry is a link that leads out of the root, which raises an `InputError`."""
        if not entry.is_symlink() or self.follow_links:
            return True
        target = os.path.realpath(entry.path)
        # With the separator, so that /data/pets2 is not inside /data/pets.
        if target != self.real and not target.startswith(self.real + os.sep):
            raise InputError(
                f"{entry.path} is a link that leads out of {self.root}, to {target}; if this is intended, pass "
                "--follow-links"
            )
        return True


def open_folder(
    root: Path, *, follow_links: bool = False, recommend_reader: Callable[[Path], str] = lambda _: ""
) -> Dataset:
    """Lists a folder of images.

    Args:
        root: a folder in one of these layouts.
            `<split>/<class>/…`: splits train, val or validation, test; each holds either a folder per class, with
            images at any depth, or only images, which are unlabelled.
            `<class>/…`: at least two folders and no images beside them; all are training images.
            Otherwise, images at any depth, unlabelled, all for training.
            Files that are not images are skipped, with a note.
        follow_links: whether symbolic links may lead out of the folder.
        recommend_reader: given a path without images, returns advice for the error message.

    Raises:
        InputError: there is no folder or no image in it, images lie beside class folders, classes differ only in
            case, or a link leads out of the folder.
    """
    if not root.is_dir():
        raise InputError(_not_a_folder(root, recommend_reader))
    listing = FolderListing(str(root), follow_links)
    named: dict[str, str] = {}
    for folder in listing.folders():
        split = SPLIT_NAMES.get(folder.lower())
        if split in named:
            raise InputError(f"{root} has both {named[split]}/ and {folder}/ for one split; keep one")
        if split:
            named[split] = folder
    # A new split would appear here.
    listing.watched.append(str(root))
    if not named:
        return _without_splits(root, listing, recommend_reader)
    others = [
        # By a listing of its own, since these images are only looked for, neither watched nor noted as skipped.
        name
        for name in listing.folders()
        if name not in named.values() and FolderListing(str(root / name)).images()
    ]
    # Silently leaving images out would be worse: "evaluation/" is easily taken for a split.
    if others:
        raise InputError(
            f"{root} has images in {', '.join(others[:5])} beside the splits {', '.join(named.values())}; move "
            "them out, or rename them to train, val or test"
        )
    inner = {folder: listing.folders(folder) for folder in named.values()}
    # Of all splits together: a class that one split lacks must not move the numbers of the others.
    classes = check_classes(sorted({name for names in inner.values() for name in names}), root)
    splits = {split: _list_split(listing, folder, inner[folder], classes) for split, folder in named.items()}
    return _dataset(root, listing, classes, sort_splits(splits))


def _not_a_folder(root: Path, recommend_reader: Callable[[Path], str]) -> str:
    if not root.exists():
        return f"{root} is missing; expected a folder of images"
    if advice := recommend_reader(root):
        return f"{root} is a file, not a folder of images; {advice}"
    table = "; a table of labels is not read: put the images into one folder per class"
    return f"{root} is a file; expected a folder of images{table if _ending(root.name) in TABLES else ''}"


def _without_splits(root: Path, listing: FolderListing, recommend_reader: Callable[[Path], str]) -> Dataset:
    loose = listing.images(deep=False)
    inside = {folder: names for folder in listing.folders() if (names := listing.images(folder))}
    names = loose + [name for images in inside.values() for name in images]
    if not names:
        advice = recommend_reader(root)
        raise InputError(f"{root} has no images; {f'{advice}; otherwise ' if advice else ''}{EXPECTED}")
    # A single class cannot be learned, so one folder alone is taken for a container of images.
    if loose or len(inside) < 2:
        splits = {"train": SplitListing(sorted(names), np.full(len(names), UNLABELLED, np.int32))}
        why = f"images lie beside folders, e.g. {loose[0]}" if loose else "only one folder has images"
        note = f"{root}: {why}, so folders are not read as classes and all images are unlabelled"
        return _dataset(root, listing, (), splits, [note] if inside else [])
    classes = check_classes(sorted(inside), root)
    # In the order of `classes`, which is that of the names below.
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(inside[name]) for name in classes])
    splits = {"train": SplitListing([name for c in classes for name in inside[c]], labels)}
    return _dataset(root, listing, classes, splits)


def _is_cycle(entry: os.DirEntry) -> bool:
    """Returns whether a folder is a link to one that contains it."""
    target, parent = Path(os.path.realpath(entry.path)), Path(os.path.realpath(os.path.dirname(entry.path)))
    return entry.is_symlink() and parent.is_relative_to(target)


def _dataset(
    root: Path,
    listing: FolderListing,
    classes: tuple[str, ...],
    splits: dict[str, SplitListing],
    notes: list[str] | None = None,
) -> Dataset:
    def read(split: str, index: int) -> bytes:
        return read_file(os.path.join(listing.root, splits[split].names[index]))

    notes = [*(notes or []), *listing.notes(), *([] if classes else listing.table_notes())]
    notes += _class_notes(root, classes, splits)
    return Dataset(root.resolve().name, classes, splits, read, listing.watched, notes=tuple(notes), location=str(root))


def _class_notes(root: Path, classes: tuple[str, ...], splits: dict[str, SplitListing]) -> list[str]:
    """Returns notes about classes that cannot be learned from these folders."""
    if len(classes) == 1:
        return [f"{root} has a single class, {classes[0]}, so accuracy on it means nothing"]
    train = splits.get("train")
    if train is None or not train.labelled:
        return []
    absent = [classes[i] for i in sorted(set(range(len(classes))) - set(train.labels.tolist()))]
    return (
        [f"{root} has no training images of {len(absent)} of {len(classes)} classes, e.g. {absent[0]}"]
        if absent
        else []
    )


def _list_split(listing: FolderListing, folder: str, inner: list[str], classes: tuple[str, ...]) -> SplitListing:
    where = os.path.join(listing.root, folder)
    loose = listing.images(folder, deep=False)
    if loose and inner:
        raise InputError(
            f"{where} has {len(loose)} images beside class folders ({loose[0]}, …); move them into a class folder, or "
            "move the class folders out"
        )
    names, labels = list(loose), [UNLABELLED] * len(loose)
    for name in inner:
        images = listing.images(f"{folder}/{name}")
        names, labels = names + images, labels + [classes.index(name)] * len(images)
    if not names:
        raise InputError(f"{where} has no images; add some, or remove this split")
    return SplitListing(names, np.array(labels, np.int32))


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()
