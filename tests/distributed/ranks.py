"""Real processes with a real process group, driven by tests."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloudckpt.testing.servers import free_ports

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """What one rank answered.

    Attributes:
        value: what the scenario returned.
        error: kind, message, cause and traceback of what it raised.
        log: level and text of each line.
        gone: whether its process ended.
    """

    value: Any = None
    error: dict[str, Any] | None = None
    log: list[tuple[str, str]] = field(default_factory=list)
    gone: bool = False

    def lines(self, level: str) -> list[str]:
        """The log lines of a level."""
        return [text for name, text in self.log if name == level]


class Ranks:
    """So many processes, each a rank of one gloo process group on this machine."""

    def __init__(self, count: int, *, environment: dict[str, str] | None = None) -> None:
        self.count = count
        (port,) = free_ports(1)
        self.processes: list[subprocess.Popen[str]] = []
        self._answers: list[int] = []
        for rank in range(count):
            reading, writing = os.pipe()
            words = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "ANSWERS": str(writing),
                "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
                **(environment or {}),
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.rank"],
                stdin=subprocess.PIPE,
                text=True,
                env=words,
                cwd=_ROOT,
                pass_fds=[writing],
            )
            os.close(writing)
            self.processes.append(process)
            self._answers.append(reading)
        self._buffers = [b""] * count
        assert all(outcome.value is None and not outcome.gone for outcome in self._gather(120))

    def start(self, scenario: Callable[..., Any], words: dict[str, Any] | None = None) -> None:
        """Have every rank run a function of an importable module; its words and its answer go through JSON."""
        asked = {"module": scenario.__module__, "function": scenario.__qualname__, "words": words or {}}
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()

    def run(self, scenario: Callable[..., Any], *, timeout_s: float = 90, **words: Any) -> list[Outcome]:
        """Run it on every rank, and give what each answered."""
        self.start(scenario, words)
        return self.outcomes(timeout_s)

    def outcomes(self, timeout_s: float = 90) -> list[Outcome]:
        """What the ranks answer to what was started."""
        return self._gather(timeout_s)

    def outcomes_of(self, ranks: Sequence[int], timeout_s: float = 90) -> list[Outcome]:
        """What some of them answer; the others are not waited for."""
        return self._gather(timeout_s, ranks)

    def _gather(self, timeout_s: float, ranks: Sequence[int] | None = None) -> list[Outcome]:
        asked = range(self.count) if ranks is None else ranks
        end = time.monotonic() + timeout_s
        found: dict[int, Outcome] = {}
        with selectors.DefaultSelector() as selector:
            for rank in asked:
                selector.register(self._answers[rank], selectors.EVENT_READ, rank)
            while len(found) < len(asked):
                ready = selector.select(max(0.0, end - time.monotonic()))
                if not ready:
                    missing = [rank for rank in asked if rank not in found]
                    raise TimeoutError(f"ranks {missing} have not answered within {timeout_s} s")
                for key, _ in ready:
                    rank = key.data
                    came = os.read(self._answers[rank], 1 << 20)
                    self._buffers[rank] += came
                    line, newline, rest = self._buffers[rank].partition(b"\n")
                    if newline:
                        self._buffers[rank] = rest
                        said = json.loads(line)
                        found[rank] = Outcome(
                            said.get("value"), said.get("error"), [(a, b) for a, b in said.get("log", [])]
                        )
                    elif not came:
                        found[rank] = Outcome(gone=True)
                    else:
                        continue
                    selector.unregister(self._answers[rank])
        return [found[rank] for rank in asked]

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for answers in self._answers:
            os.close(answers)
