"""Evaluation of models: metrics of other libraries, temperature, comparison, corruptions, features, and bad input."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import funmatch
from funmatch.config import Evaluate
from funmatch.errors import InputError
from funmatch.ops.corruptions import CORRUPTIONS, Damage
from funmatch.training.evaluation import evaluate, figures, subject

NAMES = ("ant", 'a "bee",\nor two', "<b>cat")


class Net(torch.nn.Module):
    """Classifies by the mean colour; other seeds and scales give other models of the same classes."""

    def __init__(self, classes=3, seed=0, scale=10.0):
        super().__init__()
        self.num_classes = classes
        self.head = torch.nn.Linear(12, classes)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            # Names are sorted, which turns the order of the colours around.
            colors = torch.eye(3).flip(0).repeat_interleave(4, 1)[torch.arange(classes) % 3] / 4
            self.head.weight.copy_(scale * (colors + 0.1 * torch.randn(classes, 12, generator=generator)))
            self.head.bias.zero_()

    def forward(self, views):
        return self.head(torch.nn.functional.adaptive_avg_pool2d(views, 2).flatten(1))


def classifier(classes=3, seed=0, scale=10.0, names=None, net=None):
    card = funmatch.Card("its-name", 16, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), names)
    return funmatch.Classifier(net or Net(classes, seed, scale), card, num_classes=classes)


def paint_class(path, number, seed):
    """Writes an image whose colour tells its class as a rule."""
    rng = np.random.default_rng(seed)
    color = 90 + 60 * np.eye(3)[number % 3] + rng.normal(0, 25, 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(color + rng.normal(0, 20, (20, 22, 3)), 0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def data(tmp_path):
    """Training, validation and test images of three classes with awkward names."""
    for s, (split, count) in enumerate((("train", 8), ("val", 6), ("test", 7))):
        for c, name in enumerate(NAMES):
            for i in range(count):
                paint_class(tmp_path / "images" / split / name / f"{i}.png", c, 1000 * s + 100 * c + i)
    return tmp_path / "images"


def found_in(data, model=None, **options):
    return funmatch.evaluate(classifier() if model is None else model, data=data, side=16, **options)


def test_metrics_equal_those_of_scikit_learn_and_of_the_columns(data):
    sklearn = pytest.importorskip("sklearn.metrics")
    model, teacher = classifier(), classifier(seed=1)
    options = Evaluate.checked(model="one", teacher=["two"], data=str(data), side=16)
    found = evaluate.evaluate(options, {"one": model, "two": teacher})
    metrics, scores = found.metrics, found.scores
    assert scores is not None
    labels, logits = scores.labels.numpy(), scores.logits.double()
    shares, predicted = logits.softmax(-1).numpy(), logits.argmax(-1).numpy()
    assert metrics["top1"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert metrics["class_balanced"]["top1"] == pytest.approx(sklearn.balanced_accuracy_score(labels, predicted))
    assert metrics["class_balanced"]["f1"] == pytest.approx(sklearn.f1_score(labels, predicted, average="macro"))
    assert metrics["nll"] == pytest.approx(sklearn.log_loss(labels, shares), abs=1e-6)
    assert metrics["confusions"]["matrix"] == sklearn.confusion_matrix(labels, predicted).tolist()
    precision, recall, _, counts = sklearn.precision_recall_fscore_support(labels, predicted, zero_division=np.nan)
    rows = metrics["classes"]
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert [row["images"] for row in rows] == counts.tolist()
    assert [row["top1"] for row in rows] == pytest.approx(recall.tolist())
    assert [math.nan if row["precision"] is None else row["precision"] for row in rows] == pytest.approx(
        precision.tolist(), nan_ok=True
    )
    assert metrics["agreement"] == pytest.approx((scores.columns["teacher"].numpy() == predicted).mean())
    assert metrics["of_teacher"]["top1"] == metrics["teacher_top1"]
    low, high = metrics["intervals"]["top1"]
    assert low < metrics["top1"] < high


def test_keys_that_scripts_read_keep_their_meaning(data):
    metrics = found_in(data)
    keys = "top1 top5 agreement agreement5 kl ece teacher_top1 split pictures parameters step run model data teacher"
    assert set(keys.split()) <= metrics.keys()
    assert (metrics["split"], metrics["pictures"], metrics["teacher"], metrics["run"]) == ("test", 21, None, None)
    assert metrics["agreement"] is metrics["kl"] is metrics["teacher_top1"] is None
    json.dumps(metrics, allow_nan=False)


def test_temperature_is_fitted_on_validation_images_and_measured_on_the_others(data):
    metrics = found_in(data, classifier(scale=200.0))
    assert metrics["temperature_from"] == "18 images of val"
    assert metrics["temperature"] > 1, "an overconfident model"
    assert metrics["nll_scaled"] < metrics["nll"]
    again = found_in(data, classifier(scale=200.0 / metrics["temperature"]))
    assert again["temperature"] == pytest.approx(1, rel=1e-3)
    assert again["ece"] == pytest.approx(metrics["ece_scaled"], abs=1e-5)


def test_temperature_of_validation_images_themselves_is_cross_fitted(data):
    metrics = found_in(data, classifier(scale=200.0), split="val")
    assert metrics["temperature_from"] == "val, each half by the temperature of the other"
    assert metrics["nll_scaled"] < metrics["nll"]


def test_unlabelled_images_have_agreement_and_entropy_alone(tmp_path):
    for i in range(9):
        paint_class(tmp_path / "photos" / f"{i}.png", i, i)
    metrics = funmatch.evaluate(
        classifier(), data=tmp_path / "photos", unlabelled=True, teacher=classifier(seed=1), side=16
    )
    assert all(metrics[name] is None for name in ("top1", "top5", "ece", "nll", "brier", "aurc", "temperature"))
    assert metrics["confusions"] is metrics["class_balanced"] is None
    assert 0 <= metrics["agreement"] <= 1
    assert metrics["kl"] > 0
    assert metrics["entropy"] > 0
    assert sum(row["images"] for row in metrics["classes"]) == 9
    assert "label" not in metrics["differing"]["images"][0]
    alone = funmatch.evaluate(classifier(), data=tmp_path / "photos", unlabelled=True, side=16)
    assert alone["classes"] is None
    assert alone["entropy"] == metrics["entropy"]


def test_several_models_are_compared_on_the_same_images(data):
    first, other = classifier(), classifier(seed=1)
    metrics = found_in(data, first, others=[other, classifier(scale=9.0)])
    alone = found_in(data, other)
    row, near = metrics["others"]
    assert row["top1"] == alone["top1"]
    difference = row["difference"]
    assert difference["top1"]["mean"] == pytest.approx(alone["top1"] - metrics["top1"])
    assert difference["gained"] - difference["lost"] == round(21 * difference["top1"]["mean"])
    assert 0 < difference["p"] <= 1
    assert near["difference"]["top1"] == {"mean": 0, "low": 0, "high": 0}
    assert near["difference"]["p"] == 1


def test_models_of_other_classes_are_not_compared(data):
    with pytest.raises(InputError, match=r"has 4 outputs, but images has 3 classes"):
        found_in(data, others=[classifier(4)])
    with pytest.raises(InputError, match="has 4 outputs"):
        found_in(data, unlabelled=True, others=[classifier(4)])
    named = [classifier(3, names=names) for names in (("a", "b", "c"), ("b", "a", "c"))]
    with pytest.raises(InputError, match="have different classes, so their predictions cannot be compared"):
        found_in(data, named[0], unlabelled=True, others=named[1:])
    with pytest.raises(InputError, match=r"teacher .* has 4 outputs"):
        found_in(data, unlabelled=True, teacher=classifier(4))


def test_outputs_that_are_not_finite_are_refused(data):
    net = Net()
    with torch.no_grad():
        net.head.bias[1] = torch.nan
    with pytest.raises(InputError, match=r"outputs that are not finite for 21 of 21 images of test"):
        found_in(data, classifier(net=net))


@pytest.mark.parametrize(
    ("logits", "bad"),
    [([0.0, math.nan], 1), ([0.0, math.inf], 1), ([-math.inf, -math.inf], 1), ([0.0, -math.inf], 0), ([1e4, -1e4], 0)],
)
def test_only_rows_without_probabilities_are_not_finite(logits, bad):
    class Split(list):
        name = "test"

    if not bad:
        subject.check_finite("m", torch.tensor([logits]), Split([0]))
        return
    with pytest.raises(InputError, match="for 1 of 1 images of test"):
        subject.check_finite("m", torch.tensor([logits]), Split([0]))


@pytest.mark.parametrize(
    "logits", [torch.zeros(1, 1), torch.zeros(3, 4), 1e4 * torch.eye(4), -torch.inf * torch.eye(3)]
)
def test_degenerate_logits_give_metrics_or_none(logits):
    logits = logits.nan_to_num(nan=0.0, neginf=-math.inf)
    labels = torch.zeros(len(logits), dtype=torch.long)
    scores = figures.score(logits, labels, logits.flip(0))
    names = [str(i) for i in range(logits.shape[-1])]
    found = figures.finite(figures.figures(scores) | {"classes": figures.class_rows(scores, names)})
    json.dumps(found, allow_nan=False)
    assert 0 <= found["top1"] <= 1
    assert sum(each["images"] for each in found["reliability"]) == len(logits)
    figures.compare(scores, scores, 0)
    assert len(figures.differing_images(scores, 2)) <= 2


def test_flip_averages_an_image_and_its_mirror(data):
    options = {"data": str(data), "side": 16, "model": "one"}
    plain, flipped = (
        evaluate.evaluate(Evaluate.checked(**options, tta=tta), {"one": classifier()}) for tta in ("none", "flip")
    )
    opened = flipped.opened
    view = opened.subjects[0].trained.preprocessing.view
    images = torch.stack([view(each) for each in opened.split.images(slice(None))])
    net = classifier().eval()
    with torch.inference_mode():
        expected = (net(images) + net(images.flip(-1))) / 2
    assert torch.allclose(flipped.scores.logits, expected, atol=1e-4)
    assert not torch.allclose(plain.scores.logits, expected, atol=1e-4)


def test_corrupted_images_are_the_same_for_every_model_and_batch(data):
    options = {"corruptions": ["noise", "posterize"], "teacher": classifier(), "seed": 3}
    one, other = (found_in(data, batch=batch, **options)["corruptions"] for batch in (4, 128))
    assert one == other
    assert one["kinds"] == ["noise", "posterize"]
    assert one["images"] == 21
    ((_, model),), teacher = one["models"].items(), one["teacher"]
    # The teacher is the same network: on the same pixels it must say the same.
    assert model["top1"] == teacher["top1"]
    assert found_in(data, corruptions=["noise"], seed=4, teacher=classifier())["corruptions"] != one
    assert all(len(values) == 5 for values in model["top1"]["by_kind"].values())


def test_corruptions_are_evaluated_on_some_images_only_where_there_are_many(data):
    assert found_in(data, corruptions=["jpeg"], corruption_images=5)["corruptions"]["images"] == 5


def test_names_of_corruptions_are_those_that_exist():
    from funmatch.config.choices import CORRUPTIONS as names

    assert names == tuple(CORRUPTIONS)
    assert Damage("noise", 5).apply(torch.rand(1, 3, 8, 8)).shape == (1, 3, 8, 8)
    with pytest.raises(InputError, match="unknown corruption 'nois'; did you mean 'noise'"):
        Evaluate.checked(model="m", corruptions=["nois"])


def test_features_are_measured_by_neighbours_and_a_probe(data):
    embedding = found_in(data, embedding=True)["embedding"]
    assert (embedding["dimensions"], embedding["train"]) == (12, 24)
    assert embedding["knn"]["top1"] > 0.8, "the colour of an image tells its class"
    assert embedding["probe"]["top1"] > 0.8


def test_a_model_without_classes_is_measured_by_its_features_alone(data):
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    net.num_classes = 0
    metrics = found_in(data, classifier(12, net=net))
    assert metrics["top1"] is None
    assert metrics["embedding"]["knn"]["top1"] > 0.8
    with pytest.raises(InputError, match="are fitted on the training images"):
        found_in(data, classifier(12, net=net), split="train")
    with pytest.raises(InputError, match="has no labels, which nearest neighbours"):
        found_in(data, classifier(12, net=net), unlabelled=True)


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match="a model is given twice"):
        Evaluate.checked(model="a", others=["b", "a"])


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_of_one_class_can_be_evaluated(tmp_path, count):
    for split, images in (("train", 2), ("test", count)):
        for i in range(images):
            paint_class(tmp_path / "images" / split / "only" / f"{i}.png", 0, i)
    metrics = funmatch.evaluate(
        classifier(1), data=tmp_path / "images", side=16, teacher=classifier(1), report=tmp_path / "page.html",
        per_image=tmp_path / "all.csv", corruptions=["noise"], others=[classifier(1, seed=1)],
    )  # fmt: skip
    assert metrics["top1"] == metrics["agreement"] == 1.0
    assert metrics["ece"] == metrics["kl"] == metrics["nll"] == metrics["brier"] == 0
    assert metrics["temperature"] is None, "with one class, every temperature gives the same"
    assert metrics["intervals"]["top1"][1] == 1.0
    assert len((tmp_path / "all.csv").read_text().splitlines()) == count + 1
