"""CRC-32C arithmetic in pure Python: joining sums of neighbouring byte ranges without touching the bytes.

CRC-32C is the Castagnoli polynomial of RFC 3720, reflected, as S3 and GCS verify it. A CRC is linear: the sum of
``A + B`` follows from the sums of A and B and the length of B (M. Adler, ``crc32_combine`` in zlib). The sums
of payload bytes themselves come from the ``crc32c`` library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from cloudckpt.errors import FormatError

__all__ = [
    "combine",
    "combine_all",
    "combiner",
    "format_crc32c",
    "format_sums",
    "is_crc32c",
    "parse_crc32c",
    "parse_sums",
]

_POLYNOMIAL = 0x82F63B78
_ONE = 1 << 31  # the polynomial 1: in reflected order the highest bit is x**0
_SUM = re.compile(r"[0-9a-f]{8}")
_HEX = re.compile(r"[0-9a-f]*")


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials modulo ours, in reflected bit order."""
    product = 0
    bit = _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=64)
def _power_of_two(exponent: int) -> int:
    """x**(2**exponent) modulo ours."""
    if exponent == 0:
        return _ONE >> 1
    half = _power_of_two(exponent - 1)
    return _multiply(half, half)


@lru_cache(maxsize=8 * 256)
def _shift_of_byte(place: int, byte: int) -> int:
    """What ``byte * 256**place`` zero bytes multiply by. There are few of these, and every length is made of them."""
    found = _ONE
    for bit in range(8):
        if byte >> bit & 1:
            found = _multiply(found, _power_of_two(3 + 8 * place + bit))
    return found


@lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """x**(8 * length): what appending ``length`` zero bytes multiplies by. Tensors come in few sizes."""
    found, place = _ONE, 0
    while length:
        if length & 255:
            found = _multiply(found, _shift_of_byte(place, length & 255))
        length >>= 8
        place += 1
    return found


def combine(first: int, second: int, second_length: int) -> int:
    """The sum of two byte strings laid end to end, from their sums and the length in bytes of the second.

    Raises:
        ValueError: the length is negative.
    """
    if second_length < 0:
        raise ValueError(f"a length of {second_length} bytes")
    return _multiply(_shift(second_length), first) ^ second if first else second


@lru_cache(maxsize=8)
def combiner(second_length: int) -> Callable[[int, int], int]:
    """``combine`` for one length in bytes of the second string, at a tenth of its time. For a length that is met often.

    What a length multiplies by is linear: the products of all bytes, in each of their four places, are looked up.
    """
    shift = _shift(second_length)
    low, second, third, high = ([_multiply(shift, byte << bits) for byte in range(256)] for bits in (0, 8, 16, 24))

    def joined(first: int, then: int) -> int:
        return low[first & 255] ^ second[first >> 8 & 255] ^ third[first >> 16 & 255] ^ high[first >> 24] ^ then

    return joined


def combine_all(parts: Iterable[tuple[int, int]]) -> int:
    """The sum of many byte strings laid end to end, each given as (sum, length in bytes)."""
    total = 0
    for part, length in parts:
        total = combine(total, part, length)
    return total


def format_crc32c(value: int) -> str:
    """Eight lower-case hex digits."""
    return f"{value:08x}"


def is_crc32c(text: str) -> bool:
    """Whether a text is eight lower-case hex digits."""
    return _SUM.fullmatch(text) is not None


def parse_crc32c(text: str) -> int:
    """The sum spelled by eight lower-case hex digits.

    Raises:
        FormatError: it is something else.
    """
    if not is_crc32c(text):
        raise FormatError(f"{text!r} is no CRC-32C: expected 8 lower-case hex digits")
    return int(text, 16)


def format_sums(values: Iterable[int]) -> str:
    """Eight lower-case hex digits for each, laid end to end."""
    return "".join(map(format_crc32c, values))


def parse_sums(text: str, count: int) -> tuple[int, ...]:
    """So many sums spelled by eight lower-case hex digits each.

    Raises:
        FormatError: it is something else.
    """
    if len(text) != 8 * count or not _HEX.fullmatch(text):
        raise FormatError(f"{count} sums CRC-32C have {8 * count} lower-case hex digits")
    return tuple(int(text[at : at + 8], 16) for at in range(0, len(text), 8))
