"""The data sets that have a name."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from funmatch.data.dataset import Dataset, mosaic
from funmatch.data.readers import published
from funmatch.errors import InputError, first_line
from funmatch.runtime.files import disk_errors, user_cache

EMBEDDED = Path(__file__).parent.parent.parent / "embedded"
SECONDS_OF_SILENCE = 30.0


@dataclass(frozen=True)
class CatalogEntry:
    """A published data set.

    Attributes:
        title: as its authors call it.
        layout: reads its folder.
        counts: images a split, ours: where its authors have no validation split, a tenth of the training images
            is cut by content, as the paper cuts `train[90%:]` (section 4.1).
        classes: how many.
        licence: of the images.
        citation: of its paper.
        folder: under the folder of data sets, as torchvision leaves it.
        marks: what must lie in that folder.
        files: what to fetch by hand where there is no network.
        torchvision: class that fetches it and checks what came, with its options.
        elsewhere: other places where it may lie.
    """

    title: str
    layout: Callable[[Path], Dataset]
    counts: dict[str, int]
    classes: int
    licence: str
    citation: str
    folder: str = ""
    marks: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    torchvision: tuple[str, dict[str, str | bool]] | None = None
    elsewhere: tuple[str, ...] = field(default=())


def fashion_mini(folder: Path) -> Dataset:
    """2,700 images of Fashion-MNIST: 200 for training, 500 for validation, 2,000 for test.

    The training images are the first 20 of each class in Fashion-MNIST's training set. Validation and test are the
    first 50 and the next 200 of each class in its *test* set, none of which the embedded teacher has seen.
    """
    return mosaic(folder, "fashion-mini", tuple(json.loads((folder / "classes.json").read_text())), 28)


OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
FASHION_FILES = tuple(
    f"{split}-{part}-ubyte.gz" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")
)

CATALOG: dict[str, CatalogEntry] = {
    "fashion-mini": CatalogEntry(
        "2,700 images of Fashion-MNIST, embedded", fashion_mini, {"train": 200, "val": 500, "test": 2000}, 10,
        "MIT", "Xiao, Rasul & Vollgraf, Fashion-MNIST, arXiv 1708.07747, 2017",
        elsewhere=(str(EMBEDDED / "fashion-mini"),), marks=("train.png",),
    ),
    "pet37": CatalogEntry(
        "The Oxford-IIIT Pet Dataset", published.pet37, {"train": 3312, "val": 368, "test": 3669}, 37,
        "CC BY-SA 4.0", "Parkhi, Vedaldi, Zisserman & Jawahar, Cats and Dogs, CVPR 2012",
        "oxford-iiit-pet", ("images", "annotations"),
        (f"{OXFORD}/pets/data/images.tar.gz", f"{OXFORD}/pets/data/annotations.tar.gz"),
        ("OxfordIIITPet", {"split": "trainval"}),
    ),
    "flowers102": CatalogEntry(
        "102 Category Flower Dataset", published.flowers102, {"train": 1020, "val": 1020, "test": 6149}, 102,
        "not stated; for research", "Nilsback & Zisserman, Automated Flower Classification, ICVGIP 2008",
        "flowers-102", ("jpg", "imagelabels.mat", "setid.mat"),
        tuple(f"{OXFORD}/flowers/102/{file}" for file in ("102flowers.tgz", "imagelabels.mat", "setid.mat")),
        ("Flowers102", {"split": "train"}),
    ),
    "food101": CatalogEntry(
        "Food-101", published.food101, {"train": 68175, "val": 7575, "test": 25250}, 101,
        "not stated; images of foodspotting.com, for research", "Bossard, Guillaumin & Van Gool, Food-101, ECCV 2014",
        "food-101", ("images", "meta"), ("http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",),
        ("Food101", {"split": "train"}),
    ),
    "sun397": CatalogEntry(
        "SUN397 Scene Benchmark", published.sun397, {"train": 76128, "val": 10875, "test": 21750}, 397,
        "not stated; for research", "Xiao, Hays, Ehinger, Oliva & Torralba, SUN Database, CVPR 2010",
        "SUN397", ("ClassName.txt",), ("SUN397.tar.gz (its first address is dead; 37 GB, 108,753 images)",),
    ),
    "imagenet": CatalogEntry(
        "ImageNet (ILSVRC 2012)", published.imagenet, {"train": 1281167, "val": 50000}, 1000,
        "for research, by agreement with its authors", "Russakovsky et al., ImageNet Challenge, IJCV 2015",
        "imagenet", ("train", "val"), ("the folders train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, from image-net.org",),
    ),
    "fashion-mnist": CatalogEntry(
        "Fashion-MNIST", published.fashion_mnist, {"train": 54000, "val": 6000, "test": 10000}, 10,
        "MIT", "Xiao, Rasul & Vollgraf, Fashion-MNIST, arXiv 1708.07747, 2017",
        "FashionMNIST/raw", (), tuple(f"{FASHION}/{file}" for file in FASHION_FILES),
        ("FashionMNIST", {}), ("/usr/share/datasets/fashion-mnist",),
    ),
    "cifar10": CatalogEntry(
        "CIFAR-10", published.cifar10, {"train": 45000, "val": 5000, "test": 10000}, 10,
        "not stated", "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        "cifar-10-batches-py", ("batches.meta",), ("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",),
        ("CIFAR10", {}),
    ),
    "cifar100": CatalogEntry(
        "CIFAR-100", published.cifar100, {"train": 45000, "val": 5000, "test": 10000}, 100,
        "not stated", "Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        "cifar-100-python", ("meta",), ("https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",),
        ("CIFAR100", {}),
    ),
}  # fmt: skip


def data_home(data_dir: Path | None = None) -> Path:
    """Where data sets lie: as said, else `$FUNMATCH_DATA`, else `funmatch/data` in the user's cache folder."""
    if data_dir or (os.environ.get("FUNMATCH_DATA")):
        return Path(data_dir or os.environ["FUNMATCH_DATA"]).expanduser()
    return user_cache() / "data"


def open_named(name: str, data_dir: Path | None = None) -> Dataset:
    """A data set of the catalog, fetched if it is not there.

    Raises:
        InputError: it is not there and cannot be fetched; the message says what to put where.
    """
    entry = CATALOG[name]
    home = data_home(data_dir)
    root = _find(entry, home)
    if root is None:
        _fetch(name, entry, home)
        root = home / entry.folder
    return replace(entry.layout(root), name=name, counts=entry.counts, place=str(root))


def _find(entry: CatalogEntry, home: Path) -> Path | None:
    """Where a data set lies: under the folder of data sets, in it, or elsewhere."""
    places = [home / entry.folder, home] if entry.folder else []
    return next((place for place in [*places, *map(Path, entry.elsewhere)] if _lies_in(entry, place)), None)


def found_under(name: str, top: Path, levels: int) -> Path | None:
    """The folder somewhere under `top` in which a data set lies and can be read, whatever the folder is called."""
    entry = CATALOG[name]
    for folder in folders_under(top, levels):
        if _lies_in(entry, folder):
            with suppress(InputError):  # other data sets have folders of the same names
                entry.layout(folder)
                return folder
    return None


def folders_under(top: Path, levels: int) -> Iterator[Path]:
    """A folder and the folders in it, so many levels deep, those above first."""
    inside = [top] if top.is_dir() else []
    yield from inside
    for _ in range(levels):
        inside = [path for folder in inside for path in _folders_in(folder)]
        yield from inside


def _folders_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:  # which knows folders without a look at each of many files
        return sorted(Path(entry.path) for entry in entries if entry.is_dir())


def _lies_in(entry: CatalogEntry, place: Path) -> bool:
    if not entry.marks:  # four files, plain or packed
        return all((place / f).is_file() or (place / f.removesuffix(".gz")).is_file() for f in FASHION_FILES)
    return all((place / mark).exists() for mark in entry.marks)


def _fetch(name: str, entry: CatalogEntry, home: Path) -> None:
    """Fetches a data set into a folder beside its place, and moves it there when it is whole."""
    to_do = _by_hand(entry, home)
    if entry.torchvision is None:
        raise InputError(f"{name} ({entry.title}) cannot be fetched automatically; {to_do}")
    import torchvision.datasets

    kind, options = entry.torchvision
    arriving = home / f".{name}.partial"
    top = Path(entry.folder).parts[0]
    made = not home.exists()
    arriving.mkdir(parents=True, exist_ok=True)
    _keep_only_archives(entry, arriving)
    _take_archives(entry, home, arriving)
    try:
        with disk_errors(home), redirect_stdout(sys.stderr), _patience():
            getattr(torchvision.datasets, kind)(str(arriving), download=True, **options)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        if isinstance(error, OSError) and error.filename:
            raise  # the disk's fault, not the network's
        _keep_only_archives(entry, arriving)
        for folder in (arriving / top, arriving, *([home] if made else [])):
            with suppress(OSError):  # it holds archives that are whole, or other things
                folder.rmdir()
        raise InputError(f"{name} ({entry.title}) could not be fetched: {first_line(error)}; {to_do}") from None
    (home / top).mkdir(exist_ok=True)
    for arrived in (arriving / top).iterdir():
        if not arrived.name.endswith((".tar.gz", ".tgz")):
            arrived.replace(home / top / arrived.name)
    shutil.rmtree(arriving)


def _keep_only_archives(entry: CatalogEntry, arriving: Path) -> None:
    """Removes what an earlier try unpacked, perhaps not wholly; archives are checked before they are used again."""
    archives = {Path(address).name for address in entry.files}
    for path in sorted(arriving.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name not in archives:
            path.unlink()


def _by_hand(entry: CatalogEntry, home: Path) -> str:
    place = home / entry.folder
    marks = f", so that {', '.join(str(place / mark) for mark in entry.marks)} are there" if entry.marks else ""
    return (
        f"put {' and '.join(entry.files)} into {place}{', unpacked' if entry.marks else ''}{marks}; or say where the "
        f"folder {Path(entry.folder).parts[0]} lies by --data-dir"
    )


def _take_archives(entry: CatalogEntry, home: Path, arriving: Path) -> None:
    """Archives that a person put there are used, so that nothing is fetched twice."""
    inside = Path(entry.folder) if Path(entry.folder).parts[0] in ("oxford-iiit-pet", "flowers-102") else Path()
    for file in (Path(address).name for address in entry.files if "/" in address):
        for place in (home / entry.folder, home):
            if (place / file).is_file() and not (arriving / inside / file).exists():
                (arriving / inside).mkdir(parents=True, exist_ok=True)
                os.symlink((place / file).resolve(), arriving / inside / file)


@contextmanager
def _patience():
    """Gives up on a network that says nothing."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_OF_SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
