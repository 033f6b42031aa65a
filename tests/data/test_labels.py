"""Labels as shards have them: numbers, floats or names, their class files, and what is said where one had to choose."""

import gzip
import json
import struct
import zlib

import pytest
from make_images import paint
from test_shards import write_tar

from funmatch.data.cache.open_cache import open_cache
from funmatch.data.dataset import ReadOptions
from funmatch.data.formats import compressed
from funmatch.data.formats.compressed import compression_of
from funmatch.data.formats.crc32c import masked_crc32c
from funmatch.data.formats.tfrecord import example, frame
from funmatch.data.readers.open import open_dataset
from funmatch.errors import InputError


@pytest.fixture(name="jpegs", scope="module")
def jpeg_files(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("raw")
    return [paint(folder / f"{i}.jpg", i).read_bytes() for i in range(6)]


def part(field: int, content: bytes) -> bytes:
    """A field of a protocol buffer that holds bytes, of up to 16,383 of them."""
    low, high = len(content) & 127, len(content) >> 7
    assert high < 128
    return bytes([field << 3 | 2, *([low | 128, high] if high else [low])]) + content


def record(**features) -> bytes:
    """A record of a `tf.train.Example`, put together without the code under test but for its frame."""
    entries = b""
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        if isinstance(values[0], bytes):
            feature = part(1, b"".join(part(1, each) for each in values))
        elif isinstance(values[0], float):
            feature = part(2, part(1, struct.pack(f"<{len(values)}f", *values)))
        else:
            feature = part(3, part(1, bytes(values)))
        entries += part(1, part(1, name.encode()) + part(2, feature))
    return frame(part(1, entries))


def write(folder, records, split="train"):
    path = folder / split / f"{split}-0.tfrec"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(records))
    return f"tfrecord:{folder}"


def two_labels(folder, jpegs):
    """Two features that may be the label: `class` of 2 values, `species` of 3."""
    return write(folder, [record(image=jpeg, **{"class": i % 2, "species": i % 3}) for i, jpeg in enumerate(jpegs)])


def test_class_names_are_those_of_the_label_feature(tmp_path, jpegs):
    spec, species = two_labels(tmp_path, jpegs), ReadOptions(label_feature="species")
    (tmp_path / "class.labels.txt").write_text("cat\ndog\nemu\nfox\n")
    found = open_dataset(spec, species)
    assert (found.classes, found.unnamed) == (("0", "1", "2"), True), "not from class.labels.txt"
    assert "class.labels.txt names the classes of 'class' and is not read" in found.notes[0]
    assert open_cache(spec, species).unnamed
    (tmp_path / "species.labels.txt").write_text("ant\nbee\nbug\n")
    found = open_dataset(spec, species)
    assert found.classes == open_cache(spec, species).classes == ("ant", "bee", "bug"), "and a new file is noticed"
    assert (found.splits["train"].labels.tolist(), found.notes) == ([0, 1, 2] * 2, ())
    assert open_dataset(spec).classes == ("cat", "dog", "emu", "fox")


def test_class_file_of_another_name_is_read_and_differing_ones_are_told(tmp_path, jpegs):
    spec = write(tmp_path, [record(image=jpeg, kind=i % 2) for i, jpeg in enumerate(jpegs)])
    kind = ReadOptions(label_feature="kind")
    (tmp_path / "class.labels.txt").write_text("cat\ndog\n")
    (tmp_path / "train" / "classes.txt").write_text("cat\r\ndog\r\n")
    found = open_dataset(spec, kind)
    assert (found.classes, found.notes) == (("cat", "dog"), ()), "no feature 'class' is there to which it belongs"
    (tmp_path / "class.labels.txt").write_text("dog\ncat\n")
    found = open_dataset(spec, kind)
    assert found.classes == ("cat", "dog")
    assert found.notes[0].startswith("WARNING: ")
    assert "class.labels.txt holds others; choose one with --class-file" in found.notes[0]


def test_one_of_several_features_is_told(tmp_path, jpegs):
    records = [record(**{"image": each, "image/encoded": each, "class": 1, "label": 0}) for each in jpegs]
    notes = open_dataset(write(tmp_path, [*records, record(image=jpegs[0], **{"class": 0})])).notes
    assert [note.partition(": ")[2] for note in notes] == [
        "the image is read from image, not image/encoded; choose with --image-feature",
        "the label is read from class, not label; choose with --label-feature",
    ]
    both = write_tar(tmp_path / "a.tar", {"a.jpg": jpegs[0], "a.png": jpegs[1], "a.cls": b"0"})
    found = open_dataset(both)
    assert found.read("train", 0) == jpegs[0]
    assert "the image is read from jpg, not png" in found.notes[0]


def test_each_feature_has_its_own_images_in_the_cache(tmp_path, jpegs):
    pairs = zip(jpegs[:3], jpegs[3:], strict=True)
    spec = write(tmp_path, [record(image=one, other=two, **{"class": 0}) for one, two in pairs])
    keys = [open_cache(spec, ReadOptions(image_feature=each)).key for each in (None, "other", "image")]
    assert keys[0] == keys[2] != keys[1]


FLOATS = [0.0, 2.0, 1.0]


def test_whole_floats_are_numbers_of_classes(tmp_path, jpegs):
    spec = write(tmp_path, [record(image=jpeg, **{"class": each}) for jpeg, each in zip(jpegs, FLOATS, strict=False)])
    assert open_dataset(spec).splits["train"].labels.tolist() == FLOATS
    members = {f"{i}.jpg": jpeg for i, jpeg in enumerate(jpegs[:3])} | {"0.cls": b"0.0", "1.cls": b"2.", "2.cls": b"1"}
    found = open_dataset(write_tar(tmp_path / "a.tar", members))
    assert found.splits["train"].labels.tolist() == FLOATS
    assert found.classes == ("0", "1", "2")
    in_json = {f"{i}.jpg": jpegs[i] for i in range(3)} | {
        f"{i}.json": json.dumps({"label": each}).encode() for i, each in enumerate(FLOATS)
    }
    assert open_dataset(write_tar(tmp_path / "b.tar", in_json)).splits["train"].labels.tolist() == FLOATS


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"class": 0.5}, "feature 'class' is 0.5, not a whole number"),
        ({"class": float("nan")}, "feature 'class' is nan, not a whole number"),
        ({"class": [0.0, 1.0, 0.0]}, r"feature 'class' has 3 values; expected one label \(of one-hot"),
        ({"class": [0, 1]}, "feature 'class' has 2 values; expected one label"),
        ({"class": b"0.5"}, r"feature 'class' is '0\.5'; expected a number, or the name"),
        ({"class": b"\xff\xd8\x00"}, "expected a number, or the name of a class"),
        ({"class": b"a caption " * 30}, r"'a caption .*', … \(299 bytes\); expected a number, or the name"),
        ({"image": [b"x", b"y"], "class": 0}, "feature 'image' holds 2 images; write a record for each"),
        ({"image": [0.5] * 12, "class": 0}, "feature 'image' holds 12 numbers, not an encoded image"),
        ({"image": [7] * 12, "class": 0}, "feature 'image' holds 12 numbers, not an encoded image"),
    ],
)
def test_unusable_features_are_described(tmp_path, features, message):
    with pytest.raises(InputError, match=f"record 0: .*{message}"):
        open_dataset(write(tmp_path, [record(**{"image": b"x"} | features)]))


NAMES = ["tulip", "rose", "äster", "rose"]


@pytest.fixture(name="named", params=["tfrecord", "cls", "json"])
def shards_of_names(request, tmp_path, jpegs):
    pairs = list(zip(jpegs, NAMES, strict=False))
    if request.param == "tfrecord":
        return write(tmp_path / "r", [record(image=jpeg, **{"class": name.encode()}) for jpeg, name in pairs])
    members = {f"{i}.jpg": jpeg for i, (jpeg, _) in enumerate(pairs)}
    for i, name in enumerate(NAMES):
        members[f"{i}.{request.param}"] = json.dumps({"label": name}) if request.param == "json" else f"{name}\n"
    data = {name: value.encode() if isinstance(value, str) else value for name, value in members.items()}
    return write_tar(tmp_path / "r" / "a.tar", data)


def test_names_become_classes_in_the_alphabets_order(named):
    found = open_dataset(named)
    assert (found.classes, found.unnamed) == (("rose", "tulip", "äster"), False)
    assert found.splits["train"].labels.tolist() == [1, 0, 2, 0]
    assert "holds names: 3 classes in alphabetical order, rose, tulip, äster; for another" in found.notes[0]
    assert open_cache(named).classes == found.classes


def test_a_class_file_sets_the_order_of_names(named, tmp_path):
    file = tmp_path / "order.txt"
    file.write_text("äster\nlily\nrose\ntulip\n")
    found = open_dataset(named, ReadOptions(class_file=file))
    assert found.classes == ("äster", "lily", "rose", "tulip")
    assert [note.partition(": ")[2] for note in found.notes] == ["1 of 4 classes have no images in any split: lily"]
    assert found.splits["train"].labels.tolist() == [3, 2, 0, 2]
    file.write_text("rose\ntulip\n")
    with pytest.raises(InputError, match=r"'äster' is not among the 2 names in .*order.txt \(1 such records\); add it"):
        open_dataset(named, ReadOptions(class_file=file))


def test_names_of_several_splits_and_of_hardly_a_class(tmp_path, jpegs):
    for split, names in (("train", "ba"), ("validation", "ca"), ("test", "")):
        rows = zip(jpegs, names or " " * 2, strict=False)
        write(tmp_path, [record(image=jpeg, **{"class": name.encode()}) for jpeg, name in rows], split)
    found = open_dataset(f"tfrecord:{tmp_path}")
    assert found.classes == ("a", "b", "c")
    assert {name: split.labels.tolist() for name, split in found.splits.items()} == {
        "train": [1, 0], "val": [2, 0], "test": [-1, -1],
    }  # fmt: skip
    files = [record(image=jpegs[i % 6], **{"class": b"%d.jpg" % i}) for i in range(11)]
    notes = open_dataset(write(tmp_path / "files", files)).notes
    assert notes[0].startswith("WARNING: ")
    assert "class holds 11 names for 11 images, so it is hardly their class" in notes[0]


def test_names_among_numbers_need_a_list(tmp_path, jpegs):
    rows = [record(image=jpeg, **{"class": name}) for jpeg, name in zip(jpegs, (b"7", b"cat", b"7up"), strict=False)]
    spec = write(tmp_path, rows)
    with pytest.raises(InputError, match=r"names, e\.g\. '7up', and 1 are numbers, e\.g\. 7; expected a number"):
        open_dataset(spec)
    (tmp_path / "classes.txt").write_text("7\n7up\ncat\n")
    assert open_dataset(spec).splits["train"].labels.tolist() == [0, 2, 1]
    assert open_dataset(spec, ReadOptions(unlabelled=True)).notes == ()


@pytest.mark.parametrize("first", [1, 3])
def test_labels_that_count_from_one_are_told(tmp_path, jpegs, first):
    spec = write(tmp_path, [record(image=jpeg, **{"class": first + i % 2}) for i, jpeg in enumerate(jpegs)])
    (note,) = open_dataset(spec).notes
    assert note.startswith("WARNING: ")
    assert f"the smallest label is {first}, so " in note
    assert f"of {first + 2} classes has no images" in note
    assert note.endswith(f"pass --first-label {first}")
    found = open_dataset(spec, ReadOptions(first_label=first))
    assert (found.classes, found.notes) == (("0", "1"), ())
    assert not open_dataset(spec, ReadOptions(unlabelled=True)).notes


def test_a_test_split_without_labels_joins_labelled_images(tmp_path, jpegs):
    labelled = write(tmp_path / "a", [record(image=jpeg, **{"class": i % 3}) for i, jpeg in enumerate(jpegs)])
    test = write(tmp_path / "b", [record(image=jpeg, id=1) for jpeg in jpegs[:2]], "test")
    found = open_dataset([labelled, test])
    assert found.splits["train"].labels.tolist() == [0, 1, 2] * 2
    assert found.splits["test"].labels.tolist() == [-1, -1]
    assert found.notes == (f"{tmp_path}/b: no record has a label, so test is taken as unlabelled",)
    assert [found.read("test", i) for i in range(2)] == jpegs[:2]
    with pytest.raises(InputError, match=r"has no feature 'class', but: id, image; .*--unlabelled"):
        open_dataset(test)
    train = write(tmp_path / "c", [record(image=jpeg, id=1) for jpeg in jpegs[:2]])
    for joined in ([labelled, train], [test, train]):
        with pytest.raises(InputError, match="has no feature 'class', but: id, image"):
            open_dataset(joined)


def test_zlib_shards_are_read(tmp_path, jpegs):
    plain = b"".join(record(image=jpeg, **{"class": i}) for i, jpeg in enumerate(jpegs))
    for level in (0, 1, 6, 9):
        spec = write(tmp_path, [zlib.compress(plain, level)])
        found = open_dataset(spec)
        assert found.splits["train"].labels.tolist() == list(range(6))
        assert [found.read("train", i) for i in range(6)] == jpegs
    packed = zlib.compress(plain)
    flipped = packed[:-200] + bytes([packed[-200] ^ 4]) + packed[-199:]
    for damaged in (packed[:100], packed[:-5], packed + b"more", flipped):
        with pytest.raises(InputError, match=r"record \d: .*(ZLIB stream is damaged|checksum)"):
            open_dataset(write(tmp_path, [damaged]))


def test_zlib_shards_that_expand_without_end_are_refused(tmp_path, monkeypatch):
    head = struct.pack("<Q", 1 << 29)
    bomb = zlib.compress(head + struct.pack("<I", masked_crc32c(head)) + bytes(1 << 22))
    with pytest.raises(InputError, match=r"536,870,912 bytes is more than .* write the shard without compression"):
        open_dataset(write(tmp_path, [bomb]))
    monkeypatch.setattr(compressed, "EXPANDS_FREELY", 1 << 20)
    with pytest.raises(InputError, match="record 16: the shard expands to more than 100 times its"):
        open_dataset(write(tmp_path, [zlib.compress(frame(example(bytes(1 << 16), [0])) * 40)]))


@pytest.mark.parametrize("length", [0x8B1F, 0x9C78, 0x0178])
def test_lengths_that_begin_as_compressed_files_do(tmp_path, jpegs, length):
    # The first two bytes of a plain shard are those of its first record's length: here of GZIP and ZLIB.
    padding = length - len(frame(example(jpegs[0], [0]))) + 16
    image = jpegs[0] + bytes(max(padding, 0))
    while len(example(image, [0])) > length:
        image = image[:-1]
    shard = frame(example(image, [0]))
    assert shard[:2] == struct.pack("<H", length)
    spec = write(tmp_path, [shard])
    assert compression_of(tmp_path / "train" / "train-0.tfrec") == ""
    assert open_dataset(spec).read("train", 0) == image
    (tmp_path / "train" / "train-0.tfrec").write_bytes(gzip.compress(shard))
    assert compression_of(tmp_path / "train" / "train-0.tfrec") == "GZIP"


def test_notes_about_classes_are_not_said_of_unlabelled_images(tmp_path):
    for i in range(3):
        paint(tmp_path / "p" / "train" / f"c{i}" / "0.png", i)
    paint(tmp_path / "p" / "val" / "c0" / "0.png", 9)
    assert "val has no images of 2 of 3 classes" in open_dataset(str(tmp_path / "p")).notes[0]
    assert open_dataset(str(tmp_path / "p"), ReadOptions(unlabelled=True)).notes == ()


def test_numbered_lines_of_a_class_file(tmp_path, jpegs):
    rows = [
        record(image=each, **{"class": 1 + i % 2, "text": b"ab"[i % 2 : i % 2 + 1]}) for i, each in enumerate(jpegs)
    ]
    spec, file = write(tmp_path, rows), tmp_path / "labels.txt"
    file.write_text("0:background\n1:a\n2:b\n")
    found = open_dataset(spec)
    assert (found.classes, found.notes) == (("0:background", "1:a", "2:b"), ())
    assert found.splits["train"].labels.tolist() == [1, 2] * 3
    with pytest.raises(InputError, match=r"labels.txt numbers its classes from 0; pass --first-label 0"):
        open_dataset(spec, ReadOptions(first_label=1))
    by_name = open_dataset(spec, ReadOptions(label_feature="text"))
    assert by_name.classes == ("background", "a", "b")
    assert by_name.splits["train"].labels.tolist() == [1, 2] * 3
    # No value of --first-label makes this file and these labels agree.
    file.write_text("0:a\n1:b\n")
    with pytest.raises(InputError, match=r"2 is outside the 2 classes \(3 .*labels.txt numbers its classes from 0, so"):
        open_dataset(spec)
    file.write_text("1:a\n2:b\n")
    with pytest.raises(InputError, match=r"labels.txt numbers its classes from 1; pass --first-label 1"):
        open_dataset(spec)
    assert open_dataset(spec, ReadOptions(first_label=1)).splits["train"].labels.tolist() == [0, 1] * 3


def test_empty_labels_of_a_whole_split_are_none(tmp_path, jpegs):
    pairs = {"train": [b"1", b"0"], "test": [b" ", b""]}
    for split, labels in pairs.items():
        files = {f"{i}.{end}": data for i in range(2) for end, data in (("jpg", jpegs[i]), ("cls", labels[i]))}
        write_tar(tmp_path / "w" / f"{split}-0.tar", files)
    found = open_dataset(f"wds:{tmp_path}/w")
    assert [split.labels.tolist() for split in found.splits.values()] == [[1, 0], [-1, -1]]
    write_tar(tmp_path / "w" / "test-0.tar", {"0.jpg": jpegs[0], "0.cls": b"", "1.jpg": jpegs[1], "1.cls": b"1"})
    with pytest.raises(InputError, match=r"test-0\.tar: 0\.cls is empty; pass another --label-feature"):
        open_dataset(f"wds:{tmp_path}/w")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_of_encodings_are_no_part_of_a_class_name(tmp_path, jpegs, encoding):
    spec = write(tmp_path, [record(image=jpeg, **{"class": b"ab"[i % 2 : i % 2 + 1]}) for i, jpeg in enumerate(jpegs)])
    (tmp_path / "classes.txt").write_text("b\r\na\r\n", encoding=encoding)
    (tmp_path / "labels.txt").write_text("b\na\n")
    found = open_dataset(spec)
    assert (found.classes, found.notes) == (("b", "a"), ())
    assert found.splits["train"].labels.tolist() == [1, 0] * 3
    (tmp_path / "labels.txt").write_bytes("ab".encode("utf-16")[:-1])
    with pytest.raises(InputError, match=r"cannot read class names from .*labels.txt: 'utf-16"):
        open_dataset(spec)


def test_classes_of_a_file_without_images_are_named(tmp_path, jpegs):
    # As where the file is that of another feature.
    spec = write(tmp_path, [record(image=jpeg, **{"class": i % 2}) for i, jpeg in enumerate(jpegs)])
    write(tmp_path, [record(image=jpegs[0], **{"class": 1})], "val")
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\nfox\n")
    lacking, empty = open_dataset(spec).notes
    assert lacking.startswith(f"{tmp_path}: val has no images of 1 of 4 classes, ")
    assert empty == f"{tmp_path}: 2 of 4 classes have no images in any split: cat, fox"
    assert open_dataset(spec, ReadOptions(unlabelled=True)).notes == ()
