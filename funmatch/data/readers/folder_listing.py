"""Lists the folders and images in a folder, and collects what was found on the way."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from funmatch.data.decode import EXTENSIONS
from funmatch.errors import InputError

BESIDE_IMAGES = {".txt", ".md", ".json", ".csv", ".html", ".ini", ".db", ".mat", ".xml"}
"""Endings of files that usually lie beside images and are skipped without a note."""
TABLES = {".csv", ".tsv", ".jsonl"}
LEFTOVERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "#recycle"}
"""Folders that macOS, Windows, Linux and network storage add, with previews or deleted images in them."""


@dataclass
class FolderListing:
    """Lists one folder, and collects what was found on the way.

    Attributes:
        root: the folder.
        follow_links: whether symbolic links may lead out of it.
        watched: folders and images, for `Dataset.watched`.
        skipped: files that are not images, relative to the root.
        nested: folders inside those whose images were listed, relative to the root.
    """

    root: str
    follow_links: bool = False
    watched: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The root may be a link itself; what lies where it leads counts as inside.
        self.real = os.path.realpath(self.root)

    def path(self, inside: str = "") -> str:
        """Returns the path of a folder in the root, for messages."""
        return os.path.join(self.root, inside) if inside else self.root

    def folders(self, inside: str = "") -> list[str]:
        """Returns the names of the folders in a folder, sorted."""
        with os.scandir(os.path.join(self.root, inside)) as entries:
            return sorted(entry.name for entry in entries if self._is_folder(entry))

    def filled(self, inside: str, names: Sequence[str], at_most: int | None = None) -> list[str]:
        """Returns those of the folders in a folder that have images, the first ones only if so many are enough."""
        filled: list[str] = []
        for name in names:
            if len(filled) == at_most:
                break
            if self.has_images(f"{inside}/{name}" if inside else name):
                filled.append(name)
        return filled

    def has_images(self, inside: str = "", *, deep: bool = True) -> bool:
        """Returns whether there is an image in a folder; nothing is watched or noted as skipped."""
        waiting = [os.path.join(self.root, inside)]
        while waiting:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if _is_image(entry):
                        return True
                    if deep and self._is_folder(entry):
                        waiting.append(entry.path)
        return False

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
                        if deep and self._is_folder(entry):
                            waiting.append(prefix + entry.name)
                            self.nested.append(prefix + entry.name)
                    elif not _is_image(entry):
                        self.skipped.append(prefix + entry.name)
                    elif self._allowed(entry):
                        images.append(prefix + entry.name)
        self.watched += [os.path.join(self.root, name) for name in images]
        # File systems list in different orders; indices, and with them whole runs, depend on this one.
        return sorted(images)

    def notes(self) -> list[str]:
        """Returns a note about skipped files that may have been meant as images."""
        odd = sorted({name for name in self.skipped if ending(name) not in BESIDE_IMAGES | TABLES})
        if not odd:
            return []
        return [
            f"skipped {len(odd):,} files in {self.root}, e.g. {odd[0]}; images end in {', '.join(sorted(EXTENSIONS))}"
        ]

    def table_notes(self) -> list[str]:
        """Returns a note about tables, which an unlabelled folder may have its labels in."""
        tables = sorted(name for name in self.skipped if ending(name) in TABLES)
        if not tables:
            return []
        of_paths = os.path.join(self.root, tables[0])
        other = f"; if it has a column of paths, pass csv:{of_paths}" if ending(of_paths) != ".jsonl" else ""
        return [f"{self.root}: {tables[0]} is not read; labels come from folder names, <class>/*.jpg{other}"]

    def _is_folder(self, entry: os.DirEntry) -> bool:
        """Returns whether an entry is a folder that may hold images."""
        if entry.name[0] == "." or not entry.is_dir() or entry.name.lower() in LEFTOVERS:
            return False
        return self._allowed(entry) and not is_cycle(entry.path, self.root)

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


def ending(name: str) -> str:
    """Returns the ending of a file's name in lower case, with its dot."""
    # In lower case, since cameras write .JPG.
    return os.path.splitext(name)[1].lower()


def _is_image(entry: os.DirEntry) -> bool:
    # By the ending first, which needs no look at the disk.
    return entry.name[0] != "." and ending(entry.name) in EXTENSIONS and not entry.is_dir()


def is_cycle(folder: str, root: Path | str) -> bool:
    """Returns whether a folder is a link to one of the folders on the way to it, or to one that contains such a folder.

    Args:
        root: where the way begins.
    """
    # First the cheap question: resolving paths asks the disk about each of their folders.
    if not os.path.islink(folder):
        return False
    target, above = Path(os.path.realpath(folder)), Path(folder).parent
    # All folders on the way, not only the last: of two that link to each other, neither contains the other.
    way = [above, *(parent for parent in above.parents if parent.is_relative_to(root))]
    return any(Path(os.path.realpath(each)).is_relative_to(target) for each in way)
