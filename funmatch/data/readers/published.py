"""How the published data sets lie on disk once they are unpacked: a reader for each."""

import gzip
import json
import re
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from funmatch.data.dataset import Dataset, SplitListing, SplitSpec, check_classes, encode_pnm, read_file, sort_splits
from funmatch.data.readers.folder import open_folder
from funmatch.errors import InputError, first_line

TENTH = SplitSpec({"val": Fraction(1, 10)})
# Sun397 has no official splits. TensorFlow Datasets drew 70, 10 and 20 %; these are its lists, used where they lie
# beside the images.
SUN_LISTS = {"train": "sun397_tfds_tr.txt", "val": "sun397_tfds_va.txt", "test": "sun397_tfds_te.txt"}
SUN_CUT = SplitSpec({"test": Fraction(2, 10), "val": Fraction(1, 10)})


def pet37(root: Path) -> Dataset:
    """`images/*.jpg`, and `annotations/trainval.txt` and `test.txt` of lines `<image> <class, from 1> …`."""
    listed: dict[str, list[tuple[str, int]]] = {}
    for split, file in (("train", "trainval.txt"), ("test", "test.txt")):
        lines = _lines(root / "annotations" / file)
        try:
            listed[split] = [(line.split()[0], int(line.split()[1])) for line in lines if line.strip()]
        except (IndexError, ValueError):
            raise InputError(f"{root / 'annotations' / file} is damaged; wanted lines '<image> <class> …'") from None
    breeds = {label: name.rsplit("_", 1)[0] for images in listed.values() for name, label in images}
    order = sorted(breeds)
    classes = [" ".join(word.title() for word in breeds[label].split("_")) for label in order]
    images = {
        split: [(f"images/{name}.jpg", order.index(label)) for name, label in found] for split, found in listed.items()
    }
    return _of_files("pet37", root, classes, images, ["annotations/trainval.txt", "annotations/test.txt"], TENTH)


def flowers102(root: Path) -> Dataset:
    """`jpg/image_*.jpg`, `imagelabels.mat` (a class from 1 for each) and `setid.mat` (the images of each split)."""
    from scipy.io import loadmat
    from torchvision.datasets import Flowers102

    found: dict[str, Any] = {}
    for file in ("imagelabels.mat", "setid.mat"):
        try:
            found |= loadmat(str(root / file))
        except Exception as error:  # of many kinds: missing, cut off, another format
            raise InputError(f"{root / file} cannot be read: {first_line(error)}") from None
    try:
        labels = found["labels"].ravel().astype(int) - 1
        ids = {split: found[key].ravel().astype(int) for split, key in _FLOWER_SPLITS.items()}
        images = {
            split: [(f"jpg/image_{i:05}.jpg", int(labels[i - 1])) for i in numbers] for split, numbers in ids.items()
        }
    except (KeyError, IndexError):
        raise InputError(f"{root}: imagelabels.mat and setid.mat do not belong together") from None
    return _of_files("flowers102", root, Flowers102.classes, images, ["imagelabels.mat", "setid.mat"], None)


_FLOWER_SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}


def food101(root: Path) -> Dataset:
    """`images/<class>/*.jpg`, and `meta/train.json` and `test.json` of {class: [class/picture, …]}."""
    listed = {}
    for split in ("train", "test"):
        file = root / "meta" / f"{split}.json"
        try:
            listed[split] = {str(name): list(found) for name, found in json.loads("\n".join(_lines(file))).items()}
        except (ValueError, AttributeError, TypeError):
            raise InputError(f"{file} is damaged; wanted an object of lists by class") from None
    classes = sorted(listed["train"].keys() | listed["test"].keys())
    images = {
        split: [(f"images/{name}.jpg", classes.index(c)) for c in classes for name in found.get(c, [])]
        for split, found in listed.items()
    }
    return _of_files("food101", root, classes, images, ["meta/train.json", "meta/test.json"], TENTH)


def sun397(root: Path) -> Dataset:
    """`ClassName.txt` of lines `/<letter>/<class>`, and `<letter>/<class>/sun_*.jpg`; splits as `SUN_LISTS` say."""
    names = [line.strip() for line in _lines(root / "ClassName.txt") if line.strip()]
    classes = [name.lstrip("/").partition("/")[2] for name in names]
    places = {name.strip("/"): i for i, name in enumerate(names)}
    lists = {
        split: next((p for p in (root / f, root.parent / f) if p.is_file()), None) for split, f in SUN_LISTS.items()
    }
    if all(lists.values()):
        files = {
            split: [line.strip().lstrip("/") for line in _lines(path) if line.strip()]
            for split, path in lists.items()
            if path
        }
        extra, cut = [str(path) for path in lists.values()], None
    else:
        found = [f.relative_to(root).as_posix() for name in places for f in sorted((root / name).glob("sun_*.jpg"))]
        files, extra, cut = {"train": found}, [], SUN_CUT
    try:
        images = {split: [(file, places[file.rpartition("/")[0]]) for file in each] for split, each in files.items()}
    except KeyError as error:
        raise InputError(f"{root}: ClassName.txt has no class {error}, which a list of splits names") from None
    return _of_files("sun397", root, classes, images, ["ClassName.txt", *extra, *places], cut)


def imagenet(root: Path) -> Dataset:
    """`train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`."""
    return open_folder(root, follow_links=True)


def fashion_mnist(root: Path) -> Dataset:
    """The four IDX files, plain or GZIP, as torchvision and Debian's `dataset-fashion-mnist` leave them."""
    from torchvision.datasets import FashionMNIST

    images, labels = {}, {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images[split] = _idx(root, f"{prefix}-images-idx3-ubyte", 3)
        labels[split] = _idx(root, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int32)
        if len(images[split]) != len(labels[split]):
            raise InputError(f"{root}: {len(images[split])} images and {len(labels[split])} labels of {split}")
    return _of_arrays("fashion-mnist", root, FashionMNIST.classes, images, labels)


def cifar10(root: Path) -> Dataset:
    """`cifar-10-batches-py/`, whose files torchvision checks before they are opened."""
    return _cifar("cifar10", "CIFAR10", root)


def cifar100(root: Path) -> Dataset:
    """`cifar-100-python/`, whose files torchvision checks before they are opened."""
    return _cifar("cifar100", "CIFAR100", root)


def _cifar(name: str, kind: str, root: Path) -> Dataset:
    import torchvision.datasets

    try:
        parts = {
            split: getattr(torchvision.datasets, kind)(str(root.parent), train=split == "train")
            for split in ("train", "test")
        }
    except RuntimeError as error:
        raise InputError(f"{root} is damaged or not whole: {first_line(error)}") from None
    images = {split: part.data for split, part in parts.items()}
    labels = {split: np.array(part.targets, np.int32) for split, part in parts.items()}
    return _of_arrays(name, root, parts["train"].classes, images, labels)


def _of_files(
    name: str,
    root: Path,
    classes: Sequence[str],
    images: dict[str, list[tuple[str, int]]],
    watched: Sequence[str],
    cut: SplitSpec | None,
) -> Dataset:
    """A source of (file, label) pairs, the files relative to `root`."""
    splits = {}
    for split, found in images.items():
        if not found:
            raise InputError(f"{root}: nothing is listed for {split}")
        labels = np.array([label for _, label in found], np.int32)
        if labels.min() < 0 or labels.max() >= len(classes):
            raise InputError(f"{root}: a label of {split} is outside the {len(classes)} classes")
        splits[split] = SplitListing([file for file, _ in found], labels)
    files = [file for found in images.values() for file, _ in found]
    folders = {Path(file).parent.as_posix() for file in files}
    seen = [str(root / file) for file in (*watched, *sorted(folders), *files)]

    def read(split: str, index: int) -> bytes:
        return read_file(root / splits[split].names[index])

    return Dataset(name, check_classes(classes, root), sort_splits(splits), read, seen, cut)


def _of_arrays(
    name: str, root: Path, classes: Sequence[str], images: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> Dataset:
    for split, found in labels.items():
        if len(found) and found.max() >= len(classes):
            raise InputError(f"{root}: a label of {split} is outside the {len(classes)} classes")
    splits = {
        split: SplitListing([f"{name} {split}[{i}]" for i in range(len(found))], found)
        for split, found in labels.items()
    }
    watched = [str(root), *(str(path) for path in sorted(root.iterdir()))]
    return Dataset(name, tuple(classes), splits, lambda split, i: encode_pnm(images[split][i]), watched, TENTH)


def _idx(root: Path, file: str, dimensions: int) -> np.ndarray:
    """An IDX file of bytes: two zeros, 8, the number of dimensions, each of them, then the values."""
    packed, plain = root / f"{file}.gz", root / file
    path = plain if plain.is_file() else packed
    try:
        content = read_file(path)
        content = gzip.decompress(content) if path == packed else content
        head = struct.unpack_from(f">HBB{dimensions}I", content)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        if head[:3] != (0, 8, dimensions):
            raise ValueError("it is no IDX file of bytes")
        return values.reshape(head[3:])
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise InputError(f"{path} is damaged: {re.sub(r'^.Errno.*?] ', '', str(error))}") from None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
