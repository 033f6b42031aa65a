"""Nearest neighbours and linear probes against scikit-learn."""

import numpy as np
import pytest
import torch

from funmatch.ops.embeddings import RIDGES, apply_probe, fit_ridge, linear_probe, nearest_neighbours


def clusters(count, classes=4, dimensions=12, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dimensions, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % classes
    return centers[labels] + 0.8 * torch.randn(count, dimensions, generator=generator), labels


def test_votes_equal_those_of_scikit_learn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    (train, labels), (queries, _) = clusters(300), clusters(40, seed=1)
    unit = torch.nn.functional.normalize(train).numpy()
    model = neighbors.KNeighborsClassifier(
        20, algorithm="brute", metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(unit, labels)
    votes = nearest_neighbours(train, labels, queries, 4)
    shares = votes / votes.sum(1, keepdim=True)
    assert shares.numpy() == pytest.approx(model.predict_proba(queries.numpy()), abs=1e-4)


def test_ridge_weights_for_several_classes_equal_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, numbers = clusters(200)
    labels = (torch.rand(200, 4, generator=torch.Generator().manual_seed(5)) < 0.3) | (numbers[:, None] == 1)
    scale = features.double().var(0, correction=0).mean().item()
    for strength, weights in zip(RIDGES, fit_ridge(features, labels.float(), 4, RIDGES), strict=True):
        model = linear_model.Ridge(alpha=200 * strength * scale).fit(features.double().numpy(), labels.double().numpy())
        assert weights[:-1].numpy() == pytest.approx(model.coef_.T, abs=1e-6)
        assert weights[-1].numpy() == pytest.approx(model.intercept_, abs=1e-6)


def test_fewer_images_than_neighbours_all_vote():
    votes = nearest_neighbours(torch.eye(2), torch.tensor([1, 0]), torch.tensor([[0.0, 3.0]]), 3)
    assert votes.argmax(1).tolist() == [0]
    assert votes[0, 2] == 0


def test_ridge_weights_equal_those_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, labels = clusters(200)
    onehot = np.eye(4)[labels]
    scale = features.double().var(0, correction=0).mean().item()
    for strength, weights in zip(RIDGES, fit_ridge(features, labels, 4, RIDGES), strict=True):
        model = linear_model.Ridge(alpha=strength * scale * len(features)).fit(features.double().numpy(), onehot)
        assert weights[:-1].numpy() == pytest.approx(model.coef_.T, abs=1e-6)
        assert weights[-1].numpy() == pytest.approx(model.intercept_, abs=1e-6)


def test_probe_is_finite_on_features_that_are_constant_or_fewer_than_dimensions():
    for features in (torch.ones(6, 8), torch.randn(3, 8), torch.zeros(1, 4)):
        scores, strength = linear_probe(features, torch.arange(len(features)) % 2, features, 2)
        assert scores.isfinite().all()
        assert strength in RIDGES


def test_probe_classifies_clusters():
    (train, labels), (queries, expected) = clusters(400), clusters(100, seed=1)
    scores, _ = linear_probe(train, labels, queries, 4)
    assert (scores.argmax(1) == expected).double().mean() > 0.9
    assert apply_probe(queries, fit_ridge(train, labels, 4, (1e-3,))[0]).shape == (100, 4)
