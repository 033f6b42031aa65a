"""Tests images of several classes: from folders to the labels of batches."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from funmatch.data.cache.check import LABEL_SETS
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.dataset import ReadOptions, SplitSpec
from funmatch.data.label_sets import number_sets
from funmatch.data.loader import Loader
from funmatch.ops.view_spec import ViewSpec

SETS = [("a",), ("a", "b"), ("c",), ("a", "b", "c"), ("b",), ("a",), ("b", "c"), ("c",), ("a", "c"), ("b",)]
MULTI = ReadOptions(task="multilabel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Each image in the folder of each of its classes, under other names."""
    root = tmp_path_factory.mktemp("several") / "photos"
    for number, classes in enumerate(SETS):
        image = Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8))
        for name in classes:
            (root / name).mkdir(parents=True, exist_ok=True)
            image.save(root / name / f"{name}-{number}.png")
    return root


def targets():
    return [[float(name in classes) for name in "abc"] for classes in SETS]


def rows(split):
    """The number of each image, by its pixels."""
    return [int(image[0, 0, 0]) // 20 for image in split.images(np.arange(len(split)))]


def test_an_image_in_several_folders_has_all_their_classes(folder, tmp_path):
    said = []
    cache = open_cache(str(folder), MULTI, CacheOptions(home=tmp_path), log=said.append)
    split = cache.splits["train"]
    assert len(split) == len(SETS)
    assert split.labels(slice(None)).tolist() == [targets()[number] for number in rows(split)]
    assert split.class_counts(3).tolist() == [5, 5, 5]
    assert any("5 images of the same content" in line for line in said)
    # The same images with one class each are another cache, and what is held out keeps an image's copies together.
    single = open_cache(str(folder), ReadOptions(), CacheOptions(home=tmp_path), log=said.append)
    assert single.key != cache.key
    assert len(single.splits["train"]) == sum(map(len, SETS))
    cut = open_cache(
        str(folder),
        ReadOptions(task="multilabel", split_spec=SplitSpec({"val": Fraction(1, 5)})),
        CacheOptions(home=tmp_path),
    )
    assert sorted(rows(cut.splits["train"]) + rows(cut.splits["val"])) == list(range(len(SETS)))
    val = cut.splits["val"]
    assert val.labels(slice(None)).tolist() == [targets()[number] for number in rows(val)]


def test_batches_have_a_row_of_labels_an_image(folder, tmp_path):
    split = open_cache(str(folder), MULTI, CacheOptions(home=tmp_path)).splits["train"]
    loader = Loader(split, ViewSpec(seed=0, batch=4, side=8))
    batch = loader.batch_at(3)
    assert (batch.labels.shape, batch.labels.dtype, len(batch)) == ((5, 3), torch.float32, 4)
    pieces = [piece.labels for piece, _ in batch.pieces(2)]
    assert [each.tolist() for each in pieces] == [batch.labels[:3].tolist(), batch.labels[2:].tolist()]
    halves = [Loader(split, loader.spec, rank, 2).batch_at(3).labels for rank in (0, 1)]
    assert [each.tolist() for each in halves] == [batch.labels[:3].tolist(), batch.labels[2:].tolist()]


def test_without_labels_there_are_no_sets(folder, tmp_path):
    split = open_cache(str(folder), MULTI, CacheOptions(home=tmp_path)).without_labels().splits["train"]
    assert not split.labelled
    assert split.labels([0, 1]).tolist() == [-1, -1]
    # An image of its own without a label beside those that have some.
    some = open_cache(str(folder), MULTI, CacheOptions(home=tmp_path)).splits["train"]
    index = np.array(some.index)
    index["label"][1] = -1
    assert type(some)(some.name, index, some.store, some.digests, some.task, some.label_table).labels([1]).isnan().all()


@pytest.mark.parametrize("place", [-1, 0])
def test_damaged_sets_are_noticed(folder, tmp_path, place):
    home = CacheOptions(home=tmp_path)
    path = open_cache(str(folder), MULTI, home).folder / LABEL_SETS
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    said = []
    again = open_cache(str(folder), MULTI, home, log=said.append)
    assert any("damaged on the disk; rebuilding it" in line for line in said)
    assert again.splits["train"].class_counts(3).tolist() == [5, 5, 5]


def test_sources_are_joined_by_the_names_of_their_classes(folder, tmp_path):
    other = tmp_path / "other"
    for name in ("b", "d"):
        (other / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 240, np.uint8)).save(other / name / f"{name}.png")
    cache = open_cache([str(folder), str(other)], MULTI, CacheOptions(home=tmp_path / "home"))
    assert cache.classes == ("a", "b", "c", "d")
    split = cache.splits["train"]
    assert split.labels([rows(split).index(12)]).tolist() == [[0.0, 1.0, 0.0, 1.0]]


def test_numbers_of_sets_do_not_depend_on_the_order_of_images():
    one, table = number_sets({"train": [(1,), None, (0, 2)], "val": [()]}, 3)
    other, same = number_sets({"train": [(0, 2), (1,)], "val": [(), None]}, 3)
    assert table.tolist() == same.tolist() == [[0, 0, 0], [1, 0, 1], [0, 1, 0]]
    assert {name: labels.tolist() for name, labels in one.items()} == {"train": [2, -1, 1], "val": [0]}
    assert other["train"].tolist() == [1, 2]
