"""Saved by one process and restored by four: each rank reads its own share, and what proves it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import cloudckpt
from cloudckpt import CheckpointManager
from cloudckpt.tensors.sums import CELL_BYTES
from tests.distributed import cells_scenarios
from tests.distributed.ranks import Outcome, Ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of one process with a checkpoint of a module and of one with long rows."""
    root = tmp_path_factory.mktemp("cells") / "run"
    state = {"model": cells_scenarios.module(), "rows": cells_scenarios.rows()}
    with CheckpointManager(root) as ckpts:
        ckpts.save(1, state, block=True)
    return str(root)


def check_shares(outcomes: list[Outcome], stored_bytes: int) -> None:
    """Each rank has read its share and at most two cells for each run of it, and all of them little more than all."""
    assert [outcome.error for outcome in outcomes] == [None] * 4
    for outcome in outcomes:
        told = outcome.value
        assert told["share"] <= told["read"] <= told["share"] + 2 * CELL_BYTES * told["runs"]
        assert told["read"] < stored_bytes / 2
    assert sum(outcome.value["share"] for outcome in outcomes) == stored_bytes


@pytest.mark.parametrize(
    ("restore", "kind"),
    [
        (cells_scenarios.restore_module, "fsdp"),
        (cells_scenarios.restore_module, "tp"),
        (cells_scenarios.restore_rows, "columns"),
        (cells_scenarios.restore_rows, "rows and columns"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_rank_reads_its_share(four_ranks: Ranks, saved: str, restore: Callable[..., Any], kind: str) -> None:
    """Bit for bit its part of every tensor, for its bytes and at most two cells for each run of them."""
    component = "model" if restore is cells_scenarios.restore_module else "rows"
    tensors = cloudckpt.open(saved).index("latest").tensors[component]
    stored_bytes = sum(chunk.length for tensor in tensors.values() for chunk in tensor.chunks)
    check_shares(four_ranks.run(restore, root=saved, kind=kind), stored_bytes)
