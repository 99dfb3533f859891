"""Saved by one process and restored by four: each rank reads its own share, and what proves it."""

from __future__ import annotations

import pytest

import cloudckpt
from cloudckpt import CheckpointManager
from cloudckpt.tensors.sums import CELL_BYTES
from tests.distributed import cells_scenarios
from tests.distributed.ranks import Outcome, Ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of one process with a checkpoint of a module, of long rows, and of short ones."""
    root = tmp_path_factory.mktemp("cells") / "run"
    state = {
        "model": cells_scenarios.module(),
        "wide": cells_scenarios.rows(cells_scenarios.WIDE),
        "tall": cells_scenarios.rows(cells_scenarios.TALL),
    }
    with CheckpointManager(root) as ckpts:
        ckpts.save(1, state, block=True)
    return str(root)


def stored_bytes(root: str, component: str) -> int:
    """How many bytes a component's tensors have."""
    tensors = cloudckpt.open(root).index("latest").tensors[component]
    return sum(chunk.length for tensor in tensors.values() for chunk in tensor.chunks)


def check_shares(outcomes: list[Outcome], whole: int, *, around: int = 1) -> None:
    """Each rank has read its share, so many times, and at most two cells for each run of it."""
    assert [outcome.error for outcome in outcomes] == [None] * 4
    for outcome in outcomes:
        told = outcome.value
        assert told["share"] <= told["read"] <= told["share"] * around + 2 * CELL_BYTES * told["runs"]
        assert told["read"] < whole * 3 / 4
    assert sum(outcome.value["share"] for outcome in outcomes) == whole


@pytest.mark.parametrize("kind", ["fsdp", "tp"])
def test_each_rank_reads_its_share_of_a_module(four_ranks: Ranks, saved: str, kind: str) -> None:
    """Bit for bit its part of every tensor, for its bytes and at most two cells for each tensor."""
    outcomes = four_ranks.run(cells_scenarios.restore_module, root=saved, kind=kind)
    check_shares(outcomes, stored_bytes(saved, "model"))


@pytest.mark.parametrize("kind", ["columns", "rows and columns"])
def test_each_rank_reads_its_share_of_long_rows(four_ranks: Ranks, saved: str, kind: str) -> None:
    """Columns of each row are a run for themselves: the bytes between are not read."""
    outcomes = four_ranks.run(cells_scenarios.restore_rows, root=saved, component="wide", kind=kind)
    check_shares(outcomes, stored_bytes(saved, "wide"))


def test_of_short_rows_those_it_has_are_read(four_ranks: Ranks, saved: str) -> None:
    """Half of the columns of half of the rows: these rows come whole, the others not at all."""
    outcomes = four_ranks.run(cells_scenarios.restore_rows, root=saved, component="tall", kind="rows and columns")
    check_shares(outcomes, stored_bytes(saved, "tall"), around=2)
