"""TFRecord and tar shards: reading TensorFlow's, writing ours, and naming every damaged one."""

import gzip
import io
import json
import shutil
import struct
import tarfile
import tracemalloc
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from make_images import paint
from PIL import Image

from funmatch.data.cache.open_cache import open_cache
from funmatch.data.dataset import ReadOptions
from funmatch.data.decode import decode
from funmatch.data.formats import compressed, crc32c
from funmatch.data.formats.crc32c import masked_crc32c
from funmatch.data.formats.protobuf import write_fields, write_varint
from funmatch.data.formats.tfrecord import example, frame, parse_example, records
from funmatch.data.readers.open import open_dataset
from funmatch.errors import InputError

SHARDS = Path(__file__).parent / "tfrecords"
"""Shards written by TensorFlow 2.21 as in `test_tensorflow.py`: the right half of image i is grey 20·i."""


def image_numbers(source, split: str) -> list[int]:
    """Number of each image, read from the grey of its right half."""
    return [round(decode(source.read(split, i))[:, 5:].mean() / 20) for i in range(len(source.splits[split]))]


def test_plain_shards_give_labels_and_images():
    source = open_dataset(f"tfrecord:{SHARDS}/plain")
    assert source.name == "pets37"
    assert source.classes == ("0", "1", "2", "3", "4")
    assert source.unnamed
    assert {name: split.labels.tolist() for name, split in source.splits.items()} == {
        "train": [0, 1, 2, 3, 4],
        "test": [2, 4],
    }
    assert image_numbers(source, "train") == [0, 1, 2, 3, 4]
    assert image_numbers(source, "test") == [9, 8], "in any order of features"


PATTERNS = ("gzip", "gzip/*/*.tfrec", "gzip/validation/validation_{pets37,none*}-0{0..0}-4.tfrec")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gzip_shards_are_found_by_folder_and_pattern(pattern):
    source = open_dataset(f"tfrecord:{SHARDS}/{pattern}")
    assert image_numbers(source, "val") == source.splits["val"].labels.tolist() == [0, 1, 2, 3]


def test_feature_and_class_names_can_be_given():
    with pytest.raises(InputError, match=r"--first-label 1"):
        open_dataset(f"tfrecord:{SHARDS}/imagenet", ReadOptions(class_file=SHARDS / "three.txt"))
    source = open_dataset(f"tfrecord:{SHARDS}/imagenet", ReadOptions(first_label=1))
    assert source.splits["val"].labels.tolist() == [0, 1, 2]
    source = open_dataset(f"tfrecord:{SHARDS}/tfds")
    assert source.classes == ("Abyssinian", "Beagle")
    assert source.splits["train"].labels.tolist() == [0, 1, 0]
    with pytest.raises(InputError, match=r"record 0: has no feature 'picture', but: file_name, image, label"):
        open_dataset(f"tfrecord:{SHARDS}/tfds", ReadOptions(image_feature="picture"))
    with pytest.raises(InputError, match=r"no feature 'kind'.*--label-feature or --unlabelled"):
        open_dataset(f"tfrecord:{SHARDS}/tfds", ReadOptions(label_feature="kind"))
    assert not open_dataset(f"tfrecord:{SHARDS}/tfds", ReadOptions(label_feature="none")).classes
    text = ReadOptions(image_feature="image/class/text", label_feature="none", unlabelled=True)
    without = open_dataset(f"tfrecord:{SHARDS}/imagenet", text)
    assert not without.classes, "unlabelled if the shards have no labels"


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 511, 512, 513, 1000, 66_000])
def test_crc32c_equals_googles(length):
    data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
    assert crc32c.crc32c_by_table(data) == google_crc32c.value(data)


def test_crc32c_of_the_published_example():
    assert crc32c.crc32c_by_table(b"123456789") == crc32c.crc32c(b"123456789") == 0xE3069283


@pytest.fixture(name="shard")
def single_shard(tmp_path) -> Path:
    path = tmp_path / "s" / "train" / "train_pets37-00-3.tfrec"
    path.parent.mkdir(parents=True)
    shutil.copy(SHARDS / "plain" / "train" / path.name, path)
    return path


def test_flipped_bits_and_truncation_are_found(shard):
    content = shard.read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, 7, 8, 11, 12, len(content) - 1, *rng.integers(0, len(content), 40)]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{shard.name}: record \d"):
            open_dataset(f"tfrecord:{shard.parent}")
    for end in [1, 11, 12, 13, len(content) // 2, len(content) - 1]:
        shard.write_bytes(content[:end])
        with pytest.raises(InputError, match=r"record \d: the (shard ends|checksum)"):
            open_dataset(f"tfrecord:{shard.parent}")


def test_wrong_record_count_and_damaged_gzip_are_found(shard):
    short = shard.with_name("train_pets37-00-4.tfrec")
    shard.rename(short)
    with pytest.raises(InputError, match="has 3 records, but its name says 4"):
        open_dataset(f"tfrecord:{short}")
    packed = gzip.compress(short.read_bytes())
    short.rename(shard)
    for damaged in (packed[:-30], packed[:40] + bytes([packed[40] ^ 255]) + packed[41:]):
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match=r"record \d: "):
            open_dataset(f"tfrecord:{shard}")


def peak_of_reading(path: Path) -> tuple[str, int]:
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as error:
            open_dataset(f"tfrecord:{path}")
        return str(error.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_gzip_shards_that_expand_without_end_are_refused_before_they_take_memory(tmp_path, monkeypatch):
    head = struct.pack("<Q", 1 << 29)
    path = tmp_path / "train-0.tfrecord"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(head + struct.pack("<I", masked_crc32c(head)) + bytes(1 << 22))
    message, peak = peak_of_reading(path)
    assert "record 0: its length of 536,870,912 bytes is more than the 268,435,456" in message
    assert peak < 16 << 20
    # Many small records instead of a large one.
    monkeypatch.setattr(compressed, "EXPANDS_FREELY", 1 << 20)
    path.write_bytes(gzip.compress(frame(example(bytes(1 << 16), [0])) * 40))
    assert "record 16: the shard expands to more than 100 times its" in peak_of_reading(path)[0]


def test_record_longer_than_its_file_is_refused(tmp_path):
    head = struct.pack("<Q", 1 << 30)
    path = tmp_path / "train-0.tfrecord"
    path.write_bytes(head + struct.pack("<I", masked_crc32c(head)) + bytes(100))
    message, peak = peak_of_reading(path)
    assert "record 0: the shard ends in the middle of it" in message
    assert peak < 16 << 20


def test_all_bad_shards_are_named_at_once(tmp_path):
    for i in range(30):
        (tmp_path / f"train_x-{i:02}-1.tfrec").write_bytes(b"nonsense that is no record")
    with pytest.raises(InputError, match=r"30 of 30 shards are unusable:(\n.*){30}$"):
        open_dataset(f"tfrecord:{tmp_path}")


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "it has no features"),
        (b"\x0a\x05hello", "not a tf.train.Example"),
        (example(b"x", [3])[:-3], "cut off"),
        (example(b"x", None), "has no feature 'class'"),
    ],
)
def test_records_that_are_not_examples_are_rejected(tmp_path, payload, message):
    (tmp_path / "a.tfrecord").write_bytes(frame(payload))
    with pytest.raises(InputError, match=f"record 0: .*{message}"):
        open_dataset(f"tfrecord:{tmp_path}/a.tfrecord")


def test_example_round_trip():
    payload = example(b"bytes" * 100, [2**40])
    features = parse_example(payload)
    assert payload[slice(*features["image"][0])] == b"bytes" * 100
    assert features["class"] == [2**40]
    assert parse_example(example(b"", [-1]))["class"] == [-1]


def example_of(**features: bytes | list[int]) -> bytes:
    """A `tf.train.Example` of bytes and lists of whole numbers."""
    entries = []
    for name, value in features.items():
        if isinstance(value, bytes):
            content = write_fields(1, write_fields(1, value))
        else:
            content = write_fields(3, write_fields(1, b"".join(map(write_varint, value))))
        entries.append(write_fields(1, write_fields(1, name.replace("__", "/").encode()) + write_fields(2, content)))
    return write_fields(1, b"".join(entries))


PIXELS = {
    "colours": ((5, 7, 3), {"image__height": [5], "image__width": [7], "image__channels": [3]}, "image__encoded"),
    "no channels": ((5, 7, 3), {"height": [5], "width": [7]}, "image"),
    "a shape": ((4, 6, 3), {"image__shape": [4, 6, 3]}, "image"),
    "grey": ((28, 28, 1), {"rows": [28], "cols": [28], "depth": [1]}, "image_raw"),
    "a shape of grey": ((4, 6, 1), {"shape": [4, 6]}, "image"),
}


@pytest.mark.parametrize("case", PIXELS)
def test_pixels_that_are_not_encoded_are_images(tmp_path, case):
    shape, sizes, name = PIXELS[case]
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, shape, np.uint8) for _ in range(3)]
    label = "image__class__label" if name == "image__encoded" else "label"
    rows = [example_of(**{name: each.tobytes(), label: [i], **sizes}) for i, each in enumerate(arrays)]
    (tmp_path / "train.tfrec").write_bytes(b"".join(map(frame, rows)))
    source = open_dataset(f"tfrecord:{tmp_path}/train.tfrec")
    assert source.splits["train"].labels.tolist() == [0, 1, 2]
    for i, each in enumerate(arrays):
        np.testing.assert_array_equal(decode(source.read("train", i)), np.broadcast_to(each, (*shape[:2], 3)))


def test_encoded_images_with_sizes_beside_them_stay_as_they_are(tmp_path):
    jpeg = paint(tmp_path / "a.jpg", 0).read_bytes()
    row = example_of(image=jpeg, label=[0], height=[24], width=[20], channels=[3])
    # As many bytes as a grey image of these sizes would have.
    odd = example_of(image=jpeg, label=[1], height=[1], width=[len(jpeg)], channels=[1])
    (tmp_path / "train.tfrec").write_bytes(frame(row) + frame(odd))
    source = open_dataset(f"tfrecord:{tmp_path}/train.tfrec")
    assert [source.read("train", i) for i in range(2)] == [jpeg, jpeg]


def test_labels_outside_the_classes_are_named(tmp_path):
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    (tmp_path / "a.tfrec").write_bytes(frame(example(b"x", [0])) + frame(example(b"x", [7])))
    with pytest.raises(InputError, match=r"a.tfrec, record 1: label 7 is outside the 2 classes \(1 such"):
        open_dataset(f"tfrecord:{tmp_path}")
    (tmp_path / "classes.txt").write_text("ant\nAnt\n")
    with pytest.raises(InputError, match="'ant' and 'Ant' differ only in case"):
        open_dataset(f"tfrecord:{tmp_path}")


def test_written_shards_hold_the_resized_images(images, funmatch, tmp_path):
    funmatch("prepare", images, "--to", "tfrecord", "--side", "16", "--shard-size", "4", "--out", "shards")
    names = sorted(path.relative_to(tmp_path / "shards").as_posix() for path in tmp_path.glob("shards/*/*"))
    assert names[:2] == ["test/test_images-00-4.tfrec", "test/test_images-01-4.tfrec"]
    assert names[-1] == "validation/validation_images-02-1.tfrec"
    source = open_dataset(f"tfrecord:{tmp_path / 'shards'}")
    assert source.classes == ("ant", "bee", "cat")
    original = open_dataset(str(images))
    for split in ("train", "val", "test"):
        assert sorted(source.splits[split].labels) == sorted(original.splits[split].labels)
        for i, label in enumerate(source.splits[split].labels):
            encoded = source.read(split, i)
            image = Image.open(io.BytesIO(encoded))
            assert (image.format, image.size) == ("JPEG", (16, 16))
            assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3, "no chroma subsampling"
            expected = [
                Image.fromarray(decode(original.read(split, j))).resize((16, 16), Image.Resampling.BILINEAR)
                for j in range(len(original.splits[split]))
                if original.splits[split].labels[j] == label
            ]
            nearest = min(np.abs(np.asarray(image, float) - np.asarray(each, float)).mean() for each in expected)
            assert nearest < 3, "only the loss of JPEG"


def test_interrupted_shard_writing_resumes(images, funmatch, tmp_path):
    argv = ("prepare", images, "--to", "tfrecord", "--shard-size", "4", "--out", "shards")
    funmatch(*argv)
    before = {path: path.read_bytes() for path in tmp_path.glob("shards/*/*.tfrec")}
    (tmp_path / "shards").rename(tmp_path / ".shards.partial")
    lost, damaged, *_ = sorted(tmp_path.glob(".shards.partial/train/*.tfrec"))
    lost.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    funmatch(*argv)
    assert {path: path.read_bytes() for path in tmp_path.glob("shards/*/*.tfrec")} == before
    assert "another format" in funmatch(*argv, "--side", "8", check=2).stderr


def test_jpegs_are_copied_unchanged(tmp_path, funmatch):
    paint(tmp_path / "p" / "a.jpg", 1)
    paint(tmp_path / "p" / "b.png", 2)
    funmatch("prepare", "p", "--to", "tfrecord", "--out", "shards")
    (shard,) = tmp_path.glob("shards/train/*.tfrec")
    images = {payload[slice(*parse_example(payload)["image"][0])] for _, payload in records(shard)}
    assert (tmp_path / "p" / "a.jpg").read_bytes() in images
    assert len(images) == 2


def write_tar(path: Path, members: dict[str, bytes | str]) -> Path:
    """Write a tar of files; content given as `str` makes a symbolic link to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(name="jpegs")
def jpeg_files(tmp_path) -> list[bytes]:
    return [paint(tmp_path / "raw" / f"{i}.jpg", i).read_bytes() for i in range(4)]


def test_webdataset_shards_are_read(tmp_path, jpegs):
    write_tar(
        tmp_path / "w" / "pets-train-000000.tar",
        {"a/0.jpg": jpegs[0], "a/0.cls": b"1", "b/0.jpg": jpegs[1], "b/0.cls": b"0\n"},
    )
    write_tar(
        tmp_path / "w" / "pets-train-000001.tar", {"c.seg.png": b"?", "c.jpg": jpegs[2], "c.json": b'{"label": 2}'}
    )
    write_tar(tmp_path / "w" / "pets-val-000000.tar", {"d.jpg": jpegs[3], "d.cls": b"2"})
    source = open_dataset(f"wds:{tmp_path}/w/pets-{{train-000000,train-000001,val-000000}}.tar")
    assert source.classes == ("0", "1", "2")
    assert source.splits["train"].labels.tolist() == [1, 0, 2]
    assert [source.read("train", i) for i in range(3)] == jpegs[:3]
    assert source.read("val", 0) == jpegs[3]
    assert open_cache(f"wds:{tmp_path}/w").splits["train"].labels(slice(None)).tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"../out.jpg": b"x"}, r"'../out.jpg' is a link or leads outside"),
        ({"/etc/out.jpg": b"x"}, "leads outside"),
        ({"a.jpg": "/etc/passwd"}, "is a link"),
        ({"a.jpg": b"x", "a.cls": b"0.5"}, r"a\.cls is '0.5'; expected a number"),
        ({"a.jpg": b"x", "a.json": b"[]"}, 'a.json is not a JSON object with "label"'),
        ({"a.jpg": b"x", "a.cls": b"1", "b.jpg": b"y"}, "b.jpg: there is no label"),
        ({"a.txt": b"x"}, "sample 'a' has no image, but: txt"),
        ({"a.b.jpg": b"x"}, r"sample 'a' has no image, but: b\.jpg"),
        ({}, "have no images"),
    ],
)
def test_unusable_tars_are_rejected(tmp_path, members, message):
    path = write_tar(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match=message):
        open_dataset(f"wds:{path}")


def test_truncated_or_compressed_tars_are_rejected(tmp_path, jpegs):
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": jpeg for i, jpeg in enumerate(jpegs)})
    content = path.read_bytes()
    with tarfile.open(path) as file:
        between = file.getmembers()[2].offset
    for end in (0, 100, 600, between, between + 512, between + 600):
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match=r"a\.tar"):
            open_dataset(f"wds:{path}")
    path.write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match="compressed one must be unpacked first"):
        open_dataset(f"wds:{path}")


def test_missing_and_empty_shards_are_rejected(tmp_path):
    for spec in (f"tfrecord:{tmp_path}", f"tfrecord:{tmp_path}/*.tfrec"):
        with pytest.raises(InputError, match="no shard matches"):
            open_dataset(spec)
    with pytest.raises(InputError, match="1 of 1 shards are missing"):
        open_dataset(f"wds:{tmp_path}/x.tar")
    for missing in (f"tfrecord:{SHARDS}/plain/train/train_pets37-0{{0..2}}-3.tfrec",):
        with pytest.raises(InputError, match=r"2 of 3 shards are missing, e\.g\. .*-01-3"):
            open_dataset(missing)
    (tmp_path / "a.tfrec").write_bytes(b"")
    with pytest.raises(InputError, match="shards of train have no images"):
        open_dataset(f"tfrecord:{tmp_path}")
    with pytest.raises(InputError, match=f"pass tfrecord:{tmp_path}"):
        open_dataset(str(tmp_path))


def test_labels_from_json_members(tmp_path, jpegs):
    label = json.dumps({"label": 1}).encode()
    write_tar(tmp_path / "a.tar", {"a.jpg": jpegs[0], "a.cls": b"0", "a.json": label})
    assert open_dataset(f"wds:{tmp_path}/a.tar").splits["train"].labels.tolist() == [0]
    by_json = ReadOptions(label_feature="json")
    assert open_dataset(f"wds:{tmp_path}/a.tar", by_json).splits["train"].labels.tolist() == [1]


def test_missing_shard_of_a_numbered_set_is_named(tmp_path):
    for i in (0, 2):
        (tmp_path / f"train-{i:05}-of-00003").write_bytes(frame(example(b"x", [0])))
    with pytest.raises(InputError, match=r"of 3 shards train-…, 1 are missing, e\.g\. 00001"):
        open_dataset(f"tfrecord:{tmp_path}")


def test_split_comes_from_file_name_before_folder_name(tmp_path):
    (tmp_path / "dev").mkdir()
    for split in ("train", "val"):
        (tmp_path / "dev" / f"{split}_x-00-1.tfrec").write_bytes(frame(example(b"x", [0])))
    assert list(open_dataset(f"tfrecord:{tmp_path}/dev").splits) == ["train", "val"]


def test_new_shards_and_class_names_are_noticed(tmp_path, jpegs):
    (tmp_path / "s" / "train").mkdir(parents=True)
    for i in range(2):
        (tmp_path / "s" / "train" / f"train_x-{i:02}-1.tfrec").write_bytes(frame(example(jpegs[i], [i])))
    assert open_cache(f"tfrecord:{tmp_path}/s").unnamed
    (tmp_path / "s" / "class.labels.txt").write_text("ant\nbee\n")
    assert open_cache(f"tfrecord:{tmp_path}/s").classes == ("ant", "bee")
    (tmp_path / "s" / "val").mkdir()
    (tmp_path / "s" / "val" / "val_x-00-1.tfrec").write_bytes(frame(example(jpegs[2], [1])))
    assert list(open_cache(f"tfrecord:{tmp_path}/s").splits) == ["train", "val"]


def test_data_that_shards_cannot_hold_is_rejected(tmp_path, funmatch):
    paint(tmp_path / "nc" / "d\ne" / "a.png", 1)
    paint(tmp_path / "nc" / "z" / "b.png", 2)
    error = funmatch("prepare", "nc", "--to", "tfrecord", "--out", "o", check=2).stderr
    assert "class name 'd\\ne' is empty or has a line break" in error
    paint(tmp_path / "loose" / "x.png", 3)
    error = funmatch("prepare", "nc", "loose", "--to", "tfrecord", "--out", "o", check=2).stderr
    assert "some images of train have labels and some have none" in error
    assert not (tmp_path / "o").exists()


def test_finished_shards_are_not_rewritten(images, funmatch, tmp_path):
    content = (images / "train" / "ant" / "0.jpg").read_bytes()
    (images / "train" / "ant" / "0.jpg").write_bytes(content[: len(content) // 2])
    argv = ("--to", "tfrecord", "--shard-size", "4", "--out", "o")
    assert "1 unreadable" in funmatch("prepare", images, *argv, check=2).stderr
    assert not (tmp_path / "o").exists()
    first = json.loads(funmatch("prepare", images, *argv, "--on-bad", "skip", "--json").stdout)
    assert first["splits"]["train"]["pictures"] == 14
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("o/*/*")}
    again = json.loads(funmatch("prepare", images, *argv, "--on-bad", "skip", "--json").stdout)
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("o/*/*")} == times
    images.rename(tmp_path / "renamed")
    assert "of other images or of another format" in funmatch("prepare", "renamed", *argv, check=2).stderr


def test_shards_of_another_pixel_limit_are_not_reused(tmp_path, funmatch):
    for i in range(6):
        paint(tmp_path / "p" / f"{i}.png", i, (50, 50) if i % 3 == 0 else (20, 20))
    argv = ("prepare", "p", "--to", "tfrecord", "--out", "o", "--shard-size", "2")
    limited = (*argv, "--max-pixels", "1000")
    funmatch(*limited, "--on-bad", "skip")
    assert "of another format" in funmatch(*argv, check=2).stderr
    assert "2 unreadable" in funmatch(*limited, check=2).stderr
    (tmp_path / "o").rename(tmp_path / ".o.partial")
    assert json.loads(funmatch(*argv, "--json").stdout)["splits"]["train"]["pictures"] == 6
    assert json.loads(funmatch("data", "tfrecord:o", "--json").stdout)["repeated"] == 0


def test_files_missing_from_finished_shards_are_repaired_or_named(images, funmatch, tmp_path):
    argv = ("prepare", images, "--to", "tfrecord", "--out", "o", "--shard-size", "4")
    funmatch(*argv)
    (tmp_path / "o" / "class.labels.txt").unlink()
    funmatch(*argv)
    assert open_dataset(f"tfrecord:{tmp_path}/o").classes == ("ant", "bee", "cat")
    (tmp_path / "o" / "train" / "train_images-01-4.tfrec").unlink()
    with pytest.raises(InputError, match=r"1 shards are missing, e\.g\. train/train_images-01-4"):
        open_dataset(f"tfrecord:{tmp_path}/o")


def test_many_gzip_shards_need_few_open_files(tmp_path, jpegs):
    import resource

    for i in range(120):
        (tmp_path / f"train_x-{i:03}-1.tfrec").write_bytes(gzip.compress(frame(example(jpegs[i % 4], [0]))))
    # Fewer descriptors than shards: a reader that kept each shard open would fail.
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (110, limits[1]))
    try:
        source = open_dataset(f"tfrecord:{tmp_path}")
        assert all(source.read("train", i) == jpegs[i % 4] for i in range(120))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_new_shards_of_a_deep_pattern_are_noticed(tmp_path, jpegs):
    for i, folder in enumerate(("x/y", "z/w")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.tfrec").write_bytes(frame(example(jpegs[i], [0])))
        assert len(open_cache(f"tfrecord:{tmp_path}/**/*.tfrec").splits["train"]) == i + 1
