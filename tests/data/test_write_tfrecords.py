"""Shards as TensorFlow notebooks look for them: names of splits, labels left out, and how images are resized."""

import json

import numpy as np
import pytest
from make_images import paint

from funmatch.data.formats.tfrecord import parse_example, records
from funmatch.data.readers.open import open_dataset
from funmatch.data.shard_images import Resizing

ARGV = ("prepare", "p", "--to", "tfrecord", "--shard-size", "4", "--out", "o")


@pytest.fixture(name="labelled")
def labelled_images(tmp_path):
    for i in range(6):
        paint(tmp_path / "p" / ("train", "val")[i % 2] / f"c{i % 3}" / f"{i}.png", i, (24, 36))
    return tmp_path


def test_validation_shards_have_the_name_that_notebooks_look_for(labelled, funmatch):
    funmatch(*ARGV)
    (shard,) = labelled.glob("o/validation/*.tfrec")
    assert shard.name == "validation_p-00-3.tfrec"
    content = {
        name: [s.labels.tolist(), len(s)] for name, s in open_dataset("tfrecord:" + str(labelled / "o")).splits.items()
    }
    assert list(content) == ["train", "val"]
    # As an earlier version wrote them, and as other people call them.
    for name in ("val", "valid"):
        shard.parent.rename(labelled / "o" / name)
        shard = (labelled / "o" / name / shard.name).rename(labelled / "o" / name / f"{name}_p-00-3.tfrec")
        note = labelled / "o" / "funmatch.json"
        about = json.loads(note.read_text())
        about["shards"] = [str(path.relative_to(labelled / "o")) for path in sorted(labelled.glob("o/*/*.tfrec"))]
        note.write_text(json.dumps({key: value for key, value in about.items() if key != "format"}))
        found = open_dataset("tfrecord:" + str(labelled / "o"))
        assert {key: [s.labels.tolist(), len(s)] for key, s in found.splits.items()} == content
        if name == "val":
            again = funmatch(*ARGV)
            assert "o is of an earlier version, with validation shards in val/" in again.stderr
            assert not list(labelled.glob("o/validation"))


def test_unlabelled_shards_have_no_class(labelled, funmatch):
    summary = json.loads(funmatch(*ARGV, "--unlabelled", "--json").stdout)
    assert summary["classes"] == []
    assert not any(split["labelled"] for split in summary["splits"].values())
    assert not (labelled / "o" / "class.labels.txt").exists()
    shards = list(labelled.glob("o/*/*.tfrec"))
    assert all(set(parse_example(payload)) == {"image"} for shard in shards for _, payload in records(shard))
    assert not open_dataset("tfrecord:" + str(labelled / "o")).classes
    assert "another format" in funmatch(*ARGV, check=2).stderr


def test_notes_about_images_are_said_when_shards_are_written(labelled, funmatch):
    (labelled / "p" / "train" / "c9").mkdir()
    assert "no images in any split: c9" in funmatch(*ARGV).stderr


def between(pixels, side, axis):
    """Bilinear without antialias along an axis, by the definition of `half_pixel_centers`."""
    size = pixels.shape[axis]
    at = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, size - 1), at - low
    share = np.expand_dims(share, tuple(k for k in range(3) if k != axis))
    return pixels.take(low, axis) * (1 - share) + pixels.take(high, axis) * share


@pytest.mark.parametrize(("fit", "size"), [("squash", (20, 20)), ("keep", (20, 30))])
def test_images_are_resized_as_asked(fit, size):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    plain = Resizing(20, fit, "tf").apply(pixels)
    assert (plain.shape, plain.dtype) == ((*size, 3), np.uint8)
    expected = between(between(pixels.astype(float), size[0], 0), size[1], 1)
    assert np.abs(plain - expected).max() <= 0.51
    smooth = Resizing(20, fit).apply(pixels)
    assert smooth.shape == plain.shape
    assert smooth.std() < 0.75 * plain.std(), "antialias averages what the other leaves out"


def test_shards_of_another_resizing_are_not_taken_for_these(labelled, funmatch):
    squashed = (*ARGV, "--side", "16")
    funmatch(*squashed)
    first = sorted(labelled.glob("o/*/*.tfrec"))[0].read_bytes()
    for other in (["--resample", "tf"], ["--fit", "keep"]):
        assert "of another format" in funmatch(*squashed, *other, check=2).stderr
    funmatch(*squashed)
    assert sorted(labelled.glob("o/*/*.tfrec"))[0].read_bytes() == first
    error = funmatch(*ARGV, "--fit", "keep", check=2).stderr
    assert "--fit and --resample say how --side resizes" in error
