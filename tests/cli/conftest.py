"""A run to look at, and a way to give commands to the very entry point."""

from __future__ import annotations

import json
import signal
import sys
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager
from cloudckpt.cli import app as commands


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A closed run: steps 1 to 4, best 2, tagged and pinned."""
    place = str(tmp_path_factory.mktemp("cli") / "run")
    with CheckpointManager(place, monitor="loss", mode="min", keep_best=1, keep_last=2) as ckpts:
        for step, loss in [(1, 0.9), (2, 0.1), (3, 0.5), (4, 0.4)]:
            ckpts.save(step, {"model": {"w": torch.full((9,), float(step))}}, metrics={"loss": loss, "acc": step / 10})
        ckpts.wait()
        ckpts.tag(2, "release")
        ckpts.pin(3)
    return place


class Result:
    """What a command printed and how it ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self) -> Any:
        """The one document on standard output."""
        return json.loads(self.out)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in this process, through the very entry point."""
    # Neither a run nor a width of the shell that started the tests: what a pipe gets is as wide as it needs to be.
    for name in ("CLOUDCKPT_ROOT", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["cloudckpt", *arguments])
        # A command sets its own signal handlers; the process is the test's.
        handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            with pytest.raises(SystemExit) as ended:
                commands.run()
        finally:
            for number, handler in handlers:
                signal.signal(number, handler)
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return run
