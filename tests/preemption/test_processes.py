"""Real signals in real processes: the training process, its children, its data loader's workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cloudckpt

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs the signals of Linux"),
]
ROOT = Path(__file__).parents[2]


class Program:
    """A function of ``programs`` in a process and a session of its own."""

    def __init__(self, name: str, **words: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.preemption.programs", name, json.dumps(words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def hears(self, key: str) -> Any:
        """The value of the next line that has this key."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if key in said:
                return said[key]
        raise AssertionError(f"it ended without {key}: {self.process.communicate()}")

    def end(self) -> tuple[int, str]:
        """Its exit code and what it wrote to its standard error, once it has ended."""
        _, err = self.process.communicate(timeout=120)
        return self.process.returncode, err

    def close(self) -> None:
        """End it and all of its children, if it still is there."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """Starts programs, and ends them after the test."""
    made: list[Program] = []

    def begin(name: str, **words: Any) -> Program:
        made.append(Program(name, **words))
        return made[-1]

    yield begin
    for program in made:
        program.close()


def test_sigterm_ends_a_training_after_its_step_and_loses_none(start: Callable[..., Program], tmp_path: Path) -> None:
    """It ends by itself with exit code 0, and the next one goes on with the next step."""
    words: dict[str, Any] = {"root": str(tmp_path / "run"), "signals": {"SIGTERM": 100}}
    program = start("train", **words)
    assert program.hears("first") == 0
    saved = program.hears("saved")
    program.process.terminate()
    stopped = program.hears("stopped")
    assert stopped > saved
    assert program.end()[0] == 0
    newest = cloudckpt.open(words["root"]).latest()
    assert newest is not None
    assert newest.step == stopped
    again = start("train", **words)
    assert again.hears("first") == stopped + 1
    again.process.terminate()
    assert again.hears("reason") == "SIGTERM"
    assert again.end()[0] == 0


def test_the_exit_code_says_that_it_stopped(start: Callable[..., Program], tmp_path: Path) -> None:
    """A training that ends with ``guard.exit_code`` ends with 143 once it was told to stop, and its save is there."""
    program = start("train", root=str(tmp_path / "run"), signals={"SIGTERM": 100}, tell=True)
    program.hears("saved")
    program.process.terminate()
    stopped = program.hears("stopped")
    assert program.end()[0] == 143
    newest = cloudckpt.open(tmp_path / "run").latest()
    assert newest is not None
    assert newest.step == stopped


def test_a_second_signal_does_not_end_it_sooner(start: Callable[..., Program], tmp_path: Path) -> None:
    """An impatient scheduler: whatever comes while the last save is made, it is made."""
    program = start("train", root=str(tmp_path / "run"), signals={"SIGTERM": 100, "SIGUSR1": 100})
    program.hears("saved")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        program.process.send_signal(number)
    stopped = program.hears("stopped")
    assert program.end()[0] in {0, -signal.SIGTERM, -signal.SIGUSR1}  # the guard may be closed when the last one comes
    newest = cloudckpt.open(tmp_path / "run").latest()
    assert newest is not None
    assert newest.step == stopped


def test_a_forked_child_is_ended_by_signals_as_ever(start: Callable[..., Program]) -> None:
    """It has the handlers that were there before the guard, and is told to ask elsewhere; its parent notices nothing."""
    program = start("fork")
    child = program.hears("default")
    assert child is True
    assert program.hears("parent") is True
    assert program.end()[0] == 0


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_a_shielded_child_ends_by_its_parents_word_only(start: Callable[..., Program], context: str) -> None:
    """Signals of others pass it by; ``terminate()`` ends it, however it was started."""
    program = start("shield", context=context)
    assert program.hears("exit") == 0
    assert program.end()[0] == 0


@pytest.mark.parametrize(
    ("context", "number"),
    [
        ("fork", signal.SIGTERM),
        pytest.param("spawn", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("fork", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_data_loader_workers_live_through_a_signal_to_all(
    start: Callable[..., Program], tmp_path: Path, context: str, number: signal.Signals
) -> None:
    """Torchrun and Slurm signal the whole process group: shielded workers load on until the last save is made."""
    program = start("load", root=str(tmp_path / "run"), context=context, shielded=True)
    program.hears("step")
    os.killpg(program.process.pid, number)
    stopped = program.hears("stopped")
    code, err = program.end()
    assert code == 0, err
    newest = cloudckpt.open(tmp_path / "run").latest()
    assert newest is not None
    assert newest.step == stopped


@pytest.mark.slow
def test_without_the_shield_the_last_save_is_lost(start: Callable[..., Program], tmp_path: Path) -> None:
    """What the shield is for: the workers die first, and torch raises in the training process."""
    program = start("load", root=str(tmp_path / "run"), context="fork", shielded=False)
    program.hears("step")
    os.killpg(program.process.pid, signal.SIGTERM)
    code, err = program.end()
    assert code == 1
    assert "torch/utils/data/dataloader.py" in err  # it says which worker died, or that a connection to one was reset
    assert cloudckpt.open(tmp_path / "run").latest() is None


def test_the_example_runs_to_its_end_and_goes_on(tmp_path: Path) -> None:
    """On one process, with workers; a second start with more steps resumes from the first."""
    for steps in (20, 40):
        words = ["--root", str(tmp_path / "run"), "--steps", str(steps), "--save-every", "10", "--workers", "1"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "examples" / "spot_train.py"), *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        newest = cloudckpt.open(tmp_path / "run").latest()
        assert newest is not None
        assert newest.step == steps - 1
    assert "resumed from" in done.stdout
