"""Folders as people have them: splits that are doubled or called otherwise, containers, leftovers, other tasks."""

import os
import unicodedata

import pytest
from make_images import paint

from funmatch.data.cache.open_cache import open_cache
from funmatch.data.dataset import ReadOptions
from funmatch.data.readers.folder import open_folder
from funmatch.data.readers.open import open_dataset
from funmatch.data.readers.split_names import says_split
from funmatch.errors import InputError


def grow(root, *folders, images=2):
    """Paints different images into each of the folders."""
    for f, folder in enumerate(folders):
        for i in range(images):
            paint(root / folder / f"{i}.png", 10 * f + i)
    return root


def shape(dataset):
    """Images and classes that occur, by split; None for classes where it is unlabelled."""
    return {
        name: (len(split), len(set(split.labels.tolist())) if split.labelled else None)
        for name, split in dataset.splits.items()
    }


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train", "train"), ("seg_train", "train"), ("Train_set", "train"), ("TrainSet", "train"),
        ("trainset", "train"),
        ("train2017", "train"), ("training-images", "train"), ("test1", "test"), ("testdata", "test"), ("VAL", "val"),
        ("valid_224x224", "val"), ("trainval", "train"), ("evaluation", "eval"),
        ("bullet_train", None), ("train station", None), ("contest", None), ("developer", None), ("train_test", None),
        ("training wheels", None), ("cats", None), ("value", None),
    ],
)  # fmt: skip
def test_words_that_say_split(name, split):
    assert says_split(name) == split


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train/train", "test/test"),
        ("training_set/training_set", "test_set/test_set"),
        ("Train_set", "Test_set"),
        ("archive/train", "archive/test"),
        ("images/train", "images/test"),
        ("data/pets/train", "data/pets/test"),
        ("train2017", "test2017"),
        ("dogs_train", "dogs_test"),
        ("tr", "te"),
        ("train/images", "test/images"),
        ("train", "test1"),
        ("train/animal", "test/animal"),
    ],
)
def test_splits_under_other_names_are_read_and_said(tmp_path, train, test):
    root = grow(tmp_path / "p", f"{train}/sea", f"{train}/street", f"{test}/sea", f"{test}/street")
    found = open_folder(root)
    assert found.classes == ("sea", "street")
    assert shape(found) == {"train": (4, 2), "test": (4, 2)}
    assert found.splits["train"].names[0] == f"{train}/sea/0.png"
    assert any(f"read {train} as train, {test} as test" in note for note in found.notes)


def test_evaluation_is_the_test_split_beside_a_validation_split(tmp_path):
    root = grow(tmp_path, "training/a", "training/b", "validation/a", "validation/b", "evaluation/a", "evaluation/b")
    assert list(shape(open_folder(root))) == ["train", "val", "test"]
    grow(tmp_path / "two", "train/a", "train/b", "eval/a", "eval/b")
    assert list(shape(open_folder(tmp_path / "two"))) == ["train", "val"]


def test_a_container_of_classes_is_looked_through(tmp_path):
    found = open_folder(grow(tmp_path, "archive/cat", "archive/dog", "__MACOSX/archive"))
    assert found.classes == ("cat", "dog")
    assert "looked through archive/" in found.notes[0]
    # Nothing but images at its end: unlabelled, as without any folder.
    assert open_folder(grow(tmp_path / "one", "photos/of/dogs")).classes == ()


def test_classes_may_have_the_name_of_a_split_or_a_container(tmp_path):
    assert open_folder(grow(tmp_path / "a", "bullet_train", "freight_train", "tram")).classes == (
        "bullet_train", "freight_train", "tram",
    )  # fmt: skip
    found = open_folder(grow(tmp_path / "b", "train/bus", "train/train", "val/train"))
    assert found.classes == ("bus", "train")
    assert found.splits["val"].labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["seg_train/a", "seg_train/b", "seg_pred/x"], "has images in seg_pred beside the splits seg_train"),
        (["cats_train", "cats_test", "dogs_train", "dogs_test"], "name a class and a split at once"),
        (["train/train/a", "train/test/a"], "train holds splits itself .*; pass .*train$"),
        (["train/test/a", "val/b"], "holds nothing but test/, which names another split"),
        (["train/a", "train_set/a"], "both train/ and train_set/"),
        (["images", "masks"], "holds images and masks, as data sets of segmentation do"),
        (["train/images", "train/masks"], "train holds images and masks"),
    ],
)
def test_folders_of_several_meanings_are_refused(tmp_path, folders, message):
    with pytest.raises(InputError, match=message):
        open_folder(grow(tmp_path, *folders))


def test_a_split_of_strange_classes_only_is_unlabelled(tmp_path):
    found = open_folder(grow(tmp_path / "a", "train/cat", "train/dog", "test/unknown"))
    assert found.classes == ("cat", "dog")
    assert shape(found) == {"train": (4, 2), "test": (2, None)}
    assert any(note.startswith("WARNING: ") and "images only in unknown" in note for note in found.notes)
    # Tiny ImageNet
    found = open_folder(grow(tmp_path / "b", "train/n01/images", "train/n02/images", "val/images"))
    assert (found.classes, shape(found)["val"]) == (("n01", "n02"), (2, None))
    assert "val/images as val (unlabelled)" in found.notes[0]
    # An empty folder says that it is a class.
    (tmp_path / "a" / "train" / "unknown").mkdir()
    assert open_folder(tmp_path / "a").classes == ("cat", "dog", "unknown")


def test_training_images_in_one_strange_folder_are_unlabelled(tmp_path):
    found = open_folder(grow(tmp_path, "train/stuff", "val/cat", "val/dog"))
    assert (found.classes, shape(found)) == (("cat", "dog"), {"train": (2, None), "val": (4, 2)})
    assert found.notes[0].startswith("WARNING: ")


def test_loud_notes_are_logged_as_warnings(tmp_path):
    lines = []
    open_cache(str(grow(tmp_path, "train/cat", "train/dog", "test/dog", "test/owl")), log=lines.append)
    assert any(line.startswith("WARNING: ") and line.endswith("which only test has: owl") for line in lines)


@pytest.mark.parametrize(("ending", "advice"), [(".HEIC", "HEIC must be converted"), (".dcm", "DCM must be converted"),
                                                (".npy", "NPY must be converted"), ("", "without an ending"),
                                                (".zip", "unpack archives")])  # fmt: skip
@pytest.mark.parametrize("split", ["", "train/"])
def test_files_that_are_no_images_are_named(tmp_path, ending, advice, split):
    for name in "ab":
        for i in range(3):
            path = tmp_path / f"{split}{name}" / f"{i}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\0")
    with pytest.raises(InputError, match=rf"has no images, but 6 files such as a/0{ending}; images end in .*{advice}"):
        open_folder(tmp_path)


@pytest.mark.parametrize(("file", "message"), [
    ("pets.zip", "is an archive; unpack it"), ("x.tar.gz", "is an archive"), ("one.jpg", "is a single image"),
    ("train.csv", "train.csv has zero bytes"), ("labels.xlsx", "a table of labels is not read"), ("a.npz", "of arrays"),
    ("list.txt", "is a file; expected a folder of images"), ("x.tar", "pass wds:"), ("x.parquet", "pass hf:"),
])  # fmt: skip
def test_files_in_place_of_a_folder(tmp_path, file, message):
    (tmp_path / file).write_bytes(b"\0")
    with pytest.raises(InputError, match=message):
        open_dataset(str(tmp_path / file))


def test_leftovers_of_systems_are_ignored(tmp_path):
    root = grow(tmp_path, "train/cat", "train/dog", "val/cat", "val/dog")
    before = open_folder(root)
    for folder in ("", "train", "train/cat"):
        for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._0.png"):
            (root / folder / name).write_bytes(b"\0")
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found"):
            grow(root / folder, name)
    after = open_folder(root)
    assert after.notes == ()
    assert [split.names for split in after.splits.values()] == [split.names for split in before.splits.values()]


def test_labels_of_other_tasks_are_said_to_be_unread(tmp_path):
    grow(tmp_path / "coco", "train2017", "val2017")
    (tmp_path / "coco" / "annotations").mkdir()
    grow(tmp_path / "yolo", "train/images", "valid/images")
    for split in ("train", "valid"):
        (tmp_path / "yolo" / split / "labels").mkdir()
    grow(tmp_path / "voc", "JPEGImages")
    (tmp_path / "voc" / "Annotations").mkdir()
    for root, folder in {"coco": "annotations/", "yolo": "train/labels/", "voc": "Annotations/"}.items():
        found = open_folder(tmp_path / root)
        assert found.classes == ()
        assert any(
            f"{folder} (boxes or masks) is not read, so all images are unlabelled" in each for each in found.notes
        )


def test_labels_in_tables_and_file_names_are_said_to_be_unread(tmp_path):
    grow(tmp_path / "csv", "train_images", "test_images")
    for name in ("sample_submission.csv", "train.csv"):
        (tmp_path / "csv" / name).write_text("image,label\n")
    assert any(
        "train.csv is not read; labels come from folder names" in each for each in open_folder(tmp_path / "csv").notes
    )
    for i in range(4):
        paint(tmp_path / "flat" / "train" / f"{('cat', 'dog')[i % 2]}.{i}.png", i)
        paint(tmp_path / "camera" / f"IMG_{i}.png", i)
    assert any("cat.0.png seem to begin with the class" in each for each in open_folder(tmp_path / "flat").notes)
    assert open_folder(tmp_path / "camera").notes == ()


def test_classes_that_look_alike_are_refused(tmp_path):
    twins = {"case": ("Cat", "cat"), "spaces": ("cat", "cat "), "accents": tuple(
        unicodedata.normalize(form, "café") for form in ("NFC", "NFD")
    )}  # fmt: skip
    for kind, (one, other) in twins.items():
        with pytest.raises(InputError, match="case" if kind == "case" else "spaces" if kind == "spaces" else "accents"):
            open_folder(grow(tmp_path / kind, f"train/{one}", f"val/{other}", "train/dog"))
    assert open_folder(grow(tmp_path / "fine", "big cat", "chien d'été")).classes == ("big cat", "chien d'été")


def test_linked_class_folders(tmp_path):
    grow(tmp_path / "real", "dog")
    grow(tmp_path / "linked", "train/cat")
    os.symlink(tmp_path / "real" / "dog", tmp_path / "linked" / "train" / "dog")
    with pytest.raises(InputError, match="--follow-links"):
        open_folder(tmp_path / "linked")
    assert open_folder(tmp_path / "linked", follow_links=True).classes == ("cat", "dog")


def test_empty_class_folders_are_named(tmp_path):
    root = grow(tmp_path / "a", "cat", "dog")
    (root / "eel").mkdir()
    found = open_folder(root)
    assert (found.classes, found.notes) == (("cat", "dog"), (f"{root}: folders without images are no classes: eel",))


def test_a_pointer_or_a_page_in_place_of_an_image_is_named(tmp_path):
    grow(tmp_path, "a", "b")
    (tmp_path / "a" / "0.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    (tmp_path / "b" / "0.png").write_bytes(b"\n<!DOCTYPE html><title>404</title>")
    with pytest.raises(InputError, match=r"(?s)pointer of Git LFS.*a web page"):
        open_cache(str(tmp_path))


def test_unlabelled_data_has_no_classes_in_its_summary(tmp_path, funmatch):
    root = grow(tmp_path / "p", "train/cat", "train/dog", "val/cat", "val/dog", images=1)
    shown = funmatch("data", root, "--unlabelled").stdout
    assert "unlabelled" in shown
    assert "cat" not in shown
    assert open_cache(str(root), ReadOptions(unlabelled=True)).summary["classes"] == []


def test_sizes_of_classes_are_shown(tmp_path, funmatch):
    grow(tmp_path / "p", "train/cat", images=6)
    grow(tmp_path / "p", "train/dog", "val/dog", "val/cat", images=2)
    shown = funmatch("data", tmp_path / "p").stdout
    assert "images per class of train: 2 (dog) … 6 (cat), 1 : 3" in shown
    assert "images per class of val: 2 each" in shown


def test_copies_and_parts_among_classes(tmp_path):
    """Kaggle's flowers hold flowers/ once more among the classes; its k-fold sets have folders of classes in fold1/."""
    with pytest.raises(InputError, match="the folder flowers holds a copy of the classes beside it"):
        open_folder(grow(tmp_path / "flowers", "daisy", "rose", "flowers/daisy", "flowers/rose"))
    found = open_folder(grow(tmp_path / "folds", "fold1/cat", "fold1/dog", "fold2/cat", "fold2/dog"))
    assert "fold1/cat, are not read as classes" in found.notes[0]
    assert found.notes[1].startswith("WARNING: ")
    assert "fold1, fold2 look like parts" in found.notes[1]
    found = open_folder(grow(tmp_path / "copy", "cat", "cat - Copy", "dog"))
    assert found.notes[0].endswith("classes that look like copies of others: cat - Copy")


def test_a_validation_split_without_class_folders_is_noted(tmp_path):
    """ImageNet's validation images come without folders."""
    found = open_folder(grow(tmp_path, "train/cat", "train/dog", "val"))
    assert found.notes == (f"{tmp_path}: val without class folders: unlabelled",)


def test_file_names_with_the_backslashes_of_windows(tmp_path):
    grow(tmp_path, ".")
    for path in list(tmp_path.glob("*.png")):
        path.rename(tmp_path / f"train\\cat\\{path.name}")
    assert open_folder(tmp_path).notes[0].startswith("WARNING: ")


def test_only_what_lies_in_the_folder_is_watched(tmp_path):
    found = open_folder(grow(tmp_path / "p", "archive/train/a", "archive/train/b"))
    assert all(path.startswith(str(tmp_path / "p")) for path in found.watched)
    assert str(tmp_path / "p" / "archive") in found.watched


def test_splits_that_are_given_one_by_one(tmp_path):
    root = grow(tmp_path / "p", "train/a", "train/b", "val/a", "val/b")
    joined = open_dataset([str(root / "train"), str(root / "val")])
    assert "are joined, and all their images are for training" in joined.notes[0]
    assert joined.notes[0].startswith("WARNING: ")
    assert open_dataset(str(root / "train")).notes[0].endswith("also has val")
    assert open_dataset(str(root)).notes == ()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("https://example.org/pets", "web servers have no listing of a folder's files; pass an archive"),
        ("ftp://example.org/pets.zip", "is an address of another kind; expected one of gs://"),
        ("file:///data/pets", "pass /data/pets$"),
        ("microsoft/cats_vs_dogs", "pass hf:microsoft/cats_vs_dogs"),
    ],
)
def test_specs_that_are_no_folder(spec, message):
    with pytest.raises(InputError, match=message):
        open_dataset(spec)


def test_options_of_shards_are_said_not_to_apply_to_folders(tmp_path):
    found = open_dataset(str(grow(tmp_path, "a", "b")), ReadOptions(label_feature="x", first_label=1))
    assert "--label-feature, --first-label does not apply to it" in found.notes[0]


def test_a_reader_of_shards_given_a_folder_of_images(tmp_path):
    with pytest.raises(InputError, match="leave out the prefix"):
        open_dataset(f"wds:{grow(tmp_path, 'a', 'b')}")


def test_a_single_folder_of_test_images_is_no_split(tmp_path):
    assert list(open_folder(grow(tmp_path / "a", "test_images")).splits) == ["train"]
    with pytest.raises(InputError, match="has images in birds beside the splits test_images"):
        open_folder(grow(tmp_path / "b", "test_images", "birds"))
