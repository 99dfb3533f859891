"""Saved under one parallelism, restored under another: bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from torch.distributed.checkpoint import state_dict as dcp_state

import cloudckpt
from tests.distributed import resharding
from tests.distributed.ranks import Ranks
from tests.distributed.scenarios import digest

Saved = tuple[str, dict[str, dict[str, str]]]

fsdp1_on_some_ranks = pytest.mark.skipif(
    not hasattr(dcp_state, "_get_fsdp_process_group"),
    reason="this torch asks all ranks of the job for FSDP1's moments, and waits forever (pytorch issue 180449)",
)


@pytest.fixture(scope="module")
def saved_by_each(four_ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """A run in which every parallelism has saved once, and the digests of what it saved; by how the state was given."""

    @cache
    def saved(given: str) -> Saved:
        root = str(tmp_path_factory.mktemp("resharding") / "run")
        outcomes = four_ranks.run(resharding.save_each, root=root, given=given)
        assert [outcome.error for outcome in outcomes] == [None] * 4
        return root, outcomes[0].value

    return saved


@pytest.mark.parametrize("given", ["train-state", "objects"])
@pytest.mark.parametrize("kind", resharding.KINDS)
def test_each_parallelism_restores_what_every_other_saved(
    four_ranks: Ranks, saved_by_each: Callable[[str], Saved], kind: str, given: str
) -> None:
    """Weights and moments are the same, whole, on every rank, whatever they were sharded over."""
    root, saved = saved_by_each(given)
    assert len({str(digests) for digests in saved.values()}) == len(resharding.KINDS)
    outcomes = four_ranks.run(resharding.restore_each, root=root, given=given, kind=kind)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    for outcome in outcomes:
        assert outcome.value in ({}, saved)  # nothing on ranks that this one has no use for
    assert outcomes[0].value == saved


@pytest.mark.parametrize("given", ["train-state", "objects"])
def test_a_process_alone_loads_whole_tensors(saved_by_each: Callable[[str], Saved], given: str) -> None:
    """No process group, and no parallelism: ``load()`` gives what each of them saved."""
    root, saved = saved_by_each(given)
    run = cloudckpt.open(root)
    loaded = {kind: digest(run.load(step)["model"]) for step, kind in enumerate(resharding.KINDS)}
    assert loaded == {kind: digests["model"] for kind, digests in saved.items()}


@pytest.mark.parametrize(
    "turns",
    [
        pytest.param(
            [("plain", 1), ("fsdp1", 4), ("fsdp2", 2), ("fsdp1", 4), ("fsdp2", 4), ("fsdp1", 4)], id="on-all-ranks"
        ),
        pytest.param(
            [("plain", 1), ("fsdp1", 4), ("fsdp1", 2), ("fsdp1", 4), ("fsdp2", 4), ("fsdp1", 2)],
            id="on-some-ranks",
            marks=fsdp1_on_some_ranks,
        ),
    ],
)
def test_fsdp1_restores_what_it_and_others_saved(
    four_ranks: Ranks, tmp_path: Path, turns: list[tuple[str, int]]
) -> None:
    """Through ShardedTensors of another number of ranks, and through DTensors, weights and moments stay the same."""
    root = str(tmp_path / "run")
    outcomes = four_ranks.run(resharding.save_in_turns, root=root, turns=turns)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    run = cloudckpt.open(root)
    steps = sorted(c.step for c in run.checkpoints())
    assert steps == [*range(len(turns))]
    loaded = [run.load(step) for step in steps]
    assert len({digest(state["model"]) for state in loaded}) == 1
    assert len({digest(dict(sorted(state["optimizer"]["state"].items()))) for state in loaded}) == 1


def test_shards_in_a_dict_are_restored(four_ranks: Ranks, tmp_path: Path) -> None:
    """In place, where each rank has its own, or none."""
    outcomes = four_ranks.run(resharding.restore_shards_in_a_dict, root=str(tmp_path / "run"))
    assert [outcome.error for outcome in outcomes] == [None] * 4
    assert [outcome.value for outcome in outcomes] == [[True], [True], [True], []]
