"""Distances against sums written out in float64."""

import math

import numpy as np
import pytest
import torch

from funmatch.ops.distances import cross_entropy, dist, distance, kl, mix_labels, standardize_logits


def softmax(logits):
    e = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(e) for x in e]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_kl_equals_its_equation_times_t_squared(temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (4, 6)), rng.normal(0, 3, (4, 6))
    found = kl(torch.tensor(student), torch.tensor(teacher), temperature)
    for i in range(4):
        p, q = softmax(list(teacher[i] / temperature)), softmax(list(student[i] / temperature))
        expected = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_kl_is_zero_only_for_equal_probabilities():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert kl(logits + 5, logits).item() == pytest.approx(0, abs=1e-6)
    assert kl(logits * 2, logits).item() > 0.1


def test_gradient_of_kl_hardly_depends_on_a_high_temperature():
    """Hinton et al. 2015, section 2: T² makes it (softmax difference)·T, which tends to a constant for large T."""
    teacher = torch.tensor([[1.0, -1.0, 0.5]])
    norms = []
    for temperature in (20.0, 40.0):
        student = torch.zeros(1, 3, requires_grad=True)
        kl(student, teacher, temperature).sum().backward()
        norms.append(student.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_kl_of_half_precision_logits_is_computed_in_fp32():
    student, teacher = torch.randn(3, 5).bfloat16(), torch.randn(3, 5).bfloat16()
    assert torch.equal(kl(student, teacher), kl(student.float(), teacher.float()))


def test_labels_are_mixed_like_views():
    found = mix_labels(torch.tensor([2, 0, 1]), 0.75, 3)
    assert found.tolist() == [[0.75, 0, 0.25], [0.25, 0.75, 0]]
    assert mix_labels(torch.tensor([2, 0, 1]), 1.0, 3).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_cross_entropy_of_one_hot_labels_is_minus_the_log_probability():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    found = cross_entropy(logits, mix_labels(torch.tensor([0, 1, 2]), 1.0, 3))
    for i, label in enumerate((1, 2)):
        assert found[i].item() == pytest.approx(-math.log(softmax(logits[i].tolist())[label]), rel=1e-5)


def distance_by_equation(kind, student, teacher, temperature):
    """The equations, one image at a time in float64."""
    p, q = softmax([x / temperature for x in teacher]), softmax([x / temperature for x in student])
    if kind == "reverse-kl":
        return temperature**2 * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    if kind == "js":
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        terms = [a * math.log(a / m) + b * math.log(b / m) for a, b, m in zip(p, q, middle, strict=True)]
        return temperature**2 * sum(terms) / 2
    if kind == "hard":
        return -math.log(softmax(student)[max(range(len(teacher)), key=teacher.__getitem__)])
    if kind.startswith("log-softmax"):
        student, teacher = ([math.log(x) for x in softmax(z)] for z in (student, teacher))
    squares = sum((a - b) ** 2 for a, b in zip(student, teacher, strict=True))
    return squares if kind.endswith("l2") else math.sqrt(squares)


KINDS = ["reverse-kl", "js", "hard", "l2", "euclidean", "log-softmax-l2", "log-softmax-euclidean"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_every_distance_equals_its_equation(kind, temperature):
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(0, 3, (5, 7)), rng.normal(0, 3, (5, 7))
    found = distance(kind, torch.tensor(student), torch.tensor(teacher), temperature)
    for i in range(5):
        expected = distance_by_equation(kind, list(student[i]), list(teacher[i]), temperature)
        assert found[i].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_one_minus_pearsons_correlations(temperature):
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(0, 3, (6, 5)), rng.normal(0, 3, (6, 5))
    p, q = (np.array([softmax(list(row / temperature)) for row in z]) for z in (teacher, student))
    columns = np.mean([1 - np.corrcoef(q[:, k], p[:, k])[0, 1] for k in range(5)])
    found = dist(torch.tensor(student), torch.tensor(teacher), temperature, 2.0, 3.0)
    for i in range(6):
        expected = temperature**2 * (2 * (1 - np.corrcoef(q[i], p[i])[0, 1]) + 3 * columns)
        assert found[i].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["kl", *KINDS[:2], *KINDS[3:], "dist"])
def test_distances_are_zero_with_finite_gradient_for_equal_logits(kind):
    teacher = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])
    student = teacher.clone().requires_grad_()
    found = distance(kind, student, teacher, 2.0)
    assert found.abs().max() < 1e-5
    found.sum().backward()
    assert student.grad.abs().max() < 1e-3
    assert student.grad.isfinite().all()
    assert distance(kind, teacher.flip(1), teacher, 2.0).min() > 0.01


@pytest.mark.parametrize(("n", "classes"), [(8, 10), (8, 8), (16, 7), (4, 1000)])
def test_dist_of_a_zero_student_has_a_bounded_gradient(n, classes):
    """With a zero head the correlation is undefined; the distance must be 1 and its gradient bounded."""
    teacher = torch.randn(n, classes, generator=torch.Generator().manual_seed(0)) * 3
    student = torch.zeros(n, classes, requires_grad=True)
    for temperature in (1.0, 10.0):
        found = dist(student, teacher, temperature)
        assert found.tolist() == pytest.approx([2 * temperature**2] * n, rel=1e-2)
        (gradient,) = torch.autograd.grad(found.mean(), student)
        assert 0 < gradient.norm() < 1e4
    assert dist(torch.zeros(n, classes), torch.zeros(n, classes)).tolist() == pytest.approx([2.0] * n, rel=1e-2)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_dist_is_accurate_for_very_small_probabilities(scale):
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(0, scale, (16, 40)), rng.normal(0, scale, (16, 40))
    p, q = (np.array([softmax(list(row)) for row in z]) for z in (teacher, student))
    columns = np.mean([1 - np.corrcoef(q[:, k], p[:, k])[0, 1] for k in range(40)])
    expected = [1 - np.corrcoef(q[i], p[i])[0, 1] + columns for i in range(16)]
    assert dist(torch.tensor(student), torch.tensor(teacher)).tolist() == pytest.approx(expected, rel=1e-3)


def test_extreme_logits_give_finite_distances():
    student, teacher = torch.tensor([[1e4, -1e4, 0.0]]).requires_grad_(), torch.tensor([[-1e4, 1e4, 0.0]])
    for kind in ("kl", "js", "hard", "l2", "euclidean", "dist"):
        (gradient,) = torch.autograd.grad(distance(kind, student, teacher).sum(), student)
        assert gradient.isfinite().all(), kind
    assert distance("js", student, teacher).item() == pytest.approx(math.log(2))


def test_t_squared_can_be_turned_off():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    for kind in ("kl", "reverse-kl", "js", "dist"):
        scaled, unscaled = (distance(kind, student, teacher, 3.0, squared=squared) for squared in (True, False))
        torch.testing.assert_close(scaled, 9 * unscaled)


def test_label_smoothing_equals_torchs():
    student, teacher = torch.randn(6, 4), torch.randn(6, 4)
    expected = torch.nn.functional.cross_entropy(student, teacher.argmax(-1), label_smoothing=0.2)
    torch.testing.assert_close(distance("hard", student, teacher, smoothing=0.2).mean(), expected)


def test_standardised_logits_have_mean_0_and_deviation_1():
    logits = torch.randn(5, 9) * 7 + 3
    found = standardize_logits(logits).double()
    assert found.mean(-1).abs().max() < 1e-6
    torch.testing.assert_close(found.square().mean(-1), torch.ones(5, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(standardize_logits(logits * 5 - 2), standardize_logits(logits))
    assert standardize_logits(torch.ones(2, 3)).abs().max() == 0
