"""Calibration, proper scores, temperature scaling and selective accuracy against other libraries and definitions."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from funmatch.ops.calibration import (
    COVERAGES,
    calibration_error,
    entropy,
    fit_temperature,
    half_scaled,
    proper_scores,
    reliability,
    selective,
)


def random_logits(images=300, classes=7, *, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(images, classes, generator=generator)
    labels = torch.randint(classes, (images,), generator=generator)
    # Right on about half of the images, so that there is something to calibrate.
    logits[torch.arange(images // 2), labels[: images // 2]] += 2 * scale
    return logits, labels


CASES = {
    "random": random_logits(),
    "two classes": random_logits(50, 2),
    "one image": random_logits(1, 5),
    "one class": (torch.zeros(9, 1), torch.zeros(9, dtype=torch.long)),
    "ties": (torch.zeros(12, 4), torch.arange(12) % 4),
    "logits of 1e4": random_logits(40, 5, scale=1e4),
    "probabilities of 0": (torch.tensor([[0.0, -torch.inf, 1.0]] * 6), torch.tensor([0, 2, 2, 2, 0, 2])),
}
each_case = pytest.mark.parametrize(("logits", "labels"), CASES.values(), ids=CASES)


@each_case
def test_calibration_errors_equal_those_of_torchmetrics_and_netcal(logits, labels):
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.classification import binary_calibration_error

    # torchmetrics closes bins on the left: nudged down, a confidence on an edge lies in the same bin in both.
    confidence, predicted = logits.double().softmax(-1).max(-1)
    correct = predicted == labels
    inside = (confidence - 1e-9).clamp(min=0)
    found = calibration_error(confidence, correct)
    # Of a binary problem whose score is the confidence: it takes scores as they are.
    expected = binary_calibration_error(inside, correct.long(), n_bins=15, norm="l1")
    assert found == pytest.approx(expected.item(), abs=1e-6)


@each_case
def test_calibration_error_equals_that_of_netcal(logits, labels):
    metrics = pytest.importorskip("netcal.metrics")
    confidence, predicted = logits.double().softmax(-1).max(-1)
    correct = (predicted == labels).numpy().astype(int)
    if len(np.unique(correct)) < 2 or len(correct) < 2:
        pytest.skip("netcal needs right and wrong images")
    inside = (confidence - 1e-9).clamp(min=0).numpy()
    expected = metrics.ECE(15).measure(inside, correct)
    assert calibration_error(confidence, torch.tensor(correct)) == pytest.approx(expected, abs=1e-6)


def test_confidences_on_an_edge_are_in_the_bin_above_in_other_libraries():
    """The only difference of the three: which of two bins has a confidence of exactly k / 15."""
    netcal = pytest.importorskip("netcal.metrics")
    from torchmetrics.functional.classification import binary_calibration_error

    # Edges of 4 bins are exact in binary; together with 0.6 the lower edge's bin has another mean.
    confidence, correct = torch.tensor([0.5, 0.6, 0.3], dtype=torch.float64), torch.tensor([1, 0, 0])
    below = (abs(0.5 - 1 + 0.3) + 0.6) / 3
    above = (abs(0.5 + 0.6 - 1) + 0.3) / 3
    assert calibration_error(confidence, correct, 4) == pytest.approx(below)
    assert binary_calibration_error(confidence, correct, n_bins=4, norm="l1").item() == pytest.approx(above)
    assert netcal.ECE(4).measure(confidence.numpy(), correct.numpy()) == pytest.approx(above)


def test_edges_belong_to_the_bin_below_and_the_ends_to_the_first_and_the_last():
    edge = torch.tensor([1 / 15, 2 / 15], dtype=torch.float64)
    bins = reliability(edge, torch.ones(2))
    assert [each.images for each in bins[:3]] == [1, 1, 0]
    # The two ends belong to the first and the last bin.
    assert [each.images for each in reliability(torch.tensor([0.0, 1.0]), torch.ones(2))][0::14] == [1, 1]


@each_case
def test_bins_of_the_reliability_diagram_add_up_to_the_calibration_error(logits, labels):
    confidence, predicted = logits.softmax(-1).max(-1)
    correct = predicted == labels
    bins = reliability(confidence, correct)
    filled = [each for each in bins if each.images]
    assert sum(each.images for each in bins) == len(labels)
    total = sum(each.images * abs(each.accuracy - each.confidence) for each in filled) / len(labels)
    assert total == pytest.approx(calibration_error(confidence, correct), abs=1e-9)


@each_case
def test_likelihood_and_brier_score_equal_those_of_scikit_learn(logits, labels):
    metrics = pytest.importorskip("sklearn.metrics")
    shares = logits.double().softmax(-1).numpy()
    scores = {name: values.mean().item() for name, values in proper_scores(logits, labels).items()}
    onehot = np.eye(logits.shape[1])[labels.numpy()]
    assert scores["brier"] == pytest.approx(((shares - onehot) ** 2).sum(1).mean(), abs=1e-9)
    assert scores["confidence"] == pytest.approx(shares.max(1).mean(), abs=1e-9)
    # scikit-learn clips probabilities at 2e-16, so that its likelihood of logits of 1e4 is another number.
    if shares[np.arange(len(labels)), labels.numpy()].min() > 1e-12 and logits.shape[1] > 1:
        expected = metrics.log_loss(labels.numpy(), shares, labels=range(logits.shape[1]))
        assert scores["nll"] == pytest.approx(expected, abs=1e-9)
        brier = metrics.brier_score_loss(labels.numpy(), shares, labels=range(logits.shape[1]), scale_by_half=False)
        assert scores["brier"] == pytest.approx(brier, abs=1e-9)
    else:
        expected = torch.nn.functional.cross_entropy(logits.double(), labels).item()
        assert scores["nll"] == pytest.approx(expected, rel=1e-12)


def test_scores_of_no_images_are_empty():
    scores = proper_scores(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert {len(each) for each in scores.values()} == {0}


@each_case
def test_entropy_equals_its_definition(logits, labels):  # noqa: ARG001
    from scipy.stats import entropy as expected

    assert entropy(logits).numpy() == pytest.approx(expected(logits.double().softmax(-1).numpy(), axis=1), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0, 100.0, 3000.0])
def test_fitted_temperature_equals_that_of_another_optimiser(scale, seed):
    logits, labels = random_logits(seed=seed, scale=scale)

    def loss(log_temperature):
        return proper_scores(logits, labels, np.exp(log_temperature))["nll"].mean().item()

    expected = minimize_scalar(loss, bounds=(np.log(1e-3), np.log(1e3)), method="bounded", options={"xatol": 1e-10})
    found = fit_temperature(logits, labels)
    # The minimum is flat: its place is known to half as many digits as its value.
    assert loss(np.log(found)) <= expected.fun + 1e-12
    if scale < 1000:
        assert found == pytest.approx(np.exp(expected.x), rel=1e-5)
    assert fit_temperature(logits, labels, start=20.0) == pytest.approx(found, rel=1e-6)


@pytest.mark.filterwarnings("ignore")  # netcal's own
def test_temperature_equals_that_of_netcal():
    scaling = pytest.importorskip("netcal.scaling")
    logits, labels = random_logits(400, 5)
    model = scaling.TemperatureScaling(detection=False)
    shares = logits.double().softmax(-1).numpy()
    model.fit(shares, labels.numpy())
    temperature = fit_temperature(logits, labels)
    expected = (logits.double() / temperature).softmax(-1).numpy()
    assert model.transform(shares) == pytest.approx(expected, abs=1e-3)


def test_temperatures_of_degenerate_logits_are_bounded_or_none():
    labels = torch.arange(6) % 3
    assert fit_temperature(torch.zeros(6, 3), labels) is None, "equal logits are the same at any temperature"
    assert fit_temperature(torch.zeros(0, 3), labels[:0]) is None
    assert fit_temperature(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long)) is None
    perfect = torch.eye(3)[labels]
    assert 1e-3 <= fit_temperature(perfect, labels) < 0.05, "so cold that all probabilities are 0 or 1"
    wrong = torch.eye(3)[(labels + 1) % 3]
    assert fit_temperature(wrong, labels) == pytest.approx(1e3, rel=0.01), "as hot as it may be"
    impossible = torch.tensor([[0.0, -torch.inf]])
    assert fit_temperature(impossible, torch.tensor([1])) is None, "no temperature gives it a probability"
    assert 1e-3 <= fit_temperature(1e4 * perfect, labels) <= 1e3


def test_temperature_scaling_lowers_the_error_of_an_overconfident_classifier():
    logits, labels = random_logits(2000, 5)
    scaled = half_scaled(logits, labels)
    assert scaled is not None
    before, after = (each.double().softmax(-1).max(-1) for each in (logits, scaled))
    correct = before.indices == labels
    assert calibration_error(after.values, correct) < 0.5 * calibration_error(before.values, correct)


def test_each_half_is_scaled_by_the_temperature_of_the_other():
    logits, labels = random_logits(21, 3)
    scaled = half_scaled(logits, labels)
    assert scaled is not None
    assert torch.allclose(scaled[0::2] * fit_temperature(logits[1::2], labels[1::2]), logits[0::2])
    assert torch.allclose(scaled[1::2] * fit_temperature(logits[0::2], labels[0::2]), logits[1::2])
    assert half_scaled(logits[:1], labels[:1]) is None, "one half is empty"


def test_selective_accuracy_equals_its_definition():
    rng = np.random.default_rng(0)
    confidence, correct = rng.permutation(200) / 200, rng.integers(0, 2, 200)
    found = selective(torch.tensor(confidence), torch.tensor(correct))
    ranked = correct[np.argsort(-confidence)]
    curve = np.cumsum(ranked) / np.arange(1, 201)
    assert found.aurc == pytest.approx(np.mean(1 - curve))
    assert found.accuracy == pytest.approx({each: curve[round(each * 200) - 1] for each in COVERAGES})


def test_selective_accuracy_of_equal_confidences_does_not_depend_on_their_order():
    correct = torch.tensor([1.0, 1, 0, 0])
    one, other = (selective(torch.full((4,), 0.5), each) for each in (correct, correct.flip(0)))
    assert one == other
    assert one.aurc == pytest.approx(0.5)
    assert set(selective(torch.tensor([0.3]), torch.tensor([0.0])).accuracy.values()) == {0.0}
