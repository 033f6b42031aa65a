"""Data sets of the Hugging Face `datasets` library, from files on disk."""

from importlib.util import find_spec
from io import BytesIO

import numpy as np
import pytest
from lazy_module import LazyModule
from make_images import paint

from funmatch.data.cache.open_cache import open_cache
from funmatch.data.dataset import ReadOptions
from funmatch.data.readers.open import open_dataset
from funmatch.errors import InputError

datasets = LazyModule("datasets")
pytestmark = pytest.mark.skipif(not find_spec("datasets"), reason="needs datasets")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def isolated_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()


def table(tmp_path, count=6, names=("ant", "bee"), first=0, **columns):
    images = [paint(tmp_path / "raw" / f"{first + i}.jpg", first + i).read_bytes() for i in range(count)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
    features |= {name: datasets.Value("string" if isinstance(v[0], str) else "int64") for name, v in columns.items()}
    rows = {"image": [{"bytes": p, "path": None} for p in images], "label": [i % len(names) for i in range(count)]}
    return datasets.Dataset.from_dict(rows | columns, features=datasets.Features(features)), images


def test_parquet_file_is_read(tmp_path):
    rows, images = table(tmp_path)
    rows.to_parquet(tmp_path / "pets.parquet")
    source = open_dataset(f"hf:{tmp_path}/pets.parquet")
    assert source.name == "pets"
    assert source.classes == ("ant", "bee")
    assert source.splits["train"].labels.tolist() == [0, 1] * 3
    assert [source.read("train", i) for i in range(6)] == images
    assert open_cache(f"hf:{tmp_path}/pets.parquet").splits["train"].labels(slice(None)).tolist() == [0, 1] * 3


def test_folder_of_parquet_splits_and_saved_dataset_are_read(tmp_path):
    train, images = table(tmp_path)
    test, test_images = table(tmp_path, 4, first=50)
    (tmp_path / "files").mkdir()
    train.to_parquet(tmp_path / "files" / "train-00000-of-00001.parquet")
    test.to_parquet(tmp_path / "files" / "validation-00000-of-00001.parquet")
    source = open_dataset(f"hf:{tmp_path}/files")
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 6, "val": 4}
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "saved")
    source = open_dataset(f"hf:{tmp_path}/saved")
    assert [source.read("train", i) for i in range(6)] == images
    assert [source.read("test", i) for i in range(4)] == test_images


def test_each_column_has_its_own_images_in_the_cache(tmp_path):
    rows, images = table(tmp_path)
    other = [{"bytes": each, "path": None} for each in reversed(images)]
    rows.add_column("other", other).to_parquet(tmp_path / "a.parquet")
    spec = f"hf:{tmp_path}/a.parquet"
    keys = [open_cache(spec, ReadOptions(image_feature=each)).key for each in (None, "other", "image")]
    assert keys[0] == keys[2] != keys[1]


def test_image_and_label_columns_can_be_chosen(tmp_path):
    rows, _ = table(tmp_path, kind=["x", "z", "y"] * 2, number=[3, 1, 2] * 2)
    rows.to_parquet(tmp_path / "a.parquet")
    spec = f"hf:{tmp_path}/a.parquet"
    assert open_dataset(spec, ReadOptions(label_feature="kind")).classes == ("x", "y", "z")
    assert open_dataset(spec, ReadOptions(label_feature="kind")).splits["train"].labels.tolist() == [0, 2, 1] * 2
    numbered = open_dataset(spec, ReadOptions(label_feature="number"))
    assert (numbered.classes, numbered.unnamed) == (("0", "1", "2", "3"), True)
    assert open_dataset(spec, ReadOptions(label_feature="none")).classes == ()
    for wrong in (ReadOptions(image_feature="label"), ReadOptions(label_feature="image")):
        with pytest.raises(InputError, match=r"has no (images|labels)"):
            open_dataset(spec, wrong)
    for options in (ReadOptions(label_feature="no"), ReadOptions(image_feature="no")):
        with pytest.raises(InputError, match="has no column 'no', but: image, label, kind, number"):
            open_dataset(spec, options)


def test_missing_labels_are_an_error_unless_unlabelled(tmp_path):
    rows, images = table(tmp_path)
    rows.remove_columns("label").add_column("label", [0, None, 1, None, 0, 1]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"train\[1\]: label None is outside the 2 classes; pass --unlabelled"):
        open_dataset(f"hf:{tmp_path}/a.parquet")
    source = open_dataset(f"hf:{tmp_path}/a.parquet", ReadOptions(unlabelled=True))
    assert source.classes == ()
    assert source.read("train", 5) == images[5]


def test_images_stored_as_pixels_are_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    from PIL import Image

    rows = datasets.Dataset.from_dict({"img": [Image.fromarray(pixels)]}, datasets.Features({"img": datasets.Image()}))
    rows.to_parquet(tmp_path / "a.parquet")
    source = open_dataset(f"hf:{tmp_path}/a.parquet")
    assert np.array_equal(np.asarray(Image.open(BytesIO(source.read("train", 0)))), pixels)
    assert not source.splits["train"].labelled


def test_missing_and_damaged_files_are_rejected(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.parquet is missing"):
        open_dataset(f"hf:{tmp_path}/nowhere.parquet")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"hf:.*a\.parquet cannot be loaded"):
        open_dataset(f"hf:{tmp_path}/a.parquet")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(InputError, match="no column of images, but: text"):
        open_dataset(f"hf:{tmp_path}/b.parquet")


@pytest.mark.parametrize("form", ["file", "folder"])
def test_paths_in_tables_are_opened_inside_the_data_alone(tmp_path, form):
    folder, outside = tmp_path / "set", paint(tmp_path / "other" / "secret.jpg", 0)
    inside = paint(folder / "images" / "0.jpg", 1)
    (folder / "link.jpg").symlink_to(outside)
    paths = [str(inside), str(outside), str(folder / ".." / "other" / "secret.jpg"), str(folder / "link.jpg")]
    rows = {"image": [{"bytes": None, "path": path} for path in paths], "label": [0] * 4}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant"])})
    (folder / "train").mkdir()
    table = folder / "train.parquet"
    pq.write_table(datasets.Dataset.from_dict(rows, features=features).data.table, table)
    if form == "folder":
        (tmp_path / "links").symlink_to(folder)
    source = open_dataset(f"hf:{table if form == 'file' else tmp_path / 'links' / 'train.parquet'}")
    assert source.read("train", 0) == inside.read_bytes()
    for i in (1, 2, 3):
        with pytest.raises(ValueError, match=r"the table names '.*', which is outside .*set; move the images into it"):
            source.read("train", i)


def test_error_without_a_network_names_the_data_set(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"hf:user/nothing cannot be loaded: .*with a network, or downloaded before"):
        open_dataset("hf:user/nothing")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            ["https://example.org/0.jpg"] * 4,
            r"holds addresses, e\.g\. https://example\.org/0\.jpg; download the images",
        ),
        (["data:image/png;base64,AAAA"] * 4, "holds images in base64"),
        (["QUJD" * 100] * 4, "holds images in base64"),
        (["0.jpg"] * 4, "holds names of files, e.g. '0.jpg', which are not there"),
        ([[{"bytes": b"x", "path": None}]] * 4, "holds lists of images; write one image a row"),
        ([list(range(784))] * 4, "holds flat lists of 784 numbers"),
        ([None] * 4, "is empty"),
    ],
)
def test_columns_without_images_are_named_in_one_line(tmp_path, values, message):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": values, "label": [0, 1, 0, 1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=f"the column 'image' {message}") as error:
        open_dataset(f"hf:{tmp_path}/a.parquet")
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:Downcasting")
def test_pixels_in_nested_lists_are_images(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    pixels = [[[8 * i + j for j in range(8)] for i in range(8)]] * 2
    bytes_of_rows = pyarrow.array(pixels, type=pyarrow.list_(pyarrow.list_(pyarrow.uint8())))
    parquet.write_table(pyarrow.table({"image": bytes_of_rows, "label": [0, 1]}), tmp_path / "a.parquet")
    assert open_cache(f"hf:{tmp_path}/a.parquet").splits["train"].image(0).shape == (8, 8, 3)


def test_splits_under_other_names(tmp_path):
    train, _ = table(tmp_path)
    test, _ = table(tmp_path, 4, first=50)
    datasets.DatasetDict(train=train, test=test, unlabeled=test).save_to_disk(tmp_path / "a")
    found = open_dataset(f"hf:{tmp_path}/a")
    assert list(found.splits) == ["train", "test"]
    assert found.notes[0].endswith("splits that are not read: unlabeled")
    datasets.DatasetDict(train2017=train, val2017=test).save_to_disk(tmp_path / "b")
    assert list(open_dataset(f"hf:{tmp_path}/b").splits) == ["train", "val"]


@pytest.mark.parametrize(("values", "expected"), [([0.0, 2.0, 1.0], [0, 2, 1]), ([3, 1, 2], [2, 0, 1])])
def test_whole_floats_and_the_number_of_the_first_class(tmp_path, values, expected):
    rows, _ = table(tmp_path, 3)
    rows.remove_columns("label").add_column("label", values).to_parquet(tmp_path / "a.parquet")
    spec, first = f"hf:{tmp_path}/a.parquet", min(values)
    source = open_dataset(spec, ReadOptions(first_label=int(first)))
    assert (source.classes, source.unnamed, source.notes) == (("0", "1", "2"), True, ())
    assert source.splits["train"].labels.tolist() == expected
    notes = open_dataset(spec).notes
    assert [note.rpartition("; ")[2] for note in notes] == (
        ["if the first class has number 1, pass --first-label 1"] if first else []
    )


def test_floats_that_are_no_numbers_of_classes(tmp_path):
    rows, _ = table(tmp_path, 2)
    rows.remove_columns("label").add_column("label", [1.0, 0.5]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"train\[1\]: label 0\.5 is outside the 2 classes"):
        open_dataset(f"hf:{tmp_path}/a.parquet")


def test_a_table_without_labels_joins_labelled_ones(tmp_path):
    train, _ = table(tmp_path, kind=[0, 1] * 3)
    test, _ = table(tmp_path, 2, first=60)
    datasets.DatasetDict(train=train).save_to_disk(tmp_path / "a")
    datasets.DatasetDict(test=test.remove_columns("label")).save_to_disk(tmp_path / "b")
    by_kind = ReadOptions(label_feature="kind")
    joined = open_dataset([f"hf:{tmp_path}/a", f"hf:{tmp_path}/b"], by_kind)
    assert (joined.splits["train"].labelled, joined.splits["test"].labelled) == (True, False)
    assert joined.notes == (f"{tmp_path}/b: no record has a label, so test is taken as unlabelled",)
    with pytest.raises(InputError, match="has no column 'kind', but: image"):
        open_dataset(f"hf:{tmp_path}/b", by_kind)


def test_one_of_several_columns_of_images_is_told(tmp_path):
    _, images = table(tmp_path, 2)
    rows = {name: [{"bytes": each, "path": None} for each in images] for name in ("photo", "mask")}
    features = datasets.Features({name: datasets.Image() for name in rows})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    source = open_dataset(f"hf:{tmp_path}/a.parquet")
    assert source.read("train", 1) == images[1]
    assert "the image is read from photo, not mask; choose with --image-feature" in source.notes[0]


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_column_of_a_split_is_no_label(tmp_path, empty):
    train, _ = table(tmp_path, 4)
    test, _ = table(tmp_path, 2, first=70)
    text = {"feature": datasets.Value("string")}
    named = train.remove_columns("label").add_column("label", ["b", "a"] * 2, **text)
    bare = test.remove_columns("label").add_column("label", [empty] * 2, **text)
    datasets.DatasetDict(train=named, test=bare).save_to_disk(tmp_path / "a")
    found = open_dataset(f"hf:{tmp_path}/a")
    assert found.classes == ("a", "b")
    assert [split.labels.tolist() for split in found.splits.values()] == [[1, 0] * 2, [-1, -1]]
    datasets.DatasetDict(test=bare).save_to_disk(tmp_path / "b")
    with pytest.raises(InputError, match="the column 'label' is empty; pass another --label-feature, or --unlabelled"):
        open_dataset(f"hf:{tmp_path}/b")
    assert not open_dataset(f"hf:{tmp_path}/b", ReadOptions(unlabelled=True)).classes
    assert not open_dataset([f"hf:{tmp_path}/a", f"hf:{tmp_path}/b"]).splits["test"].labelled
