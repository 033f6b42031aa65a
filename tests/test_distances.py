"""Distances against sums written out in float64."""

import math

import numpy as np
import pytest
import torch

from funmatch.distances import cross_entropy, kl, mixed_labels


def softmax(logits):
    e = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(e) for x in e]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
def test_kl_is_from_teacher_to_student_times_t_squared(temperature):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(0, 3, (4, 6)), rng.normal(0, 3, (4, 6))
    found = kl(torch.tensor(student), torch.tensor(teacher), temperature)
    for i in range(4):
        p, q = softmax(list(teacher[i] / temperature)), softmax(list(student[i] / temperature))
        expected = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        assert found[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_kl_vanishes_only_where_the_functions_agree():
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert kl(logits + 5, logits).item() == pytest.approx(0, abs=1e-6)
    assert kl(logits * 2, logits).item() > 0.1


def test_the_gradient_keeps_its_size_with_the_temperature():
    """Hinton et al. 2015, section 2: T² makes it (softmax difference)·T, which tends to a constant for large T."""
    teacher = torch.tensor([[1.0, -1.0, 0.5]])
    norms = []
    for temperature in (20.0, 40.0):
        student = torch.zeros(1, 3, requires_grad=True)
        kl(student, teacher, temperature).sum().backward()
        norms.append(student.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_half_precision_logits_lose_nothing_in_the_loss():
    student, teacher = torch.randn(3, 5).bfloat16(), torch.randn(3, 5).bfloat16()
    assert torch.equal(kl(student, teacher), kl(student.float(), teacher.float()))


def test_labels_are_mixed_as_views_are():
    found = mixed_labels(torch.tensor([2, 0, 1]), 0.75, 3)
    assert found.tolist() == [[0.75, 0, 0.25], [0.25, 0.75, 0]]
    assert mixed_labels(torch.tensor([2, 0, 1]), 1.0, 3).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_cross_entropy_of_one_hot_labels_is_minus_the_log_probability():
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]])
    found = cross_entropy(logits, mixed_labels(torch.tensor([0, 1, 2]), 1.0, 3))
    for i, label in enumerate((1, 2)):
        assert found[i].item() == pytest.approx(-math.log(softmax(logits[i].tolist())[label]), rel=1e-5)
