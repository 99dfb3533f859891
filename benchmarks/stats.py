"""Medians, and how far a median ratio can be trusted. Standard library only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PairedRatio", "paired_ratio", "upper_bound_of_median"]


@dataclass(frozen=True, slots=True)
class PairedRatio:
    """A ratio measured in interleaved pairs.

    Attributes:
        pairs: how many.
        median: of the ratios, one a pair.
        upper: the bound that the true median ratio is below with the asked confidence; infinite with too few pairs.
    """

    pairs: int
    median: float
    upper: float


def paired_ratio(values: Sequence[float], bases: Sequence[float], *, confidence: float = 0.95) -> PairedRatio:
    """The median of ``values[i] / bases[i]`` with its upper bound.

    Raises:
        ValueError: there is no pair, or not as many values as bases.
    """
    ratios = [value / base for value, base in zip(values, bases, strict=True)]
    if not ratios:
        raise ValueError("no pairs: a ratio needs at least one")
    return PairedRatio(len(ratios), statistics.median(ratios), upper_bound_of_median(ratios, confidence=confidence))


def upper_bound_of_median(values: Sequence[float], *, confidence: float = 0.95) -> float:
    """The smallest order statistic that is an upper bound of the median with the asked confidence.

    Distribution-free: of n values, how many lie below the true median is Binomial(n, 1/2), so the k-th smallest is
    below it with probability P(at least k of n). With 11 values at 95 % that is the 9th; below 5 there is none.
    """
    count = len(values)
    for rank in range(count // 2 + 1, count + 1):
        missed = sum(math.comb(count, below) for below in range(rank, count + 1)) / 2**count
        if missed <= 1 - confidence:
            return sorted(values)[rank - 1]
    return math.inf
