"""Sampling: TensorFlow's crop distribution, shuffling without stored state, and dependence on (seed, step) only."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from funmatch.ops.order import BalancedOrder, shuffle_positions
from funmatch.ops.sampling import sample_inception_boxes, sample_step, step_generator

# Deciles of 200,000 boxes of TensorFlow 2.21's `tf.image.sample_distorted_bounding_box` (aspect 3/4 … 4/3, area
# 5 … 100 %, 100 attempts): the box's share of the image's area, its aspect, its centre as a share of the sides.
TENSORFLOW = {
    (375, 500): {
        "area": [0.082, 0.1233, 0.1743, 0.2329, 0.3001, 0.3756, 0.4596, 0.5528, 0.6701],
        "aspect": [0.8087, 0.8675, 0.9256, 0.9838, 1.0424, 1.1006, 1.158, 1.2165, 1.2749],
        "middle_y": [0.3347, 0.404, 0.4493, 0.48, 0.4987, 0.5173, 0.548, 0.5933, 0.6627],
        "middle_x": [0.289, 0.36, 0.413, 0.459, 0.499, 0.54, 0.585, 0.64, 0.709],
    },
    (40, 300): {
        "area": [0.0556, 0.0625, 0.0698, 0.0775, 0.087, 0.096, 0.1048, 0.117, 0.1333],
        "aspect": [0.8065, 0.8649, 0.9231, 0.9744, 1.0385, 1.1, 1.1579, 1.2174, 1.2727],
        "middle_y": [0.4, 0.4375, 0.4625, 0.475, 0.4875, 0.5, 0.5125, 0.5375, 0.575],
        "middle_x": [0.1433, 0.2317, 0.3217, 0.41, 0.4992, 0.5883, 0.6767, 0.765, 0.855],
    },
    (28, 28): {
        "area": [0.0804, 0.1263, 0.1824, 0.2487, 0.3265, 0.4286, 0.5281, 0.6378, 0.7577],
        "aspect": [0.8095, 0.8667, 0.9231, 1.0, 1.0417, 1.1, 1.1579, 1.2174, 1.2778],
        "middle_y": [0.3036, 0.375, 0.4286, 0.4643, 0.4821, 0.5, 0.5536, 0.5893, 0.6607],
        "middle_x": [0.3036, 0.375, 0.4286, 0.4643, 0.4821, 0.5, 0.5357, 0.5893, 0.6607],
    },
}


def box_measures(boxes, height, width):
    top, left, h, w = boxes.T
    return {
        "area": h * w / (height * width),
        "aspect": w / h,
        "middle_y": (top + h / 2) / height,
        "middle_x": (left + w / 2) / width,
    }


@pytest.mark.parametrize("size", TENSORFLOW)
def test_crops_have_tensorflows_distribution(size):
    """The share of our boxes at or below each of TensorFlow's deciles is that decile, up to ties and chance."""
    n = 100_000
    found = box_measures(sample_inception_boxes(step_generator(1, 0), np.full(n, size[0]), np.full(n, size[1])), *size)
    critical = 1.63 * math.sqrt(1 / n + 1 / 200_000)  # Kolmogorov-Smirnov, p = 0.01
    for name, deciles in TENSORFLOW[size].items():
        for share, value in zip(np.arange(0.1, 0.95, 0.1), deciles, strict=True):
            below, upto = np.mean(found[name] < value - 6e-5), np.mean(found[name] <= value + 6e-5)
            assert below - critical <= share <= upto + critical, f"{name} of {size} at its decile {share:.1f}"


def sample_one_box(uniforms, height, width, low_area, high_area):
    """One attempt of the sampler for one image, written out without arrays."""
    aspect = 0.75 + uniforms[0] * (4 / 3 - 0.75)
    shortest = round(math.sqrt(low_area * height * width / aspect))
    tallest = round(math.sqrt(high_area * height * width / aspect))
    if round(tallest * aspect) > width:
        tallest = math.floor((width + 0.5 - 1e-7) / aspect)
    tallest = min(tallest, height)
    shortest = min(shortest, tallest)
    h = shortest + math.floor(uniforms[1] * (tallest - shortest + 1))
    w = round(h * aspect)
    if h * w < low_area * height * width:
        h += 1
        w = round(h * aspect)
    if h * w > high_area * height * width:
        h -= 1
        w = round(h * aspect)
    if not (low_area * height * width <= h * w <= high_area * height * width and 0 < w <= width and 0 < h <= height):
        return None
    return math.floor(uniforms[2] * (height - h)), math.floor(uniforms[3] * (width - w)), h, w


@given(st.integers(0, 2**32), st.integers(1, 700), st.integers(1, 700), st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_boxes_equal_the_rules_written_out_for_one_image(seed, height, width, low_area):
    n = 20
    boxes = sample_inception_boxes(step_generator(seed, 3), np.full(n, height), np.full(n, width), min_area=low_area)
    rng = step_generator(seed, 3)
    for box, uniforms in zip(boxes, rng.random((n, 4)), strict=True):
        expected = sample_one_box(uniforms, height, width, low_area, 1.0)
        if expected is None:
            later = (sample_one_box(u, height, width, low_area, 1.0) for u in rng.random((99, 4)))
            expected = next((found for found in later if found), (0, 0, height, width))
        assert tuple(box) == expected


def test_whole_image_is_used_if_no_crop_fits():
    assert sample_inception_boxes(step_generator(0, 0), [10], [1000]).tolist() == [[0, 0, 10, 1000]]


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_every_epoch_shows_every_image_once(count, seed, epoch):
    order = shuffle_positions(seed, np.arange(epoch * count, (epoch + 1) * count), count)
    assert sorted(order) == list(range(count))


def test_orders_are_uniform_and_differ_between_epochs_and_seeds():
    count, epochs = 7, 20_000
    orders = shuffle_positions(5, np.arange(count * epochs), count).reshape(epochs, count)
    expected = epochs / count
    for position in range(count):
        counts = np.bincount(orders[:, position], minlength=count)
        assert ((counts - expected) ** 2 / expected).sum() < 22.5, "chi-square, 6 degrees of freedom, p = 0.001"
    pairs = np.bincount(orders[:, 0] * count + orders[:, 1], minlength=count * count)
    expected = epochs / (count * (count - 1))
    off_diagonal = pairs[~np.eye(count, dtype=bool).ravel()]
    assert ((off_diagonal - expected) ** 2 / expected).sum() < 76, "41 degrees of freedom, p < 0.001"
    assert not np.array_equal(shuffle_positions(1, np.arange(50), 50), shuffle_positions(2, np.arange(50), 50))


def test_order_is_that_of_earlier_versions():
    """Runs resume with it: the numbers were written by version 0.1.0."""
    assert shuffle_positions(3, np.arange(12), 7).tolist() == [4, 6, 3, 0, 5, 1, 2, 5, 6, 4, 1, 0]
    assert shuffle_positions(2**70 + 1, np.arange(10**12, 10**12 + 4), 1000).tolist() == [959, 459, 863, 38]


def labels_of(counts: list[int]) -> np.ndarray:
    """Labels of a split whose classes are not in order; class 1 has no images if its count is 0."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return labels[np.argsort(np.random.default_rng(0).random(len(labels)))]


@pytest.mark.parametrize("counts", [[100, 5, 1], [7], [3, 0, 40], [8, 8, 8, 8]])
def test_a_balanced_order_shows_classes_equally_often_and_images_of_a_class_in_turn(counts):
    labels, present = labels_of(counts), np.flatnonzero(counts)
    order, rounds = BalancedOrder(labels), 3 * max(counts)
    images = order(5, np.arange(rounds * len(present)))
    shown = labels[images].reshape(rounds, len(present))
    assert (np.sort(shown, axis=1) == present).all(), "every class once in each round"
    for label in present:
        own = images[labels[images] == label]
        for epoch in range(len(own) // counts[label]):
            part = own[epoch * counts[label] : (epoch + 1) * counts[label]]
            assert sorted(part) == np.flatnonzero(labels == label).tolist(), "each image once an epoch of the class"


def test_a_balanced_order_is_a_function_of_seed_and_position_and_uniform():
    labels = labels_of([30, 3, 30])
    order = BalancedOrder(labels)
    whole = order(7, np.arange(900))
    assert np.array_equal(np.concatenate([order(7, np.arange(i, i + 9)) for i in range(0, 900, 9)]), whole)
    assert not np.array_equal(order(8, np.arange(900)), whole)
    first = labels[order(0, np.arange(0, 60_000, 3))]
    counts = np.bincount(first, minlength=3)
    assert ((counts - 20_000 / 3) ** 2 / (20_000 / 3)).sum() < 13.8, "2 degrees of freedom, p = 0.001"
    # Classes of equal size are not shuffled alike: MixUp would then mix the same pairs in every epoch.
    own = [np.searchsorted(np.flatnonzero(labels == label), whole[labels[whole] == label]) for label in (0, 2)]
    assert (own[0] == own[1]).mean() < 0.2


def test_distant_positions_of_a_large_data_set_need_no_memory():
    far = np.arange(10**15, 10**15 + 4)
    assert len(set(shuffle_positions(0, far, 10**9).tolist())) == 4


def sizes(indices):
    return 20 + indices % 5, 30 + indices % 7


def test_sample_is_a_function_of_seed_and_step():
    uniforms = sample_step(3, 17, 8, 100, sizes)
    for step in (0, 16, 18):
        sample_step(3, step, 8, 100, sizes)
    repeated = sample_step(3, 17, 8, 100, sizes)
    for name in ("indices", "boxes", "flips"):
        np.testing.assert_array_equal(getattr(uniforms, name), getattr(repeated, name))
    assert uniforms.lam == repeated.lam
    assert sample_step(4, 17, 8, 100, sizes).lam != uniforms.lam != sample_step(3, 18, 8, 100, sizes).lam


def test_batch_can_exceed_the_data_and_cross_epochs():
    sample = sample_step(0, 0, 25, 10, sizes)
    assert sorted(sample.indices[:10]) == sorted(sample.indices[10:20]) == list(range(10))
    assert len(set(sample.indices[20:])) == 5
    following = sample_step(0, 1, 25, 10, sizes)
    assert sorted([*sample.indices[20:], *following.indices[:5]]) == list(range(10)), (
        "the third epoch continues in the next batch"
    )


def test_lambda_is_uniform_above_one_half_and_flips_are_fair():
    draws = [sample_step(0, step, 50, 50, sizes) for step in range(2000)]
    lams = np.sort([sample.lam for sample in draws])
    assert lams[0] >= 0.5
    assert np.abs(lams - np.linspace(0.5, 1, 2000)).max() < 0.5 * 1.95 / math.sqrt(2000), (
        "Kolmogorov-Smirnov, p = 0.001"
    )
    flips = np.mean([sample.flips for sample in draws])
    assert abs(flips - 0.5) < 3.3 * 0.5 / math.sqrt(100_000)
