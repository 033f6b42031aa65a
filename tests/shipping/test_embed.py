"""`funmatch embed`: the features are those of plain timm or of a hook of one's own, with the paths in step."""

import csv
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import funmatch as api
from funmatch.errors import InputError

TEACHER = "fashion-mini-teacher"


@pytest.fixture
def model(tiny_run):
    """The folder of a finished run on the painted images."""
    return tiny_run.folder


def timms_features(run, paths) -> np.ndarray:
    net = timm.create_model(f"local-dir:{run}/student", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with torch.inference_mode():
        return torch.cat([net(transform(Image.open(path).convert("RGB"))[None]) for path in paths]).numpy()


def test_features_are_those_of_timm_without_its_head(model, images, tmp_path, funmatch):
    from pyarrow import parquet

    paths = sorted(map(str, (images / "test").rglob("*.*")))
    expected = timms_features(model, paths)
    funmatch("embed", model, images / "test", "--out", "f.npy")
    found = np.load(tmp_path / "f.npy", mmap_mode="r")
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with open(tmp_path / "f.paths.csv", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == paths
    funmatch("embed", model, images / "test", "--out", "f.parquet")
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.schema.field("features").type.list_size == expected.shape[1]
    np.testing.assert_array_equal(np.array(table["features"].to_pylist(), np.float32), found)
    assert table["path"].to_pylist() == paths


def test_unreadable_images_have_nan_and_the_reason(images, tmp_path, funmatch):
    (images / "val" / "bee" / "1.png").write_bytes(b"\x89PNG")
    done = funmatch("embed", TEACHER, images / "val", "--out", "f.npy")
    assert "1 of 9 images cannot be read" in done.stderr
    with open(tmp_path / "f.paths.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    bad = [bool(row["error"]) for row in rows]
    assert sum(bad) == 1
    np.testing.assert_array_equal(np.isnan(np.load(tmp_path / "f.npy")).all(1), bad)
    funmatch("embed", TEACHER, images / "val", "--out", "g.npy", "--strict", check=2)
    assert len(np.load(tmp_path / "g.npy")) == 9


def test_files_that_exist_are_kept_and_a_failure_leaves_none(images, tmp_path, funmatch, monkeypatch):
    (tmp_path / "f.paths.csv").write_text("mine")
    assert (
        "f.paths.csv exists; pass --overwrite" in funmatch("embed", TEACHER, images, "--out", "f.npy", check=2).stderr
    )
    assert not (tmp_path / "f.npy").exists()
    funmatch("embed", TEACHER, images, "--out", "f.npy", "--overwrite")
    assert (tmp_path / "f.paths.csv").read_text() != "mine"

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("funmatch.shipping.embed.with_gaps", full)
    assert "the disk is full at" in funmatch("embed", TEACHER, images, "--out", "g.npy", check=2).stderr
    assert {path.name for path in tmp_path.iterdir()} == {"images", "f.npy", "f.paths.csv"}


class Own(nn.Module):
    """A network that is not timm's: its last layer is not the last of its modules."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.num_classes = nn.Linear(12, 4), nn.Linear(3, 12), 4

    def forward(self, x):
        return self.head(self.body(x.mean((2, 3))).relu())


class Headless(nn.Module):
    num_classes = 4

    def forward(self, x):
        return x.mean((2, 3))[:, [0, 1, 2, 0]]


def test_features_of_other_networks_are_the_input_of_their_last_linear_layer():
    net, image = Own().eval(), np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    with torch.inference_mode():
        expected = net.body(torch.from_numpy(image).permute(2, 0, 1)[None].div(255).mean((2, 3))).relu()[0]
    np.testing.assert_allclose(api.embed(net, image), expected, atol=1e-4)
    with pytest.raises(InputError, match="has no features to write: it is not a timm network"):
        api.embed(Headless(), image)


def test_python_gives_the_rows_of_the_command(images, tmp_path, funmatch):
    funmatch("embed", TEACHER, images / "test", "--out", "f.npy")
    paths = sorted(map(str, (images / "test").rglob("*.*")))
    found = api.embed(TEACHER, [Image.open(path) for path in paths])
    np.testing.assert_allclose(found, np.load(tmp_path / "f.npy"), atol=1e-5)
    assert api.embed(TEACHER, paths[0]).shape == found.shape[1:]
    assert np.isnan(api.embed(TEACHER, [*paths, "missing.jpg"])[-1]).all()
    assert api.embed(TEACHER, []).shape == (0, found.shape[1])
    with pytest.raises(InputError, match="no file or folder missing"):
        api.embed(TEACHER, "missing.jpg")
