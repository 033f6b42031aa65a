"""Votes of neighbours and means of classes as heads for several labels an image, against scikit-learn and numpy."""

import json

import numpy as np
import pytest
import timm
import torch
from sklearn import metrics, neighbors
from test_multilabel import answers, features_of, table, teacher, truth  # noqa: F401

import funmatch
from funmatch.config import Head
from funmatch.models.load import load
from funmatch.ops.heads.means import directions, fit_slope, nearer_mean, prior_log_odds
from funmatch.training.heads.choose import Labelled, fit_head

VOTES = {"algorithm": "brute", "metric": "cosine", "weights": lambda distance: np.exp((1 - distance) / 0.07)}


def probabilities(model, queries):
    """Of each class being there, by scikit-learn's classifier of several labels an image."""
    return np.stack([each[:, list(own).index(1)] for each, own in zip(model.predict_proba(queries), model.classes_,
                                                                       strict=True)], 1)  # fmt: skip


def nearest_by_numpy(known, labels, seen, distance):
    """By how much nearer the mean of a class's images is than that of the others."""
    found = np.zeros((len(seen), labels.shape[1]))
    if distance == "cosine":
        known, seen = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (known, seen))
    for number, own in enumerate(labels.T == 1):
        there, away = known[own].mean(0), known[~own].mean(0)
        if distance == "cosine":
            found[:, number] = seen @ (there / np.linalg.norm(there)) - seen @ (away / np.linalg.norm(away))
        else:
            found[:, number] = (((seen - away) ** 2).sum(1) - ((seen - there) ** 2).sum(1)) / 2
    return found


def fitted_to(data, run, out, **changes):
    backbone = str(run.folder / "student")
    options = {"data": str(data), "task": "multilabel", "model": backbone, "side": 32} | changes
    found = funmatch.head(out=out, **options).metrics
    known, seen = (features_of(backbone, data, name) for name in ("train", "test"))
    return found, known.double().numpy(), truth(data, "train").numpy(), seen.double().numpy()


def test_votes_are_those_of_scikit_learn(teacher, table, tmp_path):  # noqa: F811
    out = tmp_path / "head"
    found, known, labels, seen = fitted_to(table, teacher, out, kind="knn", neighbours=(3, 9, 20), calibrate=False)
    assert [each["value"] for each in found["tried"]] == [3, 9, 20]
    best = max(found["tried"], key=lambda each: each["map"])
    assert [each["map"] for each in found["tried"] if each["value"] == found["chosen"]] == [best["map"]]
    model = neighbors.KNeighborsClassifier(int(found["chosen"]), **VOTES).fit(known, labels)
    shares = probabilities(model, seen)
    logits = answers(load(str(out)), table, "test")
    assert logits.sigmoid().numpy() == pytest.approx(0.999 * shares + 0.0005, abs=1e-4)
    assert found["map"] == pytest.approx(metrics.average_precision_score(truth(table, "test"), logits), abs=1e-6)
    assert funmatch.evaluate(out, data=str(table), split="test")["map"] == pytest.approx(found["map"], abs=1e-6)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_means_are_those_of_numpy(teacher, table, tmp_path, distance):  # noqa: F811
    out = tmp_path / "head"
    found, known, labels, seen = fitted_to(table, teacher, out, kind="means", distance=distance)
    counts = labels.sum(0)
    prior = np.log((counts + 0.5) / (len(labels) - counts + 0.5))
    expected = found["chosen"] * nearest_by_numpy(known, labels, seen, distance) + prior
    assert answers(load(str(out)), table, "test").numpy() == pytest.approx(expected, abs=1e-3, rel=1e-3)
    average = metrics.average_precision_score(truth(table, "test"), expected)
    assert found["map"] == pytest.approx(average, abs=1e-6)
    # A Euclidean one is a linear layer, in the place of the network's own.
    config = json.loads((out / "config.json").read_text())
    assert ("backbone" in config["model_args"]) == (distance == "cosine")
    assert config["funmatch"]["task"] == "multilabel"
    if distance == "euclidean":
        assert timm.create_model(f"local-dir:{out}", pretrained=True).num_classes == 3


@pytest.mark.parametrize("options", [{"kind": "knn"}, {"kind": "means"}, {"kind": "means", "distance": "euclidean"}])
def test_classes_without_images_get_the_same_low_logit(teacher, table, tmp_path, options, capsys):  # noqa: F811
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    lines = [
        ",".join(
            [str(table.parent / path), *(str(int(name in label)) for name in ("bars", "dots", "rows")), "0", split]
        )
        for path, label, split in rows
    ]
    wide = tmp_path / "wide.csv"
    wide.write_text("\n".join(["path,bars,dots,rows,stars,split", *lines]))
    found = fitted_to(wide, teacher, tmp_path / "head", **options)[0]
    assert "1 of 4 classes of wide have no training images: stars; all images get" in capsys.readouterr().err
    logits = answers(load(str(tmp_path / "head")), wide, "test")
    assert logits.isfinite().all()
    assert np.ptp(logits[:, 3].numpy()) < 1e-4
    assert logits[0, 3] < -3
    assert found["map"] == pytest.approx(metrics.average_precision_score(truth(wide, "test")[:, :3], logits[:, :3]),
                                         abs=1e-6)  # fmt: skip
    with pytest.raises(funmatch.errors.InputError, match="1 of 4 classes of wide have no training images: stars; add"):
        fitted_to(wide, teacher, tmp_path / "linear", C=(0.1,))


def sets(count, *, seed, classes=4):
    """Features and labels of images with classes that are rare and common."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.tensor([0.02, 0.1, 0.4, 0.8])[:classes]
    labels = (torch.rand(count, classes, generator=generator) < share).float()
    centers = torch.randn(classes, 10, generator=torch.Generator().manual_seed(5))
    return Labelled(labels @ centers + 2 + 1.2 * torch.randn(count, 10, generator=generator), labels)


@pytest.mark.parametrize("options", [{"kind": "knn"}, {"kind": "means"}, {"kind": "means", "distance": "euclidean"}])
def test_probabilities_are_calibrated_on_validation_images(options, tmp_path):
    train, val, test = sets(1500, seed=0), sets(800, seed=1), sets(3000, seed=2)
    config = Head.checked(data="d", task="multilabel", model="resnet18", out=tmp_path, **options)
    fitted = fit_head(config, train, val, 4, torch.device("cpu"))
    answer = fitted.logits(test.features).sigmoid()
    for number in range(4):
        assert answer[:, number].mean().item() == pytest.approx(test.labels[:, number].mean().item(), abs=0.1)
    loss = metrics.log_loss(test.labels.flatten(), answer.flatten().double())
    share = train.labels.mean(0).expand_as(answer)
    assert loss < 0.9 * metrics.log_loss(test.labels.flatten(), share.flatten().double())


def test_slope_has_the_least_log_loss():
    train, val = sets(500, seed=0), sets(200, seed=1)
    prior = prior_log_odds(train.labels)
    similarity = torch.nn.functional.normalize(val.features, dim=-1) @ directions(train.features, train.labels).T
    best = fit_slope(similarity, prior, val.labels)

    def loss(slope):
        cases = (slope * similarity.double() + prior).numpy().ravel()
        found = np.logaddexp(0, np.where(val.labels.numpy().ravel() == 1, -cases, cases)).sum()
        # One more case of usual size, which is wrong.
        return found + np.logaddexp(0, slope * similarity.double().abs().median().item())

    assert loss(best) < min(loss(best * 0.98), loss(best * 1.02))
    assert fit_slope(torch.zeros(4, 4), prior, val.labels[:4]) == 1


def test_classes_of_all_images_have_no_side():
    train = sets(50, seed=0)
    train.labels[:, 1] = 1
    train.labels[:, 0] = 0
    head = nearer_mean(train.features, train.labels)
    assert head(train.features)[:, :2].abs().max() == 0
    assert directions(train.features, train.labels)[:2].abs().max() == 0
    assert prior_log_odds(train.labels)[:2].tolist() == pytest.approx([np.log(0.5 / 50.5), np.log(50.5 / 0.5)])
