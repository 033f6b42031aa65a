"""Batches with fixed shares of several sources, each of which has epochs of its own."""

import numpy as np
import pytest

from funmatch.ops.order import SharedOrder


@pytest.mark.parametrize(
    ("sources", "batch"),
    [([(2, 30), (1, 7)], 12), ([(2, 5), (1, 100), (3, 11)], 10), ([(1, 8), (1, 8)], 7), ([(9, 3), (1, 4)], 3)],
)
def test_batches_have_their_shares_and_sources_their_epochs(sources, batch):
    order, steps = SharedOrder(sources, batch), 60
    images = order(3, np.arange(steps * batch))
    ends = np.cumsum([count for _, count in sources])
    owners = np.searchsorted(ends, images, side="right")
    total = sum(share for share, _ in sources)
    for number, (share, count) in enumerate(sources):
        counts = (owners == number).reshape(steps, batch).sum(1)
        if share * batch % total == 0:
            assert (counts == share * batch // total).all()
        assert (np.abs(counts.cumsum() - share * batch / total * np.arange(1, steps + 1)) < 1).all()
        own = images[owners == number] - (ends[number] - count)
        # Of each epoch, as far as batches shuffle their places: an image comes again only in the next.
        for epoch in range(2, len(own) // count):
            times = np.bincount(own[: epoch * count], minlength=count)
            assert np.abs(times - epoch).max() <= 1
        assert np.bincount(own, minlength=count).min() >= len(own) // count - 1


def test_a_source_has_each_image_once_an_epoch_where_batches_hold_whole_epochs():
    order = SharedOrder([(2, 8), (1, 4)], 6)
    images = order(1, np.arange(24)).reshape(2, 12)
    assert [sorted(each) for each in images.tolist()] == [list(range(12))] * 2
    assert images[0].tolist() != images[1].tolist(), "a new order"


def test_order_is_a_function_of_seed_and_position():
    order = SharedOrder([(2, 50), (1, 40)], 9)
    whole = order(7, np.arange(900))
    for some in (np.array([5]), np.arange(300, 309), np.array([899, 3, 3])):
        assert order(7, some).tolist() == whole[some].tolist()
    assert order(8, np.arange(900)).tolist() != whole.tolist()
    # Others would be other runs.
    assert whole[:9].tolist() == [22, 17, 50, 45, 72, 62, 38, 16, 33]


def test_sources_are_mixed_with_each_other_and_with_themselves():
    owners = SharedOrder([(2, 50), (1, 40)], 9)(0, np.arange(9 * 500)) >= 50
    rows = owners.reshape(500, 9)
    pairs = rows[:, 1:] & rows[:, :-1]
    assert pairs.mean() == pytest.approx(3 / 9 * 2 / 8, abs=0.02), "neighbours of a batch are partners of MixUp"
    assert np.abs(rows.mean(0) - 1 / 3).max() < 0.1


def test_sources_of_equal_size_are_not_shuffled_alike():
    images = SharedOrder([(1, 64), (1, 64)], 128)(4, np.arange(128))
    first, second = images[images < 64], images[images >= 64] - 64
    assert first.tolist() != second.tolist()
