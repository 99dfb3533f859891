"""Looking for notices beside the training: one thread for each thing that is watched."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["Asked", "FileThere", "Sighting", "Watch", "Watcher"]

#: A thread that is told to end looks up from a request at once; one in a caller's own function may not.
_END_S = 2.0
#: Past this a reason says nothing new, and it goes to every rank and into the log.
_LONGEST = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A notice that was found.

    Attributes:
        reason: what it says, for people.
        notice_s: how long there is from now on, in seconds; None if nobody knows.
    """

    reason: str
    notice_s: float | None


class Watch(Protocol):
    """Something to look at."""

    @property
    def name(self) -> str:
        """What it is, for people."""
        ...

    @property
    def every_s(self) -> float:
        """How long to pause between two looks, in seconds."""
        ...

    def look(self) -> Sequence[Sighting]:
        """What has come since the last look. May wait for it, until ``close``.

        Raises:
            Exception: it cannot be seen; told once, and tried again.
        """
        ...

    def close(self) -> None:
        """Break off a look that waits, in another thread."""
        ...


class FileThere:
    """A file that somebody makes: an administrator, a scheduler's epilogue, a sidecar.

    Args:
        path: the file; its first line, if it has one, is the reason.
        notice_s: how long there is from then on.
        every_s: how often to look.
    """

    def __init__(self, path: Path, *, notice_s: float, every_s: float) -> None:
        self.name = f"the file {path}"
        self.every_s = every_s
        self._path = path
        self._notice_s = notice_s
        self._seen = False

    def look(self) -> Sequence[Sighting]:
        """See ``Watch``."""
        if self._seen:
            return ()
        try:
            with self._path.open(encoding="utf-8", errors="replace") as file:
                said = file.readline(_LONGEST).strip()
        except FileNotFoundError:
            return ()
        self._seen = True
        return (Sighting(reason=f"{self._path} is there{': ' if said else ''}{said}", notice_s=self._notice_s),)

    def close(self) -> None:
        """See ``Watch``."""


class Asked:
    """A function of the caller's.

    Args:
        function: asked again and again, in a thread of its own, until what it gives is true; a text is the reason.
        notice_s: how long there is from then on.
        every_s: how often to ask.
    """

    def __init__(self, function: Callable[[], object], *, notice_s: float, every_s: float) -> None:
        self._called = getattr(function, "__qualname__", repr(function))
        self.name = f"{self._called}()"
        self.every_s = every_s
        self._function = function
        self._notice_s = notice_s
        self._seen = False

    def look(self) -> Sequence[Sighting]:
        """See ``Watch``."""
        if self._seen or not (said := self._function()):
            return ()
        self._seen = True
        reason = said[:_LONGEST] if isinstance(said, str) else f"{self.name} says so"
        return (Sighting(reason=reason, notice_s=self._notice_s),)

    def close(self) -> None:
        """See ``Watch``."""


class Watcher:
    """Looks at one thing in a thread of its own, until it is closed.

    Args:
        watch: what to look at.
        tell: given each sighting.
        warn: given what keeps it from seeing anything, once until it has seen again.
    """

    def __init__(self, watch: Watch, tell: Callable[[Sighting], None], warn: Callable[[str], None]) -> None:
        self._watch = watch
        self._tell = tell
        self._warn = warn
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cloudckpt-notices", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._end.set()
        self._watch.close()
        if self._thread is not threading.current_thread():
            self._thread.join(_END_S)

    def _run(self) -> None:
        blind = False
        while not self._end.is_set():
            try:
                found = self._watch.look()
            except Exception as exc:  # noqa: BLE001 - training goes on without this source, and is told so once
                if not blind and not self._end.is_set():
                    self._warn(
                        f"{self._watch.name} cannot be looked at ({exc}): no notice will be seen there until it can"
                    )
                blind = True
            else:
                blind = False
                for sighting in found:
                    self._tell(sighting)
            self._end.wait(self._watch.every_s)
