"""The reader of a pipe may leave at any moment: ``cloudckpt log | head -1`` is no failure."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterable, Iterator
from typing import IO, Any, cast

__all__ = ["readers_may_leave", "wait_for_reader"]


class _Pipe:
    """A standard stream whose reader may leave.

    rich, click and typer each have words of their own for a closed pipe, all with exit code 1: they never hear of one.

    Args:
        stream: the stream.
        ends: whether nothing is left to do once nobody reads it.
    """

    def __init__(self, stream: IO[str], *, ends: bool) -> None:
        self._stream = stream
        self._ends = ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._read_or_not():
            return self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._read_or_not():
            self._stream.flush()

    @contextlib.contextmanager
    def _read_or_not(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # What lies in the stream's buffer is written again at exit, where Python would complain.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            if self._ends:
                raise SystemExit(0) from None


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Within it, a command ends with code 0 when nobody reads its output; messages that nobody reads go nowhere.

    So a failure keeps its code, whoever hears of it.
    """
    before = sys.stdout, sys.stderr
    # None: the process was started without it.
    if sys.stdout is not None:
        sys.stdout = cast("Any", _Pipe(sys.stdout, ends=True))
    if sys.stderr is not None:
        sys.stderr = cast("Any", _Pipe(sys.stderr, ends=False))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def wait_for_reader(seconds: float) -> None:
    """Wait so long; end with code 0, as a write would, once nobody reads standard output any more.

    Where the platform cannot tell, this sleeps.
    """
    until = time.monotonic() + seconds
    if hasattr(select, "poll"):
        with contextlib.suppress(OSError, ValueError):  # an output without a descriptor
            poll = select.poll()
            poll.register(sys.stdout.fileno(), 0)  # errors are told unasked
            if any(said & (select.POLLERR | select.POLLHUP) for _, said in poll.poll(seconds * 1000)):
                raise SystemExit(0)
    time.sleep(max(0.0, until - time.monotonic()))
