"""Divides the places of an endless sequence among groups in fixed shares, as evenly as whole numbers allow."""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

FINEST = 10_000
"""Shares are whole numbers with at most about this sum; finer ones are rounded to it."""


def whole_shares(shares: Sequence[float]) -> tuple[int, ...]:
    """Returns shares as whole numbers without a common divisor: (2, 1) of 2 and 1, of 4 and 2, and of 0.5 and 0.25.

    Args:
        shares: above 0, one for each group; there may be none.
    """
    if not shares:
        return ()
    # By the decimals as they are written: 0.1 is a tenth.
    exact = [Fraction(str(each)) for each in shares]
    total = sum(exact)
    whole = [each * math.lcm(*(one.denominator for one in exact)) for each in exact]
    if sum(whole) / math.gcd(*map(int, whole)) > FINEST:
        # At least 1: a group with a share is not left out.
        whole = [max(Fraction(1), Fraction(round(each * FINEST / total))) for each in exact]
    divisor = math.gcd(*map(int, whole))
    return tuple(int(each) // divisor for each in whole)


def divide(positions: np.ndarray, shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the group of each place of the sequence, and how many earlier places are of the same group.

    In the first n places, for every n, the number of a group's places differs from its share of n by less than 1. So
    where its share of a batch is a whole number, every batch has exactly that many.

    Args:
        positions: of the places, (n,) int64, counted from 0.
        shares: whole numbers, one for each group.

    Returns:
        groups and numbers, (n,) int64 each.
    """
    period, (groups, ranks) = sum(shares), _period(shares)
    rounds, places = positions // period, positions % period
    return groups[places], rounds * np.array(shares, np.int64)[groups[places]] + ranks[places]


@lru_cache(maxsize=16)
def _period(shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the groups of the first `sum(shares)` places, after which all repeats, and their numbers in their group.

    The k-th place of a group, of `share` in a period, must come between ⌊(k − 1) · period / share⌋ and
    ⌈k · period / share⌉; of those that may come, the most urgent is next. That always works out, as scheduling unit
    jobs by their deadlines does.
    """
    period = sum(shares)
    groups, ranks = np.empty(period, np.int64), np.empty(period, np.int64)
    # Of each group its next place only: (place from which it may come, group, number).
    coming = [(0, group, 0) for group in range(len(shares))]
    urgent: list[tuple[int, int, int]] = []
    for place in range(period):
        while coming and coming[0][0] <= place:
            _, group, number = heapq.heappop(coming)
            heapq.heappush(urgent, (-(-(number + 1) * period // shares[group]), group, number))
        _, group, number = heapq.heappop(urgent)
        groups[place], ranks[place] = group, number
        if number + 1 < shares[group]:
            heapq.heappush(coming, ((number + 1) * period // shares[group], group, number + 1))
    return groups, ranks
