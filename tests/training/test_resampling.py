"""How views are resized: a student answers through timm's own transform as the run reports, and records say how."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from make_images import EMBEDDED, TILE
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import funmatch
from funmatch.data.cache.stores import INDEX, CachedSplit
from funmatch.runtime.disk.json_files import seal
from funmatch.training.evaluation import scoring
from funmatch.training.run import folder as run_folder
from funmatch.training.teachers import checks

CLASSES = json.loads((EMBEDDED / "classes.json").read_text())
SIDE = 24


def write_enlarged(folder: Path) -> Path:
    """Writes the embedded training and test images as photographs are: larger than the views, of many shapes."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        sheet = np.asarray(Image.open(EMBEDDED / f"{split}.png"))
        tiles = sheet.reshape(sheet.shape[0] // TILE, TILE, -1, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE)
        for name, group in zip(CLASSES, np.split(tiles, 10), strict=True):
            (folder / split / name).mkdir(parents=True)
            for i, tile in enumerate(group[:40]):  # a test set of 400 images
                size = rng.integers(40, 100, 2)
                image = np.asarray(Image.fromarray(tile).resize((int(size[1]), int(size[0])), Image.Resampling.BICUBIC))
                # Detail that a view without antialias reads one pixel of, and one with it the mean.
                image = np.clip(image[..., None] + rng.normal(0, 40, (*image.shape, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / split / name / f"{i:03}.png", compress_level=1)
    return folder


@pytest.fixture(name="photos", scope="module")
def enlarged_images(tmp_path_factory):
    return write_enlarged(tmp_path_factory.mktemp("photos") / "images")


def train(photos, out, **options):
    options = {"steps": 30} | options
    return funmatch.train(
        data=str(photos), student="resnet10t", student_kwargs=("stem_width=8", "channels=8,16,32,64"), side=SIDE,
        batch=32, lr=0.01, val="10%", compile="off", device="cpu", out=out, **options,
    )  # fmt: skip


def right_through_timm(student: Path, photos: Path) -> int:
    """Number of the test images that a student has right, loaded and shown to it by timm alone."""
    model = timm.create_model(f"local-dir:{student}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    views, labels = [], []
    for label, name in enumerate(sorted(CLASSES)):
        for path in sorted((photos / "test" / name).iterdir()):
            views.append(transform(Image.open(path).convert("RGB")))
            labels.append(label)
    with torch.inference_mode():
        return int((model(torch.stack(views)).argmax(-1) == torch.tensor(labels)).sum())


BICUBIC = pytest.param({"eval_resample": "bicubic", "eval_resize": 27}, marks=pytest.mark.slow)
LANCZOS = pytest.param({"eval_resample": "lanczos", "eval_resize": 27}, marks=pytest.mark.slow)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"eval_resample": "tf"}, BICUBIC, LANCZOS])
def test_timms_transform_gives_the_top1_that_the_run_reports(photos, tmp_path, options):
    result = train(photos, tmp_path / "run", **options).metrics
    assert result["pictures"] == 400
    assert result["top1"] > 0.25
    # Without antialias there is no such transform, and the run reports what timm's gives besides its own figure.
    reported = result.get("top1_antialias", result["top1"])
    assert abs(right_through_timm(tmp_path / "run" / "student", photos) - 400 * reported) <= 1
    again = funmatch.evaluate(tmp_path / "run" / "student", data=str(photos), batch=500)
    assert again["top1"] == pytest.approx(result["top1"], abs=1e-3), "the card says how the student was evaluated"


def test_a_run_from_before_the_choice_goes_on_without_antialias(photos, tmp_path):
    out = tmp_path / "run"
    first = train(photos, out, eval_resample="tf").metrics
    path = out / "config.json"
    record = json.loads(path.read_text())
    assert (record["knobs"]["resample"], record["knobs"]["eval_resample"]) == ("tf", "tf")
    for name in ("resample", "eval_resample"):
        del record["knobs"][name]
    path.write_text(json.dumps(seal(record)))
    (out / "result.json").unlink()
    assert train(photos, out).metrics["top1"] == first["top1"], "resumed with the default, it is evaluated as it was"
    with pytest.raises(funmatch.InputError, match="eval_resample: tf in the run, antialias"):
        train(photos, out, eval_resample="antialias")
    assert run_folder.find_run(out).config["knobs"].get("resample") is None, "the record stays as it was"


def split_of(sizes: list[tuple[int, int]]) -> CachedSplit:
    index = np.zeros(len(sizes), INDEX)
    index["height"], index["width"] = zip(*sizes, strict=True)
    index["label"] = np.arange(len(sizes)) % 4
    store: Any = None
    return CachedSplit("val", index, store, np.zeros((len(sizes), 16), np.uint8))


@pytest.mark.parametrize(("gained", "size", "said"), [(30, 200, True), (2, 200, False), (30, 40, False)])
def test_a_teacher_that_is_clearly_better_resized_the_other_way_is_named(monkeypatch, capsys, gained, size, said):
    split = split_of([(size, size)] * 200)
    labels = split.labels(slice(None))
    answers = torch.nn.functional.one_hot(labels, 4).float()
    # Without antialias it has some images wrong that it has right with it, and two the other way round.
    here, there = answers.clone(), answers.clone()
    here[:gained] = -here[:gained]
    there[-2:] = -there[-2:]
    shown: list[tuple[int, str]] = []

    def predict(_, some, view, known_by):
        assert known_by == ()
        shown.append((len(some), view.resample))
        logits = there if view.resample == "antialias" else here
        return logits, [logits]

    monkeypatch.setattr(checks, "predict", predict)
    teachers: Any = SimpleNamespace(members=[SimpleNamespace(name="its-name")])
    view = scoring.EvalView(side=32, short_side=40, batch=8, device=torch.device("cpu"), precision="fp32")
    checks.compare_resampling(teachers, [here], split, view, "tf")
    # Images that are enlarged look the same both ways.
    assert shown == ([(200, "antialias")] if size > 40 else [])
    text = capsys.readouterr().err
    assert ("its-name has top-1 99.0 % on images resized by antialias, 85.0 % by tf" in text) == said
    assert ("--resample antialias --eval-resample antialias shows them as it knows them" in text) == said
    checks.compare_resampling(teachers, [there], split, replace(view, resample="antialias"), "antialias")
    assert not capsys.readouterr().err, "views are resized as it knows them already"


def test_a_teacher_that_is_shown_other_views_than_its_card_says_is_said_to_be(photos, tmp_path, capsys):
    train(photos, tmp_path / "teacher", steps=2)
    capsys.readouterr()
    funmatch.distill(
        data=str(photos), teacher=tmp_path / "teacher", student="resnet10t", student_kwargs=("stem_width=8",),
        side=SIDE, eval_resize=48, steps=1, batch=8, val="10%", compile="off", device="cpu", allow_weak_teacher=True,
        out=tmp_path / "run",
    )  # fmt: skip
    found = capsys.readouterr().err
    assert "(resized to 48 pixels before the crop, as for the student; its own card says 30)" in found


def test_finetune_says_the_rate_that_the_rule_gives_a_batch(photos, tmp_path, capsys):
    funmatch.finetune(
        data=str(photos), model="resnet10t", model_kwargs=("stem_width=8", "channels=8,16,32,64"), side=SIDE, steps=2,
        batch=64, val="10%", compile="off", device="cpu", out=tmp_path / "run",
    )  # fmt: skip
    assert "learning rate 0.000375 for 2 steps (BiT-HyperRule: 0.003 × batch 64 / 512)" in capsys.readouterr().err
