"""The staging memory: its size, its pages, and the thread that makes it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from cloudckpt.tensors.arena import PAGE_BYTES, Arena, positions
from cloudckpt.tensors.planning import Planner
from cloudckpt.tensors.staging import stage

MIB = 1024 * 1024

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted as Linux does")


def test_every_object_begins_on_a_page() -> None:
    """Positions are multiples of 4 KiB in the arena, and the arena's addresses are as well."""
    starts, total = positions([1, 4096, 0, 4097])
    assert (starts, total) == ([0, 4096, 8192, 8192], 16384)
    arena = Arena(segment_bytes=2 * PAGE_BYTES)
    arena.fit(total)
    assert [segment.address % PAGE_BYTES for segment in arena.segments] == [0, 0]


def test_it_grows_by_segments_and_gives_back_what_nobody_needs() -> None:
    """What is there stays where it is; segments are added at the end, and taken away from the end."""
    arena = Arena(segment_bytes=4 * PAGE_BYTES)
    arena.fit(10 * PAGE_BYTES - 1)
    assert [s.size_bytes // PAGE_BYTES for s in arena.segments] == [4, 4, 2]
    before = [s.address for s in arena.segments]
    arena.fit(17 * PAGE_BYTES)
    assert [s.address for s in arena.segments][:3] == before
    assert [s.size_bytes // PAGE_BYTES for s in arena.segments] == [4, 4, 2, 4, 3]
    arena.fit(5 * PAGE_BYTES)
    assert [s.address for s in arena.segments] == before[:2]
    arena.fit(0, soon_bytes=5 * PAGE_BYTES)
    assert [s.address for s in arena.segments] == before[:2]
    arena.fit(0)
    assert arena.size_bytes == 0


def test_a_range_comes_as_the_pieces_it_lies_in() -> None:
    """Views across segments, laid end to end, are the range."""
    arena = Arena(segment_bytes=PAGE_BYTES)
    arena.fit(3 * PAGE_BYTES)
    for number, segment in enumerate(arena.segments):
        segment.memory.fill_(number + 1)
    views = arena.views(PAGE_BYTES - 2, PAGE_BYTES + 4)
    assert b"".join(views) == b"\1\1" + b"\2" * PAGE_BYTES + b"\3\3"
    assert arena.views(PAGE_BYTES, 0) == ()


def test_more_than_its_limit_is_refused_with_both_sizes() -> None:
    """The error names what is needed and what is allowed; what was there stays."""
    arena = Arena(limit_bytes=2 * MIB)
    arena.fit(2 * MIB)
    with pytest.raises(MemoryError, match=r"needs 3\.0 MiB, and staging_limit_bytes is 2\.0 MiB"):
        arena.fit(3 * MIB)
    assert arena.size_bytes == 2 * MIB


def test_more_than_the_host_has_is_refused_with_both_sizes() -> None:
    """Linux would grant it and end the process at the page that is too much, so it is asked first what is left."""
    arena = Arena(available=lambda: 100 * MIB)
    with pytest.raises(MemoryError, match=r"needs 1\.0 GiB more host memory, and the host has 100\.0 MiB"):
        arena.fit(1024 * MIB)
    with pytest.raises(MemoryError, match="more host memory"):
        arena.prepare(1024 * MIB)
    arena.fit(36 * MIB)
    arena.fit(36 * MIB)  # what is there is not asked for again


@linux_only
def test_an_allocation_that_fails_is_an_error_with_both_sizes() -> None:
    """Where the system refuses the mapping itself, the error says so, and the process goes on."""
    program = """
import resource
from cloudckpt.tensors.arena import Arena
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)
arena = Arena(available=lambda: None)
try:
    arena.fit(2 << 30)
except MemoryError as exc:
    print(exc)
arena.fit(1 << 20)
print(arena.size_bytes)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert "staging needs 2.0 GiB of host memory, and no more than 512.0 MiB could be had" in out.stdout
    assert out.stdout.split()[-1] == str(MIB)


@linux_only
def test_after_prepare_the_first_save_touches_no_new_page() -> None:
    """The background has touched every page: staging 64 MiB causes next to no page fault, where fresh memory has one a page."""
    state = {"m": {f"t{n}": torch.ones(4 * MIB) for n in range(4)}}
    plan = Planner(0, 1).plan(state, allow_pickle=False)
    pages = plan.size_bytes // PAGE_BYTES

    def faults_of_staging(arena: Arena) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        stage(plan.payloads, arena)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    cold = Arena()
    cold.fit(plan.size_bytes)
    warm = Arena()
    warm.prepare(plan.size_bytes)
    warm.wait_prepared()
    warm.fit(plan.size_bytes)
    assert faults_of_staging(warm) < pages // 20
    # Huge pages fault in 512 pages at once; whatever the host's page size, cold memory costs more.
    assert faults_of_staging(cold) > faults_of_staging(warm)
    for arena in (cold, warm):
        arena.close()


def test_a_save_that_comes_early_is_not_overwritten() -> None:
    """Segments filled while the background still touches others keep what was put there."""
    arena = Arena(segment_bytes=16 * MIB)
    arena.prepare(128 * MIB)
    for number, segment in reversed(list(enumerate(arena.segments))):
        arena.claim(segment)
        segment.memory.fill_(number + 1)
    arena.wait_prepared()
    for number, segment in enumerate(arena.segments):
        assert torch.all(segment.memory == number + 1)
    arena.close()


def test_closing_ends_the_background_and_gives_everything_back() -> None:
    """close() comes back at once, may be called again, and prepare() may follow it."""
    arena = Arena()
    arena.prepare(1024 * MIB)
    arena.close()
    assert arena.size_bytes == 0
    arena.close()
    arena.prepare(MIB)
    arena.wait_prepared()
    assert arena.size_bytes == MIB
    arena.close()
