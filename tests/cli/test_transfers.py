"""What the command line says while bytes move, and while none do. The clock is the test's; nobody sleeps."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager
from cloudckpt.cli import moving, transfers
from cloudckpt.config import Settings
from cloudckpt.events import Listener
from cloudckpt.progress import Meter, Watch
from cloudckpt.storage import ManifestStore, MemoryStorage
from cloudckpt.storage.urls import open_store

MINUTE = 60


class Looks:
    """In place of the thread that looks every second: the test looks, as often as its clock goes on."""

    def __init__(self) -> None:
        self.at = 1000.0
        self.watch: Watch | None = None

    def now(self) -> float:
        """The clock."""
        return self.at

    @contextlib.contextmanager
    def watched(self, meter: Meter, listener: Listener, settings: Settings) -> Iterator[None]:
        """See ``progress.watched``."""
        self.watch = Watch(
            meter,
            listener,
            every_s=settings.progress_every_s,
            stall_after_s=settings.stall_after_s,
            now=self.now,
        )
        try:
            yield
        finally:
            self.watch = None

    def shown(self, what: str, *, quiet: bool) -> contextlib.AbstractContextManager[Meter]:
        """See ``transfers.shown``, by this clock."""
        return transfers.shown(what, quiet=quiet, now=self.now)

    def go_on(self, seconds: int, meter: Meter | None = None) -> None:
        """So many seconds go by; in each of them a byte is told to the meter, if there is one."""
        for _ in range(seconds):
            self.at += 1
            if meter is not None:
                meter.advance(1)
            if self.watch is not None:
                self.watch.look()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    """The clock, in place of the thread and of time."""
    found = Looks()
    monkeypatch.setattr(transfers, "watched", found.watched)
    monkeypatch.setattr(moving, "shown", found.shown)
    for name in ("CLOUDCKPT_PROGRESS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_a_line_a_minute_without_a_terminal(looks: Looks, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error, with bytes, share, rate and what is left; nothing of what takes less than a minute."""
    with looks.shown("pulling best", quiet=False) as meter:
        meter.expect_further(1000)
        looks.go_on(MINUTE - 1, meter)
        assert capsys.readouterr() == ("", "")
        looks.go_on(MINUTE * 2 + 1, meter)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "pulling best: 60 B of 1000 B (6 %), 1 B/s, 16 min left",
        "pulling best: 120 B of 1000 B (12 %), 1 B/s, 15 min left",
        "pulling best: 180 B of 1000 B (18 %), 1 B/s, 14 min left",
    ]


def test_what_stalls_is_named_once(looks: Looks, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning after a minute without a byte: the objects under way, or how many more there are."""
    with looks.shown("pulling best", quiet=False) as meter, contextlib.ExitStack() as stack:
        looks.go_on(10, meter)
        stack.enter_context(meter.carrying("checkpoint-2.0a1b2c3d/model-a"))
        looks.go_on(MINUTE * 5)
        assert capsys.readouterr().err.splitlines()[1:] == [
            "pulling best: nothing has moved for 60.0 s; under way: checkpoint-2.0a1b2c3d/model-a"
        ]
        meter.advance(1)
        for name in "bcde":
            stack.enter_context(meter.carrying(name))
        looks.go_on(MINUTE)
        assert capsys.readouterr().err.endswith("; under way: checkpoint-2.0a1b2c3d/model-a, b, c and 2 more\n")
    with looks.shown("copying best", quiet=False):
        looks.go_on(MINUTE)
    assert capsys.readouterr().err == "copying best: nothing has moved for 60.0 s\n"


def test_a_bar_on_a_terminal(looks: Looks, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows bytes done of all and goes away at the end; no line a minute beside it, but the warning of a stall."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with looks.shown("pulling best", quiet=False) as meter:
        meter.expect_further(2 * 2**20)
        meter.advance(2**20)
        looks.go_on(MINUTE * 3, meter)
        with meter.carrying("model-a"):
            looks.go_on(MINUTE)
    out, err = capsys.readouterr()
    assert out == ""
    assert "pulling best" in err
    assert "1.0/2.0 MiB" in err
    assert "\x1b[?25l" in err, "the cursor is hidden, as for a bar"
    assert " left" not in err
    assert "nothing has moved for 60.0 s; under way: model-a" in err


@pytest.mark.parametrize("how", ["quiet", "environment"])
@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_silent(
    looks: Looks, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, how: str, terminal: bool
) -> None:
    """Neither bar nor line nor warning, however long it takes."""
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    if how == "environment":
        monkeypatch.setenv("CLOUDCKPT_PROGRESS", "0")
    with looks.shown("pulling best", quiet=how == "quiet") as meter, meter.carrying("model-a"):
        looks.go_on(MINUTE * 3, meter)
        looks.go_on(MINUTE * 3)
        assert looks.watch is None, "nobody looks"
    assert capsys.readouterr() == ("", "")


class Stalls(MemoryStorage):
    """Each read of payload takes five minutes, in which nothing moves."""

    def __init__(self, looks: Looks) -> None:
        super().__init__()
        self._looks = looks

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        if "-of-" in key:
            self._looks.go_on(MINUTE * 5)
        super().read_into(key, start, *targets)


@pytest.fixture
def stalling(looks: Looks, monkeypatch: pytest.MonkeyPatch) -> Stalls:
    """A run whose commands find it under the name ``slow``."""
    storage = Stalls(looks)
    with CheckpointManager(storage) as ckpts:
        ckpts.save(7, {"model": {"w": torch.ones(9)}}, block=True)
    monkeypatch.setattr(moving, "store_at", lambda root: ManifestStore(storage) if root == "slow" else open_store(root))
    return storage


COMMANDS = {
    "pull": ["pull", "7", "pulled"],
    "cp": ["cp", "7", "copied"],
    **{
        f"export to {form}": ["export", "7", "exported", "--to", form] for form in ("safetensors", "torch", "hf", "dcp")
    },
}


@pytest.mark.usefixtures("stalling")
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_transfer_names_the_object_that_keeps_it_waiting(
    cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: Sequence[str]
) -> None:
    """Pull, copy and each export; with -q and --json they say nothing beside their answer."""
    monkeypatch.chdir(tmp_path)
    said = cli(*words, "-r", "slow")
    assert said.code == 0
    assert "nothing has moved for 60.0 s; under way: " in said.err
    assert "model-00000-of-00001.safetensors" in said.err
    for option in ("-q", "--json"):
        for made in ("pulled", "copied", "exported"):
            shutil.rmtree(made, ignore_errors=True)
            Path(made).unlink(missing_ok=True)
        silent = cli(*words, "-r", "slow", option)
        assert (silent.code, silent.err) == (0, "")
