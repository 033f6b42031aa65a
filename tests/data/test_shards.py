"""Shards as people have them: splits without labels, samples without images, and what img2dataset adds."""

import io
import json
import tarfile

import pytest
from make_images import paint

from funmatch.data.cache.open_cache import open_cache
from funmatch.data.dataset import ReadOptions
from funmatch.data.formats.tfrecord import example, frame
from funmatch.data.readers.open import open_dataset
from funmatch.errors import InputError

UNLABELLED = ReadOptions(unlabelled=True)


@pytest.fixture(name="jpegs")
def jpeg_files(tmp_path) -> list[bytes]:
    return [paint(tmp_path / "raw" / f"{i}.jpg", i).read_bytes() for i in range(4)]


def write_records(folder, jpegs, labels):
    folder.mkdir(parents=True)
    records = [
        frame(example(jpeg, None if label is None else [label])) for jpeg, label in zip(jpegs, labels, strict=False)
    ]
    (folder / "0.tfrec").write_bytes(b"".join(records))


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return f"wds:{path}"


def test_a_split_of_records_without_labels_is_unlabelled(tmp_path, jpegs):
    write_records(tmp_path / "r" / "train", jpegs, [0, 1, 1, 0])
    write_records(tmp_path / "r" / "test", jpegs[:3], [None] * 3)
    found = open_dataset(f"tfrecord:{tmp_path}/r")
    assert found.classes == ("0", "1")
    assert found.splits["train"].labels.tolist() == [0, 1, 1, 0]
    assert not found.splits["test"].labelled
    assert "no label in the shards of test, which is taken as unlabelled" in found.notes[0]
    assert [found.read("test", i) for i in range(3)] == jpegs[:3]


@pytest.mark.parametrize("labels", [[0, None, 1], [None, None, None]])
def test_labels_missing_inside_a_split_or_everywhere_are_an_error(tmp_path, jpegs, labels):
    write_records(tmp_path / "r" / "train", jpegs, labels)
    with pytest.raises(InputError, match=r"0\.tfrec: record [01]: has no feature 'class', but: image; .*--unlabelled"):
        open_dataset(f"tfrecord:{tmp_path}/r")
    assert open_dataset(f"tfrecord:{tmp_path}/r", UNLABELLED).classes == ()


def test_tars_without_a_chosen_label_in_one_split(tmp_path, jpegs):
    write_tar(tmp_path / "w" / "train.tar", {"a.jpg": jpegs[0], "a.cls": b"1", "b.jpg": jpegs[1], "b.cls": b"0"})
    write_tar(tmp_path / "w" / "test.tar", {"c.jpg": jpegs[2]})
    for options in (ReadOptions(), ReadOptions(label_feature="cls")):
        found = open_dataset(f"wds:{tmp_path}/w", options)
        assert [split.labelled for split in found.splits.values()] == [True, False]


def test_shards_of_img2dataset_are_unlabelled(tmp_path, jpegs):
    about = json.dumps({"url": "https://example.org", "caption": "a picture", "status": "success"}).encode()
    members = {}
    for i, jpeg in enumerate(jpegs):
        members |= {f"{i:09}.jpg": jpeg, f"{i:09}.txt": b"a picture", f"{i:09}.json": about}
    spec = write_tar(tmp_path / "web.tar", members)
    for options in (ReadOptions(), UNLABELLED):
        assert open_cache(spec, options).classes == ()
        assert not open_dataset(spec, options).splits["train"].labelled
    with pytest.raises(InputError, match=r"000000000\.json has none of label, cls, class_id, class, but: url, caption"):
        open_dataset(spec, ReadOptions(label_feature="json"))


@pytest.mark.parametrize(("labels", "expected"), [
    ([{"class_id": 3}, {"class_id": 1}], [3, 1]), ([{"label": None, "cls": 2}, {"cls": "0"}], [2, 0]),
])  # fmt: skip
def test_names_of_labels_in_json(tmp_path, jpegs, labels, expected):
    files = {f"{i}.{end}": data for i, label in enumerate(labels)
             for end, data in (("jpg", jpegs[i]), ("json", json.dumps(label).encode()))}  # fmt: skip
    assert open_dataset(write_tar(tmp_path / "a.tar", files)).splits["train"].labels.tolist() == expected


def test_samples_without_image_are_skipped_and_counted(tmp_path, jpegs):
    files = {"__meta__.json": b"{}", "README.md": b"?", "0.jpg": jpegs[0], "0.cls": b"0", "1.cls": b"1",
             "2.jpg": jpegs[2], "2.cls": b"1"}  # fmt: skip
    found = open_dataset(write_tar(tmp_path / "a.tar", files))
    assert found.splits["train"].labels.tolist() == [0, 1]
    assert found.notes[0].endswith("skipped 2 samples without an image, e.g. a.tar: 1")


def test_unlabelled_never_fails_for_want_of_a_label(tmp_path, jpegs):
    odd = {"a": b"cat", "b": b"9999999999999", "c": b"1"}
    files = {f"{k}.{end}": data for i, (k, label) in enumerate(odd.items())
             for end, data in (("jpg", jpegs[i]), ("cls", label))} | {"d.jpg": jpegs[3]}  # fmt: skip
    spec = write_tar(tmp_path / "a.tar", files)
    with pytest.raises(InputError, match="expected a number"):
        open_dataset(spec)
    assert not open_dataset(spec, UNLABELLED).splits["train"].labelled


def test_splits_of_shards_under_other_names(tmp_path, jpegs):
    for i, name in enumerate(("train2017-000.tar", "val2017-000.tar", "TestSet/000.tar")):
        write_tar(tmp_path / "w" / name, {"a.jpg": jpegs[i]})
    found = open_dataset(f"wds:{tmp_path}/w")
    assert list(found.splits) == ["train", "val", "test"]
    assert found.notes[0].endswith("read TestSet as test, train2017 as train, val2017 as val")
    # One folder of such a name alone is no split.
    assert list(open_dataset(f"wds:{tmp_path}/w/TestSet").splits) == ["train"]
