"""Tests losses and metrics of several classes an image, against scikit-learn, SciPy and torch."""

import numpy as np
import pytest
import torch
from scipy.special import expit, logit, rel_entr
from sklearn import metrics as sklearn_metrics

from funmatch.ops.tasks import multilabel, ranking
from funmatch.ops.tasks.task import TASKS, task_of

RNG = np.random.default_rng(0)


def logits(*shape, scale=3.0):
    return torch.from_numpy(RNG.normal(size=shape) * scale).float()


def labels(n, classes, share=0.2):
    return torch.from_numpy((RNG.random((n, classes)) < share).astype(np.float32))


def bernoulli_kl(student, teacher, temperature):
    """T² · mean over classes of KL, from probabilities in double precision."""
    p, q = (expit(each.double().numpy() / temperature) for each in (teacher, student))
    return temperature**2 * (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).mean(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_scipys(temperature):
    student, teacher = logits(7, 5), logits(7, 5)
    found = multilabel.kl(student, teacher, temperature)
    np.testing.assert_allclose(found, bernoulli_kl(student, teacher, temperature), rtol=1e-5)
    assert (multilabel.reverse_kl(student, teacher, temperature) == multilabel.kl(teacher, student, temperature)).all()
    assert multilabel.distance("kl", student, teacher, temperature, squared=False) * temperature**2 == pytest.approx(
        found
    )


def test_kl_is_exact_where_probabilities_round_to_1():
    # log(σ(60) / σ(50)) of the class, and e⁻⁵⁰ · 10 of its absence.
    assert multilabel.kl(torch.tensor([[60.0]]), torch.tensor([[50.0]])).item() == pytest.approx(
        np.exp(-50.0) * 9, rel=1e-3
    )
    assert multilabel.kl(torch.tensor([[-1000.0]]), torch.tensor([[1000.0]])).item() == pytest.approx(1000)
    assert multilabel.kl(torch.tensor([[0.0]]), torch.tensor([[-torch.inf]])).item() == pytest.approx(np.log(2))


@pytest.mark.parametrize("name", ["kl", "reverse-kl", "l2"])
def test_gradients_of_distances_are_finite_differences(name):
    student, teacher = logits(3, 4).double().requires_grad_(), logits(3, 4).double()
    # In double precision, which losses leave: a difference of 1e-3 in float32.
    gradient = torch.autograd.grad(multilabel.distance(name, student, teacher, 2.0).sum(), student)[0]
    for place in ((0, 0), (2, 3)):
        step = torch.zeros_like(teacher)
        step[place] = 1e-2
        ends = [multilabel.distance(name, student.detach() + sign * step, teacher, 2.0).sum() for sign in (1, -1)]
        assert gradient[place].item() == pytest.approx((ends[0] - ends[1]).item() / 2e-2, rel=2e-2, abs=1e-3)


def test_gradient_of_kl_is_the_difference_of_probabilities():
    student, teacher = logits(3, 4).requires_grad_(), logits(3, 4)
    gradient = torch.autograd.grad(multilabel.kl(student, teacher, 2.0).sum(), student)[0]
    expected = 2.0 * ((student / 2).sigmoid() - (teacher / 2).sigmoid()) / 4
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-4, atol=1e-6)


def test_cross_entropy_is_torchs_mean_over_classes():
    scores, targets = logits(6, 5), labels(6, 5)
    each = multilabel.cross_entropy(scores, targets)
    assert each.mean().item() == pytest.approx(torch.nn.BCEWithLogitsLoss()(scores, targets).item(), rel=1e-6)


def test_mixed_labels_are_shares_of_both_images():
    given = torch.tensor([[1.0, 0, 1], [0, 0, 1], [0, 1, 0]])
    torch.testing.assert_close(multilabel.mix_labels(given, 0.75, 3), torch.tensor([[0.25, 0, 1], [0, 0.75, 0.25]]))
    each = multilabel.mix_labels(given, torch.tensor([0.75, 1.0]), 3, smoothing=0.2)
    torch.testing.assert_close(each, torch.tensor([[0.3, 0.1, 0.9], [0.1, 0.9, 0.1]]))


def test_several_teachers_are_averaged_in_probabilities():
    each, weights = [logits(4, 3), logits(4, 3)], [0.25, 0.75]
    found = multilabel.mean_probabilities(each, weights, 2.0)
    expected = 2 * logit(sum(w * expit(z.double().numpy() / 2) for z, w in zip(each, weights, strict=True)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    far = multilabel.mean_probabilities([torch.tensor([[200.0]]), torch.tensor([[210.0]])], [0.5, 0.5], 1.0)
    assert 200 < far.item() < 201  # 1 − σ(200) is 0 in any precision


def test_views_are_averaged_in_probabilities():
    views = logits(2, 6, 3)
    np.testing.assert_allclose(
        multilabel.mean_over_views(views), logit(expit(views.double().numpy()).mean(1)), rtol=1e-6
    )


def test_average_precision_is_scikit_learns_also_with_ties():
    scores, targets = logits(60, 9).round(decimals=0), labels(60, 9)
    targets[:, 4] = 0
    found = ranking.average_precisions(scores, targets)
    for i in range(9):
        if i == 4:
            assert found[i].isnan()
            continue
        expected = sklearn_metrics.average_precision_score(targets[:, i], scores[:, i])
        assert found[i].item() == pytest.approx(expected, abs=1e-12)
    some = [i for i in range(9) if i != 4]
    assert ranking.mean_average_precision(scores, targets) == pytest.approx(
        sklearn_metrics.average_precision_score(targets[:, some], scores[:, some], average="macro"), abs=1e-12
    )
    assert ranking.mean_average_precision(scores, torch.zeros_like(targets)) is None


def test_more_classes_than_are_sorted_at_once():
    scores, targets = logits(20, ranking.CLASSES_AT_ONCE + 3), labels(20, ranking.CLASSES_AT_ONCE + 3, 0.5)
    last = sklearn_metrics.average_precision_score(targets[:, -1], scores[:, -1])
    assert ranking.average_precisions(scores, targets)[-1].item() == pytest.approx(last, abs=1e-12)


def test_f1_is_scikit_learns():
    scores, targets = logits(50, 6), labels(50, 6)
    targets[:, 2] = 0
    chosen = multilabel.decisions(scores)
    micro, macro = ranking.f1_scores(chosen, targets)
    some = [0, 1, 3, 4, 5]
    assert micro == pytest.approx(sklearn_metrics.f1_score(targets, chosen, average="micro"), abs=1e-12)
    assert macro == pytest.approx(
        sklearn_metrics.f1_score(targets[:, some], chosen[:, some], average="macro"), abs=1e-12
    )
    assert ranking.f1_scores(torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3)) == (0.0, None)


def test_best_threshold_is_that_of_the_precision_recall_curve():
    chances, targets = logits(40, 5).sigmoid().round(decimals=2), labels(40, 5)
    threshold, score = ranking.best_threshold(chances, targets)
    precision, recall, _ = sklearn_metrics.precision_recall_curve(targets.flatten(), chances.flatten())
    expected = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
    assert score == pytest.approx(expected, abs=1e-12)
    chosen = chances >= threshold
    assert score == pytest.approx(sklearn_metrics.f1_score(targets, chosen, average="micro"), abs=1e-12)


def test_random_rankings_have_about_the_classes_share():
    targets = labels(4000, 8, 0.3)
    mean, deviation = ranking.random_precision(targets)
    assert mean == pytest.approx(targets.mean().item(), abs=0.01)
    assert 0 < deviation < 0.01
    assert ranking.random_precision(targets) == (mean, deviation)


def test_measures_of_a_split():
    scores, targets, teacher = logits(30, 4), labels(30, 4, 0.4), logits(30, 4)
    found = TASKS["multilabel"].measure(scores, targets, teacher)
    assert found["agreement"] == pytest.approx(((scores > 0) == (teacher > 0)).double().mean().item())
    assert found["kl"] == pytest.approx(bernoulli_kl(scores, teacher, 1.0).mean(), rel=1e-5)
    assert found["map"] == ranking.mean_average_precision(scores, targets)
    assert found["top1"] is None
    assert TASKS["multilabel"].measure(scores, None, None)["map"] is None


def test_decisions_near_one_half_count_as_tied():
    reference, found = torch.tensor([[0.001, 2.0, -2.0]]), torch.tensor([[-0.001, -2.0, -2.0]])
    changed, tied, margin = (each.item() for each in multilabel.changes(found, reference, 1e-3))
    assert (changed, tied) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert margin == pytest.approx(2 * expit(2.0) - 1)


@pytest.mark.parametrize("values", [(1.0, 0.9, 0.0), (0.3, 0.0, 4.0), (2.0, -1.0, -3.0)])
def test_classes_are_tied_if_the_nearest_distribution_that_swaps_them_is_near_enough(values):
    p = np.exp(values) / np.exp(values).sum()
    # All distributions on a grid that prefer the second class to the first.
    one, other = np.meshgrid(np.linspace(1e-4, 1, 2001), np.linspace(1e-4, 1, 2001))
    rest = 1 - one - other
    possible = (rest > 0) & (other >= one)
    q = np.stack([one[possible], other[possible], rest[possible]], -1)
    nearest = rel_entr(p, q).sum(-1).min()
    # The first class alone counts, so the third may not be it: a copy of it that is less probable stands for it.
    split = torch.tensor([[values[0], values[1], *[values[2] - np.log(64)] * 64]])
    found = split[:, [1, 0, *range(2, 66)]]
    for nats, expected in ((nearest * 1.01, (0, 1)), (nearest * 0.98, (1, 0))):
        changed, tied, margin = task_of(None).changes(found, split, nats)
        assert (changed.item(), tied.item()) == expected
        assert margin.item() == pytest.approx(p[0] - p[1], rel=1e-4)


def test_the_same_decisions_are_neither_changed_nor_tied():
    reference = logits(5, 7)
    for task in TASKS.values():
        for each in task.changes(reference + 0.0, reference, 1e-3):
            assert torch.equal(each, torch.zeros(5).double())
