"""Published data sets in exactly the layout of their archives, against torchvision; readers and their prefixes."""

import gzip
import hashlib
import json
import struct
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from make_images import paint
from scipy.io import savemat

from funmatch.data.cache.open_cache import open_cache
from funmatch.data.dataset import ReadOptions, SplitSpec
from funmatch.data.readers import catalog
from funmatch.data.readers.catalog import CATALOG, open_named
from funmatch.data.readers.open import open_dataset, resolve_spec
from funmatch.errors import InputError


@pytest.fixture(name="home")
def data_home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FUNMATCH_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(catalog, "SECONDS_OF_SILENCE", 2.0)  # no test waits as long as a user would
    return tmp_path / "data"


def write_pets(home: Path, breeds=("Abyssinian", "american_bulldog", "Birman"), each=10) -> Path:
    root = home / "oxford-iiit-pet"
    (root / "annotations").mkdir(parents=True)
    for split, first in (("trainval", 0), ("test", 100)):
        lines = [f"{breed}_{first + i} {b + 1} 1 1" for b, breed in enumerate(breeds) for i in range(each)]
        (root / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for k, line in enumerate(lines):
            paint(root / "images" / f"{line.split()[0]}.jpg", first + k)
    (root / "images" / "Abyssinian_100.mat").write_bytes(b"there are some")
    return root


def test_lists_that_name_files_elsewhere_are_refused(home):
    root = write_pets(home)
    path = root / "annotations" / "test.txt"
    path.write_text(path.read_text() + "Birman/../../../../secret_1 1 1 1\n")
    with pytest.raises(InputError, match=r"oxford-iiit-pet lists 'images/.*secret_1\.jpg', which is outside it"):
        open_named("pet37")


def test_pets_equal_torchvisions(home):
    write_pets(home)
    source = open_named("pet37")
    assert source.classes == ("Abyssinian", "American Bulldog", "Birman")
    theirs = torchvision.datasets.OxfordIIITPet(str(home), split="test")
    assert list(source.classes) == theirs.classes
    assert source.splits["test"].labels.tolist() == theirs._labels
    assert [str(home / "oxford-iiit-pet" / name) for name in source.splits["test"].names] == list(
        map(str, theirs._images)
    )
    cache = open_cache("pet37")
    assert {name: len(split) for name, split in cache.splits.items()} == {"train": 27, "val": 3, "test": 30}
    assert len(open_cache("pet37", ReadOptions(split_spec=SplitSpec({"val": 9}))).splits["val"]) == 9
    assert "val" not in open_cache("pet37", ReadOptions(split_spec=SplitSpec({"val": 0}))).splits, "--val none"


def write_flowers(home: Path) -> Path:
    root = home / "flowers-102"
    for i in range(1, 13):
        paint(root / "jpg" / f"image_{i:05}.jpg", i)
    labels = np.array([1, 2, 102] * 4, np.uint8)
    savemat(root / "imagelabels.mat", {"labels": labels[None]})
    savemat(root / "setid.mat", {"trnid": [[3, 1, 2]], "valid": [[4, 5]], "tstid": [[6, 7, 8, 9, 10, 11, 12]]})
    return root


def test_flowers_equal_torchvisions(home, monkeypatch):
    root = write_flowers(home)
    source = open_named("flowers102")
    assert source.classes[:2] == ("pink primrose", "hard-leaved pocket orchid")
    assert len(source.classes) == 102
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 3, "val": 2, "test": 7}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda _: True)
    for split in ("train", "val", "test"):
        theirs = torchvision.datasets.Flowers102(str(home), split=split)
        assert source.splits[split].labels.tolist() == theirs._labels
        assert [name.partition("/")[2] for name in source.splits[split].names] == [p.name for p in theirs._image_files]
    assert open_cache("flowers102").splits["val"].labels(slice(None)).tolist() == [0, 1]
    (root / "setid.mat").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"cannot read .*setid\.mat"):
        open_named("flowers102")


def write_food(home: Path) -> Path:
    root = home / "food-101"
    (root / "meta").mkdir(parents=True)
    for split, first in (("train", 0), ("test", 50)):
        meta = {name: [f"{name}/{first + i}" for i in range(10)] for name in ("waffles", "apple_pie")}
        (root / "meta" / f"{split}.json").write_text(json.dumps(meta))
        for i, image in enumerate(image for found in meta.values() for image in found):
            paint(root / "images" / f"{image}.jpg", first + i)
    return root


def test_food_equals_torchvisions(home):
    root = write_food(home)
    source = open_named("food101")
    theirs = torchvision.datasets.Food101(str(home), split="test")
    assert list(source.classes) == theirs.classes == ["apple_pie", "waffles"]
    ours = dict(zip(source.splits["test"].names, source.splits["test"].labels.tolist(), strict=True))
    assert ours == {
        p.relative_to(root).as_posix(): label for p, label in zip(theirs._image_files, theirs._labels, strict=True)
    }
    assert {name: len(split) for name, split in open_cache("food101").splits.items()} == {
        "train": 18,
        "val": 2,
        "test": 20,
    }
    (root / "images" / "waffles" / "3.jpg").unlink()
    with pytest.raises(InputError, match=r"1 unreadable image in food101.*\n.*waffles/3\.jpg: No such file"):
        open_cache("food101")


def write_sun(home: Path) -> Path:
    root = home / "SUN397"
    names = ["/a/abbey", "/a/apartment_building/outdoor", "/z/zoo"]
    for n, name in enumerate(names):
        for i in range(10):
            paint(root / name[1:] / f"sun_{i:03}.jpg", 100 * n + i)
    (root / "ClassName.txt").write_text("\n".join(names) + "\n")
    return root


def test_sun_equals_torchvisions(home):
    write_sun(home)
    theirs = torchvision.datasets.SUN397(str(home))
    cache = open_cache("sun397")
    assert list(cache.classes) == theirs.classes == ["abbey", "apartment_building/outdoor", "zoo"]
    assert {name: len(split) for name, split in cache.splits.items()} == {"train": 21, "val": 3, "test": 6}
    assert sum(CATALOG["sun397"].counts.values()) == 108_753


def test_split_shares_of_sun_give_the_published_counts():
    (test, val), n = (catalog.published.SUN_SPLIT.shares[name] for name in ("test", "val")), 108_753
    assert {"train": n - int(test * n) - int(val * n), "val": int(val * n), "test": int(test * n)} == CATALOG[
        "sun397"
    ].counts


def test_sun_is_split_by_its_published_lists(home):
    root = write_sun(home)
    for file, images in (
        ("tr", ["/a/abbey/sun_001.jpg", "/z/zoo/sun_000.jpg"]),
        ("va", ["a/abbey/sun_002.jpg"]),
        ("te", ["z/zoo/sun_009.jpg"]),
    ):
        (root / f"sun397_tfds_{file}.txt").write_text("\n".join(images) + "\n")
    source = open_named("sun397")
    assert {name: list(split.names) for name, split in source.splits.items()} == {
        "train": ["a/abbey/sun_001.jpg", "z/zoo/sun_000.jpg"],
        "val": ["a/abbey/sun_002.jpg"],
        "test": ["z/zoo/sun_009.jpg"],
    }
    assert source.splits["train"].labels.tolist() == [0, 2]


def write_idx(path: Path, values: np.ndarray, packed: bool) -> None:
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if packed else content)


@pytest.mark.parametrize("packed", [True, False])
def test_fashion_mnist_equals_torchvisions(home, packed, monkeypatch):
    monkeypatch.setitem(CATALOG, "fashion-mnist", catalog.replace(CATALOG["fashion-mnist"], elsewhere=()))
    rng = np.random.default_rng(0)
    raw = home / "FashionMNIST" / "raw"
    for prefix, count in (("train", 20), ("t10k", 10)):
        end = ".gz" if packed else ""
        write_idx(
            raw / f"{prefix}-images-idx3-ubyte{end}", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), packed
        )
        write_idx(raw / f"{prefix}-labels-idx1-ubyte{end}", np.arange(count, dtype=np.uint8) % 10, packed)
    source = open_named("fashion-mnist")
    assert source.classes[0] == "T-shirt/top"
    assert {name: len(split) for name, split in open_cache("fashion-mnist").splits.items()} == {
        "train": 18,
        "val": 2,
        "test": 10,
    }
    if not packed:
        theirs = torchvision.datasets.FashionMNIST(str(home), train=False)
        cache = open_cache("fashion-mnist")
        assert np.array_equal(cache.splits["test"].image(3)[:, :, 0].numpy(), theirs.data[3].numpy())
        file = raw / "t10k-labels-idx1-ubyte"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte is damaged"):
            open_named("fashion-mnist")


def test_imagenet_is_read_from_the_users_folder(home):
    for split in ("train", "val"):
        for wnid in ("n01440764", "n01443537"):
            paint(home / "imagenet" / split / wnid / f"{wnid}_1.JPEG", hash((split, wnid)) % 1000)
    source = open_named("imagenet")
    assert source.classes == ("n01440764", "n01443537")
    assert list(source.splits) == ["train", "val"]


@pytest.mark.parametrize("name", [name for name, entry in CATALOG.items() if entry.folder])
def test_error_names_folder_and_files_if_the_download_fails(name, home, monkeypatch):
    import urllib.error
    import urllib.request

    def no_network(*_args, **_options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    entry = catalog.replace(CATALOG[name], elsewhere=())
    monkeypatch.setitem(CATALOG, name, entry)
    with pytest.raises(InputError) as error:
        open_named(name)
    assert str(home / entry.folder) in str(error.value)
    for file in entry.files:
        assert file in str(error.value)
    assert "--data-dir" in str(error.value)


def test_interrupted_download_starts_over_and_keeps_whole_archives(home, monkeypatch):
    """A download killed while unpacking starts over from the archive; only a complete folder gets its final name."""
    partial = home / ".pet37.partial"
    write_pets(partial, each=2)
    archive = partial / "oxford-iiit-pet" / "images.tar.gz"
    archive.write_bytes(b"a downloaded archive")

    def fetch(root: str, **_options) -> None:
        assert archive.exists()
        assert not (Path(root) / "oxford-iiit-pet" / "annotations").exists()
        write_pets(Path(root), each=3)

    monkeypatch.setattr(torchvision.datasets, "OxfordIIITPet", fetch)
    assert len(open_named("pet37").splits["train"]) == 9
    assert not partial.exists()
    assert sorted(path.name for path in (home / "oxford-iiit-pet").iterdir()) == ["annotations", "images"]


def test_folder_of_the_data_set_can_be_given(home, tmp_path):
    root = write_pets(home)
    assert open_named("pet37", root).classes
    root.rename(tmp_path / "mine")
    assert open_named("pet37", tmp_path / "mine").classes


def test_every_catalog_entry_is_described():
    for name, entry in CATALOG.items():
        assert entry.title and entry.licence and entry.citation and entry.classes, name  # noqa: PT018
        assert set(entry.counts) <= {"train", "val", "test"}


def test_reader_prefixes(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_dataset(f"folder:{images}").classes == ("ant", "bee", "cat")
    assert resolve_spec("folder:pictures") == f"folder:{tmp_path}/pictures"
    assert resolve_spec("pictures") == f"{tmp_path}/pictures"
    assert resolve_spec("pet37") == "pet37"
    assert resolve_spec("hf:user/name") == "hf:user/name"
    assert resolve_spec("tfrecord:a/*.tfrec") == f"tfrecord:{tmp_path}/a/*.tfrec"
    with pytest.raises(InputError, match="has no location"):
        open_dataset("folder:")
    with pytest.raises(InputError, match="did you mean 'pet37'"):
        open_dataset("pet38")


def test_several_folders_are_joined(tmp_path, images):
    for i in range(3):
        paint(tmp_path / "more" / "train" / "dog" / f"{i}.png", 500 + i)
        paint(tmp_path / "more" / "train" / "bee" / f"{i}.png", 600 + i)
    source = open_dataset([str(images), str(tmp_path / "more")])
    assert source.classes == ("ant", "bee", "cat", "dog")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 21, "val": 9, "test": 12}
    assert np.bincount(source.splits["train"].labels).tolist() == [5, 8, 5, 3]
    assert source.splits["train"].names[-1] == "more/train/dog/2.png"
    assert source.read("train", 20) == (tmp_path / "more" / "train" / "dog" / "2.png").read_bytes()
    paint(tmp_path / "loose" / "x.png", 1)
    mixed = open_dataset([str(images), str(tmp_path / "loose")])
    assert mixed.splits["train"].labels.tolist()[-1] == -1
    assert not mixed.splits["train"].labelled
    assert mixed.splits["val"].labelled


def test_classes_that_differ_only_in_case_are_rejected(images):
    paint(images / "val" / "Ant" / "0.png", 1)
    with pytest.raises(InputError, match="'Ant' and 'ant' differ only in case"):
        open_dataset(str(images))


def test_folder_layouts(tmp_path):
    for name in ("x", "y"):
        paint(tmp_path / "classes" / name / "deep" / "a.png", ord(name))
    assert open_dataset(str(tmp_path / "classes")).classes == ("x", "y")
    assert open_dataset(str(tmp_path / "classes" / "x")).classes == (), "a single folder is not a class"
    paint(tmp_path / "classes" / "loose.png", 1)
    loose = open_dataset(str(tmp_path / "classes"))
    assert loose.classes == ()
    assert "images lie beside folders, e.g. loose.png, so folders are not read as classes" in loose.notes[0]
    (tmp_path / "classes" / "x" / "b.heic").write_bytes(b"?")
    assert "skipped 1 files in" in open_dataset(str(tmp_path / "classes")).notes[1]


def test_images_outside_the_splits_are_an_error(images):
    paint(images / "evaluation" / "ant" / "0.png", 1)
    with pytest.raises(InputError, match="has images in evaluation beside the splits test, train, val"):
        open_dataset(str(images))


def test_names_with_quotes_and_markup_are_shown_unchanged(tmp_path, funmatch):
    names = [
        "<b>bold</b>".replace("/", "∕"),
        'it\'s "quoted"',
        "[red]x[/red]".replace("/", "∕"),
        "new\nline",
        "$\\frac{1}$",
    ]
    for i, name in enumerate(names):
        for k in range(3):
            paint(tmp_path / "p" / "train" / name / f"{k} [bold].png", 10 * i + k)
    found = json.loads(funmatch("data", "p", "--json").stdout)
    assert sorted(found["classes"]) == sorted(names)
    output = funmatch("data", "p").stdout
    assert names[0] in output
    assert names[2] in output
    assert Path(tmp_path / "p-sheet.png").stat().st_size > 1000


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass


@pytest.fixture(name="server")
def local_server(tmp_path):
    """Serves the folder `server` on the loopback interface."""
    handler = partial(QuietHandler, directory=str(tmp_path / "server"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_archives_are_downloaded_checked_and_unpacked(home, server, tmp_path, monkeypatch, capfd):
    """Uses torchvision's own download, from a local server in place of Oxford's."""
    root = write_pets(tmp_path / "made", each=4)
    resources = []
    for name in ("images", "annotations"):
        archive = tmp_path / "server" / f"{name}.tar.gz"
        archive.parent.mkdir(exist_ok=True)
        with tarfile.open(archive, "w:gz") as file:
            file.add(root / name, name)
        resources.append((f"{server}/{name}.tar.gz", hashlib.md5(archive.read_bytes()).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.OxfordIIITPet, "_RESOURCES", (resources[0], (resources[1][0], "0" * 32)))
    with pytest.raises(InputError, match="could not be downloaded"):
        open_named("pet37")
    assert not (home / "oxford-iiit-pet").exists()
    assert (home / ".pet37.partial" / "oxford-iiit-pet" / "images.tar.gz").exists(), (
        "kept, so that it is downloaded only once"
    )
    monkeypatch.setattr(torchvision.datasets.OxfordIIITPet, "_RESOURCES", tuple(resources))
    (tmp_path / "server" / "images.tar.gz").unlink()
    source = open_named("pet37")
    assert len(source.splits["train"]) == 12
    assert {path.name for path in home.iterdir()} == {"oxford-iiit-pet"}
    assert "100%" in capfd.readouterr().err, "shows a progress bar"


def test_archives_already_in_the_folder_are_used(home, tmp_path, monkeypatch):
    root = write_pets(tmp_path / "made", each=4)
    folder = home / "oxford-iiit-pet"
    folder.mkdir(parents=True)
    resources = []
    for name in ("images", "annotations"):
        with tarfile.open(folder / f"{name}.tar.gz", "w:gz") as file:
            file.add(root / name, name)
        digest = hashlib.md5((folder / f"{name}.tar.gz").read_bytes()).hexdigest()
        resources.append((f"file:///nowhere/{name}.tar.gz", digest))
    monkeypatch.setattr(torchvision.datasets.OxfordIIITPet, "_RESOURCES", tuple(resources))
    assert len(open_named("pet37").splits["test"]) == 12
    assert (folder / "images.tar.gz").is_file()
