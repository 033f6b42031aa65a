"""Where pictures come from: listed once, decoded on demand.

A source names its classes and splits, gives the pixels of one picture, and a key that changes when its content does.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from funmatch.errors import InputError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
UNLABELLED = -1


@dataclass(frozen=True)
class Split:
    """The pictures of one split.

    Attributes:
        names: how messages call each picture, (n,).
        labels: index of each picture's class, (n,) int32; all `UNLABELLED` where there are none.
    """

    names: list[str]
    labels: np.ndarray

    @property
    def labelled(self) -> bool:
        return bool(len(self.labels)) and bool((self.labels != UNLABELLED).all())


class Source(Protocol):
    """What the cache asks of a data set."""

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def splits(self) -> dict[str, Split]: ...

    def stamp(self) -> str:
        """A digest that is cheap to make and changes whenever the content may have changed."""
        ...

    def digest(self, split: str, index: int) -> bytes:
        """A digest of one picture's encoded content."""
        ...

    def pixels(self, split: str, index: int) -> np.ndarray:
        """(height, width, 3) uint8, upright; any failure to decode is an exception."""
        ...


@dataclass(frozen=True)
class Folder:
    """A folder of pictures: `<split>/<class>/*`, `<split>/*` without labels, or any unlabelled tree of pictures."""

    root: Path
    name: str
    classes: tuple[str, ...] = ()
    splits: dict[str, Split] = field(default_factory=dict)

    def stamp(self) -> str:
        digest = hashlib.blake2b(str(self.root.resolve()).encode(), digest_size=16)
        for split, content in self.splits.items():
            for name, label in zip(content.names, content.labels, strict=True):
                try:
                    status = os.stat(self.root / name)
                    known = (status.st_size, status.st_mtime_ns, status.st_ino)
                except OSError as error:
                    known = (error.errno,)  # it will be named when it is read
                digest.update(repr((split, name, int(label), *known)).encode())
        return digest.hexdigest()

    def digest(self, split: str, index: int) -> bytes:
        return hashlib.blake2b((self.root / self.splits[split].names[index]).read_bytes(), digest_size=16).digest()

    def pixels(self, split: str, index: int) -> np.ndarray:
        return decode((self.root / self.splits[split].names[index]).read_bytes())


def open_folder(root: Path) -> Folder:
    """Lists a folder of pictures.

    Args:
        root: holding folders named train, val or validation, test (each with a folder a class, or unlabelled
            pictures); or, with no such folder, pictures at any depth, all unlabelled and all for training.

    Raises:
        InputError: no folder, no picture, or pictures lying beside class folders.
    """
    if not root.is_dir():
        raise InputError(f"{root} is {'not a folder' if root.exists() else 'missing'}; wanted a folder of pictures")
    named = {}
    for entry in _folders(root):
        split = SPLIT_NAMES.get(entry.name.lower())
        if split in named:
            raise InputError(f"{root} has both {named[split].name}/ and {entry.name}/ for one split; keep one")
        if split:
            named[split] = entry
    if not named:
        names = sorted(_pictures(root, root))
        if not names:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise InputError(f"{root} has no picture ({kinds}); wanted <split>/<class>/*.jpg or a folder of pictures")
        return Folder(root, root.name, (), {"train": Split(names, np.full(len(names), UNLABELLED, np.int32))})
    order = [split for split in ("train", "val", "test") if split in named]
    classes = tuple(sorted({entry.name for split in order for entry in _folders(named[split])}))
    return Folder(root, root.name, classes, {split: _list_split(root, named[split], classes) for split in order})


def _list_split(root: Path, folder: Path, classes: tuple[str, ...]) -> Split:
    loose = sorted(name for name in _pictures(root, folder, deep=False))
    entries = _folders(folder)
    if loose and entries:
        raise InputError(
            f"{folder} holds {len(loose)} pictures beside class folders ({loose[0]}, …); move them into a class "
            "folder, or the class folders out"
        )
    names, labels = loose, [UNLABELLED] * len(loose)
    for entry in entries:
        found = sorted(_pictures(root, entry))
        names, labels = names + found, labels + [classes.index(entry.name)] * len(found)
    if not names:
        raise InputError(f"{folder} holds no picture; fill this split or remove it")
    return Split(names, np.array(labels, np.int32))


def _folders(folder: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")


def _pictures(root: Path, folder: Path, *, deep: bool = True) -> Iterator[str]:
    """Names relative to `root` of the pictures in a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if deep and not _leads_back(entry):
                    yield from _pictures(root, Path(entry.path))
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield os.path.relpath(entry.path, root)


def _leads_back(entry: os.DirEntry) -> bool:
    """Whether a folder is a link to one that it lies in."""
    target, parent = Path(os.path.realpath(entry.path)), Path(os.path.realpath(os.path.dirname(entry.path)))
    return entry.is_symlink() and parent.is_relative_to(target)


@dataclass(frozen=True)
class Mosaic:
    """A small data set kept as one grey PNG a split, tiles in rows, equally many a class and sorted by class.

    Attributes:
        folder: holding `<split>.png`.
        name: of the data set.
        classes: their names.
        tile: side of a tile in pixels.
    """

    folder: Path
    name: str
    classes: tuple[str, ...]
    tile: int
    splits: dict[str, Split] = field(init=False)
    tiles: dict[str, np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tiles = {path.stem: self._cut(path) for path in self.folder.glob("*.png")}
        ordered = {split: tiles[split] for split in ("train", "val", "test") if split in tiles}
        object.__setattr__(self, "tiles", ordered)
        object.__setattr__(self, "splits", {name: self._split(name, len(cut)) for name, cut in ordered.items()})

    def _cut(self, path: Path) -> np.ndarray:
        """(n, tile, tile) uint8 of a mosaic."""
        sheet = np.asarray(Image.open(path))
        rows, columns = sheet.shape[0] // self.tile, sheet.shape[1] // self.tile
        grid = sheet.reshape(rows, self.tile, columns, self.tile)
        return grid.swapaxes(1, 2).reshape(-1, self.tile, self.tile)

    def _split(self, name: str, count: int) -> Split:
        labels = np.repeat(np.arange(len(self.classes), dtype=np.int32), count // len(self.classes))
        return Split([f"{name}/{self.classes[label]}/{i}" for i, label in enumerate(labels)], labels)

    def stamp(self) -> str:
        digest = hashlib.blake2b(repr((self.name, self.classes)).encode(), digest_size=16)
        for split, tiles in self.tiles.items():
            digest.update(split.encode() + tiles.tobytes())
        return digest.hexdigest()

    def digest(self, split: str, index: int) -> bytes:
        return hashlib.blake2b(self.tiles[split][index].tobytes(), digest_size=16).digest()

    def pixels(self, split: str, index: int) -> np.ndarray:
        return np.repeat(self.tiles[split][index][:, :, None], 3, axis=2)


def decode(encoded: bytes) -> np.ndarray:
    """An encoded picture as a person sees it: upright, RGB, transparency over white, 16 bits scaled to 8.

    Returns:
        (height, width, 3) uint8.
    """
    with Image.open(BytesIO(encoded)) as opened:
        opened.load()
        image = ImageOps.exif_transpose(opened)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))
