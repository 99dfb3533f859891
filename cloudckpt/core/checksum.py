"""CRC-32C arithmetic in pure Python: joining sums of neighbouring byte ranges without touching the bytes.

CRC-32C is the Castagnoli polynomial of RFC 3720, reflected, as S3 and GCS verify it. A CRC is linear: the sum of
``A + B`` follows from the sums of A and B and the length of B (M. Adler, ``crc32_combine`` in zlib). The sums
of payload bytes themselves come from the ``crc32c`` library.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from cloudckpt.errors import FormatError

__all__ = ["combine", "combine_all", "format_crc32c", "parse_crc32c"]

_POLYNOMIAL = 0x82F63B78
_WIDTH = 32
_SUM = re.compile(r"[0-9a-f]{8}")

#: A linear operator on 32-bit sums: column n is what bit n becomes.
_Operator = tuple[int, ...]


def _apply(operator: _Operator, value: int) -> int:
    result = 0
    for column in operator:
        if value & 1:
            result ^= column
        value >>= 1
    return result


@lru_cache(maxsize=64)
def _zeros(power: int) -> _Operator:
    """The operator that appends ``2**power`` zero bits."""
    if power == 0:
        return (_POLYNOMIAL, *(1 << bit for bit in range(_WIDTH - 1)))
    half = _zeros(power - 1)
    return tuple(_apply(half, column) for column in half)


def combine(first: int, second: int, second_length: int) -> int:
    """The sum of two byte strings laid end to end, from their sums and the length in bytes of the second.

    Raises:
        ValueError: the length is negative.
    """
    if second_length < 0:
        raise ValueError(f"a length of {second_length} bytes")
    bits = second_length * 8
    power = 0
    while bits:
        if bits & 1:
            first = _apply(_zeros(power), first)
        bits >>= 1
        power += 1
    return first ^ second


def combine_all(parts: Iterable[tuple[int, int]]) -> int:
    """The sum of many byte strings laid end to end, each given as (sum, length in bytes)."""
    total = 0
    for part, length in parts:
        total = combine(total, part, length)
    return total


def format_crc32c(value: int) -> str:
    """Eight lower-case hex digits."""
    return f"{value:08x}"


def parse_crc32c(text: str) -> int:
    """The sum spelled by eight lower-case hex digits.

    Raises:
        FormatError: it is something else.
    """
    if _SUM.fullmatch(text) is None:
        raise FormatError(f"{text!r} is no CRC-32C: expected 8 lower-case hex digits")
    return int(text, 16)
