"""What was run, a line each: story, fault, backend, how many points, and how it ended.

With ``--record FILE`` the crash, power, fuzz and soak suites append a line of JSON for every case that they run, the
failed and the skipped ones included. ``tools/reliability.py`` makes the tables of ``docs/reliability.md`` from such
lines, and from nothing else. Several pytest workers may append to one file: a line is one write.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pytest

__all__ = ["HELD", "Case", "Recording"]

HELD, FAILED, SKIPPED = "held", "failed", "skipped"


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


@dataclass(slots=True, kw_only=True)
class Case:
    """One line.

    Attributes:
        story: what the program was doing.
        fault: what was done to it.
        backend: on which store.
        test: the test that ran it.
        points: in how many places, or how often.
        outcome: "held", "failed" or "skipped".
        note: why it was skipped, or what else is worth knowing.
        figures: numbers by name: kills by phase, bytes, requests.
        seconds: how long it took.
        where: on which machine.
    """

    story: str
    fault: str
    backend: str
    test: str = ""
    points: int = 0
    outcome: str = HELD
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    where: str = field(default_factory=_machine)


class Recording:
    """Appends cases to a file, if there is one.

    Args:
        path: the file; None writes nothing.
        test: the test that runs them.
    """

    def __init__(self, path: Path | None, test: str) -> None:
        self._path = path
        self._test = test

    @contextlib.contextmanager
    def __call__(self, story: str, fault: str, backend: str) -> Iterator[Case]:
        """Run a case in the block; how it ended is written down when it has."""
        case = Case(story=story, fault=fault, backend=backend, test=self._test)
        began = time.monotonic()
        try:
            yield case
        except pytest.skip.Exception as exc:
            case.outcome, case.note = SKIPPED, str(exc)
            raise
        except BaseException as exc:
            case.outcome, case.note = FAILED, f"{type(exc).__name__}: {exc}"[:300]
            raise
        finally:
            case.seconds = round(time.monotonic() - began, 3)
            self._append(case)

    def _append(self, case: Case) -> None:
        if self._path is None:
            return
        line = json.dumps(asdict(case), sort_keys=True).encode() + b"\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
