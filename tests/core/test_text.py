from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.text import format_bytes, format_duration, format_metric, format_rate

GIB = 2**30


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2.1 * GIB, "2.1 GiB"),
        (21 * GIB, "21.0 GiB"),
        (3 * 2**50, "3.0 PiB"),
        (5000 * 2**50, "5000.0 PiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_sizes_are_binary_with_one_decimal(size_bytes: float, text: str) -> None:
    """A size is spelled in the largest unit that it fills."""
    assert format_bytes(size_bytes) == text


@given(st.integers(0, 2**60))
def test_no_size_needs_more_than_four_digits(size_bytes: int) -> None:
    """Below the largest unit no more than four digits stand before the point."""
    assert len(format_bytes(size_bytes).split(" ")[0].split(".")[0]) <= 4


@pytest.mark.parametrize(
    ("size_bytes", "seconds", "text"),
    [
        (182 * 2**20, 1.0, "182 MiB/s"),
        (500, 1.0, "500 B/s"),
        (1000 * 2**20, 1.0, "1 GiB/s"),
        (0, 0.0, "0 B/s"),
        (1024, 0.0, "1 MiB/s"),
        (10**6 * 2**50, 1.0, "1000000 PiB/s"),
    ],
)
def test_rates_stay_short(size_bytes: float, seconds: float, text: str) -> None:
    """A rate has at most three digits but in the largest unit, and no time at all counts as a millisecond."""
    assert format_rate(size_bytes, seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "40 ms"),
        (1, "1.0 s"),
        (11.8, "11.8 s"),
        (119.9, "119.9 s"),
        (180, "3 min"),
        (7200, "2 h"),
        (345_600, "4 d"),
    ],
)
def test_durations_have_one_unit(seconds: float, text: str) -> None:
    """A duration is spelled in one unit, as fine as a reader needs."""
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.85571, "2.8557"),
        (0, "0.0000"),
        (0.0001234, "0.0001234"),
        (12_345_678.9, "1.235e+07"),
        (-0.5, "-0.5000"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_metrics_have_four_decimals(value: float, text: str) -> None:
    """A metric reads as in a training log; very small and very large ones keep four significant digits."""
    assert format_metric(value) == text
