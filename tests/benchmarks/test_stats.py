"""The bound behind every bar is what it says."""

from __future__ import annotations

import itertools
import math

import pytest

from benchmarks.stats import paired_ratio, upper_bound_of_median


@pytest.mark.parametrize(("count", "rank"), [(5, 5), (6, 6), (7, 7), (8, 7), (9, 8), (11, 9), (15, 12), (21, 15)])
def test_the_bound_is_the_known_order_statistic(count: int, rank: int) -> None:
    """The one-sided 95 % bound of the sign test, as statistics books tabulate it."""
    assert upper_bound_of_median([float(v) for v in range(1, count + 1)]) == rank


def test_too_few_values_have_no_bound() -> None:
    """Below five values even the largest one may lie under the median more often than once in twenty."""
    assert upper_bound_of_median([1.0, 2.0, 3.0, 4.0]) == math.inf


@pytest.mark.parametrize("count", [5, 8, 11])
def test_the_bound_covers_the_median_as_often_as_promised(count: int) -> None:
    """Of all ways in which values can lie below and above the true median, at most 5 % put the bound below it."""
    outcomes = list(itertools.product((-1.0, 1.0), repeat=count))
    missed = sum(upper_bound_of_median(outcome) < 0 for outcome in outcomes)
    assert missed / len(outcomes) <= 0.05


def test_a_paired_ratio_divides_round_by_round() -> None:
    """A drift that hits both of a pair alike does not move the ratio."""
    bases = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = paired_ratio([1.5 * base for base in bases], bases)
    assert (found.pairs, found.median, found.upper) == (5, 1.5, 1.5)


def test_unequal_rounds_are_refused() -> None:
    """A value without its base is a mistake, not a pair."""
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="no pairs"):
        paired_ratio([], [])
