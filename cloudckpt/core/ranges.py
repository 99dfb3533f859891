"""Which byte ranges to ask for: neighbours merged, objects apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Extent", "Wanted", "pieces", "plan_extents"]


@dataclass(frozen=True, slots=True, order=True)
class Wanted:
    """``length`` bytes of an object from byte ``start``."""

    object: str
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """One contiguous range to read, and what of it was wanted, by ``start``."""

    object: str
    start: int
    length: int
    wanted: tuple[Wanted, ...]


def plan_extents(wanted: Iterable[Wanted], *, gap_bytes: int) -> tuple[Extent, ...]:
    """The fewest extents that cover ``wanted`` without reading more than ``gap_bytes`` between two neighbours.

    Empty ranges are covered by nothing and belong to no extent.
    """
    groups: list[list[Wanted]] = []
    end = 0
    for item in sorted(w for w in wanted if w.length):
        if groups and groups[-1][0].object == item.object and item.start - end <= gap_bytes:
            groups[-1].append(item)
            end = max(end, item.start + item.length)
        else:
            groups.append([item])
            end = item.start + item.length
    return tuple(_extent(group) for group in groups)


def _extent(group: list[Wanted]) -> Extent:
    start = group[0].start
    end = max(item.start + item.length for item in group)
    return Extent(object=group[0].object, start=start, length=end - start, wanted=tuple(group))


def pieces(start: int, length: int, *, most_bytes: int) -> Iterator[tuple[int, int]]:
    """A range in pieces of at most ``most_bytes``, as (start, length)."""
    for offset in range(0, length, most_bytes):
        yield start + offset, min(most_bytes, length - offset)
