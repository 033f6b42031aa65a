"""Lists the published data sets in the layouts that their unpacked archives have."""

import gzip
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
from funmatch.runtime.disk.json_files import parse_json

TENTH = SplitSpec({"val": Fraction(1, 10)})
# SUN397 has no official splits. TensorFlow Datasets drew 70, 10 and 20 %, as the paper uses them; its lists are read
# where they lie beside the images, and otherwise we hold out the same shares ourselves.
SUN_LISTS = {"train": "sun397_tfds_tr.txt", "val": "sun397_tfds_va.txt", "test": "sun397_tfds_te.txt"}
SUN_SPLIT = SplitSpec({"test": Fraction(2, 10), "val": Fraction(1, 10)})


def pet37(root: Path) -> Dataset:
    """Reads `images/*.jpg`, `annotations/trainval.txt` and `test.txt` with lines `<image> <class, from 1> …`."""
    # Not `images/*.jpg` alone: the archive also holds images that its authors list nowhere.
    listed: dict[str, list[tuple[str, int]]] = {}
    for split, file in (("train", "trainval.txt"), ("test", "test.txt")):
        lines = _lines(root / "annotations" / file)
        try:
            listed[split] = [(line.split()[0], int(line.split()[1])) for line in lines if line.strip()]
        except (IndexError, ValueError):
            raise InputError(f"{root / 'annotations' / file} is damaged; expected lines '<image> <class> …'") from None
    # The files name classes by number only; names are in the images' names, as torchvision takes them too.
    breeds = {label: name.rsplit("_", 1)[0] for images in listed.values() for name, label in images}
    order = sorted(breeds)
    classes = [" ".join(word.title() for word in breeds[label].split("_")) for label in order]
    images = {
        split: [(f"images/{name}.jpg", order.index(label)) for name, label in rows] for split, rows in listed.items()
    }
    return _from_files("pet37", root, classes, images, ["annotations/trainval.txt", "annotations/test.txt"], TENTH)


def flowers102(root: Path) -> Dataset:
    """Reads `jpg/image_*.jpg`, `imagelabels.mat` (class of each, from 1) and `setid.mat` (image numbers by split)."""
    # Here, since SciPy and torchvision are slow to import.
    from scipy.io import loadmat
    from torchvision.datasets import Flowers102

    matrices: dict[str, Any] = {}
    for file in ("imagelabels.mat", "setid.mat"):
        try:
            matrices |= loadmat(str(root / file))
        except Exception as error:  # SciPy raises many types: missing, cut off, another format
            raise InputError(f"cannot read {root / file}: {first_line(error)}") from None
    try:
        # MATLAB counts from 1: labels, and below the images too.
        labels = matrices["labels"].ravel().astype(int) - 1
        ids = {split: matrices[key].ravel().astype(int) for split, key in _FLOWER_SPLITS.items()}
        images = {
            split: [(f"jpg/image_{i:05}.jpg", int(labels[i - 1])) for i in numbers] for split, numbers in ids.items()
        }
    except (KeyError, IndexError):
        raise InputError(f"{root}: imagelabels.mat and setid.mat do not match") from None
    return _from_files("flowers102", root, Flowers102.classes, images, ["imagelabels.mat", "setid.mat"], None)


_FLOWER_SPLITS = {"train": "trnid", "val": "valid", "test": "tstid"}


def food101(root: Path) -> Dataset:
    """Reads `images/<class>/*.jpg`, and `meta/train.json` and `test.json` of {class: [class/image, …]}."""
    listed = {}
    for split in ("train", "test"):
        file = root / "meta" / f"{split}.json"
        try:
            listed[split] = parse_json("\n".join(_lines(file)), dict[str, list[str]])
        except InputError:
            raise
        except ValueError:
            raise InputError(f"{file} is damaged; expected a JSON object of lists by class") from None
    classes = sorted(listed["train"].keys() | listed["test"].keys())
    images = {
        split: [(f"images/{name}.jpg", classes.index(c)) for c in classes for name in found.get(c, [])]
        for split, found in listed.items()
    }
    return _from_files("food101", root, classes, images, ["meta/train.json", "meta/test.json"], TENTH)


def sun397(root: Path) -> Dataset:
    """Reads `ClassName.txt` of lines `/<letter>/<class>`, `<letter>/<class>/sun_*.jpg`, and `SUN_LISTS` if present."""
    names = [line.strip() for line in _lines(root / "ClassName.txt") if line.strip()]
    # Without the first level, a letter; a second one belongs to the name, as in field/cultivated.
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
        extra, spec = [str(path) for path in lists.values()], None
    else:
        unsplit = [f.relative_to(root).as_posix() for name in places for f in sorted((root / name).glob("sun_*.jpg"))]
        files, extra, spec = {"train": unsplit}, [], SUN_SPLIT
    try:
        images = {split: [(file, places[file.rpartition("/")[0]]) for file in each] for split, each in files.items()}
    except KeyError as error:
        raise InputError(f"{root}: ClassName.txt lacks the class {error}, which a list of splits has") from None
    return _from_files("sun397", root, classes, images, ["ClassName.txt", *extra, *places], spec)


def imagenet(root: Path) -> Dataset:
    """Reads `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`."""
    # Clusters often offer ImageNet as a folder of links into shared storage.
    return open_folder(root, follow_links=True)


def fashion_mnist(root: Path) -> Dataset:
    """Reads the four IDX files, plain or GZIP, as torchvision and Debian's `dataset-fashion-mnist` leave them."""
    from torchvision.datasets import FashionMNIST

    images, labels = {}, {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images[split] = _idx(root, f"{prefix}-images-idx3-ubyte", 3)
        labels[split] = _idx(root, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int32)
        if len(images[split]) != len(labels[split]):
            raise InputError(f"{root}: {split} has {len(images[split])} images but {len(labels[split])} labels")
    return _from_arrays("fashion-mnist", root, FashionMNIST.classes, images, labels)


def cifar10(root: Path) -> Dataset:
    """Reads `cifar-10-batches-py/` through torchvision."""
    return _cifar("cifar10", "CIFAR10", root)


def cifar100(root: Path) -> Dataset:
    """Reads `cifar-100-python/` through torchvision."""
    return _cifar("cifar100", "CIFAR100", root)


def _cifar(name: str, class_name: str, root: Path) -> Dataset:
    import torchvision.datasets

    # The files are pickles, which can run code: torchvision verifies their checksums before it unpickles them.
    try:
        parts = {
            # Its parent: torchvision itself appends the name of the folder.
            split: getattr(torchvision.datasets, class_name)(str(root.parent), train=split == "train")
            for split in ("train", "test")
        }
    except RuntimeError as error:
        raise InputError(f"{root} is damaged or incomplete: {first_line(error)}") from None
    images = {split: part.data for split, part in parts.items()}
    labels = {split: np.array(part.targets, np.int32) for split, part in parts.items()}
    return _from_arrays(name, root, parts["train"].classes, images, labels)


def _from_files(
    name: str,
    root: Path,
    classes: Sequence[str],
    images: dict[str, list[tuple[str, int]]],
    watched: Sequence[str],
    split_spec: SplitSpec | None,
) -> Dataset:
    """Makes a data set of (file, label) pairs by split, the files relative to `root`."""
    splits = {}
    for split, rows in images.items():
        if not rows:
            raise InputError(f"{root} lists no images for {split}")
        labels = np.array([label for _, label in rows], np.int32)
        # A 0 in files that count from 1 becomes -1, which would pass for `UNLABELLED`.
        if labels.min() < 0 or labels.max() >= len(classes):
            raise InputError(f"{root}: a label of {split} is outside the {len(classes)} classes")
        splits[split] = SplitListing([file for file, _ in rows], labels)
    files = [file for rows in images.values() for file, _ in rows]
    # The lists may come from somebody else, and must not make us read other files of this machine.
    if leading_out := [file for file in files if file.startswith("/") or ".." in file.split("/")]:
        raise InputError(f"{root} lists {leading_out[0][:200]!r}, which is outside it")
    folders = {Path(file).parent.as_posix() for file in files}
    all_watched = [str(root / file) for file in (*watched, *sorted(folders), *files)]

    def read(split: str, index: int) -> bytes:
        return read_file(root / splits[split].names[index])

    return Dataset(name, check_classes(classes, root), sort_splits(splits), read, all_watched, split_spec)


def _from_arrays(
    name: str, root: Path, classes: Sequence[str], images: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> Dataset:
    """Makes a data set of arrays: images (n, height, width) or (n, height, width, 3) uint8, labels (n,), by split."""
    for split, values in labels.items():
        if len(values) and values.max() >= len(classes):
            raise InputError(f"{root}: a label of {split} is outside the {len(classes)} classes")
    splits = {
        split: SplitListing([f"{name} {split}[{i}]" for i in range(len(values))], values)
        for split, values in labels.items()
    }
    watched = [str(root), *(str(path) for path in sorted(root.iterdir()))]
    return Dataset(name, tuple(classes), splits, lambda split, i: encode_pnm(images[split][i]), watched, TENTH)


def _idx(root: Path, file: str, dimensions: int) -> np.ndarray:
    """Reads an IDX file of bytes: two zeros, 8, the number of dimensions, each of them, then the values."""
    gzipped, plain = root / f"{file}.gz", root / file
    path = plain if plain.is_file() else gzipped
    try:
        content = read_file(path)
        content = gzip.decompress(content) if path == gzipped else content
        head = struct.unpack_from(f">HBB{dimensions}I", content)  # big-endian, whatever the machine
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
        if head[:3] != (0, 8, dimensions):
            raise ValueError("it is not an IDX file of bytes")
        # This also finds a file that is cut off: its values do not fill the shape.
        return values.reshape(head[3:])
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise InputError(f"{path} is damaged: {re.sub(r'^.Errno.*?] ', '', str(error))}") from None


def _lines(path: Path) -> list[str]:
    try:
        # Not the locale's encoding, which on clusters may be ASCII.
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
