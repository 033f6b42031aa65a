"""Unequal classes: weights in the loss, and an order that shows all classes equally often."""

import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from make_images import paint

import funmatch
from funmatch.config import Train
from funmatch.data.loader import Loader
from funmatch.errors import InputError
from funmatch.ops.distances import balanced_weights, mix_labels, mix_weights
from funmatch.ops.mixing import mix_views
from funmatch.ops.tasks import multilabel
from funmatch.training import train
from funmatch.training.defaults import view_spec

COUNTS = {"ant": 12, "bee": 3, "cat": 1}
TINY = {"student": "fashion-mini-student", "batch": 16, "side": 16, "threads": 1, "val": "none"}
BALANCED = {"sampling": "balanced", "class_weights": "balanced"}


@pytest.fixture
def data(tmp_path) -> Path:
    for c, (name, count) in enumerate(COUNTS.items()):
        for i in range(count):
            paint(tmp_path / "images" / "train" / name / f"{i:02}.png", 100 * c + i)
    return tmp_path / "images"


def test_weights_are_those_of_scikit_learn():
    """n_samples / (n_classes * np.bincount(y)), of the classes that occur."""
    labels = torch.tensor([0] * 12 + [1] * 3 + [3])
    weights = balanced_weights(labels, 5)
    by_hand = [Fraction(16, 3 * 12), Fraction(16, 3 * 3), 0, Fraction(16, 3), 0]
    assert weights.tolist() == pytest.approx([float(each) for each in by_hand])
    assert weights[labels].mean() == pytest.approx(1.0)


def test_a_mixed_label_weighs_by_its_shares():
    labels, weights = torch.tensor([2, 0, 1, 1]), torch.tensor([0.5, 2.0, 4.0])
    for lam in (1.0, 0.25, torch.tensor([0.0, 0.5, 0.75])):
        expected = mix_labels(labels, lam, 3) @ weights
        assert torch.allclose(mix_weights(labels, lam, weights), expected)


def objective_of(data, tmp_path, **options):
    config = Train.checked(data=data, out=tmp_path / "run", steps=4, **TINY | options)
    built = train.build_train_setup(config)
    return built, train.label_objective(built)


def test_loss_without_mixup_is_that_of_torch(data, tmp_path):
    built, objective = objective_of(data, tmp_path, mixup=0, class_weights="balanced", device="cpu", precision="fp32")
    batch = built.loader.batch_at(0)
    student = built.student.classifier.eval()
    with torch.no_grad():
        logits, loss = student(batch.crops[1:]), objective.loss(batch)["loss"]
    weights = torch.tensor([16 / (3 * count) for count in COUNTS.values()])
    each = torch.nn.CrossEntropyLoss(weight=weights, reduction="none")(logits, batch.labels[1:])
    # Divided by the number of images; torch's own mean divides by the sum of the batch's weights.
    assert loss == pytest.approx(each.mean().item(), rel=1e-5)
    plain = objective_of(data, tmp_path, mixup=0)[1].loss(batch)["loss"].item()
    assert plain != pytest.approx(loss.item(), rel=1e-3)


@pytest.fixture(name="tags")
def table_of_tags(data) -> Path:
    """A table in which 12 of 16 images have the first class, 3 the second, none the third, and all the fourth."""
    rows = [
        f"{path.relative_to(data)},{int(i < 12)},{int(i > 12)},0,1"
        for i, path in enumerate(sorted(data.rglob("*.png")))
    ]
    (data / "tags.csv").write_text("path,a,b,c,d\n" + "\n".join(rows))
    return data / "tags.csv"


def test_weights_of_several_labels_are_negatives_for_each_positive():
    labels = torch.zeros(16, 4)
    labels[:12, 0] = labels[13:, 1] = labels[:, 3] = 1
    assert multilabel.balanced_weights(labels, 4).tolist() == pytest.approx([4 / 12, 13 / 3, 1, 1])


@pytest.mark.parametrize("options", [{"mixup": 0}, {"mixup": 1.0, "label_smoothing": 0.1}])
def test_loss_of_several_labels_is_torchs_with_pos_weight(tags, tmp_path, options):
    given = {"task": "multilabel", "label_column": "a;b;c;d", "class_weights": "balanced", "device": "cpu"} | options
    built, objective = objective_of(tags, tmp_path, precision="fp32", **given)
    batch = built.loader.batch_at(0)
    student = built.student.classifier.eval()
    lam = torch.as_tensor(batch.own_weight).reshape(-1, 1)
    with torch.no_grad():
        logits = student(mix_views(batch.crops, (), batch.lam, batch.cutmix_boxes)[1])
        loss = objective.loss(batch)["loss"]
    targets = lam * batch.labels[1:] + (1 - lam) * batch.labels[:-1]
    targets = (1 - given.get("label_smoothing", 0)) * targets + given.get("label_smoothing", 0) / 2
    expected = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor([4 / 12, 13 / 3, 1, 1]))(logits, targets)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    plain = objective_of(tags, tmp_path, **given | {"class_weights": "none"})[1].loss(batch)["loss"].item()
    assert plain != pytest.approx(loss.item(), rel=1e-3)


def test_a_run_of_several_labels_resumes_exactly(tags, tmp_path):
    options = TINY | {"steps": 4, "save_every": 2, "eval_every": 4, "data": tags, "task": "multilabel"}
    options |= {"class_weights": "balanced", "label_column": "a;b;c;d"}
    whole = funmatch.finetune(out=tmp_path / "whole", **options)
    shutil.copytree(whole.folder, tmp_path / "resumed")
    (tmp_path / "resumed" / "result.json").unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000000004")
    resumed = funmatch.finetune(out=tmp_path / "resumed", **options)
    files = [(run.folder / "student" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]
    with pytest.raises(InputError, match="class_weights: balanced in the run, none now"):
        funmatch.finetune(out=tmp_path / "resumed", **options | {"class_weights": "none"})


def test_batches_are_balanced_on_one_process_and_on_two(data, tmp_path):
    built, _ = objective_of(data, tmp_path, sampling="balanced")
    loader = built.loader
    labels = np.concatenate([loader.batch_at(step).labels[1:].numpy() for step in range(6)])
    assert np.bincount(labels).tolist() == [32, 32, 32]
    for step in range(3):
        whole = loader.batch_at(step)
        halves = [Loader(loader.split, loader.spec, rank, 2).batch_at(step) for rank in (0, 1)]
        assert torch.equal(torch.cat([half.labels[1:] for half in halves]), whole.labels[1:])
        assert torch.equal(torch.cat([half.crops[1:] for half in halves]), whole.crops[1:])
    assert view_spec(built.config).key()["sampling"] == "balanced"


@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_a_run_resumes_exactly(verb, data, tmp_path):
    options = TINY | BALANCED | {"steps": 6, "save_every": 3, "eval_every": 6, "data": data}
    whole = getattr(funmatch, verb)(out=tmp_path / "whole", **options)
    shutil.copytree(whole.folder, tmp_path / "resumed")
    (tmp_path / "resumed" / "result.json").unlink()
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-000000006")
    resumed = getattr(funmatch, verb)(out=tmp_path / "resumed", **options)
    files = [(run.folder / "student" / "model.safetensors").read_bytes() for run in (whole, resumed)]
    assert files[0] == files[1]
    assert resumed.metrics["step"] == 6
    with pytest.raises(InputError, match="sampling: balanced in the run, shuffled now"):
        getattr(funmatch, verb)(out=tmp_path / "resumed", **options | {"sampling": "shuffled"})


def test_distillation_refuses_both(data, tmp_path, funmatch):
    words = ["--teacher", "fashion-mini-teacher", "--student", "fashion-mini-student", "--steps", "2", "--out", "run"]
    told = funmatch("distill", "--data", data, *words, "--sampling", "balanced", "--class-weights", "balanced", check=2)
    assert "--sampling balanced is for training on labels (train, finetune)" in told.stderr
    assert "--class-weights balanced is for training on labels (train, finetune)" in told.stderr
    assert not (tmp_path / "run").exists()


def test_the_remedies_are_named_where_classes_are_very_unequal(data, funmatch):
    shown = funmatch("data", data).stdout
    assert "images per class of train: 1 (cat) … 12 (ant), 1 : 12" in shown
    assert "train and finetune count them equally with --class-weights balanced" in shown
    shown = funmatch("data", data, "--task", "multilabel").stdout
    assert "train and finetune count them equally with --class-weights balanced (in the loss)\n" in shown
    shutil.rmtree(data / "train" / "cat")
    assert "--sampling balanced" not in funmatch("data", data).stdout, "12 and 3 are near enough"


def test_words_of_other_tools_lead_to_the_options(data, funmatch):
    words = ["train", "--data", data, "--student", "resnet10t", "--steps", "1", "--out", "run"]
    assert "use --sampling balanced" in funmatch(*words, "--sampler", "balanced", check=2).stderr
    assert "use --class-weights balanced" in funmatch(*words, "--class-weight", "balanced", check=2).stderr
