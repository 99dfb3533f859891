"""Checksums noted as bytes go by, each byte summed once: of tensors and cells for the index, of parts for the store."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence

from crc32c import crc32c

from cloudckpt.core.checksum import combine, combine_all, combiner

__all__ = ["CELL_BYTES", "Sums"]

#: An object's bytes are summed in cells of this size, counted from its first: so much of it can be read and proven
#: alone. Parts are multiples of it, so that none is cut.
CELL_BYTES = 2 * 1024 * 1024

#: Shorter pieces are summed twice, each for itself and all neighbours together: joining two sums costs what summing
#: this much does.
_SHORT_BYTES = 64 * 1024


class Sums:
    """What is known of one payload object's sums. Safe to use from several threads.

    Args:
        bounds: where its pieces begin, and at last where it ends; no holes.
    """

    def __init__(self, bounds: Sequence[int]) -> None:
        self._bounds = bounds
        self._mutex = threading.Lock()
        self._whole: list[int | None] = [None] * (len(bounds) - 1)
        # Pieces that parts cut: (number, start) -> (stop, sum). And the parts: start -> {stop: sum}.
        self._cut: dict[tuple[int, int], tuple[int, int]] = {}
        self._parts: dict[int, dict[int, int]] = {}
        # Cells, and pieces of them where parts cut them: start -> (stop, sum).
        self._cells: dict[int, tuple[int, int]] = {}

    def part(self, start: int, views: Sequence[memoryview]) -> int:
        """The sum of the bytes from ``start`` as they were when they were first looked at; ``views`` are them now."""
        stop = start + sum(view.nbytes for view in views)
        if stop == start:
            return 0  # no part that another one could follow
        known = self._parts.get(start, {}).get(stop)
        if known is not None:
            return known
        total = self._sum_of_cells(start, stop, views) if self._cells else self._sum(start, views)
        with self._mutex:
            return self._parts.setdefault(start, {}).setdefault(stop, total)

    def cell(self, start: int, views: Sequence[memoryview]) -> None:
        """Sum some bytes before anybody asks for them. ``start`` is a multiple of ``CELL_BYTES``, which they fill."""
        self._sum(start, views)

    def _sum_of_cells(self, start: int, stop: int, views: Sequence[memoryview]) -> int:
        total, at = 0, start
        while at < stop:
            end, value = self._cells.get(at, (at, 0))
            if not at < end <= stop:
                end = at
                while end < stop and (end == at or end not in self._cells):
                    end = min(stop, end - end % CELL_BYTES + CELL_BYTES)
                value = self._sum(at, _between(views, at - start, end - start))
            total = _combined(total, value, end - at)
            at = end
        return total

    def _sum(self, start: int, views: Sequence[memoryview]) -> int:
        # A hundred thousand small tensors pass through this loop; it is written for that.
        bounds, whole = self._bounds, self._whole
        number = bisect_right(bounds, start) - 1
        begin, at, total, base = bounds[number], start, 0, start
        cell, in_cell, border = start, 0, start - start % CELL_BYTES + CELL_BYTES
        for view in views:
            joined = at  # up to here the sum of the cell has come
            last = base + view.nbytes
            while at < last:
                end = border if border < last else last  # noqa: FURB136 - as below
                while at < end:
                    close = bounds[number + 1]
                    stop = close if close < end else end  # noqa: FURB136 - min() costs a tenth of this loop
                    value = crc32c(view[at - base : stop - base])
                    if stop - at >= _SHORT_BYTES:
                        in_cell = _extended(in_cell, view[joined - base : at - base])
                        in_cell, joined = _combined(in_cell, value, stop - at), stop
                    if stop == close:
                        if at == begin:
                            whole[number] = value
                        else:
                            self._note_cut(number, at, stop, value)
                        number, begin = number + 1, close
                    else:
                        self._note_cut(number, at, stop, value)
                    at = stop
                in_cell, joined = _extended(in_cell, view[joined - base : end - base]), end
                if end == border:
                    total = self._note_cell(total, cell, end, in_cell)
                    cell, in_cell, border = end, 0, end + CELL_BYTES
            base = last
        return self._note_cell(total, cell, at, in_cell) if at > cell else total

    def _note_cell(self, total: int, start: int, stop: int, value: int) -> int:
        """Note a cell, or a piece of one. Gives the sum with it at its end."""
        with self._mutex:
            self._cells.setdefault(start, (stop, value))
        return _combined(total, value, stop - start)

    def _note_cut(self, number: int, start: int, stop: int, value: int) -> None:
        with self._mutex:
            self._cut.setdefault((number, start), (stop, value))

    def finish(self, again: Callable[[int, int], None]) -> tuple[int, list[int]]:
        """The sum of the whole object, and of each of its pieces.

        Args:
            again: called with (start, length) of what no part has covered; has it summed.
        """
        pieces = [self._piece(number, again) if found is None else found for number, found in enumerate(self._whole)]
        joined = self._joined()
        if joined is None:
            lengths = (b - a for a, b in zip(self._bounds, self._bounds[1:], strict=False))
            joined = combine_all(zip(pieces, lengths, strict=True))
        return joined, pieces

    def cells(self, again: Callable[[int, int], None]) -> tuple[int, ...]:
        """The sum of each cell of the object, the last of which may be shorter.

        Args:
            again: see ``finish``.
        """
        size = self._bounds[-1]
        return tuple(self._cell(at, min(size, at + CELL_BYTES), again) for at in range(0, size, CELL_BYTES))

    def _cell(self, start: int, stop: int, again: Callable[[int, int], None]) -> int:
        total, at = 0, start
        while at < stop:
            found = self._cells.get(at)
            if found is None:
                again(at, stop - at)
                return combine(total, self._parts[at][stop], stop - at)
            total, at = _combined(total, found[1], found[0] - at), found[0]
        return total

    def _piece(self, number: int, again: Callable[[int, int], None]) -> int:
        start, stop = self._bounds[number], self._bounds[number + 1]
        found = self._whole[number] if stop > start else 0
        if found is not None:
            return found
        at, total = start, 0
        while at < stop and (cut := self._cut.get((number, at))) is not None:
            total, at = _combined(total, cut[1], cut[0] - at), cut[0]
        if at == stop:
            return total
        again(start, stop - start)
        return self._parts[start][stop]

    def _joined(self) -> int | None:
        """The whole object's sum from the parts, if they lie end to end."""
        at, parts = 0, []
        while at < self._bounds[-1]:
            found = self._parts.get(at)
            if not found:
                return None
            stop = max(found)
            parts.append((found[stop], stop - at))
            at = stop
        return combine_all(parts)


def _between(views: Sequence[memoryview], start: int, stop: int) -> list[memoryview]:
    """The bytes ``start`` to ``stop`` of views laid end to end."""
    found, at = [], 0
    for view in views:
        if (piece := view[max(0, start - at) : max(0, stop - at)]).nbytes:
            found.append(piece)
        at += view.nbytes
    return found


def _combined(total: int, value: int, length: int) -> int:
    """``combine``, quickly for the length that most calls have."""
    return combiner(CELL_BYTES)(total, value) if length == CELL_BYTES else combine(total, value, length)


def _extended(total: int, short: memoryview) -> int:
    """The sum with a run of short pieces after it, which were summed each for itself already."""
    if short.nbytes < _SHORT_BYTES:
        return crc32c(short, total) if short.nbytes else total
    return combine(total, crc32c(short), short.nbytes)
