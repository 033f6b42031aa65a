"""Orders the training images: computes the image at each position of an endless sequence from seed and position alone.

So no order is stored, no epoch begins with a pause, and a run that is stopped and resumed, on one process or several,
is shown the same images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from funmatch.ops.mixtures.shares import divide

Order = Callable[[int, np.ndarray], np.ndarray]
"""Returns the images, (n,) int64, at some positions, (n,) int64, of the sequence of a seed."""


def shuffle_positions(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Returns the image at each position of an endless sequence of epochs, each epoch in a new order.

    Position p lies in epoch p // count. Within an epoch the order is a keyed permutation that is *computed*: a Feistel
    network on the smallest square grid that holds `count`, applied until the result is below `count` (cycle walking;
    Black & Rogaway, "Ciphers with arbitrary finite domains", 2002). So any step can be computed directly, whatever the
    number of images.

    Args:
        seed: the run's seed.
        positions: (n,) int64, counted from 0.
        count: images in the split, at least 1.

    Returns:
        (n,) int64 in [0, count).
    """
    # The seed is mixed before the epoch is added: seed 0, epoch 1 must not be seed 1, epoch 0. Negative seeds and those
    # of more than 64 bits, are taken modulo 2⁶⁴.
    return _permute(positions, _mix64(np.uint64(seed % 2**64)), np.asarray(count, np.int64))


class BalancedOrder:
    """An order in which all classes come equally often, however many images they have.

    The sequence is made of rounds, in each of which every class that has images comes once, in a new order. The images
    of a class come one after the other, each once before any of them comes again, and then in a new order.
    """

    def __init__(self, labels: np.ndarray) -> None:
        """Args: labels of the images, (n,) integers, at least 0."""
        _, self.counts = np.unique(labels, return_counts=True)
        # Stable, so that the images of a class are in the order of the split.
        self.images = np.argsort(labels, kind="stable").astype(np.int64)
        self.starts = np.cumsum(self.counts) - self.counts

    def __call__(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """Returns the image at each position; see `Order`."""
        positions = np.asarray(positions, np.int64)
        classes = shuffle_positions(seed, positions, len(self.counts))
        # A class comes once a round, so the round is the number of its images that came before.
        rounds, counts = positions // len(self.counts), self.counts[classes]
        # A key for each class: classes of equal size would otherwise be shuffled alike, and so paired alike by MixUp.
        keys = _mix64(_mix64(np.uint64(seed % 2**64)) ^ (classes.astype(np.uint64) + np.uint64(1)))
        return self.images[self.starts[classes] + _permute(rounds, keys, counts)]


class SharedOrder:
    """An order in which every batch has images of several sources in fixed shares.

    How many places of a batch a source has is its share, rounded so that what is left over comes in a later batch.
    Which places these are is shuffled. The images of a source come one after the other, each once before any of them
    comes again, and then in a new order.
    """

    def __init__(self, sources: Sequence[tuple[int, int]], batch: int) -> None:
        """Divides the images.

        Args:
            sources: share, a whole number, and number of images of each; the images of the first come first.
            batch: images in the global batch.
        """
        self.shares = tuple(share for share, _ in sources)
        self.counts = np.array([count for _, count in sources], np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self.batch = batch

    def __call__(self, seed: int, positions: np.ndarray) -> np.ndarray:
        """Returns the image at each position; see `Order`."""
        positions, mixed = np.asarray(positions, np.int64), _mix64(np.uint64(seed % 2**64))
        # A batch is an epoch of its places: in the order of the division, a source would often follow the same one,
        # and so be mixed with it by MixUp.
        places = _permute(positions, _mix64(mixed), np.asarray(self.batch, np.int64))
        sources, numbers = divide(positions // self.batch * self.batch + places, self.shares)
        # A key for each source, none of them the places': those of equal size would otherwise be shuffled alike.
        keys = _mix64(mixed ^ (sources.astype(np.uint64) + np.uint64(1)))
        return self.starts[sources] + _permute(numbers, keys, self.counts[sources])


def _permute(positions: np.ndarray, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns positions, each in an epoch of its count, permuted within their epochs.

    Args:
        positions: (n,) int64.
        keys: of the permutations, one or (n,) uint64; the epoch is added to them.
        counts: length of an epoch, one or (n,) int64.

    Returns:
        (n,) int64 in [0, count).
    """
    # int64 throughout: a run of 30,000 epochs of ImageNet has more positions than 32 bits can count.
    positions = np.asarray(positions, np.int64)
    counts = np.broadcast_to(counts, positions.shape)
    epochs, places = positions // counts, positions % counts
    side = np.ceil(np.sqrt(counts)).astype(np.int64)
    keys = _mix64(epochs.astype(np.uint64) + keys)
    result = _feistel(places, keys, side)
    # side² < count + 2·√count + 1, so few results lie outside, and the loop ends after a few turns.
    outside = np.flatnonzero(result >= counts)
    while outside.size:
        result[outside] = _feistel(result[outside], keys[outside], side[outside])
        outside = outside[result[outside] >= counts[outside]]
    return result


def _feistel(places: np.ndarray, keys: np.ndarray, side: np.ndarray, rounds: int = 8) -> np.ndarray:
    """Permutes [0, side²) by a keyed Feistel network.

    Args:
        places: (n,) int64 in [0, side²).
        keys: (n,) uint64.
        side: of the grid, (n,) int64.
        rounds: of the network; part of what decides the order.
    """
    # Addition modulo `side` instead of the usual XOR, since `side` is not a power of two.
    left, right = places // side, places % side
    for number in range(rounds):
        scrambled = _mix64(right.astype(np.uint64) ^ (keys + np.uint64(number << 48)))
        left, right = right, (left + (scrambled % side.astype(np.uint64)).astype(np.int64)) % side
    return left * side + right


def _mix64(x: Any) -> Any:
    """Applies SplitMix64's finalizer (Steele, Lea & Flood, 2014): 64 bits in, 64 well-mixed bits out.

    Args:
        x: uint64, a scalar or (n,).
    """
    # Products modulo 2⁶⁴ are meant; numpy warns of them for scalars.
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
