"""Images that are chosen from a pool: by the teacher's confidence, class by class, without near copies."""

import csv
import io
import os
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import timm
from make_images import write_few
from PIL import Image, ImageEnhance

import funmatch as api
from funmatch.data.formats.tfrecord import example, frame
from funmatch.data.readers.open import open_dataset
from funmatch.errors import InputError
from funmatch.shipping.selection import scores
from funmatch.shipping.selection.choose import Chooser, KeptClear
from funmatch.shipping.selection.copies import CopyIndex, code, codes_of_windows, likeness, views_of
from funmatch.shipping.selection.memory import ROW, UNREADABLE, Memory

TEACHER = "fashion-mini-teacher"


def picture(seed: int, side: int = 96) -> Image.Image:
    """A picture with structure at several sizes, as photographs have."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3))
    for blocks in (3, 6, 12, 24):
        layer = Image.fromarray(rng.integers(0, 256, (blocks, blocks, 3), dtype=np.uint8))
        total += np.asarray(layer.resize((side, side), Image.Resampling.BICUBIC), np.float64) / blocks
    return Image.fromarray((total / total.max() * 255).astype(np.uint8))


def encoded(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


COPIES = {
    "jpeg": lambda image: encoded(image, 30),
    "half": lambda image: image.resize((48, 48)),
    "double": lambda image: image.resize((192, 192)),
    "squashed": lambda image: image.resize((96, 70)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "shifted by 3 %": lambda image: image.crop((3, 3, 96, 96)),
    "shifted by 8 %": lambda image: image.crop((0, 8, 88, 96)),
    "cut by a tenth": lambda image: image.crop((5, 5, 91, 91)),
    "bright": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "all": lambda image: encoded(image.crop((4, 0, 96, 92)).transpose(Image.Transpose.FLIP_LEFT_RIGHT), 50),
}


@pytest.fixture(name="originals", scope="module")
def six_pictures() -> tuple[CopyIndex, list[np.ndarray]]:
    """Six pictures: the index of their codes, and their views."""
    originals = [np.asarray(picture(seed)) for seed in range(6)]
    codes = [codes_of_windows(each) for each in originals]
    index = CopyIndex(np.concatenate(codes), np.repeat(np.arange(6), len(codes[0])))
    return index, [views_of(each) for each in originals]


@pytest.mark.parametrize("kind", COPIES)
def test_near_copies_are_found_and_nothing_else(kind, originals):
    index, views = originals
    for number in range(6):
        copy = np.asarray(COPIES[kind](picture(number)))
        assert next(index.near(np.uint64(code(copy)))) == number
        alike = [likeness(views_of(copy), each) for each in views]
        assert alike[number] > 0.95
        assert max(each for i, each in enumerate(alike) if i != number) < 0.85
    assert not [*index.near(np.uint64(code(np.asarray(picture(99)))))]


def test_near_codes_are_those_that_differ_in_few_bits():
    rng = np.random.default_rng(0)
    known = rng.integers(0, 2**64, 500, dtype=np.uint64)
    index = CopyIndex(known, np.arange(500))
    for place in range(40):
        flipped = rng.choice(64, place % 14, replace=False)
        own = known[place] ^ np.bitwise_or.reduce(np.uint64(1) << flipped.astype(np.uint64), initial=np.uint64(0))
        near = [i for i, each in enumerate(known.tolist()) if bin(each ^ int(own)).count("1") <= 8]
        assert [*index.near(own)] == near


def rows_of(labels, confidence, codes=None) -> np.ndarray:
    rows = np.zeros(len(labels), ROW)
    rows["label"], rows["confidence"] = labels, confidence
    rows["code"] = np.arange(len(labels)) if codes is None else codes
    return rows


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_the_surest_of_each_class_are_chosen():
    rng = np.random.default_rng(1)
    labels, confidence = rng.integers(-1, 5, 300), rng.integers(0, 20, 300).astype(np.float32) / 20
    codes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    found = Chooser(6, 7, 0.3, 0.95, noise).choose(rows_of(labels, confidence, codes))
    expected: list[int] = []
    for label in range(6):
        own = [i for i in range(300) if labels[i] == label and confidence[i] >= np.float32(0.3)]
        expected += sorted(own, key=lambda i: (-confidence[i], i))[:7]
        assert found.candidates[label] == len(own)
    assert sorted(found.chosen) == sorted(expected)
    assert [confidence[i] for i in found.chosen] == sorted((confidence[i] for i in expected), reverse=True)
    assert found.unsure == int(((labels >= 0) & (confidence < np.float32(0.3))).sum())
    assert UNREADABLE == -1


def test_near_copies_leave_room_for_the_next():
    images = [np.asarray(picture(seed)) for seed in range(4)]
    # The second is the first one mirrored, the third one cut; the last is to be kept clear of; all are of one class.
    pool = [images[0], images[0][:, ::-1].copy(), images[0][4:, 4:].copy(), images[1], images[2], images[3]]
    codes = codes_of_windows(np.asarray(encoded(Image.fromarray(images[2]), 60)))
    kept = KeptClear(CopyIndex(codes, np.zeros(len(codes), int)), lambda _: images[2])
    rows = rows_of([0] * 6, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [code(each) for each in pool])
    found = Chooser(1, 3, 0.0, 0.95, pool.__getitem__, kept).choose(rows)
    assert found.chosen == [0, 3, 5]
    assert found.repeated == [(1, 0), (2, 0)]
    assert found.kept_clear == [(4, 0)]
    # Of another class, an equal image is a copy all the same.
    rows = rows_of([0, 1], [0.9, 0.8], [code(images[0])] * 2)
    assert Chooser(2, 3, 0.0, 0.95, lambda _: images[0]).choose(rows).repeated == [(1, 0)]


def test_what_a_teacher_said_is_kept_up_to_the_first_damage(tmp_path):
    rows = rows_of([3, 1, 2], [0.5, 0.25, 1.0])
    rows["size"], rows["changed"] = [1, 2, 3], [7, 8, 9]
    for part in (slice(0, 2), slice(2, 3)):
        with Memory(tmp_path) as memory:
            memory.add(["a.jpg", "ü/b.jpg", "c.jpg"][part], rows[part].copy())
    with Memory(tmp_path) as memory:
        assert memory.rows["label"].tolist() == [3, 1, 2]
        assert [memory.find("ü/b.jpg", state) for state in ((2, 8), (2, 9), (3, 8))] == [1, None, None]
        assert memory.find("d.jpg", (1, 7)) is None
    content = bytearray((tmp_path / "rows").read_bytes())
    content[ROW.itemsize + 5] ^= 1
    (tmp_path / "rows").write_bytes(content[:-3])
    with Memory(tmp_path) as memory:
        assert [*memory.places] == ["a.jpg"]
        memory.add(["ü/b.jpg"], rows[1:2].copy())
    with Memory(tmp_path) as memory:
        assert memory.rows["confidence"].tolist() == [0.5, 0.25]


@pytest.fixture(name="pool", scope="module")
def small_pool(tmp_path_factory):
    """A pool of 60 embedded images and copies of some of 30 others, which are to be kept clear of."""
    root = tmp_path_factory.mktemp("select")
    few = write_few(3, 6)
    for number, path in enumerate(sorted((p for p in os.scandir(f"{few}/train")), key=lambda p: p.name)):
        shutil.copytree(path.path, root / "pool" / f"part {number}")
    shutil.copytree(f"{few}/test", root / "kept" / "test")
    for number, name in enumerate(("bag", "coat")):
        Image.open(root / "kept" / "test" / name / "01.png").resize((56, 56)).save(root / "pool" / f"copy {number}.png")
    (root / "pool" / "broken.jpg").write_bytes(b"none")
    return root


def read(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_pool_becomes_a_table_that_runs_read(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(pool)
    arguments = {"without": "kept", "per_class": 8, "min_confidence": 0.1}
    found = api.select("pool", TEACHER, "chosen.csv", **arguments)
    rows = read("chosen.csv")
    assert (found["images"], found["unreadable"], found["chosen"]) == (63, 1, len(rows))
    assert {os.path.basename(one) for one, _ in found["kept_clear"]["examples"]} == {"copy 0.png", "copy 1.png"}
    assert {other for _, other in found["kept_clear"]["examples"]} == {f"kept/test/{c}/01.png" for c in ("bag", "coat")}
    # The same classes and probabilities as predict gives, from the surest to the least sure of each class.
    predicted = {each.path: each for each in api.predict(TEACHER, "pool", topk=1)}
    by_class: dict[str, list[float]] = {}
    for row in rows:
        one = predicted[row["path"]]
        assert row["label"] == one.label
        assert float(row["confidence"]) == pytest.approx(one.score, abs=1e-6)
        by_class.setdefault(row["label"], []).append(float(row["confidence"]))
    assert all(each == sorted(each, reverse=True) and len(each) <= 8 for each in by_class.values())
    assert found["classes"]["bag"]["chosen"] == len(by_class["bag"])
    assert found["short"] == [name for name in found["classes"] if len(by_class.get(name, [])) < 8]
    listed = open_dataset("csv:chosen.csv")
    assert len(listed.splits["train"]) == len(rows)
    assert listed.classes == tuple(sorted(by_class))
    # Again with other numbers, and from elsewhere: nothing is computed again.
    monkeypatch.setattr(scores, "answer", lambda _networks, images, *_: iter([*images]))
    api.select("pool", TEACHER, tmp_path / "more.parquet", **arguments | {"per_class": 2})
    assert len(open_dataset(f"csv:{tmp_path}/more.parquet").splits["train"]) <= len(rows)


def test_an_interrupted_selection_goes_on(pool, tmp_path, monkeypatch):
    add, calls = Memory.add, []

    def stop_at_the_third(memory, paths, rows):
        calls.append(len(paths))
        if len(calls) == 3:
            raise KeyboardInterrupt
        add(memory, paths, rows)

    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Memory, "add", stop_at_the_third)
    arguments = {"per_class": 5, "batch": 16}
    with pytest.raises(KeyboardInterrupt):
        api.select(pool / "pool", TEACHER, tmp_path / "a.csv", **arguments)
    assert not (tmp_path / "a.csv").exists()
    stopped, calls[:] = sum(calls[:2]), []
    monkeypatch.setattr(Memory, "add", lambda memory, paths, rows: (calls.append(len(paths)), add(memory, paths, rows)))
    api.select(pool / "pool", TEACHER, tmp_path / "a.csv", **arguments)
    assert stopped > 0
    assert sum(calls) == 63 - stopped
    # As if it had never been interrupted, up to the rounding of batches of other sizes.
    monkeypatch.setenv("FUNMATCH_CACHE", str(tmp_path / "other"))
    api.select(pool / "pool", TEACHER, tmp_path / "b.csv", **arguments)
    one, other = ({row["path"]: row for row in read(tmp_path / name)} for name in ("a.csv", "b.csv"))
    assert one.keys() == other.keys()
    for path, row in one.items():
        assert row["label"] == other[path]["label"]
        assert float(row["confidence"]) == pytest.approx(float(other[path]["confidence"]), abs=1e-6)


def tar_of(pool, path) -> str:
    """Writes the pool as a shard of WebDataset, whose samples are named by numbers."""
    with tarfile.open(path, "w") as tar:
        for number, file in enumerate(sorted((pool / "pool").rglob("*.*"))):
            tar.add(file, f"{number}{file.suffix}")
    return f"wds:{path}"


def by_content(table) -> dict[bytes, tuple[str, float]]:
    """The label and the confidence of each image of a table, by the bytes of its file."""
    folder = os.path.dirname(table)
    found = {}
    for row in read(table):
        with open(os.path.join(folder, row["path"]), "rb") as file:
            found[file.read()] = row["label"], float(row["confidence"])
    return found


def test_a_table_and_shards_are_pools_like_their_folder(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {"per_class": 4, "without": str(pool / "kept")}
    api.select(pool / "pool", TEACHER, "folder.csv", **arguments)
    expected = by_content("folder.csv")
    files = sorted((pool / "pool").rglob("*.*"))
    (pool / "table.csv").write_text("path\n" + "".join(f"{file.relative_to(pool)}\n" for file in files))
    shards = tar_of(pool, tmp_path / "pool.tar")
    # TFRecords of the same bytes, of which two shards have a record 0.
    (tmp_path / "records").mkdir()
    for number, part in enumerate((files[:20], files[20:])):
        content = b"".join(frame(example(file.read_bytes(), None)) for file in part)
        (tmp_path / "records" / f"{number}.tfrec").write_bytes(content)
    for spec, extract in (
        (f"csv:{pool}/table.csv", None),
        (shards, "a/b"),
        ("tfrecord:records", "c"),
        (pool / "pool", "d"),
    ):
        given = {"extract": extract} if extract else {}
        found = api.select(str(spec), TEACHER, "chosen.csv", overwrite=True, **arguments, **given)
        assert (found["images"], found["unreadable"], found["chosen"]) == (63, 1, len(expected))
        chosen = by_content("chosen.csv")
        assert chosen.keys() == expected.keys()
        for content, (label, confidence) in chosen.items():
            assert (label, confidence) == (expected[content][0], pytest.approx(expected[content][1], abs=1e-6))
        if extract:
            # The files are those of the table, which runs read.
            assert {os.path.join(extract, each.name) for each in (tmp_path / extract).iterdir()} == {
                row["path"] for row in read("chosen.csv")
            }
            assert len(open_dataset("csv:chosen.csv").splits["train"]) == len(chosen)
    # What was said of an image in a shard is not computed again, but where its bytes have changed.
    calls = []
    add = Memory.add
    monkeypatch.setattr(Memory, "add", lambda memory, paths, rows: (calls.extend(paths), add(memory, paths, rows)))
    again = {"overwrite": True, "extract": "c"} | arguments
    api.select("tfrecord:records", TEACHER, "chosen.csv", **again)
    assert not calls
    other = Image.new("L", (28, 28), 90)
    other.save(file := io.BytesIO(), "PNG")
    (tmp_path / "records" / "0.tfrec").write_bytes(
        b"".join(frame(example(each, None)) for each in (file.getvalue(), *(path.read_bytes() for path in files[1:20])))
    )
    api.select("tfrecord:records", TEACHER, "chosen.csv", **again)
    assert len(calls) == 1
    assert calls[0].endswith("0.tfrec, record 0")


def test_pixels_of_shards_are_extracted_as_image_files(tmp_path):
    found = api.select("fashion-mini-pool", TEACHER, tmp_path / "chosen.csv", per_class=2, extract=tmp_path / "files")
    source = open_dataset("fashion-mini-pool")
    known = {source.read("train", i) for i in range(len(source.splits["train"]))}
    names = sorted(path for path in (tmp_path / "files").iterdir())
    assert len(names) == found["chosen"] > 0
    assert {path.suffix for path in names} == {".ppm"}
    assert {path.read_bytes() for path in names} <= known


def test_what_select_refuses(pool, tmp_path, funmatch):
    shards = tar_of(pool, pool / "pool.tar")
    (tmp_path / "there.csv").write_text("")
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([pool, "--per-class", "0", "--out", "a.csv"], "per_class must be at least 1, got 0"),
        ([pool, "--per-class", "1", "--out", "there.csv"], "there.csv exists; pass --overwrite"),
        ([pool, "--per-class", "1", "--out", "a.txt"], "a.txt ends in neither .csv nor .parquet"),
        (["empty", "--per-class", "1", "--out", "a.csv"], "empty has no images"),
        (["none", "--per-class", "1", "--out", "a.csv"], "no file or folder none"),
        (["fashion-mini", "--per-class", "1", "--out", "a.csv"], "not files of their own, e.g. train/ankle boot/0"),
        (
            [shards, "--per-class", "1", "--out", "a.csv"],
            "pass --extract FOLDER, which writes the chosen ones as files",
        ),
        ([pool, "--per-class", "1", "--without", "nowhere", "--out", "a.csv"], "unknown data set 'nowhere'"),
    ):
        ended = funmatch("select", *map(str, words), "--teacher", TEACHER, check=2)
        assert message in ended.stderr, words
    assert {path.name for path in tmp_path.iterdir()} == {"there.csv", "empty"}


def test_a_teacher_without_classes_is_refused(pool, tmp_path):
    backbone = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(InputError, match="has no classes, so it is sure of none; fit some on labelled images"):
        api.select(pool / "pool", backbone, tmp_path / "a.csv", per_class=1)
    several = api.load(TEACHER)
    several.card = replace(several.card, task="multilabel")
    with pytest.raises(InputError, match=r"\(multilabel\), so an image has no surest class"):
        api.select(pool / "pool", several, tmp_path / "a.csv", per_class=1)
