"""Signals as notices. A handler notes that it was called and passes the signal on; nothing else happens in one.

Whatever more a handler does may run in the middle of an optimizer's step, or wait for a lock that the interrupted
code holds. Python runs handlers in the main thread, and only there can they be set.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from cloudckpt.errors import ConfigError

__all__ = ["Handlers", "checked_signal"]

#: Given the signal's number and the moment, by ``time.monotonic``. Must not wait for anything.
Note = Callable[[int, float], None]


def checked_signal(name: object) -> signal.Signals:
    """A signal by its name or number.

    Raises:
        ConfigError: there is none, or it cannot be caught.
    """
    try:
        found = signal.Signals[name] if isinstance(name, str) else signal.Signals(int(str(name)))
    except (KeyError, ValueError):
        raise ConfigError(f'signals: {name!r} is no signal of this system; write names such as "SIGTERM"') from None
    if found.name in {"SIGKILL", "SIGSTOP"}:
        raise ConfigError(f"signals: nothing can catch {found.name}")
    return found


class _Handler:
    """One signal's handler, on top of the one that was there."""

    def __init__(self, number: signal.Signals, note: Note, previous: Any) -> None:
        self.number = number
        self.previous = previous
        self.closed = False
        self._note = note

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.closed:
            self._note(number, time.monotonic())
        below = self.below
        # Python's own handler of SIGINT is the default as well: it would end what was asked to go on to the next step.
        if callable(below) and below is not signal.default_int_handler:
            below(number, frame)
        elif self.closed and signal.getsignal(number) is self:
            # Closed in another thread, where no handler can be set: what was hidden comes back now.
            signal.signal(number, below)
            signal.raise_signal(number)

    @property
    def below(self) -> Any:
        """What is there without this one, and without others that were closed meanwhile."""
        found = self.previous
        while isinstance(found, _Handler) and found.closed:
            found = found.previous
        return signal.SIG_DFL if found is None else found  # None was not set from Python, and cannot come back


class Handlers:
    """Handlers of several signals, from ``install`` to ``remove``.

    Args:
        numbers: the signals.
        note: called in the handler.
    """

    def __init__(self, numbers: Iterable[signal.Signals], note: Note) -> None:
        self._numbers = tuple(numbers)
        self._note = note
        self._set: list[_Handler] = []

    def install(self) -> None:
        """Set them, each on top of the one that was there, which is still called.

        Raises:
            ConfigError: this is not the main thread.
        """
        if self._numbers and threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "signals can be watched from the main thread only: start the PreemptionGuard there, or pass signals=()"
            )
        for number in self._numbers:
            handler = _Handler(number, self._note, signal.getsignal(number))
            signal.signal(number, handler)
            self._set.append(handler)
        _OPEN.add(self)

    def remove(self) -> None:
        """Put back what was there before. A handler that somebody has set on top since then stays, and is served."""
        for handler in reversed(self._set):
            handler.closed = True
            now: object = signal.getsignal(handler.number)
            if now is handler:
                with contextlib.suppress(ValueError):  # another thread; see the handler
                    signal.signal(handler.number, handler.below)
        self._set.clear()


#: The handlers of this process, for its forked children: they are ended by the very signals that are notices here.
_OPEN: weakref.WeakSet[Handlers] = weakref.WeakSet()


def _remove_in_child() -> None:
    for handlers in [*_OPEN]:
        handlers.remove()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remove_in_child)
