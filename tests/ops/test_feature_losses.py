"""Distances between features equal their equations, written out image by image."""

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from funmatch.ops.features import grids, losses

RNG = np.random.default_rng(0)
STUDENT, TEACHER, QUEUE = RNG.normal(size=(5, 7)), RNG.normal(size=(5, 7)), RNG.normal(size=(11, 7))


def unit(rows: np.ndarray) -> np.ndarray:
    return np.array([row / math.sqrt(sum(value**2 for value in row)) for row in rows])


def tensor(rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(rows).float()


def divergence(teacher: np.ndarray, student: np.ndarray, temperature: float) -> float:
    return rel_entr(softmax(teacher / temperature), softmax(student / temperature)).sum()


def test_distances_of_each_image():
    one, other = unit(STUDENT), unit(TEACHER)
    cosines = [1 - float(one[row] @ other[row]) for row in range(5)]
    np.testing.assert_allclose(losses.cosine(tensor(STUDENT), tensor(TEACHER)), cosines, atol=1e-6)
    squares = [sum((STUDENT[row] - TEACHER[row]) ** 2) / 7 for row in range(5)]
    np.testing.assert_allclose(losses.l2(tensor(STUDENT), tensor(TEACHER)), squares, rtol=1e-5)


@pytest.mark.parametrize("distance", [losses.cosine, losses.l2])
def test_tokens_are_averaged(distance):
    maps = torch.randn(2, 3, 4, 7, generator=torch.Generator().manual_seed(0))
    each = torch.stack([distance(maps[0, :, token], maps[1, :, token]) for token in range(4)]).mean(0)
    torch.testing.assert_close(distance(maps[0], maps[1]), each)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_queue_kl_is_the_divergence_of_similarities_to_the_queue(temperature):
    queue = unit(QUEUE)
    expected = [
        divergence(queue @ teacher, queue @ student, temperature)
        for teacher, student in zip(unit(TEACHER), unit(STUDENT), strict=True)
    ]
    found = losses.queue_kl(tensor(STUDENT), tensor(TEACHER), tensor(queue), temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not losses.queue_kl(tensor(TEACHER), tensor(3 * TEACHER), tensor(queue), temperature).abs().max() > 1e-6


def test_batch_kl_is_the_divergence_of_similarities_to_the_others():
    student, teacher = unit(STUDENT), unit(TEACHER)
    expected = []
    for row in range(5):
        others = [other for other in range(5) if other != row]
        expected.append(divergence(teacher[others] @ teacher[row], student[others] @ student[row], 0.5))
    np.testing.assert_allclose(losses.batch_kl(tensor(STUDENT), tensor(TEACHER), 0.5), expected, rtol=1e-4)


def test_relations_of_nothing_are_zero_and_have_a_gradient():
    student = tensor(STUDENT[:1]).requires_grad_()
    empty = losses.queue_kl(student, tensor(TEACHER[:1]), torch.empty(0, 7), 1.0)
    (empty + losses.batch_kl(student, tensor(TEACHER[:1]), 1.0)).sum().backward()
    assert empty.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_rows_without_a_direction_become_zeros():
    rows = torch.tensor([[0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [3.0, 4.0]])
    assert losses.normalize(rows).tolist() == [[0, 0], [0, 0], [0, 0], [pytest.approx(0.6), pytest.approx(0.8)]]


@pytest.mark.parametrize(("source", "target"), [((7, 5), (3, 5)), ((8, 6), (4, 2)), ((2, 3), (4, 6))])
def test_maps_are_averaged_over_areas(source, target):
    """Against a map that is enlarged until every target cell is a whole number of its cells."""
    maps = torch.randn(2, *source, 3, generator=torch.Generator().manual_seed(1))
    fine = maps.repeat_interleave(target[0], 1).repeat_interleave(target[1], 2)
    expected = fine.view(2, target[0], source[0], target[1], source[1], 3).mean((2, 4))
    torch.testing.assert_close(grids.to_grid(maps, target), expected)


def test_maps_of_the_grid_stay_as_they_are():
    maps = torch.randn(2, 3, 4, 5)
    assert torch.equal(grids.to_grid(maps, (3, 4)), maps)
