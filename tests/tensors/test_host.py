"""Host memory: what is left of it, and plain copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cloudckpt.tensors import host


def test_both_copies_move_exactly_these_bytes() -> None:
    """Neither touches what lies before or after."""
    source = torch.arange(100, dtype=torch.uint8)
    for copy in (host.copy_large, host.copy_small):
        target = torch.zeros(100, dtype=torch.uint8)
        copy(target.data_ptr() + 10, source.data_ptr() + 20, 30)
        assert target.tolist() == [0] * 10 + [*range(20, 50)] + [0] * 60


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux says it")
def test_what_is_available_is_less_than_there_is() -> None:
    """The machine's own figure, in bytes."""
    total = int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) * 1024
    found = host.available_bytes()
    assert found is not None
    assert 0 < found < total


@pytest.mark.parametrize(
    ("limit", "used", "inactive", "left"),
    [("1000000", "600000", "100000", 500_000), ("1000000", "1200000", "0", 0), ("1000000", "0", "0", 1_000_000)],
)
def test_a_container_has_no_more_than_it_is_allowed(
    *, limit: str, used: str, inactive: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit less what is used; cached files that nobody reads count as free."""
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\n")
    monkeypatch.setattr(host, "_GROUP", tmp_path)
    assert host.available_bytes() == left


def test_a_container_without_a_limit_has_what_the_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, or "max": the machine's figure alone."""
    monkeypatch.setattr(host, "_GROUP", tmp_path)
    without = host.available_bytes()
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    (tmp_path / "memory.stat").write_text("")
    assert (host.available_bytes() is None) == (without is None)
