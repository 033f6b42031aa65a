"""Folders of images, in every common layout."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from funmatch.data.dataset import SPLIT_NAMES, UNLABELLED, Dataset, SplitListing, check_classes, read_file, sort_splits
from funmatch.data.decode import EXTENSIONS
from funmatch.errors import InputError


@dataclass
class FolderWalk:
    """One walk over a folder: what was seen on the way, and whether links may lead out."""

    root: str
    follow_links: bool = False
    watched: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.real = os.path.realpath(self.root)

    def folders(self, inside: str = "") -> list[str]:
        """Names of the folders in a folder, sorted."""
        with os.scandir(os.path.join(self.root, inside)) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name[0] != "." and entry.is_dir() and self._allowed(entry) and not _leads_back(entry)
            )

    def images(self, inside: str = "", *, deep: bool = True) -> list[str]:
        """Names, from the root, of the images in a folder, in an order that is the same everywhere."""
        found: list[str] = []
        waiting = [inside]
        while waiting:
            folder = waiting.pop()
            prefix = f"{folder}/" if folder else ""
            self.watched.append(os.path.join(self.root, folder))
            with os.scandir(self.watched[-1]) as entries:
                for entry in entries:
                    if entry.name[0] == ".":
                        continue
                    if entry.is_dir():
                        if deep and self._allowed(entry) and not _leads_back(entry):
                            waiting.append(prefix + entry.name)
                    elif os.path.splitext(entry.name)[1].lower() not in EXTENSIONS:
                        self.left_out.append(prefix + entry.name)
                    elif self._allowed(entry):
                        found.append(prefix + entry.name)
        self.watched += [os.path.join(self.root, name) for name in found]
        return sorted(found)

    def notes(self) -> tuple[str, ...]:
        """What was left out."""
        known = {".txt", ".md", ".json", ".csv", ".html", ".ini", ".db", ".mat", ".xml"}
        odd = sorted({name for name in self.left_out if os.path.splitext(name)[1].lower() not in known})
        kinds = ", ".join(sorted(EXTENSIONS))
        return (f"{len(odd):,} files in {self.root} are left out, e.g. {odd[0]}; images end in {kinds}",) if odd else ()

    def _allowed(self, entry: os.DirEntry) -> bool:
        """True, unless it is a link that leads out, which is an `InputError`."""
        if not entry.is_symlink() or self.follow_links:
            return True
        target = os.path.realpath(entry.path)
        if target != self.real and not target.startswith(self.real + os.sep):
            raise InputError(
                f"{entry.path} is a link that leads out of {self.root}, to {target}; if that is meant, --follow-links"
            )
        return True


def open_folder(root: Path, *, follow_links: bool = False) -> Dataset:
    """Lists a folder of images.

    Args:
        root: in one of these layouts.
            `<split>/<class>/…`: splits train, val or validation, test; each with a folder a class, in which images
            lie at any depth, or with images alone, which are unlabelled.
            `<class>/…`: at least two folders and no image beside them; all are for training.
            Else images at any depth, unlabelled, all for training.
            Files that are no images are left out, with a note.
        follow_links: whether links may lead out of the folder.

    Raises:
        InputError: no folder, no image, images lying beside class folders, classes that differ only in case, a
            link that leads out.
    """
    if not root.is_dir():
        raise InputError(f"{root} is {'not a folder' if root.exists() else 'missing'}; wanted a folder of images")
    walk = FolderWalk(str(root), follow_links)
    named: dict[str, str] = {}
    for folder in walk.folders():
        split = SPLIT_NAMES.get(folder.lower())
        if split in named:
            raise InputError(f"{root} has both {named[split]}/ and {folder}/ for one split; keep one")
        if split:
            named[split] = folder
    walk.watched.append(str(root))
    if named:
        others = [
            name for name in walk.folders() if name not in named.values() and FolderWalk(str(root / name)).images()
        ]
        if others:
            raise InputError(
                f"{root} has images in {', '.join(others[:5])} beside the splits {', '.join(named.values())}; move "
                "them out, or rename them to train, val or test"
            )
        inner = {folder: walk.folders(folder) for folder in named.values()}
        classes = check_classes(sorted({name for names in inner.values() for name in names}), root)
        splits = {split: _list_split(walk, folder, inner[folder], classes) for split, folder in named.items()}
        return _source(root, walk, classes, sort_splits(splits))
    return _without_splits(root, walk)


def _without_splits(root: Path, walk: FolderWalk) -> Dataset:
    loose = walk.images(deep=False)
    inside = {folder: names for folder in walk.folders() if (names := walk.images(folder))}
    names = loose + [name for found in inside.values() for name in found]
    if not names:
        raise InputError(f"{root} has no image; {_hint(root)}wanted <split>/<class>/*.jpg or a folder of images")
    if loose or len(inside) < 2:
        splits = {"train": SplitListing(sorted(names), np.full(len(names), UNLABELLED, np.int32))}
        why = f"images lie beside folders, e.g. {loose[0]}" if loose else "only one folder has images"
        note = f"{root}: {why}, so folders are not taken for classes and nothing is labelled"
        return _source(root, walk, (), splits, (note,) if inside else ())
    classes = check_classes(sorted(inside), root)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(inside[name]) for name in classes])
    return _source(root, walk, classes, {"train": SplitListing([name for c in classes for name in inside[c]], labels)})


def _leads_back(entry: os.DirEntry) -> bool:
    """Whether a folder is a link to one that it lies in."""
    target, parent = Path(os.path.realpath(entry.path)), Path(os.path.realpath(os.path.dirname(entry.path)))
    return entry.is_symlink() and parent.is_relative_to(target)


def _hint(root: Path) -> str:
    """What to say about a folder that holds shards instead of images."""
    for door, pattern in (("tfrecord", "*.tfrec*"), ("wds", "*.tar")):
        if next(root.rglob(pattern), None):
            return f"but {pattern} are there, so say {door}:{root}; otherwise "
    return ""


def _source(
    root: Path, walk: FolderWalk, classes: tuple[str, ...], splits: dict[str, SplitListing], notes: tuple[str, ...] = ()
) -> Dataset:
    def read(split: str, index: int) -> bytes:
        return read_file(os.path.join(walk.root, splits[split].names[index]))

    notes += walk.notes()
    return Dataset(root.resolve().name, classes, splits, read, walk.watched, notes=notes, place=str(root))


def _list_split(walk: FolderWalk, folder: str, inner: list[str], classes: tuple[str, ...]) -> SplitListing:
    where = os.path.join(walk.root, folder)
    loose = walk.images(folder, deep=False)
    if loose and inner:
        raise InputError(
            f"{where} holds {len(loose)} images beside class folders ({loose[0]}, …); move them into a class "
            "folder, or the class folders out"
        )
    names, labels = list(loose), [UNLABELLED] * len(loose)
    for name in inner:
        found = walk.images(f"{folder}/{name}")
        names, labels = names + found, labels + [classes.index(name)] * len(found)
    if not names:
        raise InputError(f"{where} holds no image; fill this split or remove it")
    return SplitListing(names, np.array(labels, np.int32))
