"""From files to batches: folder layouts, the decoded cache, and the loader's batches."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from make_images import paint
from PIL import Image

from funmatch.data.cache import build
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.decode import decode
from funmatch.data.loader import Loader
from funmatch.data.prefetch import prefetch
from funmatch.data.readers.folder import open_folder
from funmatch.data.readers.open import READERS, Reader, local_folder, open_dataset, resolve_spec
from funmatch.errors import InputError
from funmatch.ops.crops import crop_resize_flip
from funmatch.ops.view_spec import Preprocessing, ViewSpec
from funmatch.training.evaluation.scoring import central_batches


def test_folder_gives_splits_classes_and_labels(images):
    folder = open_folder(images)
    assert folder.classes == ("ant", "bee", "cat")
    assert {name: len(split.names) for name, split in folder.splits.items()} == {"train": 15, "val": 9, "test": 12}
    assert folder.splits["val"].labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert folder.splits["val"].names[3] == "val/bee/0.jpg"


def test_a_folder_without_splits_is_unlabelled_at_any_depth(tmp_path):
    paint(tmp_path / "a.JPG", 0)
    paint(tmp_path / "deep" / "er" / "b.png", 1)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    paint(tmp_path / ".hidden" / "c.png", 2)
    folder = open_folder(tmp_path)
    assert folder.splits["train"].names == ["a.JPG", "deep/er/b.png"]
    assert not folder.splits["train"].labelled
    assert folder.classes == ()


def test_one_split_can_be_unlabelled(images):
    shutil.rmtree(images / "train")
    paint(images / "train" / "x.png", 5)
    folder = open_folder(images)
    assert not folder.splits["train"].labelled
    assert folder.splits["val"].labelled


def test_split_names_have_aliases(images):
    (images / "val").rename(images / "Validation")
    assert list(open_folder(images).splits) == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), "missing"),
        (lambda root: [shutil.rmtree(path) for path in root.iterdir()], "no image"),
        (lambda root: [path.unlink() for path in (root / "val").rglob("*.*")], "val has no images"),
        (lambda root: paint(root / "train" / "loose.png", 0), "beside class folders"),
        (lambda root: shutil.copytree(root / "val", root / "valid"), "both"),
    ],
)
def test_unusable_folders_are_rejected(images, damage, message):
    damage(images)
    with pytest.raises(InputError, match=message):
        open_folder(images)


def test_unknown_data_set_suggests_near_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="did you mean 'fashion-mini'"):
        open_dataset("fashion_mini")
    with pytest.raises(InputError, match="no folder"):
        open_dataset("./nowhere")


def test_cache_holds_the_decoded_pixels(images):
    cache = open_cache(str(images))
    split = cache.splits["train"]
    assert cache.classes == ("ant", "bee", "cat")
    for i, name in enumerate(open_folder(images).splits["train"].names):
        expected = decode((images / name).read_bytes())
        assert torch.equal(split.image(i), torch.from_numpy(expected.copy()))
    assert split.labels(np.arange(15)).tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_cap_shrinks_large_images(tmp_path):
    paint(tmp_path / "a.png", 0, (90, 60))
    cache = open_cache(str(tmp_path), cache_options=CacheOptions(cap=30))
    assert cache.splits["train"].image(0).shape == (30, 45, 3)


def test_cache_key_depends_on_content_and_not_on_path(images, tmp_path, monkeypatch):
    decoded = []
    original = build._fill
    monkeypatch.setattr(build, "_fill", lambda *args: decoded.append(1) or original(*args))
    home = tmp_path / "home"
    key = open_cache(str(images), cache_options=CacheOptions(home=home)).key
    assert open_cache(str(images), cache_options=CacheOptions(home=home)).key == key
    images.rename(tmp_path / "moved")
    assert open_cache(str(tmp_path / "moved"), cache_options=CacheOptions(home=home)).key == key
    assert len(decoded) == 1
    changed = tmp_path / "moved" / "train" / "ant" / "0.jpg"
    paint(changed, 999)
    assert open_cache(str(tmp_path / "moved"), cache_options=CacheOptions(home=home)).key != key
    assert len(decoded) == 2


def test_changed_image_of_the_same_size_changes_the_key(tmp_path):
    for name in ("a", "b"):
        Image.fromarray(np.full((4, 4, 3), ord(name), np.uint8)).save(tmp_path / f"{name}.bmp")
    before = open_cache(str(tmp_path)).key
    a = tmp_path / "a.bmp"
    size = a.stat().st_size
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(a)
    assert a.stat().st_size == size
    assert open_cache(str(tmp_path)).key != before


def test_all_unreadable_images_are_named_and_no_cache_is_left(images, tmp_path):
    content = (images / "train" / "ant" / "0.jpg").read_bytes()
    (images / "train" / "ant" / "0.jpg").write_bytes(content[: len(content) // 2])
    (images / "val" / "bee" / "1.png").write_text("not an image at all")
    (images / "test" / "cat" / "2.webp").write_bytes(b"")
    home = tmp_path / "home"
    with pytest.raises(InputError) as error:
        open_cache(str(images), cache_options=CacheOptions(home=home))
    message = str(error.value)
    assert message.startswith("3 unreadable images")
    for name in ("train/ant/0.jpg", "val/bee/1.png", "test/cat/2.webp"):
        assert name in message
    assert not [path for path in home.iterdir() if path.is_dir() and path.name != "surveys"], "nothing half-written"


def test_truncated_cache_is_rebuilt(images, tmp_path):
    home = tmp_path / "home"
    cache = open_cache(str(images), cache_options=CacheOptions(home=home))
    image = cache.splits["train"].image(3).clone()
    file = cache.folder / "train.pixels"
    os.truncate(file, file.stat().st_size - 1)
    assert torch.equal(open_cache(str(images), cache_options=CacheOptions(home=home)).splits["train"].image(3), image)


def test_the_embedded_set_is_balanced_and_its_splits_are_distinct():
    cache = open_cache("fashion-mini")
    assert {name: len(split) for name, split in cache.splits.items()} == {"train": 200, "val": 500, "test": 2000}
    first_split: dict[bytes, str] = {}
    for name, split in cache.splits.items():
        assert split.labels(slice(None)).bincount().tolist() == [len(split) // 10] * 10
        for i in range(len(split)):
            assert first_split.setdefault(split.image(i).numpy().tobytes(), name) == name, "an image in two splits"
    assert len(first_split) == 2700


@pytest.fixture(name="loader")
def small_loader(images) -> Loader:
    return Loader(open_cache(str(images)).splits["train"], ViewSpec(seed=1, batch=8, side=12))


def test_batch_equals_its_sampled_crops_cropped_alone(loader):
    drawn, batch = loader.sample(5), loader.batch_at(5)
    images = [loader.split.image(i) for i in drawn.indices]
    expected = crop_resize_flip(images, drawn.boxes, drawn.flips, 12)
    assert torch.equal(batch.crops[1:], expected)
    assert torch.equal(batch.crops[0], expected[-1]), "the first image's partner is the last of the batch"
    assert torch.equal(batch.labels[1:], loader.split.labels(drawn.indices))
    assert batch.lam == drawn.lam


@pytest.mark.parametrize("world", [2, 4])
def test_slices_of_processes_are_the_global_batch(loader, world):
    content = loader.batch_at(3)
    share = 8 // world
    for rank in range(world):
        part = Loader(loader.split, ViewSpec(1, 8, 12), rank, world).batch_at(3)
        rows = [(rank * share - 1) % 8, *range(rank * share, (rank + 1) * share)]
        assert torch.equal(part.crops, content.crops[1:][rows])
        assert torch.equal(part.labels, content.labels[1:][rows])
        assert part.lam == content.lam


@pytest.mark.parametrize("workers", [1, 3])
def test_prefetching_changes_nothing(loader, workers):
    expected = [loader.batch_at(step).crops for step in range(2, 9)]
    found = [batch.crops for batch in prefetch(loader, 2, 9, workers=workers)]
    assert len(found) == 7
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_error_in_a_prefetch_thread_reaches_the_caller(loader, monkeypatch):
    monkeypatch.setattr(Loader, "batch_at", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(prefetch(loader, 0, 4))


def test_evaluation_sees_every_image_once_in_order(loader):
    batches = list(central_batches(loader.split, Preprocessing(side=12, short_side=15), 4))
    assert [len(views) for views, _ in batches] == [4, 4, 4, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_cap_is_part_of_the_cache_key(images):
    assert open_cache(str(images)).key != open_cache(str(images), cache_options=CacheOptions(cap=10)).key


def test_meta_file_describes_the_cache(images):
    cache = open_cache(str(images))
    meta = json.loads((cache.folder / "meta.json").read_text())
    assert meta["splits"] == ["train", "val", "test"]
    assert meta["sizes"]["val.pixels"] == sum(p.numel() for p in map(cache.splits["val"].image, range(9)))


def test_links_that_are_broken_circular_or_lead_outside(tmp_path):
    paint(tmp_path / "p" / "a.png", 0)
    (tmp_path / "p" / "deep").mkdir()
    (tmp_path / "p" / "deep" / "back").symlink_to(tmp_path / "p")
    assert open_folder(tmp_path / "p").splits["train"].names == ["a.png"]
    (tmp_path / "p2").mkdir()
    (tmp_path / "p2" / "beside").symlink_to(
        tmp_path / "p"
    )  # its path starts with this folder's name, yet it is not inside it
    assert open_folder(tmp_path / "p2", follow_links=True).splits["train"].names == ["beside/a.png"]
    with pytest.raises(InputError, match=r"p2/beside is a link that leads out of .*--follow-links"):
        open_folder(tmp_path / "p2")
    (tmp_path / "p" / "b.png").symlink_to(tmp_path / "p" / "nowhere.png")
    with pytest.raises(InputError, match=r"1 unreadable image in .*\n.*b\.png: No such file"):
        open_cache(str(tmp_path / "p"))


def test_folders_that_link_to_each_other_are_read_once_from_each(tmp_path):
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        paint(tmp_path / "p" / "deep" / name / "0.png", ord(name))
        (tmp_path / "p" / "deep" / name / "next").symlink_to(os.path.join("..", other))
    names = open_folder(tmp_path / "p").splits["train"].names
    assert len(names) == 9, "three images, each found by three ways; not until the system refuses so many links"
    assert "deep/a/next/next/0.png" in names


def test_a_new_reader_needs_one_row_only(tmp_path, images, monkeypatch):
    """Messages, absolute specs and suggestions follow from the row alone."""

    def open_list(*_):
        return open_folder(images)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(READERS, "list", Reader(open_list, "FILE", files=("*.lst",)))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.lst").write_text("")
    assert open_dataset("list:lists/a.lst").classes == ("ant", "bee", "cat")
    assert resolve_spec("list:lists/a.lst") == f"list:{tmp_path}/lists/a.lst"
    assert local_folder("list:lists") == tmp_path / "lists"
    for spec, message in {
        "list:": "expected list:FILE",
        "lists": r"lists has no images; for \*\.lst, pass list:lists; otherwise expected <split>/<class>/",
        "lists/a.lst": r"a\.lst is a file, not a folder of images; for \*\.lst, pass list:lists/a\.lst",
        "nothing": "other sources: folder:PATH, .*, list:FILE$",
    }.items():
        with pytest.raises(InputError, match=message):
            open_dataset(spec)


def test_label_tables_are_reported_as_not_read(tmp_path):
    paint(tmp_path / "p" / "a.png", 0)
    (tmp_path / "p" / "labels.csv").write_text("a.png,cat\n")
    assert any(
        "labels.csv is not read; labels come from folder names" in note for note in open_folder(tmp_path / "p").notes
    )
    with pytest.raises(InputError, match=r"labels\.csv: the first line \(a\.png, cat\) is of an image; put a line"):
        open_dataset(str(tmp_path / "p" / "labels.csv"))


def test_classes_that_a_split_lacks_are_noted(images):
    for path in (images / "test" / "bee").iterdir():
        path.unlink()
    assert open_folder(images).notes == (
        f"{images}: test has no images of 1 of 3 classes, about which its metrics say nothing: bee",
    )


def test_classes_without_training_images_are_noted(images, tmp_path):
    assert open_folder(images).notes == ()
    paint(images / "test" / "dog" / "0.png", 1)
    (images / "train" / "eel").mkdir()
    assert open_folder(images).notes == (
        f"WARNING: {images} has no training images of 1 of 5 classes, which only test has: dog",
        f"{images}: 1 of 5 classes have no images in any split: eel",
    )
    paint(tmp_path / "one" / "train" / "ant" / "0.png", 1)
    assert "has a single class, ant" in open_folder(tmp_path / "one").notes[0]
