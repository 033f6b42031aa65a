"""Intervals and tests against scipy, and bootstrap intervals against the normal approximation."""

import itertools

import pytest
import torch
from scipy.stats import binomtest

from funmatch.ops.intervals import mcnemar, paired_bootstrap, paired_difference, wilson


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (81, 100), (49_999, 50_000)])
def test_wilson_intervals_equal_those_of_scipy(hits, count):
    expected = binomtest(hits, count).proportion_ci(0.95, "wilson")
    assert wilson(hits / count, count) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_no_images_have_no_interval():
    assert wilson(0.0, 0) is None


@pytest.mark.parametrize(("gained", "lost", "count"), [(0, 0, 70), (3, 9, 72), (5, 0, 40)])
def test_paired_intervals_hold_what_they_promise(gained, lost, count):
    """The variance by hand, of all images and one half in each of the four cases."""
    values = torch.tensor([1.0] * gained + [-1.0] * lost + [0.0] * (count - gained - lost), dtype=torch.float64)
    weights = torch.ones(len(values), dtype=torch.float64)
    values = torch.cat([values, torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64)])
    weights = torch.cat([weights, torch.full((4,), 0.5, dtype=torch.float64)])
    mean = (weights * values).sum() / weights.sum()
    variance = (weights * (values - mean) ** 2).sum() / weights.sum()
    half = 1.959964 * (variance / weights.sum()).sqrt()
    assert paired_difference(gained, lost, count) == pytest.approx(
        ((mean - half).item(), (mean + half).item()), abs=1e-6
    )


@pytest.mark.parametrize(
    ("gained", "lost"), [*itertools.product(range(7), repeat=2), (60, 40), (900, 1100), (26_000, 24_000), (3, 2000)]
)
def test_mcnemar_equals_the_exact_binomial_test_of_scipy(gained, lost):
    expected = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_bootstrap_intervals_are_those_of_the_normal_approximation():
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0)) + 0.1
    half = 1.96 * values.std().item() / 3000**0.5
    found = paired_bootstrap({"a": values, "b": -values})
    assert found["a"].mean == pytest.approx(values.mean().item())
    assert found["a"].low == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert found["a"].high == pytest.approx(values.mean().item() + half, abs=0.1 * half)
    # Of the same draws.
    assert found["b"].low == pytest.approx(-found["a"].high, abs=1e-9)


def test_bootstrap_depends_on_the_seed_alone():
    values = {"a": torch.arange(50.0)}
    first = paired_bootstrap(values, seed=3)
    assert first == paired_bootstrap(values, seed=3)
    assert first != paired_bootstrap(values, seed=4)


def test_bootstrap_of_equal_or_single_values_is_a_point():
    found = paired_bootstrap({"a": torch.full((9,), 0.25)})["a"]
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert paired_bootstrap({"a": torch.tensor([2.0])})["a"].low == 2.0
