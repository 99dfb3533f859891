"""plot, watch, cost; and what notebooks show."""

from __future__ import annotations

import io
import itertools
import json
import re
import select
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError
from cloudckpt.cli.picturing import follow, screen
from cloudckpt.cli.pipes import wait_for_reader
from cloudckpt.cli.schema import SCHEMAS
from cloudckpt.core import manifest as transitions
from cloudckpt.core.model import Checkpoint, JournalEvent, State
from cloudckpt.costing import cost_of_run
from cloudckpt.errors import StorageError
from cloudckpt.plotting import plot_of
from cloudckpt.storage import ManifestStore, MemoryStorage
from cloudckpt.testing.builders import at
from cloudckpt.tools import open_store
from tests.cli.documents import wrong


def test_what_is_drawn(root: str) -> None:
    """Each checkpoint at its step with what became of it: best, pinned, saved; deleted ones are told by the journal."""
    plot = plot_of(cloudckpt.open(root))
    assert plot.metric == "loss"
    assert {p.step: (p.value, p.kind) for p in plot.points} == {
        1: (None, "deleted"),
        2: (0.1, "best"),
        3: (0.5, "pinned"),
        4: (0.4, "saved"),
    }


def test_failed_ones_are_marked_and_a_metric_must_be_told_where_there_are_several(tmp_path: Path) -> None:
    """Marked ones count as failed; without a monitor the one metric there is, or a question."""
    storage = MemoryStorage()
    with CheckpointManager(storage, keep_last=None) as ckpts:
        ckpts.save(1, {"w": torch.zeros(1)}, metrics={"loss": 1.0}, block=True)
        ckpts.mark(1, "diverged")
    assert [p.kind for p in plot_of(cloudckpt.open(storage)).points] == ["failed"]
    with CheckpointManager(storage) as ckpts:
        ckpts.save(2, {"w": torch.zeros(1)}, metrics={"loss": 2.0, "acc": 0.5}, block=True)
    with pytest.raises(ConfigError, match="say which of acc, loss to draw"):
        plot_of(cloudckpt.open(storage))
    with pytest.raises(cloudckpt.CheckpointNotFoundError, match="the metrics there are: acc, loss"):
        plot_of(cloudckpt.open(storage), "bleu")


@pytest.mark.parametrize("saves", [0, 2])
def test_a_save_whose_process_ended_is_marked_as_failed(saves: int) -> None:
    """What a later writer gave up, while its entry is there and after that is gone; until then it is on its way."""
    storage = MemoryStorage()
    with CheckpointManager(storage, keep_last=None) as ckpts:
        ckpts.save(1, {"w": torch.zeros(1)}, metrics={"loss": 1.0}, block=True)
    store = ManifestStore(storage)
    entry = Checkpoint(
        id=store.token(8), step=2, seq=0, state=State.PENDING, writer_epoch=1, announced_at=store.clock()
    )
    store.transact(
        lambda m, _: transitions.announce(m, entry, writer_epoch=1, settlements={}, gone=(), at=store.clock()),
        prepare=lambda _: None,
    )
    kinds = {p.step: p.kind for p in plot_of(cloudckpt.open(storage), "loss").points}
    assert (kinds[1], kinds[2]) == ("saved", "uploading")
    with CheckpointManager(storage) as ckpts:
        ckpts.restore({"w": torch.zeros(1)})
        for step in range(3, 3 + saves):
            ckpts.save(step, {"w": torch.zeros(1)}, metrics={"loss": 2.0}, block=True)
    kinds = {p.step: p.kind for p in plot_of(cloudckpt.open(storage), "loss").points}
    assert (kinds[1], kinds[2]) == ("saved", "failed")


def test_plot_in_the_terminal(cli: Any, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture in characters, within the terminal's width, plain where there is no colour."""
    monkeypatch.setenv("COLUMNS", "60")
    result = cli("plot", root)
    assert result.code == 0
    assert "loss of" in result.out
    assert "\x1b" not in result.out
    assert "without a value: 1 (deleted)" in result.out
    assert cli("plot", root, "--metric", "nope").code == 4


@pytest.mark.parametrize(
    ("terminal", "escapes"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, {"38;2", "38;5"}),
        ({"TERM": "xterm-256color", "COLORTERM": ""}, {"38;5"}),
        ({"TERM": "linux", "COLORTERM": ""}, {"38;5"}),
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor", "NO_COLOR": "1"}, set()),
    ],
    ids=["24 bits", "256", "16", "none"],
)
def test_plot_uses_the_colours_that_the_terminal_has(
    cli: Any, root: str, monkeypatch: pytest.MonkeyPatch, terminal: dict[str, str], escapes: set[str]
) -> None:
    """24-bit colours only where the terminal says that it has them; otherwise those of its palette."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {**terminal, "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    result = cli("plot", root)
    assert {found[:4] for found in re.findall(r"\x1b\[(\d[\d;]+)m", result.out)} == escapes


@pytest.mark.parametrize("suffix", ["svg", "png", "html"])
def test_plot_into_a_file(cli: Any, root: str, tmp_path: Path, suffix: str) -> None:
    """The file is what its name says; -o prints its path; another suffix is exit 2."""
    path = tmp_path / f"loss.{suffix}"
    assert cli("plot", root, "-o", str(path)).out == f"{path}\n"
    body = path.read_bytes()
    if suffix == "png":
        assert body.startswith(b"\x89PNG")
    elif suffix == "svg":
        assert ET.fromstring(body).tag.endswith("svg")
    else:
        text = body.decode()
        assert "<svg" in text
        assert "<td>best</td>" in text
        assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
            "http://creativecommons.org", ""
        ).replace("https://matplotlib.org", "")
    assert cli("plot", root, "-o", str(tmp_path / "x.gif")).code == 2


def test_plot_without_its_library_says_what_to_install(cli: Any, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither picture library is a must: exit 2 and the pip command."""
    monkeypatch.setitem(sys.modules, "plotext", None)
    result = cli("plot", root)
    assert result.code == 2
    assert 'pip install "cloudckpt[plot]"' in result.err


def test_watch_in_a_pipe_tells_each_event_once() -> None:
    """What is new is a line; what was told is not told again; a repaired run goes on."""
    storage = MemoryStorage()
    store = ManifestStore(storage)
    ckpts = CheckpointManager(storage)
    ckpts.save(1, {"w": torch.zeros(1)}, block=True)
    lines: list[JournalEvent | StorageError] = []
    looks: list[int] = []

    def wait(seconds: float) -> None:
        assert seconds == 5
        looks.append(len(lines))
        if len(looks) == 1:
            ckpts.save(2, {"w": torch.zeros(1)}, block=True)

    follow(store, lines.append, every_s=5, count=3, wait=wait)
    ckpts.close()
    told = [line.event for line in lines if isinstance(line, JournalEvent)]
    assert len(told) == len(lines)
    assert told == ["claim", "announce", "commit", "announce", "commit"]
    assert looks[0] == 3
    assert looks[1] > looks[0]
    assert looks[1] == len(lines)


def test_watch_waits_for_a_run_that_has_not_begun() -> None:
    """Started before the training, it tells the first event when it comes."""
    storage = MemoryStorage()
    lines: list[JournalEvent | StorageError] = []

    def wait(_: float) -> None:
        assert lines == []
        with CheckpointManager(storage) as ckpts:
            ckpts.save(1, {"w": torch.zeros(1)}, block=True)

    assert "nothing was saved there yet" in str(screen(ManifestStore(storage)))
    follow(ManifestStore(storage), lines.append, every_s=1, count=2, wait=wait)
    assert isinstance(lines[0], JournalEvent)
    assert lines[0].event == "claim"


@pytest.mark.parametrize("how", ["--json", "-q"])
def test_watch_for_a_program(how: str, tmp_path: Path) -> None:
    """``--json`` and ``-q`` give a line for each event as it comes, while the run goes on, and a store in trouble is no event."""
    root = tmp_path / "run"
    with CheckpointManager(root) as ckpts:
        ckpts.save(1, {"w": torch.zeros(1)}, block=True)
        with subprocess.Popen(
            [sys.executable, "-m", "cloudckpt", "watch", str(root), "--every", "0.2", how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as watching:
            assert watching.stdout is not None
            assert watching.stderr is not None
            lines = [watching.stdout.readline() for _ in range(3)]
            ckpts.save(2, {"w": torch.zeros(1)}, block=True)  # when what was before has been told, through the pipe
            lines += [watching.stdout.readline() for _ in range(2)]
            manifest = root / "manifest.json"
            manifest.rename(kept := root.parent / "kept")
            manifest.symlink_to("manifest.json")  # a disk that refuses: it goes around in circles
            problem = (watching.stdout if how == "--json" else watching.stderr).readline()
            manifest.unlink()
            kept.rename(manifest)
            watching.send_signal(signal.SIGINT)
            watching.communicate(timeout=60)
            assert watching.returncode == 130
    if how == "--json":
        documents = [json.loads(line) for line in (*lines, problem)]
        assert [error for d in documents for error in wrong(d, SCHEMAS["watch"], "watch")] == []
        assert [d["event"]["event"] for d in documents[:-1]] == ["claim", "announce", "commit", "announce", "commit"]
        assert [d["event"]["step"] for d in documents[1:-1]] == [1, 1, 2, 2]
        assert {d["root"] for d in documents} == {str(root)}
        assert documents[-1]["event"] is None
        problem = documents[-1]["problem"]
    else:
        assert [line.split()[0] for line in lines] == ["claim", "announce", "commit", "announce", "commit"]
    assert "manifest.json" in problem


def test_watch_on_a_terminal_shows_uploads_and_events(root: str) -> None:
    """One screen: the run, its writer, the table, and what happened last; a store in trouble is shown as such."""
    console = Console(width=1000, file=io.StringIO(), record=True)
    console.print(screen(open_store(root)))
    text = console.export_text()
    assert f"{root}  revision" in text
    assert "best #1" in text
    assert "close" in text


def test_watch_as_a_command(root: str) -> None:
    """--count ends it by itself; in a pipe it prints lines."""
    done = subprocess.run(
        [sys.executable, "-m", "cloudckpt", "watch", root, "--count", "1"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "claim" in done.stdout


@pytest.mark.parametrize("every", ["nan", "inf", "1e10", "-1"])
def test_watch_takes_no_pause_that_never_ends(cli: Any, root: str, every: str) -> None:
    """What is no number, or longer than a day, is usage."""
    result = cli("watch", root, f"--every={every}", "-n", "2")
    assert result.code == 2
    assert "--every" in result.err


@pytest.mark.parametrize("how", [["--json"], ["-q"], []], ids="".join)
def test_watch_ends_when_its_reader_leaves_a_quiet_run(root: str, how: list[str]) -> None:
    """``cloudckpt watch --json | head -1``: in the middle of a long pause, and no event comes any more."""
    with subprocess.Popen(
        [sys.executable, "-m", "cloudckpt", "watch", root, "--every", "3600", *how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stderr is not None
        for _ in cloudckpt.open(root).journal():
            assert watching.stdout.readline()
        watching.stdout.close()
        try:
            assert watching.wait(60) == 0
        finally:
            watching.kill()
        assert watching.stderr.read() == b""


@pytest.mark.parametrize("where", ["no descriptor", "a file", "no poll"])
def test_watch_waits_where_nobody_can_tell_of_a_reader(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause is as long as it should be, whatever standard output is."""
    if where == "no poll":
        monkeypatch.delattr(select, "poll")
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", io.StringIO() if where == "no descriptor" else file)
        begin = time.monotonic()
        wait_for_reader(0.05)
        assert time.monotonic() - begin >= 0.05
        monkeypatch.undo()


def test_cost_by_the_run_s_own_numbers(cli: Any, root: str) -> None:
    """Requests and bytes of a save and of a month; money only at the prices given."""
    free = cli("cost", root, "--every", "1800")
    assert "one save" in free.out
    assert "1460 saves" in free.out
    assert "give --price-put" in free.out
    document = cli("cost", root, "--every", "1800", "--price-put", "0.005", "--price-gib-month", "0.02", "--json").json
    costs = document["found"]["costs"]
    # One payload object, its index, two writes of the manifest.
    assert costs["requests"] == {"payload": 1, "index": 1, "manifest": 2, "deletes": 2}
    assert document["total"] == pytest.approx(1460 * 4 * 0.005 / 1000, rel=1e-3)
    assert cli("cost", root, "--every", "0").code == 2


def test_the_journal_tells_how_often_a_run_saves() -> None:
    """The median gap between announces; a run that has saved once cannot tell."""
    storage = MemoryStorage()
    minutes = itertools.count()
    with CheckpointManager(storage) as ckpts:
        ckpts._store.clock = lambda: at(next(minutes))
        ckpts.save(1, {"w": torch.zeros(1)}, block=True)
        with pytest.raises(ConfigError, match="how often it saves"):
            cost_of_run(ManifestStore(storage))
        ckpts.save(2, {"w": torch.zeros(1)}, block=True)
    found = cost_of_run(ManifestStore(storage))
    assert found.every_from == "journal"
    assert found.save_every_s % 60 == 0


def test_notebooks_show_runs_checkpoints_and_plans(root: str, tmp_path: Path) -> None:
    """Each object has an HTML form; a root without a run says so."""
    run = cloudckpt.open(root)
    assert "<svg" in run._repr_html_()
    assert "best #1" in run._repr_html_()
    assert "best #1" in run.select("best")._repr_html_()
    assert "keep" in run.plan()._repr_html_()
    assert "nothing was ever saved" in cloudckpt.open(tmp_path / "new")._repr_html_()
    (tmp_path / "manifest.json").write_text("{")
    assert "manifest.json" in cloudckpt.open(tmp_path)._repr_html_()


def test_to_pandas(root: str) -> None:
    """One row for each checkpoint, one column for each metric, times in UTC."""
    frame = cloudckpt.open(root).to_pandas()
    assert [*frame["step"]] == [2, 3, 4]
    assert [*frame["metrics.loss"]] == [0.1, 0.5, 0.4]
    assert str(frame["committed_at"].dtype).endswith("UTC]")
    assert json.loads(frame[["step", "kept_because"]].to_json(orient="records"))[0]["kept_because"] == ["best #1"]
