"""Scanning, splitting and caching data sets: leaks, damage, and interruptions at any time."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from make_images import paint

from funmatch.data.cache import build, resumable
from funmatch.data.cache import open_cache as caches
from funmatch.data.cache import scan as scans
from funmatch.data.cache.open_cache import open_cache
from funmatch.data.cache.storing import CacheOptions
from funmatch.data.dataset import ReadOptions, SplitSpec, parse_share
from funmatch.data.loader import Loader
from funmatch.data.readers.open import open_dataset
from funmatch.errors import InputError
from funmatch.ops.view_spec import Preprocessing, ViewSpec
from funmatch.training.evaluation.scoring import central_batches


def classes_folder(root, count=30, classes=("ant", "bee")):
    """`<class>/*.png` without splits."""
    for c, name in enumerate(classes):
        for i in range(count):
            paint(root / name / f"{i:03}.png", 1000 * c + i)
    return root


def contents(cache) -> dict[str, set[bytes]]:
    return {name: {split.image(i).numpy().tobytes() for i in range(len(split))} for name, split in cache.splits.items()}


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("none", 0),
        ("10%", Fraction(1, 10)),
        ("0.1", Fraction(1, 10)),
        ("33.3%", Fraction(333, 1000)),
        ("500", 500),
        ("1", 1),
    ],
)
def test_shares_are_parsed(text, share):
    assert parse_share(text) == share


@pytest.mark.parametrize("text", ["", "0", "100%", "-3", "1.5", "1.0", "ten", "nan", "1/0", "500%", "1e9999999"])
def test_invalid_shares_are_rejected(text):
    with pytest.raises(InputError, match="not a valid share of the training images"):
        parse_share(text)


def test_split_depends_on_content_and_seed_only(tmp_path):
    root = classes_folder(tmp_path / "one")
    tenth = ReadOptions(split_spec=SplitSpec({"val": Fraction(1, 10)}))
    first = open_cache(str(root), tenth)
    assert {name: len(split) for name, split in first.splits.items()} == {"train": 54, "val": 6}
    moved = tmp_path / "elsewhere"
    for i, path in enumerate(sorted(root.rglob("*.png"))):  # other names, order and times
        target = moved / path.parent.name / f"{hash((i, 7)) % 10**9}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    assert contents(open_cache(str(moved), tenth)) == contents(first)
    other = open_cache(str(root), ReadOptions(split_spec=SplitSpec({"val": Fraction(1, 10)}, seed=1)))
    assert contents(other)["val"] != contents(first)["val"]
    assert contents(other)["val"] | contents(other)["train"] == contents(first)["val"] | contents(first)["train"]
    assert len(open_cache(str(root), ReadOptions(split_spec=SplitSpec({"val": 17}))).splits["val"]) == 17
    labels = first.splits["val"].labels(slice(None))
    assert set(labels.tolist()) <= {0, 1}


def test_copies_of_an_image_go_to_the_same_split(tmp_path):
    root = classes_folder(tmp_path / "p", 10)
    for path in sorted(root.rglob("*.png")):
        for copy in range(3):
            shutil.copyfile(path, path.with_name(f"{path.stem}-{copy}.png"))
    for count in (5, 6, 7):
        cache = open_cache(str(root), ReadOptions(split_spec=SplitSpec({"val": count})))
        assert not contents(cache)["train"] & contents(cache)["val"]
        assert not cache.summary["leaks"]
        assert len(cache.splits["val"]) == 8


def test_impossible_splits_are_rejected(tmp_path, images):
    with pytest.raises(InputError, match="has its own validation split"):
        open_cache(str(images), ReadOptions(split_spec=SplitSpec({"val": 3})))
    root = classes_folder(tmp_path / "p", 3)
    tenth = open_cache(str(root), ReadOptions(split_spec=SplitSpec({"val": Fraction(1, 10)})))
    assert len(tenth.splits["val"]) == 1, "a share is at least one image"
    with pytest.raises(InputError, match="leaves none for train"):
        open_cache(str(root), ReadOptions(split_spec=SplitSpec({"val": 6})))


def test_leak_between_splits_is_a_warning(images, funmatch):
    shutil.copy(images / "train" / "ant" / "0.jpg", images / "test" / "bee" / "same.jpg")
    shutil.copy(images / "train" / "ant" / "0.jpg", images / "train" / "ant" / "again.jpg")
    result = funmatch("prepare", images)
    assert "WARNING: 1 images are both in train and test of images" in result.stderr
    assert "LEAK: 1 images are both in train and test:" in result.stdout
    assert "train/ant/0.jpg = test/bee/same.jpg" in result.stdout
    found = json.loads(funmatch("prepare", images, "--json").stdout)
    assert found["leaks"]["train and test"]["pictures"] == 1
    assert found["repeated"] == 1
    assert found["splits"]["train"] == {"pictures": 16, "labelled": True, "classes": 3}
    assert found["short_side"] == [20, 21, 22]


def test_unreadable_images_can_be_skipped(images, funmatch):
    complete = (images / "train" / "ant" / "0.jpg").read_bytes()
    (images / "train" / "ant" / "0.jpg").write_bytes(complete[: len(complete) // 2])
    (images / "val" / "bee" / "1.png").write_text("no image")
    stopped = funmatch("prepare", images, check=2)
    assert "2 unreadable images" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    found = json.loads(funmatch("prepare", images, "--on-bad", "skip", "--json").stdout)
    assert [name for name, _ in found["unreadable"]] == ["train/ant/0.jpg", "val/bee/1.png"]
    cache = open_cache(str(images), cache_options=CacheOptions(on_bad="skip"))
    assert {name: len(split) for name, split in cache.splits.items()} == {"train": 14, "val": 8, "test": 12}
    with pytest.raises(InputError, match="2 unreadable"):
        open_cache(str(images))


def test_one_unreadable_image_and_the_name_of_its_folder_are_said_once(tmp_path, monkeypatch):
    paint(tmp_path / "bad" / "1.png", 1)
    (tmp_path / "bad" / "0.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^1 unreadable image in bad; fix or remove it, or"):
        open_cache("bad")


def test_long_list_of_unreadable_images_is_written_to_a_file(tmp_path):
    for i in range(300):
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / f"{i:03}.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"300 unreadable images") as error:
        open_cache(str(tmp_path / "p"), cache_options=CacheOptions(home=tmp_path / "home"))
    assert "and 100 more, all in" in str(error.value)
    (listed,) = (tmp_path / "home").glob("unreadable-*.txt")
    assert len(listed.read_text().splitlines()) == 300


@pytest.mark.parametrize("way", ["resident", "streaming"])
def test_resident_and_streaming_give_equal_batches(tmp_path, way):
    for i in range(12):
        paint(tmp_path / "p" / f"{i}.jpg", i, (100 + 7 * i, 90))
    paint(tmp_path / "p" / "large.png", 99, (400, 300))
    reference = open_cache(str(tmp_path / "p"), cache_options=CacheOptions(cap=95, way="resident", decoder="pillow"))
    cache = open_cache(str(tmp_path / "p"), cache_options=CacheOptions(cap=95, way=way))
    split = cache.splits["train"]
    assert cache.way == way
    assert min(split.image(12).shape[:2]) <= 95
    for step in range(4):
        batches = [
            Loader(each, ViewSpec(3, 16, 32)).batch_at(step).crops for each in (split, reference.splits["train"])
        ]
        assert torch.equal(*batches)
    how = Preprocessing(side=32, short_side=36)
    views = [
        torch.cat([view for view, _ in central_batches(each.splits["train"], how, 5)]) for each in (cache, reference)
    ]
    assert torch.equal(*views)


def test_large_data_is_streamed(images, tmp_path):
    lines: list[str] = []
    big = open_cache(
        str(images), cache_options=CacheOptions(resident_gb=1e-9, home=tmp_path / "home"), log=lines.append
    )
    assert big.way == "streaming"
    assert any("streaming: 36 images, packed" in line for line in lines)
    assert open_cache(str(images)).way == "resident"


def test_unchanged_folder_is_not_listed_again(images, monkeypatch):
    key = open_cache(str(images)).key
    with monkeypatch.context() as patch:
        patch.setattr(caches, "open_dataset", lambda *_: 1 / 0)
        assert open_cache(str(images)).key == key
    paint(images / "train" / "bee" / "new.png", 5)
    assert open_cache(str(images)).key != key
    (images / "train" / "bee" / "new.png").unlink()
    assert open_cache(str(images)).key == key


def test_new_file_is_noticed_even_if_not_all_are_watched(images, monkeypatch):
    monkeypatch.setattr(caches, "MAX_WATCHED", 20)
    key = open_cache(str(images), cache_options=CacheOptions(cap=40)).key
    paint(images / "test" / "cat" / "new.png", 5)
    assert open_cache(str(images), cache_options=CacheOptions(cap=40)).key != key, (
        "the folder's time changes with a new file"
    )


def test_prepare_repairs_a_damaged_cache(images, funmatch):
    cache = open_cache(str(images))
    path = cache.folder / "train.pixels"
    complete = path.read_bytes()
    path.write_bytes(complete[:100] + bytes([complete[100] ^ 1]) + complete[101:])
    assert "is damaged on the disk" in funmatch("prepare", images).stderr
    assert path.read_bytes() == complete


def test_damaged_streaming_cache_is_an_error(images, tmp_path):
    cache = open_cache(str(images), cache_options=CacheOptions(way="streaming", home=tmp_path / "home"))
    path = cache.folder / "train.pixels"
    complete = path.read_bytes()
    path.write_bytes(complete[:300] + bytes([complete[300] ^ 1]) + complete[301:])
    with pytest.raises(InputError, match="is damaged; run `funmatch prepare`"):
        cache.splits["train"].images(range(15))


def test_interrupted_scan_resumes(images, tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "CHUNK", 5)
    source = open_dataset(str(images))
    (images / "train" / "bee" / "0.jpg").write_bytes(b"")
    source = open_dataset(str(images))
    complete = scans.scan(source, tmp_path / "whole")
    read = []

    def reading_until(last: int):
        def read_one(split: str, index: int) -> bytes:
            read.append((split, index))
            if len(read) > last:
                raise KeyboardInterrupt
            return source.read(split, index)

        return read_one

    for last in (8, 20, 100):
        again = replace(source, read=reading_until(last))
        if last < 100:
            with pytest.raises(KeyboardInterrupt):
                scans.scan(again, tmp_path / "home")
    read.clear()
    found = scans.scan(replace(source, read=reading_until(100)), tmp_path / "home")
    assert 0 < len(read) < 36, "images read before the interruption are not read again"
    assert np.array_equal(found.rows, complete.rows)
    assert found.reasons == complete.reasons
    assert list(found.reasons.values()) == ["the file is empty"]


@pytest.mark.slow
def test_killed_prepare_resumes(tmp_path):
    """After SIGKILL at random times, the cache equals that of an uninterrupted run."""
    rng = np.random.default_rng(0)
    for i in range(1500):
        paint(tmp_path / "p" / f"{i:04}.jpg", i, (200, 150))
    argv = [sys.executable, "-m", "funmatch", "prepare", str(tmp_path / "p")]
    uninterrupted = {**os.environ, "FUNMATCH_CACHE": str(tmp_path / "straight")}
    subprocess.run(argv, check=True, capture_output=True, env=uninterrupted)
    killed = {**os.environ, "FUNMATCH_CACHE": str(tmp_path / "killed")}
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=killed)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.5))  # kills while importing, scanning and decoding
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            time.sleep(0.01)
    subprocess.run(argv, check=True, capture_output=True, env=killed)
    assert kills
    caches_built = [
        open_cache(str(tmp_path / "p"), cache_options=CacheOptions(home=tmp_path / home))
        for home in ("straight", "killed")
    ]
    for name in ("train.pixels", "train.index.npy", "meta.json"):
        assert (caches_built[0].folder / name).read_bytes() == (caches_built[1].folder / name).read_bytes()


def test_pixel_limit_does_not_affect_other_caches(images):
    small = open_cache(str(images), cache_options=CacheOptions(max_pixels=500, on_bad="skip"))
    assert small.summary["unreadable"]
    assert sum(map(len, open_cache(str(images)).splits.values())) == 36


@pytest.mark.parametrize("change", ["changed", "gone"])
def test_image_that_changes_while_decoding_is_an_error(images, monkeypatch, change):
    home = images.parent / "home"
    path = images / "train" / "cat" / "4.png"
    original_fill = build._fill

    def change_first(*args):
        paint(path, 999) if change == "changed" else path.rename(images.parent / "away.png")
        return original_fill(*args)

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(build, "_fill", change_first)
        with pytest.raises(InputError, match=r"train/cat/4\.png.*[Ss]tart"):
            open_cache(str(images), cache_options=CacheOptions(on_bad="skip", home=home))
    path.write_bytes(before)
    assert len(open_cache(str(images), cache_options=CacheOptions(home=home)).splits["train"]) == 15


def test_partial_line_of_reasons_is_dropped(tmp_path):
    path = tmp_path / "reasons"
    path.write_text('[0, "a"]\n[3, "b"]\n[4, "c')
    assert resumable.keep_reasons(path, 4) == {0: "a", 3: "b"}
    path.write_text(path.read_text() + "x" * 5 + '[2, "d"]\n')
    assert resumable.keep_reasons(path, 3) == {0: "a"}


def test_validation_images_are_held_out_from_labelled_ones(tmp_path):
    classes_folder(tmp_path / "p", 20)
    for i in range(40):
        paint(tmp_path / "loose" / f"{i}.png", 7000 + i)
    cache = open_cache(
        [str(tmp_path / "p"), str(tmp_path / "loose")], ReadOptions(split_spec=SplitSpec({"val": Fraction(1, 10)}))
    )
    assert {name: len(split) for name, split in cache.splits.items()} == {"train": 76, "val": 4}
    assert cache.splits["val"].labelled


def test_same_image_with_two_labels_is_a_warning(tmp_path, funmatch):
    classes_folder(tmp_path / "p", 3)
    shutil.copy(tmp_path / "p" / "ant" / "000.png", tmp_path / "p" / "bee" / "copy.png")
    result = funmatch("data", "p")
    assert "WARNING: 2 images of p are the same with different labels, e.g. ant/000.png = bee/copy.png" in result.stderr
    assert "CONTRADICTION" in result.stdout


def test_file_names_that_are_not_utf8(tmp_path, funmatch):
    os.makedirs(os.fsencode(tmp_path) + b"/p/caf\xe9")
    paint(tmp_path / "p" / "ant" / "0.png", 1)
    paint(tmp_path / "raw.png", 2).rename(os.fsdecode(os.fsencode(tmp_path) + b"/p/caf\xe9/\xff.png"))
    assert "classes: ant, caf\\udce9" in funmatch("data", "p").stdout
    assert "classes: ant, caf\\udce9" in funmatch("prepare", "p").stdout
    funmatch("prepare", "p", "--to", "tfrecord", "--out", "o")
    assert open_dataset(f"tfrecord:{tmp_path}/o").classes == ("ant", "caf\udce9")


def test_contact_sheet_is_not_written_among_the_images(tmp_path, funmatch):
    folder = classes_folder(tmp_path / "p", 3)
    for _ in range(2):
        assert "classes: ant, bee" in funmatch("data", ".", cwd=folder).stdout
    assert not list(folder.glob("*.png"))
    assert "does not end in .png" in funmatch("data", "p", "--sheet", "x.jpg", check=2).stderr


def test_unlabelled_copies_of_evaluation_images_are_left_out(tmp_path):
    classes_folder(tmp_path / "p", 10)
    (tmp_path / "loose").mkdir()
    for i, path in enumerate(sorted((tmp_path / "p").rglob("*.png"))):
        shutil.copy(path, tmp_path / "loose" / f"{i}.png")
    cache = open_cache(
        [str(tmp_path / "p"), str(tmp_path / "loose")], ReadOptions(split_spec=SplitSpec({"val": Fraction(3, 10)}))
    )
    assert {name: len(split) for name, split in cache.splits.items()} == {"train": 28, "val": 6}
    assert not cache.summary["leaks"]
    assert any("6 unlabelled copies" in note for note in cache.summary["notes"])


def test_full_disk_is_not_reported_as_a_bad_image(images, tmp_path):
    source = open_dataset(str(images))

    def disk_full(*_) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        scans.scan(replace(source, read=disk_full), tmp_path / "home")
    assert not scans.scan(source, tmp_path / "home").reasons
