"""Several labels an image in TFRecord shards: written, read back, and read as other programs write them."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from make_images import paint

from funmatch.data.dataset import ReadOptions
from funmatch.data.formats.tfrecord import example, frame, records
from funmatch.data.label_sets import sets_of
from funmatch.data.readers.open import open_dataset
from funmatch.errors import InputError

MULTI = ReadOptions(task="multilabel")
ROWS = [
    ("0.png", "dog;bird", "train"), ("1.png", "", "train"), ("2.png", "bird", "train"),
    ("3.png", "cat;dog;bird", "train"), ("copy.png", "dog", "train"),
    ("4.png", "dog", "val"), ("5.png", "", "val"), ("6.png", "", "test"),
]  # fmt: skip
WRITE = ("--task", "multilabel", "--to", "tfrecord", "--shard-size", "3", "--out", "shards")


def message_of_example():
    """`tf.train.Example` as protobuf's own library makes it of TensorFlow's definition."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, fields: list[tuple], parent=None) -> descriptor_pb2.DescriptorProto:
        made = (parent.nested_type if parent else file.message_type).add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, 1):
            label = 3 if repeated else 1
            plain = isinstance(kind, int)
            made.field.add(name=field, number=number, label=label, type=kind if plain else 11,
                           type_name=None if plain else f".t.{kind}")  # fmt: skip
        return made

    message("BytesList", [("value", 12, True)])
    message("FloatList", [("value", 2, True)])
    message("Int64List", [("value", 3, True)])
    lists = [("bytes_list", "BytesList", False), ("float_list", "FloatList", False), ("int64_list", "Int64List", False)]
    feature = message("Feature", lists)
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    features = message("Features", [("feature", "Features.Entry", True)])
    message("Entry", [("key", 9, False), ("value", "Feature", False)], features).options.map_entry = True
    message("Example", [("features", "Features", False)])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


EXAMPLE = message_of_example()


def shard_of(folder: Path, jpeg: bytes, kind: str, lists: list, feature: str = "class") -> str:
    """Writes a record for each list of labels; of None, one without the feature. Returns what reads them."""
    folder.mkdir(parents=True)
    made = []
    for values in lists:
        record = EXAMPLE()
        record.features.feature["image"].bytes_list.value.append(jpeg)
        if values is not None:
            getattr(record.features.feature[feature], kind).SetInParent()
            getattr(record.features.feature[feature], kind).value.extend(values)
        made.append(frame(record.SerializeToString()))
    (folder / "0.tfrec").write_bytes(b"".join(made))
    return f"tfrecord:{folder.parent if folder.name in ('train', 'test') else folder}"


def named_sets(source, split: str) -> list[frozenset[str] | None]:
    return [None if each is None else frozenset(source.classes[i] for i in each) for each in sets_of(source, split)]


def content(source) -> dict[str, Counter]:
    """How often each image comes with which classes, by split."""
    return {
        split: Counter(zip([source.read(split, i) for i in range(len(each))], named_sets(source, split), strict=True))
        for split, each in source.splits.items()
    }


@pytest.fixture(name="table")
def table_of_images(tmp_path) -> Path:
    for i in range(7):
        paint(tmp_path / f"{i}.jpg", i).rename(tmp_path / f"{i}.png")
    shutil.copy(tmp_path / "0.png", tmp_path / "copy.png")
    path = tmp_path / "t.csv"
    path.write_text("path,label,split\n" + "".join(f"{','.join(row)}\n" for row in ROWS))
    (tmp_path / "names.txt").write_text("dog\nbird\nfox\ncat\n")
    return path


@pytest.fixture(name="jpeg")
def jpeg_image(tmp_path) -> bytes:
    return paint(tmp_path / "one.jpg", 1).read_bytes()


def test_shards_of_several_labels_are_the_same_data_set(table, tmp_path, funmatch):
    argv = ("prepare", f"csv:{table}", "--class-file", "names.txt", *WRITE)
    funmatch(*argv)
    original = open_dataset(f"csv:{table}", ReadOptions(task="multilabel", class_file=tmp_path / "names.txt"))
    found = open_dataset(f"tfrecord:{tmp_path}/shards", MULTI)
    assert found.classes == original.classes == ("dog", "bird", "fox", "cat")
    assert content(found) == content(original)
    assert Counter(named_sets(found, "train")) == Counter(map(frozenset, (
        {"dog", "bird"}, {}, {"bird"}, {"cat", "dog", "bird"}, {"dog"},
    )))  # fmt: skip
    assert Counter(named_sets(found, "val")) == Counter([frozenset({"dog"}), frozenset()])
    assert named_sets(found, "test") == [None], "unlabelled, as in the table"
    assert found.label_sets.tolist() == original.label_sets.tolist()
    # As protobuf's library reads them.
    written = [
        EXAMPLE.FromString(payload) for path in tmp_path.glob("shards/*/*.tfrec") for _, payload in records(path)
    ]
    assert sorted(list(each.features.feature["class"].int64_list.value) for each in written
                  if "class" in each.features.feature) == [[], [], [0], [0], [0, 1], [0, 1, 3], [1]]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shards/*/*.tfrec")}
    funmatch(*argv)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("shards/*/*.tfrec")} == before, "finished"
    table.write_text(table.read_text().replace("cat;dog;bird", "cat;bird"))
    assert "shards of other images" in funmatch(*argv, check=2).stderr


def test_copies_in_folders_of_classes_are_one_record(tmp_path, funmatch):
    for name in ("ant", "bee"):
        paint(tmp_path / "p" / name / "both.jpg", 1)
    for i, name in enumerate(("ant", "bee", "cat")):
        paint(tmp_path / "p" / name / "own.jpg", 2 + i)
    said = funmatch("prepare", "p", *WRITE)
    assert "1 image of the same content" in said.stderr
    found = open_dataset(f"tfrecord:{tmp_path}/shards", MULTI)
    assert Counter(named_sets(found, "train")) == Counter(map(frozenset, ({"ant", "bee"}, {"ant"}, {"bee"}, {"cat"})))
    with pytest.raises(InputError, match=r"has 2 values; expected one label .*pass --task multilabel"):
        open_dataset(f"tfrecord:{tmp_path}/shards")
    # The same images with one class each are other shards.
    assert "shards of other images" in funmatch("prepare", "p", "--to", "tfrecord", "--out", "shards", check=2).stderr


def test_copies_of_a_single_label_each_stay_apart(table, tmp_path, funmatch):
    table.write_text("path,label\n0.png,ant\ncopy.png,bee\n1.png,ant\n")
    funmatch("prepare", f"csv:{table}", *WRITE)
    found = open_dataset(f"tfrecord:{tmp_path}/shards", MULTI)
    assert content(found) == content(open_dataset(f"csv:{table}", MULTI))
    assert found.label_sets is not None, "so copies are not joined"


@pytest.mark.parametrize(
    ("kind", "lists", "expected"),
    [
        ("int64_list", [[2, 0], [], [1], [0, 2, 1]], [{"0", "2"}, set(), {"1"}, {"0", "1", "2"}]),
        ("int64_list", [[2, -1, -1], [-1, -1, -1], [-1], [0, 1, -1]], [{"2"}, set(), set(), {"0", "1"}]),
        ("float_list", [[2.0, 0.0], [1.0]], [{"0", "2"}, {"1"}]),
        ("bytes_list", [[b"red fox", b"ant"], [], [b"ant", b"", b""], [b""], [b"ant", b"ant"]],
         [{"ant", "red fox"}, set(), {"ant"}, set(), {"ant"}]),
    ],
)  # fmt: skip
def test_lists_of_labels_as_others_write_them(tmp_path, jpeg, kind, lists, expected):
    spec = shard_of(tmp_path / "s", jpeg, kind, lists, feature="tags")
    source = open_dataset(spec, ReadOptions(task="multilabel", label_feature="tags"))
    assert named_sets(source, "train") == list(map(frozenset, expected))


def test_what_is_no_list_of_labels_is_refused(tmp_path, jpeg):
    spec = shard_of(tmp_path / "hot", jpeg, "int64_list", [[0, 1, 0, 1]])
    with pytest.raises(InputError, match=r"record 0: feature 'class' has 4 values with repetitions.*positions of the"):
        open_dataset(spec, MULTI)
    spec = shard_of(tmp_path / "outside", jpeg, "int64_list", [[0, 1], [1, 3]])
    (tmp_path / "outside" / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(InputError, match=r"record 1: label 3 is outside the 2 classes \(1 such records\)"):
        open_dataset(spec, MULTI)
    spec = shard_of(tmp_path / "lacking", jpeg, "int64_list", [[0, 1], [], None])
    with pytest.raises(InputError, match="record 2: has no feature 'class'"):
        open_dataset(spec, MULTI)
    assert not open_dataset(spec, ReadOptions(task="multilabel", unlabelled=True)).splits["train"].labelled
    spec = shard_of(tmp_path / "empty", jpeg, "int64_list", [[], []])
    with pytest.raises(InputError, match="record 0: feature 'class' is empty"):
        open_dataset(spec, MULTI)


def test_a_split_without_any_label_is_unlabelled(tmp_path, jpeg):
    shard_of(tmp_path / "s" / "train", jpeg, "int64_list", [[0, 1], []])
    source = open_dataset(shard_of(tmp_path / "s" / "test", jpeg, "int64_list", [[], []]), MULTI)
    assert named_sets(source, "train") == [{"0", "1"}, set()]
    assert named_sets(source, "test") == [None, None]
    assert any("no label in the shards of test, which is taken as unlabelled" in note for note in source.notes)


def test_records_of_one_label_each_are_joined_by_content_as_before(tmp_path, jpeg):
    spec = shard_of(tmp_path / "s", jpeg, "int64_list", [[0], [1]])
    assert open_dataset(spec, MULTI).label_sets is None
    assert open_dataset(spec, MULTI).splits["train"].labels.tolist() == [0, 1]


def test_a_split_that_would_read_back_as_unlabelled_is_refused(table, funmatch):
    table.write_text("path,label\n" + "".join(f"{i}.png,{'dog;cat' if i < 2 else ''}\n" for i in range(7)))
    # One of the five images without a class is held out.
    error = funmatch("prepare", f"csv:{table}", *WRITE, "--val", "1", "--val-seed", "0", check=2).stderr
    assert "no image of val has a class, which shards cannot tell from images without labels" in error


def test_records_are_those_of_protobufs_library(jpeg):
    for labels in ([], [3], [0, 300, 7]):
        record = EXAMPLE()
        record.features.feature["image"].bytes_list.value.append(jpeg)
        record.features.feature["class"].int64_list.value.extend(labels)
        record.features.feature["class"].int64_list.SetInParent()
        assert EXAMPLE.FromString(example(jpeg, labels)) == record
        assert len(example(jpeg, labels)) == record.ByteSize()
