"""Logistic regression against scikit-learn's."""

import numpy as np
import pytest
import torch

from funmatch.ops.heads.logistic import LinearHead, fit_logistic, moments

STRENGTHS = (1e-4, 1e-2, 1.0, 100.0)


def correlated(count=240, dimensions=16, classes=4, *, seed=0):
    """Features of very different scales that are correlated, and whose mean is far from zero."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dimensions, dimensions)) * np.logspace(0, -2, dimensions)
    labels = rng.integers(0, classes, count)
    features = (rng.normal(size=(classes, dimensions))[labels] + rng.normal(size=(count, dimensions))) @ mix + 3
    return torch.from_numpy(features.astype("float32")), torch.from_numpy(labels)


def sklearns(features, labels, strength, **options):
    """Weights (d, classes) and bias of scikit-learn's fit, whose rows sum to zero; of two classes ±half of its one."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    model = linear_model.LogisticRegression(C=strength, tol=1e-9, max_iter=20_000, **options)
    model.fit(features.double().numpy(), labels.numpy())
    weight, bias = model.coef_, model.intercept_
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return torch.from_numpy(weight.T), torch.from_numpy(bias - bias.mean())


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("scale", [True, False])
def test_weights_equal_those_of_scikit_learn(classes, scale):
    features, labels = correlated(classes=classes)
    by = moments(features, scale=scale)
    ready = by.apply(features)
    reference = ready if scale else features
    for strength, head in zip(STRENGTHS, fit_logistic(ready, labels, classes, STRENGTHS), strict=True):
        weight, bias = sklearns(reference, labels, strength)
        found = head if scale else head.unscaled(by)
        assert head.converged
        torch.testing.assert_close(found.weight, weight, atol=1e-3 * float(weight.abs().max()), rtol=0)
        torch.testing.assert_close(
            found.bias - found.bias.mean(), bias, atol=1e-5 + 2e-3 * float(bias.abs().max()), rtol=0
        )


def test_weighted_classes_equal_those_of_scikit_learn():
    features, labels = correlated()
    keep = (labels != 0) | (torch.arange(len(labels)) % 5 == 0)
    features, labels = features[keep], labels[keep]
    ready = moments(features, scale=True).apply(features)
    weights = len(labels) / (4 * torch.bincount(labels).double())
    (head,) = fit_logistic(ready, labels, 4, (0.1,), weights)
    weight, _ = sklearns(ready, labels, 0.1, class_weight="balanced")
    torch.testing.assert_close(head.weight, weight, atol=1e-4, rtol=0)


def test_weighted_classes_of_several_an_image_equal_those_of_scikit_learn():
    features, numbers = correlated()
    labels = numbers[:, None] == torch.arange(4)
    labels[::7, 2] = True
    ready = moments(features, scale=True).apply(features)
    weights = torch.tensor([30.0, 1.0, 4.0, 0.25])
    (head,) = fit_logistic(ready, labels.float(), 4, (0.1,), weights)
    assert head.converged
    for number, each in enumerate(weights.tolist()):
        weight, bias = sklearns(ready, labels[:, number].long(), 0.1, class_weight={0: 1.0, 1: each})
        own = 2 * weight[:, 1]
        torch.testing.assert_close(head.weight[:, number], own, atol=1e-3 * float(own.abs().max()), rtol=0)
        assert float(head.bias[number]) == pytest.approx(float(2 * bias[1]), abs=2e-3)


@pytest.mark.parametrize("classes", [2, 4])
def test_each_of_several_classes_an_image_has_the_weights_of_its_own_binary_fit(classes):
    features, numbers = correlated(classes=classes)
    rng = np.random.default_rng(1)
    # Each image has the class of its number, and any of the others.
    labels = torch.from_numpy(rng.random((len(numbers), classes)) < 0.2) | (numbers[:, None] == torch.arange(classes))
    ready = moments(features, scale=True).apply(features)
    for strength, head in zip(STRENGTHS, fit_logistic(ready, labels.float(), classes, STRENGTHS), strict=True):
        assert head.converged
        for number in range(classes):
            # The reference has ±half of its one row, whose intercepts have the mean 0.
            weight, bias = sklearns(ready, labels[:, number].long(), strength)
            own = 2 * weight[:, 1]
            torch.testing.assert_close(head.weight[:, number], own, atol=1e-3 * float(own.abs().max()), rtol=0)
            assert float(head.bias[number]) == pytest.approx(float(2 * bias[1]), abs=2e-3)


def test_unscaled_head_has_the_logits_of_the_scaled_one():
    features, labels = correlated()
    features[:, 3] = 7.0  # what does not vary stays as it is
    by = moments(features, scale=True)
    assert by.std[3] == 1
    (head,) = fit_logistic(by.apply(features), labels, 4, (0.1,))
    torch.testing.assert_close(head.unscaled(by)(features), head(by.apply(features)), atol=1e-4, rtol=0)
    torch.testing.assert_close(head.scaled(2)(features), 2 * head(features))


def test_single_precision_finds_the_same_minimum(monkeypatch):
    features, labels = correlated()
    by = moments(features, scale=True)
    (exact,) = fit_logistic(by.apply(features), labels, 4, (1.0,))
    monkeypatch.setattr("funmatch.ops.heads.logistic.DOUBLE", 0)
    monkeypatch.setattr("funmatch.ops.heads.logistic.ROWS", 50)
    ready = by.apply(features)
    assert ready.dtype == torch.float32
    (single,) = fit_logistic(ready, labels, 4, (1.0,))
    assert single.converged
    torch.testing.assert_close(single.weight, exact.weight, atol=1e-3, rtol=0)


def test_separable_classes_have_a_finite_minimum():
    features = torch.cat([torch.full((20, 3), -1.0), torch.full((20, 3), 1.0)]).double()
    labels = torch.arange(40) // 20
    for head in fit_logistic(features, labels, 2, (1.0, 1e6)):
        assert isinstance(head, LinearHead)
        assert head.weight.isfinite().all()
        assert torch.equal(head(features).argmax(-1), labels)
