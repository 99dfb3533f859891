"""Joining CRC-32C sums without touching the bytes."""

from __future__ import annotations

import crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.checksum import (
    combine,
    combine_all,
    combiner,
    format_crc32c,
    format_sums,
    parse_crc32c,
    parse_sums,
)
from cloudckpt.errors import FormatError


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combine_is_the_sum_of_the_concatenation(first: bytes, second: bytes) -> None:
    """The sum of two strings laid end to end follows from their own sums and the second's length."""
    joined = combine(crc32c.crc32c(first), crc32c.crc32c(second), len(second))
    assert joined == crc32c.crc32c(first + second)


@pytest.mark.parametrize("length", [255, 256, 510, 255 * 256, 255 * 257, 2**16])
def test_lengths_around_whole_bytes(length: int) -> None:
    """A length is taken byte by byte: none of its bytes is left out, whatever its value."""
    tail = bytes(length)
    assert combine(crc32c.crc32c(b"abc"), crc32c.crc32c(tail), length) == crc32c.crc32c(b"abc" + tail)


@given(st.lists(st.binary(max_size=50)))
def test_combine_all_joins_any_number(parts: list[bytes]) -> None:
    """Any number of parts gives the sum of all of them; none gives the sum of nothing."""
    assert combine_all((crc32c.crc32c(p), len(p)) for p in parts) == crc32c.crc32c(b"".join(parts))


def test_combine_reaches_past_32_bits_of_length() -> None:
    """Lengths past 2**31 and 2**40 are arithmetic: appending zeros twice equals appending them at once."""
    start = crc32c.crc32c(b"abc")
    for length in (2**31 + 5, 2**40 + 3):
        whole = combine(start, 0, 2 * length)
        assert whole == combine(combine(start, 0, length), 0, length)


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_a_combiner_is_combine_for_one_length(first: bytes, second: bytes) -> None:
    """The tables of a length give what is computed for it."""
    joined = combiner(len(second))(crc32c.crc32c(first), crc32c.crc32c(second))
    assert joined == crc32c.crc32c(first + second)


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_sums_are_spelled_end_to_end(values: list[int]) -> None:
    """Eight digits each, and back."""
    assert parse_sums(format_sums(values), len(values)) == tuple(values)


@pytest.mark.parametrize("text", ["", "0" * 15, "0" * 17, "0" * 24, "0" * 15 + "A", "0" * 15 + "\n"])
def test_anything_but_so_many_sums_is_refused(text: str) -> None:
    """Another number of digits, or what is no digit, is no two sums."""
    with pytest.raises(FormatError, match="2 sums CRC-32C have 16 lower-case hex digits"):
        parse_sums(text, 2)


def test_a_negative_length_is_refused() -> None:
    """A length below zero is an error, and no endless loop."""
    with pytest.raises(ValueError, match="-1 bytes"):
        combine(1, 2, -1)


def test_a_sum_is_spelled_by_eight_digits() -> None:
    """The check value of RFC 3720's polynomial is e3069283, and leading zeros stay."""
    assert format_crc32c(crc32c.crc32c(b"123456789")) == "e3069283"
    assert parse_crc32c("0000000a") == 10
    assert format_crc32c(10) == "0000000a"


@pytest.mark.parametrize("text", ["", "e306928", "E3069283", "0x069283", "e30692833"])
def test_anything_else_is_refused(text: str) -> None:
    """A sum that is not eight lower-case hex digits is refused by name."""
    with pytest.raises(FormatError, match="CRC-32C"):
        parse_crc32c(text)
