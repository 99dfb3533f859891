"""What a listing looks like in a terminal of any width: all of it is there."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from cloudckpt.cli.render import checkpoints_table, runs_table
from cloudckpt.core.model import Checkpoint, State
from cloudckpt.core.text import format_metric
from cloudckpt.listing import RunSummary

METRICS = {
    "val_loss": 0.123456,
    "eval_samples_per_second_of_the_whole_set": 1234.5,
    "[/b]": -1e-9,
    "損失": float("nan"),
}
SHOWN = [f"{name} {format_metric(value)}" for name, value in METRICS.items()]


def checkpoint(**words: Any) -> Checkpoint:
    """One with much to say."""
    plain = Checkpoint(
        id="0a1b2c3d",
        step=123_456_789,
        seq=7,
        state=State.COMMITTED,
        writer_epoch=1,
        announced_at="2026-01-01T00:00:00Z",
        committed_at="2026-01-01T00:00:01Z",
        metrics=METRICS,
        size_bytes=15 * 2**30,
        tags=("a-release-whose-name-is-longer-than-a-line-has-room-for", "v1"),
        kept_because=("best #1", "last #2", "pinned"),
    )
    return replace(plain, **words)


def drawn(what: object, width: int) -> list[str]:
    """The lines on a terminal of that width."""
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=True, color_system=None, highlight=False).print(what)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def everything(lines: list[str]) -> str:
    """All characters, wherever the lines were broken."""
    return "".join("".join(lines).split())


@pytest.mark.parametrize("width", [4, 12, 20, 40, 60, 80, 120])
def test_nothing_is_cut_in_a_narrow_terminal(width: int) -> None:
    """No line is wider than the terminal, but for characters of two columns, and every value is in full."""
    lines = drawn(checkpoints_table([checkpoint(), checkpoint(seq=8, step=8, metrics={})]), width)
    assert max(map(len, lines)) <= width
    text = everything(lines)
    for part in (
        *("STEP 123456789", "SIZE 15.0 GiB", "KEPT BECAUSE best #1, last #2, pinned"),
        *("STATE committed, tag:a-release-whose-name-is-longer-than-a-line-has-room-for, tag:v1", "STEP 8"),
        *SHOWN,
    ):
        assert "".join(part.split()) in text, part
    assert "…" not in text


def test_a_table_where_there_is_room() -> None:
    """Headings once, a line for each; words fold before a table is given up."""
    rows = [checkpoint(metrics={"val_loss": 0.5}, tags=()), checkpoint(seq=8, metrics={"val_loss": 0.25}, tags=())]
    wide = drawn(checkpoints_table(rows), 100)
    assert wide[0].split() == ["STEP", "AGE", "SIZE", "val_loss", "KEPT", "BECAUSE", "STATE"]
    assert [re.findall(r"0\.\d+", line) for line in wide[1:]] == [["0.2500"], ["0.5000"]]
    folded = drawn(checkpoints_table(rows), 66)
    assert folded[0].split() == wide[0].split()
    assert len(folded) == 5
    assert "bestpinned" not in everything(folded)
    assert drawn(checkpoints_table([]), 40) == ["STEP  AGE  SIZE  KEPT BECAUSE  STATE"]


def test_runs_in_a_narrow_terminal() -> None:
    """The same for the runs below a prefix."""
    run = RunSummary(
        name="team/experiments/with-a-long-name/and-a-seed-of-12345",
        url="s3://bucket/x",
        checkpoints=12,
        size_bytes=3 * 2**40,
        latest=checkpoint(),
        best=checkpoint(),
        metric="eval_samples_per_second",
        best_value=0.125,
        uploading=1,
        closed=False,
    )
    lines = drawn(runs_table([run]), 40)
    assert max(map(len, lines)) <= 40
    text = everything(lines)
    for part in (
        *("RUN team/experiments/with-a-long-name/and-a-seed-of-12345", "CHECKPOINTS 12", "SIZE 3.0 TiB"),
        *("LATEST 123456789", "BEST 123456789 (eval_samples_per_second=0.1250)", "STATE 1 uploading, open"),
    ):
        assert "".join(part.split()) in text, part
