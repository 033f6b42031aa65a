"""A BiT checkpoint whose file does not say which padding its network was trained with: labels decide."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import funmatch
from funmatch.models import bit
from funmatch.models.load import load

CLASSES, IMAGES, SIDE = 3, 30, 32
TINY = {"student": "resnet10t", "student_kwargs": ("stem_width=8", "channels=8,16,32,64")}


@pytest.fixture(name="made", scope="module")
def checkpoint_and_images(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint in the layout of TensorFlow's code, and images whose labels are its answers with padding −∞."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in bit.layout((3, 4, 6, 3), 64, CLASSES).items():
        spread = (1 / np.prod(shape[:-1])) ** 0.5 if len(shape) == 4 else 0.3
        weights[f"resnet/{name}"] = (rng.normal(0, spread, shape) + name.endswith("gamma")).astype(np.float32)
    path = folder / "teacher.npz"
    images = rng.integers(0, 256, (IMAGES, 4, 4, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    views = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    # Centred and spread, so that all classes occur.
    np.savez(path, **weights)
    with torch.inference_mode():
        logits = load(str(path), options=("pool_padding=-inf",)).eval()(views)
        weights["resnet/head/bias"] -= logits.mean(0).numpy()
        labels = (logits - logits.mean(0)).argmax(1)
    np.savez(path, **weights)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        for split in ("train", "val"):
            (folder / "images" / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / "images" / split / str(label) / f"{number}.png")
    return path, folder / "images"


def distill(made: tuple[Path, Path], out: Path, **options) -> dict:
    teacher, images = made
    return funmatch.distill(
        data=str(images), teacher=str(teacher), side=SIDE, eval_resize=SIDE, batch=20, steps=1, out=out,
        compile="off", device="cpu", **TINY, **options,
    ).metrics  # fmt: skip


def teacher_options(out: Path) -> list[str]:
    return json.loads((out / "config.json").read_text())["knobs"]["teacher_kwargs"]


@pytest.mark.slow
def test_labels_decide_and_the_run_records_it(made, tmp_path, capsys):
    distill(made, tmp_path / "run")
    shown = capsys.readouterr().err
    assert ", and 100.0 % with pool_padding=-inf; using pool_padding=-inf\n" in shown
    assert shown.count("top-1 100.0 % on 30 images of val") == 1
    assert teacher_options(tmp_path / "run") == ["pool_padding=-inf"]


@pytest.mark.slow
def test_the_same_command_finds_the_finished_run(made, tmp_path):
    assert distill(made, tmp_path / "run") == distill(made, tmp_path / "run")


@pytest.mark.slow
def test_an_option_of_the_user_and_images_without_labels_leave_the_file_as_it_is(made, tmp_path):
    distill(made, tmp_path / "asked", teacher_kwargs=("pool_padding=zeros",), allow_weak_teacher=True)
    assert teacher_options(tmp_path / "asked") == ["pool_padding=zeros"]
    distill(made, tmp_path / "unlabelled", unlabelled=True)
    assert teacher_options(tmp_path / "unlabelled") == []
