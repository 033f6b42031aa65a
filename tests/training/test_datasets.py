"""Runs on all kinds of data: unlabelled, other classes, held-out splits, joined folders, shards."""

import json

import pytest
from make_images import FEW, paint

import funmatch
from funmatch.errors import InputError

TINY = {"student": "fashion-mini-student", "steps": 2, "batch": 32, "threads": 1, "eval_every": 2}
DISTILL = {**TINY, "teacher": "fashion-mini-teacher"}


def class_folder(root, classes=("ant", "bee"), count=10):
    for c, name in enumerate(classes):
        for i in range(count):
            paint(root / name / f"{i:02}.png", 100 * c + i)
    return root


def test_images_of_other_classes_are_used_without_labels(tmp_path, capfd):
    run = funmatch.distill(data=class_folder(tmp_path / "insects"), out=tmp_path / "run", **DISTILL)
    assert "using its images without labels" in capfd.readouterr().err
    assert (run.figures["split"], run.figures["pictures"], run.top1) == ("val", 2, None)
    assert run.figures["held_out_of"] == 20
    assert 0 <= run.agreement <= 1
    evaluated = funmatch.evaluate(run.folder)
    assert (evaluated["pictures"], evaluated["agreement"]) == (2, pytest.approx(run.agreement))


def test_other_classes_with_a_validation_split_are_an_error(images, tmp_path):
    with pytest.raises(InputError, match=r"10 outputs, but images has 3 classes .*unlabelled=True, or .*eval_data"):
        funmatch.distill(data=images, out=tmp_path / "run", **DISTILL)
    run = funmatch.distill(data=images, out=tmp_path / "run", unlabelled=True, **DISTILL)
    assert run.top1 is None
    assert run.figures["split"] == "test"


def test_evaluation_on_other_data(images, tmp_path):
    run = funmatch.distill(data=images, eval_data=FEW, out=tmp_path / "run", **DISTILL)
    assert (run.figures["split"], run.figures["pictures"]) == ("test", 30)
    assert run.figures["teacher"]["top1"] == pytest.approx(0.97, abs=0.02)  # one image is 0.033
    config = json.loads((run.folder / "config.json").read_text())
    assert config["facts"]["pictures"] == {"train": 15, "val": 30, "test": 30}
    evaluated = funmatch.evaluate(run.folder)
    assert (evaluated["pictures"], evaluated["data"]) == (30, [FEW])
    assert evaluated["top1"] == pytest.approx(run.top1)
    assert "data:image/png;base64," in run.report.read_text(), "the views of a step"
    assert funmatch.distill(data=images, eval_data=FEW, out=tmp_path / "run", **DISTILL).figures == run.figures


def test_evaluation_on_a_folder_without_splits(images, tmp_path):
    other = class_folder(tmp_path / "other", ("ant", "bee", "cat"), 4)
    run = funmatch.train(data=images, eval_data=other, out=tmp_path / "run", side=16, **TINY)
    assert (run.figures["split"], run.figures["pictures"]) == ("test", 12)
    insects = class_folder(tmp_path / "insects")
    with pytest.raises(InputError, match="no labels"):
        funmatch.train(data=images, eval_data=insects, out=tmp_path / "other-run", side=16, **TINY)


def test_held_out_images_are_the_same_in_evaluation(tmp_path):
    data = class_folder(tmp_path / "insects", count=20)
    run = funmatch.train(data=data, val="20%", out=tmp_path / "run", side=16, **TINY)
    assert (run.figures["split"], run.figures["pictures"]) == ("val", 8)
    assert funmatch.evaluate(run.folder)["pictures"] == 8
    assert funmatch.evaluate(run.folder, split="train")["pictures"] == 32
    with pytest.raises(InputError, match="val_seed"):
        funmatch.train(data=data, val="20%", val_seed=1, out=tmp_path / "run", side=16, **TINY)


def test_run_is_recognised_after_its_images_moved(images, tmp_path):
    options = {**TINY, "side": 16}
    before = funmatch.train(data=images, out=tmp_path / "run", **options)
    images.rename(tmp_path / "moved")
    assert funmatch.train(data=tmp_path / "moved", out=tmp_path / "run", **options).figures == before.figures


def test_runs_on_shards_and_on_joined_data(images, tmp_path, funmatch):
    import funmatch as api

    funmatch("prepare", images, "--to", "tfrecord", "--shard-size", "5", "--out", "shards")
    spec = f"tfrecord:{tmp_path}/shards"
    run = api.train(data=spec, out=tmp_path / "run", side=16, **TINY)
    assert run.figures["pictures"] == 12
    assert api.evaluate(run.folder, split="val")["pictures"] == 9
    distilled = api.distill(
        data=[spec, images], teacher=run.folder, allow_weak_teacher=True, out=tmp_path / "t", side=16, **TINY
    )
    facts = json.loads((distilled.folder / "config.json").read_text())["facts"]
    assert facts["pictures"] == {"train": 30, "val": 18, "test": 24}
    assert facts["classes"] == ["ant", "bee", "cat"]


def test_numbered_classes_are_taken_in_the_teachers_order(tmp_path):
    """Shards without class names: labels are assumed to be in the teacher's order."""
    from funmatch.data.formats.tfrecord import example, frame
    from funmatch.data.readers.open import open_dataset

    mini = open_dataset("fashion-mini")
    records = [frame(example(mini.read("test", i), [int(mini.splits["test"].labels[i])])) for i in range(0, 2000, 100)]
    (tmp_path / "test.tfrecord").write_bytes(b"".join(records))
    metrics = funmatch.evaluate("fashion-mini-teacher", data=f"tfrecord:{tmp_path}/test.tfrecord")
    assert metrics["pictures"] == 20
    assert metrics["top1"] > 0.7


@pytest.mark.parametrize("way", ["resident", "streaming"])
def test_resident_and_streaming_runs_are_equal(images, tmp_path, way):
    run = funmatch.train(data=images, out=tmp_path / "run", side=16, **TINY)
    evaluated = funmatch.train(data=images, out=tmp_path / way, side=16, pixels=way, **TINY)
    weights = [path / "student" / "model.safetensors" for path in (run.folder, evaluated.folder)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_student_of_numbered_shards_gets_the_teachers_class_names(tmp_path):
    from funmatch.data.formats.tfrecord import example, frame
    from funmatch.data.readers.open import open_dataset

    mini = open_dataset("fashion-mini")
    records = [frame(example(mini.read("train", i), [int(mini.splits["train"].labels[i])])) for i in range(0, 160, 5)]
    (tmp_path / "train.tfrecord").write_bytes(b"".join(records))
    run = funmatch.distill(data=f"tfrecord:{tmp_path}/train.tfrecord", out=tmp_path / "run", **DISTILL)
    assert json.loads((run.folder / "student" / "config.json").read_text())["label_names"] == list(mini.classes)
    assert funmatch.evaluate(run.folder, data=FEW, split="val")["pictures"] == 30


def test_leak_between_training_and_evaluation_data_is_a_warning(images, tmp_path, capfd):
    funmatch.train(data=images, eval_data=images / "train", out=tmp_path / "run", side=16, **TINY)
    assert "WARNING: 15 images of train's test are also in images's train" in capfd.readouterr().err


def test_unlabelled_applies_to_training_data_only(images, tmp_path):
    run = funmatch.distill(data=images, unlabelled=True, eval_data=FEW, out=tmp_path / "run", **DISTILL)
    assert run.top1 is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": "10%", "eval_data": "fashion-mini"}, "give one of them"),
        ({"data": []}, "give the training images by data"),
        ({"val": "", "data": "fashion-mini"}, "val is empty"),
        ({"val": 0.1, "data": "fashion-mini"}, "has its own validation split"),
        ({"val_seed": 10**30}, "val_seed must be at most"),
    ],
)
def test_invalid_data_options_are_rejected(options, message, images, tmp_path):
    with pytest.raises(InputError, match=message):
        funmatch.distill(**{"data": images, "out": tmp_path / "run", **DISTILL, **options})
