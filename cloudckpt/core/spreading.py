"""Who writes what several ranks have: each piece once, and about as many bytes on every rank."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

__all__ = ["spread"]

_T = TypeVar("_T", bound=Hashable)


def spread(pieces: Mapping[_T, tuple[int, Sequence[int]]], world_size: int) -> dict[_T, int]:
    """The rank that writes each piece.

    The largest first, each to the rank that has the least so far: at most 4/3 of the best there is (Graham, "Bounds on
    Multiprocessing Timing Anomalies", 1969). Equal pieces in equal order give equal answers.

    Args:
        pieces: each with its size in bytes and the ranks that have it, at least one.
        world_size: how many ranks there are.
    """
    load = [0] * world_size
    found: dict[_T, int] = {}
    for piece, (size_bytes, ranks) in pieces.items():
        if len(ranks) == 1:
            found[piece] = ranks[0]
            load[ranks[0]] += size_bytes
    shared = [(piece, size, ranks) for piece, (size, ranks) in pieces.items() if len(ranks) > 1]
    for piece, size_bytes, ranks in sorted(shared, key=lambda item: -item[1]):
        chosen = min(ranks, key=lambda rank: (load[rank], rank))
        found[piece] = chosen
        load[chosen] += size_bytes
    return found
