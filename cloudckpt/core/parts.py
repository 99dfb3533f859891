"""How large the parts of an upload are."""

from __future__ import annotations

__all__ = ["plan_part_bytes"]

_MEBIBYTE = 1024 * 1024

#: Where nothing else decides, parts are whole multiples of this: what is summed before it is sent comes in such pieces.
_GRAIN_BYTES = 2 * _MEBIBYTE

#: A part that must be sent again should not cost much, nor a part's buffer; beyond this a larger one gains nothing.
_LARGEST_BYTES = 64 * _MEBIBYTE


def plan_part_bytes(
    size_bytes: int, together_bytes: int, *, connections: int, least_bytes: int, most_parts: int
) -> int:
    """The size of an object's parts: all equal (some stores want that), the last one shorter.

    All that is sent together makes whole rounds over the connections, so that none is idle in the last one.

    Args:
        size_bytes: the object.
        together_bytes: all objects that are sent at the same time, this one included.
        connections: how many parts are under way at once.
        least_bytes: what the store, or the user, wants at least.
        most_parts: how many the store takes.
    """
    # Each object ends in a shorter part: room is left for those, so that they need no round of their own.
    full = connections - connections // 8
    rounds = -(-together_bytes // (full * _LARGEST_BYTES)) or 1
    spread = _in_whole(-(-together_bytes // (rounds * full)), _GRAIN_BYTES)
    return _in_whole(max(least_bytes, spread, -(-size_bytes // most_parts)), _MEBIBYTE)


def _in_whole(size_bytes: int, grain_bytes: int) -> int:
    """Rounded up to whole grains, unless it is less than one."""
    return size_bytes if size_bytes <= grain_bytes else -(-size_bytes // grain_bytes) * grain_bytes
