"""Sums taken while the announce is on its way.

The processors have nothing else to do then, and afterwards all parts can start at once (docs/adr/0014).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from cloudckpt.tensors.host import cpus
from cloudckpt.tensors.sources import PayloadSource

__all__ = ["summed_ahead"]

#: A few threads fill the memory's own speed.
_MOST_THREADS = 4

#: Below this much for each, another thread is not worth its start.
_THREAD_BYTES = 16 * 1024 * 1024


@contextlib.contextmanager
def summed_ahead(sources: Sequence[PayloadSource]) -> Iterator[None]:
    """While the block runs, sum what nobody has asked for yet. When it ends, nobody looks at the bytes any more."""
    count = min(_MOST_THREADS, cpus(), sum(source.size_bytes for source in sources) // _THREAD_BYTES)
    threads = [threading.Thread(target=_sum, args=(sources,), name="cloudckpt-sum", daemon=True) for _ in range(count)]
    started = []
    try:
        with contextlib.suppress(RuntimeError):  # no more threads in this process: whoever sends the bytes sums them
            for thread in threads:
                thread.start()
                started.append(thread)
        yield
    finally:
        for source in sources:
            source.asked_for()
        for thread in started:
            thread.join()


def _sum(sources: Sequence[PayloadSource]) -> None:
    with contextlib.suppress(Exception):  # whatever it is, whoever sends the bytes meets it again
        for source in sources:
            source.sum_ahead()
