"""States, the meter, and the runner with real cases in real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases.floors import joined, split
from benchmarks.meter import Meter, memory_bytes
from benchmarks.plans import Plan
from benchmarks.runner import Results, run
from benchmarks.state import expected_bytes, make_state, size_bytes, tensors, view

MIB = 1 << 20


def test_states_are_the_same_every_time_and_never_all_zeros() -> None:
    """Two makings of a state are equal, so a load can be checked against one; no tensor of it is zeros."""
    first, second = tensors(make_state("tiny")), tensors(make_state("tiny"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(tensor.any() for tensor in first.values())
    assert not any(tensor.any() for tensor in tensors(make_state("tiny", empty=True)).values())


def test_sizes_are_what_their_names_say() -> None:
    """bytes-N has N MiB; tensors-N has N tensors of 1 to 64 KiB, and flat-N the same bytes in large ones."""
    assert size_bytes(make_state("bytes-10")) == 10 * MIB
    many, flat = make_state("tensors-1000"), make_state("flat-1000")
    lengths = [view(tensor).nbytes for tensor in tensors(many).values()]
    assert len(lengths) == 1000
    assert 1020 <= min(lengths) <= max(lengths) <= 65536
    assert size_bytes(flat) == sum(lengths)
    assert len(tensors(flat)) == 1
    with pytest.raises(ValueError, match="flat-COUNT"):
        make_state("huge")
    for size in ("tiny", "bytes-10", "tensors-1000"):
        # The optimizer's step counters are the only tensors that a name does not count.
        assert 0 <= size_bytes(make_state(size)) - expected_bytes(size) < 100


def test_parts_are_the_same_bytes() -> None:
    """Cutting into parts and joining small views move no byte: a floor sends what the others send."""
    views = [memoryview(bytes([number]) * size) for number, size in enumerate((10, 70_000, 3, 5, 200_000))]
    whole = b"".join(views)
    parts = split(views, 65_536)
    assert [sum(map(len, part)) for part in parts] == [65_536] * 4 + [len(whole) - 4 * 65_536]
    assert b"".join(each for part in parts for each in part) == whole
    assert sorted(b"".join(joined(views))) == sorted(whole)
    assert len(joined(views)) == 4


def test_the_meter_sees_memory_that_was_given_back() -> None:
    """The peak counts what was taken and freed meanwhile."""
    with Meter() as meter:
        taken = bytearray(b"x") * (64 * MIB)
        assert memory_bytes() > 64 * MIB
        del taken
    assert 60 * MIB < meter.peak_bytes < 80 * MIB


def test_the_meter_counts_the_work_of_a_process_that_lives_on() -> None:
    """CPU seconds of a helper that has not ended are the case's as well."""
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint('worked', flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as helper:
        with Meter() as meter:
            assert helper.stdout is not None
            assert helper.stdout.readline() == "worked\n"
        helper.communicate("\n")
    assert meter.cpu_s > 0.2


@pytest.mark.processes
def test_a_plan_is_run_once_and_gone_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each case runs in its own process and leaves a row; a second run finds nothing left to do."""
    plan = Plan("save-s3", "save-s3", "plain", ("tiny",), ("socket_1", "cloudckpt"), rounds=1)
    path = tmp_path / "results" / "save-s3.jsonl"
    run(plan, Results(path), work=tmp_path / "work")
    rows = {row["case"]: row for row in Results(path).rows}
    assert rows["socket_1"]["requests"] == {"Put": 1}
    assert rows["cloudckpt"]["bytes_in"] > rows["cloudckpt"]["bytes"]
    assert {"List", "Head", "Copy"}.isdisjoint(rows["cloudckpt"]["requests"])
    before = path.read_bytes()
    capsys.readouterr()
    run(plan, Results(path), work=tmp_path / "work")
    assert path.read_bytes() == before
    assert capsys.readouterr().out == ""


@pytest.mark.processes
def test_a_case_that_fails_stops_nothing(tmp_path: Path) -> None:
    """One that takes too long is stopped, written down as that, not run in later rounds, and tried again next time."""
    plan = Plan("save-local", "save-local", "disk", ("tiny",), ("write_fsync",), rounds=2, timeout_s=0.01)
    path = tmp_path / "save-local.jsonl"
    results = Results(path)
    run(plan, results, work=tmp_path / "work")
    assert [row["error"] for row in results.rows] == ["took longer than 0.01 s"]
    assert Results(path).rows == []


def test_a_state_that_does_not_fit_is_not_tried(tmp_path: Path) -> None:
    """A case that would take more memory than the machine has leaves a row that names both sizes."""
    plan = Plan("save-local", "save-local", "disk", ("bytes-100000000",), ("write_fsync",), rounds=1)
    results = Results(tmp_path / "save-local.jsonl")
    run(plan, results, work=tmp_path / "work")
    (row,) = results.rows
    assert row["error"].startswith("not tried: it takes 244141 GiB, and ")


@pytest.mark.processes
def test_savers_begin_together(tmp_path: Path) -> None:
    """Two processes make one row: the bytes of both, and the time of the one that took longer."""
    plan = Plan("grow-processes", "save-s3", "plain", ("tiny",), ("socket_1",), rounds=1, processes=(2,))
    results = Results(tmp_path / "grow-processes.jsonl")
    run(plan, results, work=tmp_path / "work")
    (row,) = results.rows
    assert row["bytes"] == 2 * size_bytes(make_state("tiny"))
    assert row["together_s"] >= row["wall_s"] > 0
