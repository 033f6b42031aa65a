"""Finds the published data sets by name, and downloads those that torchvision can fetch."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from funmatch.data.dataset import UNLABELLED, Dataset, SplitListing, mosaic
from funmatch.data.readers import published
from funmatch.errors import InputError, first_line
from funmatch.runtime.disk.files import disk_errors, user_cache

EMBEDDED = Path(__file__).parent.parent.parent / "embedded"
SECONDS_OF_SILENCE = 30.0


@dataclass(frozen=True)
class CatalogEntry:
    """A published data set.

    Attributes:
        title: as its authors call it.
        layout: lists its folder.
        counts: images in each of our splits. Where the authors have no validation split, a tenth of the training images
            is held out by content, as the paper takes `train[90%:]` (section 4.1).
        classes: number of classes.
        licence: of the images.
        citation: of its paper.
        folder: its folder below the folder of data sets, as torchvision leaves it.
        marks: names that its folder must contain.
        files: what to download by hand where there is no network.
        torchvision: name of the class that downloads and verifies it, and that class's options.
        elsewhere: other folders where it may be.
        files_as_published: whether its folder holds the downloaded files themselves, compressed or not, instead of
            `marks`.
        archive_folder: where torchvision looks for downloaded archives, below its root.
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
    files_as_published: bool = False
    archive_folder: str = ""

    @property
    def archives(self) -> list[str]:
        """Names of the files to download; a sentence where there is no address is not one."""
        return [Path(file).name for file in self.files if "/" in file]

    def is_in(self, folder: Path) -> bool:
        """Returns whether a folder seems to hold this data set."""
        if self.files_as_published:
            # Either form of each file: some packages unpack them.
            return all((folder / f).is_file() or (folder / f.removesuffix(".gz")).is_file() for f in self.archives)
        return all((folder / mark).exists() for mark in self.marks)


def fashion_mini(folder: Path) -> Dataset:
    """Opens the embedded 2,700 images of Fashion-MNIST: 200 for training, 500 for validation, 2,000 for test.

    The training images are the first 20 of each class in Fashion-MNIST's training set. Validation and test are the
    first 50 and the next 200 of each class in its *test* set, which the embedded teacher was not trained on.
    """
    return mosaic(folder, "fashion-mini", tuple(json.loads((folder / "classes.json").read_text())), 28)


def fashion_mini_pool(folder: Path) -> Dataset:
    """Opens the validation images of `fashion_mini` as training images without labels, to try a pool with."""
    whole = fashion_mini(folder)
    val = whole.splits["val"]
    pool = SplitListing(val.names, np.full(len(val), UNLABELLED, np.int32))
    return replace(whole, classes=(), splits={"train": pool}, read=lambda _, i: whole.read("val", i))


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
    "fashion-mini-pool": CatalogEntry(
        "The validation images of fashion-mini without labels, as a pool", fashion_mini_pool, {"train": 500}, 10,
        "MIT", "Xiao, Rasul & Vollgraf, Fashion-MNIST, arXiv 1708.07747, 2017",
        elsewhere=(str(EMBEDDED / "fashion-mini"),), marks=("val.png",),
    ),
    "pet37": CatalogEntry(
        "The Oxford-IIIT Pet Dataset", published.pet37, {"train": 3312, "val": 368, "test": 3669}, 37,
        "CC BY-SA 4.0", "Parkhi, Vedaldi, Zisserman & Jawahar, Cats and Dogs, CVPR 2012",
        "oxford-iiit-pet", ("images", "annotations"),
        (f"{OXFORD}/pets/data/images.tar.gz", f"{OXFORD}/pets/data/annotations.tar.gz"),
        ("OxfordIIITPet", {"split": "trainval"}), archive_folder="oxford-iiit-pet",
    ),
    "flowers102": CatalogEntry(
        "102 Category Flower Dataset", published.flowers102, {"train": 1020, "val": 1020, "test": 6149}, 102,
        "not stated; for research", "Nilsback & Zisserman, Automated Flower Classification, ICVGIP 2008",
        "flowers-102", ("jpg", "imagelabels.mat", "setid.mat"),
        tuple(f"{OXFORD}/flowers/102/{file}" for file in ("102flowers.tgz", "imagelabels.mat", "setid.mat")),
        ("Flowers102", {"split": "train"}), archive_folder="flowers-102",
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
        "SUN397", ("ClassName.txt",), ("SUN397.tar.gz (37 GB, 108,753 images; its original address is gone)",),
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
        ("FashionMNIST", {}), ("/usr/share/datasets/fashion-mnist",), files_as_published=True,
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
    """Returns the folder of data sets: the given one, else `$FUNMATCH_DATA`, else `data` in our cache folder."""
    if data_dir or (os.environ.get("FUNMATCH_DATA")):
        return Path(data_dir or os.environ["FUNMATCH_DATA"]).expanduser()
    return user_cache() / "data"


def open_named(name: str, data_dir: Path | None = None) -> Dataset:
    """Lists a data set of the catalog, and downloads it first if it is missing.

    Raises:
        InputError: it is missing and cannot be downloaded; the message says which files to put where.
    """
    entry = CATALOG[name]
    home = data_home(data_dir)
    root = _find(entry, home)
    if root is None:
        _download(name, entry, home)
        root = home / entry.folder
    return replace(entry.layout(root), name=name, published_counts=entry.counts, location=str(root))


def _find(entry: CatalogEntry, home: Path) -> Path | None:
    """Returns the folder of a data set: below the folder of data sets, that folder itself, or elsewhere."""
    # Embedded data sets have no folder of their own there; an empty name would mean the folder of data sets itself.
    places = [home / entry.folder, home] if entry.folder else []
    return next((place for place in [*places, *map(Path, entry.elsewhere)] if entry.is_in(place)), None)


def found_under(name: str, top: Path, levels: int) -> Path | None:
    """Returns the folder below `top` that holds a data set and can be read, whatever the folder is called."""
    entry = CATALOG[name]
    for folder in folders_under(top, levels):
        if entry.is_in(folder):
            # Other data sets have folders of the same names ("images", "train"), so only reading it decides.
            with suppress(InputError):
                entry.layout(folder)
                return folder
    return None


def folders_under(top: Path, levels: int) -> Iterator[Path]:
    """Yields a folder and the folders in it, down to a number of levels, upper levels first."""
    inside = [top] if top.is_dir() else []
    yield from inside
    for _ in range(levels):
        inside = [path for folder in inside for path in _subfolders(folder)]
        yield from inside


def _subfolders(folder: Path) -> list[Path]:
    # scandir knows which entries are folders; Path.is_dir would ask the disk about each of perhaps a million files.
    with os.scandir(folder) as entries:
        # Sorted, since file systems list in different orders and the first match is taken.
        return sorted(Path(entry.path) for entry in entries if entry.is_dir())


def _download(name: str, entry: CatalogEntry, home: Path) -> None:
    """Downloads a data set into a folder beside its place, and moves it there once it is complete."""
    advice = _manual_steps(entry, home)
    if entry.torchvision is None:
        raise InputError(f"{name} ({entry.title}) cannot be downloaded automatically; {advice}")
    # Here, since importing it is slow and few commands download.
    import torchvision.datasets

    class_name, options = entry.torchvision
    # A name that `_find` never looks at: a download that was interrupted while unpacking must not pass for the data.
    partial = home / f".{name}.partial"
    top = Path(entry.folder).parts[0]
    # Checked before it is made, so that a failed download leaves no empty folder behind.
    new_home = not home.exists()
    partial.mkdir(parents=True, exist_ok=True)
    _remove_all_but_archives(entry, partial)
    _link_archives(entry, home, partial)
    try:
        # torchvision prints its progress to standard output, which is for results.
        with disk_errors(home), redirect_stdout(sys.stderr), _network_timeout():
            getattr(torchvision.datasets, class_name)(str(partial), download=True, **options)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        if isinstance(error, OSError) and error.filename:
            raise  # the disk failed, not the network
        _remove_all_but_archives(entry, partial)
        # rmdir fails on folders that still hold complete archives or the user's own files, which must stay.
        for folder in (partial / top, partial, *([home] if new_home else [])):
            with suppress(OSError):
                folder.rmdir()
        raise InputError(f"{name} ({entry.title}) could not be downloaded: {first_line(error)}; {advice}") from None
    (home / top).mkdir(exist_ok=True)
    # One by one: the folder itself may exist already, with archives that the user has put there.
    for path in (partial / top).iterdir():
        if not path.name.endswith((".tar.gz", ".tgz")):
            path.replace(home / top / path.name)
    shutil.rmtree(partial)  # with the archives, which are not needed once unpacked


def _remove_all_but_archives(entry: CatalogEntry, partial: Path) -> None:
    """Removes what an earlier attempt unpacked, perhaps incompletely."""
    # Archives may stay: torchvision verifies their checksums before it unpacks them.
    archives = {Path(address).name for address in entry.files}
    # Deepest first: a folder is looked at when all that was in it is gone.
    for path in sorted(partial.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name not in archives:
            path.unlink()


def _manual_steps(entry: CatalogEntry, home: Path) -> str:
    place = home / entry.folder
    marks = f", so that it contains {', '.join(entry.marks)}" if entry.marks else ""
    unpacked = ", unpacked" if entry.marks else ""
    return (
        f"put {' and '.join(entry.files)} into {place}{unpacked}{marks}; or pass --data-dir, the folder that contains "
        f"{Path(entry.folder).parts[0]}"
    )


def _link_archives(entry: CatalogEntry, home: Path, partial: Path) -> None:
    """Links archives that the user downloaded, so that torchvision does not download them again."""
    target = partial / entry.archive_folder
    for file in entry.archives:
        for place in (home / entry.folder, home):
            # Links, not copies: archives have gigabytes.
            if (place / file).is_file() and not (target / file).exists():
                target.mkdir(parents=True, exist_ok=True)
                # Absolute: a relative path would be looked up from the link's own folder.
                os.symlink((place / file).resolve(), target / file)


@contextmanager
def _network_timeout():
    """Limits the time that a server may stay silent: urllib would wait forever."""
    # torchvision has no option for this, so the default of all new sockets is changed for a while.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS_OF_SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
