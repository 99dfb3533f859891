"""Folders of several real ranks: one checkpoint of what all of them wrote, and one reader for each machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cloudckpt
from tests.distributed import folder_scenarios as scenarios
from tests.distributed.ranks import Ranks

pytestmark = pytest.mark.processes


def test_ranks_write_into_one_folder_and_get_it_back(four_ranks: Ranks, tmp_path: Path) -> None:
    """All ranks of a machine see one folder, its files are stored once and spread, and every rank is given the path."""
    root, within = str(tmp_path / "run"), str(tmp_path / "staging")
    saved = four_ranks.run(scenarios.save_staged, root=root, within=within, saves=2)
    assert [outcome.error for outcome in saved] == [None] * 4
    assert len({json.dumps(outcome.value) for outcome in saved}) == 1
    assert len(set(saved[0].value["folders"])) == 2
    assert saved[0].value["left"] == []
    assert cloudckpt.verify(root, deep=True).ok
    names = [item.name for item in cloudckpt.open(root).index(1).objects]
    assert len(names) > 1, "several ranks took part in the upload"
    assert sum(item.size_bytes for item in cloudckpt.open(root).index(1).objects) < 2 * 54_000, "each file once"
    restored = four_ranks.run(scenarios.restore_staged, root=root, into=str(tmp_path / "back"))
    assert [outcome.error for outcome in restored] == [None] * 4
    expected = {f"random_states_{rank}.pkl": (bytes([rank, 1]) * 1000).hex() for rank in range(4)}
    expected |= {"model.safetensors": (bytes([1]) * 50_000).hex(), "empty": ""}
    for outcome in restored:
        assert outcome.value == {"path": str(tmp_path / "back" / "checkpoint-1"), "files": expected}
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["checkpoint-1"]


def test_files_of_machines_without_a_common_disk_make_one_folder(two_ranks: Ranks, tmp_path: Path) -> None:
    """Each rank adds what only it has; each machine gets all of it back."""
    root = str(tmp_path / "run")
    saved = two_ranks.run(scenarios.save_apart, root=root, within=str(tmp_path / "nodes"), same=True)
    assert [(outcome.error, outcome.value) for outcome in saved] == [(None, "")] * 2
    restored = two_ranks.run(scenarios.restore_staged, root=root, into=str(tmp_path / "back"), apart=True)
    for rank, outcome in enumerate(restored):
        assert outcome.error is None
        assert outcome.value["path"] == str(tmp_path / "back" / f"node-{rank}" / "checkpoint-5")
        assert outcome.value["files"] == {
            "shard-0.bin": (bytes([0]) * 3000).hex(),
            "shard-1.bin": (bytes([1]) * 3000).hex(),
            "config.json": b"{}".hex(),
        }


def test_a_file_that_differs_between_machines_is_refused_by_name(two_ranks: Ranks, tmp_path: Path) -> None:
    """One path, two contents: no rank's is lost without a word."""
    said = two_ranks.run(scenarios.save_apart, root=str(tmp_path / "run"), within=str(tmp_path / "nodes"), same=False)
    assert all(outcome.error is None for outcome in said)
    assert all(outcome.value.startswith("StateMismatchError: ") for outcome in said), said
    assert all("folder.files.config.json" in outcome.value for outcome in said)


def test_nothing_to_give_back_is_none_on_every_rank(two_ranks: Ranks, tmp_path: Path) -> None:
    """A first run starts from the beginning, on all ranks alike."""
    outcomes = two_ranks.run(scenarios.restore_staged, root=str(tmp_path / "run"), into=str(tmp_path / "back"))
    assert [(outcome.error, outcome.value) for outcome in outcomes] == [(None, {"path": None})] * 2


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_body_that_raises_on_one_rank_saves_nothing(two_ranks: Ranks, tmp_path: Path, bad_rank: int) -> None:
    """The others are told what happened there instead of waiting; the folder is gone; the next save works."""
    outcomes = two_ranks.run(
        scenarios.one_body_raises, root=str(tmp_path / "run"), within=str(tmp_path / "staging"), bad_rank=bad_rank
    )
    assert [outcome.error for outcome in outcomes] == [None] * 2
    for rank, outcome in enumerate(outcomes):
        assert outcome.value["steps"] == [2]
        assert outcome.value["gone"]
        assert "the disk is full" in outcome.value["said"]
        assert outcome.value["said"].startswith("OSError: " if rank == bad_rank else "RankError: ")
