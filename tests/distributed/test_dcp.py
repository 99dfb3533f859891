"""PyTorch's own ``dcp.save`` and ``dcp.load`` on several real processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import staging

import cloudckpt
from cloudckpt.storage import LocalStorage
from cloudckpt.testing.invariants import check_store
from tests.distributed import dcp_scenarios, scenarios, sharded
from tests.distributed.ranks import Outcome, Ranks

pytestmark = pytest.mark.processes


def answers(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned, if none failed."""
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    return [outcome.value for outcome in outcomes]


@pytest.mark.parametrize("ranks", [(4, 4), (4, 2), (2, 4), (4, 1), (1, 4)], ids="{0[0]}-to-{0[1]}".format)
@pytest.mark.parametrize("kind", ["fsdp", "tp", "ddp"])
def test_any_number_of_ranks_loads_what_any_number_saved(
    four_ranks: Ranks, tmp_path: Path, kind: str, ranks: tuple[int, int]
) -> None:
    """Weights and moments are the same, whole, whatever they were sharded over; and so in one process without DCP."""
    root, (before, after) = str(tmp_path / "run"), ranks
    saved = answers(four_ranks.run(dcp_scenarios.save, root=root, kind=kind, ranks=before))
    loaded = answers(four_ranks.run(dcp_scenarios.load, root=root, kind=kind, ranks=after))
    assert loaded[:after] == [saved[0]] * after
    whole = cloudckpt.open(root).load()
    assert scenarios.digest({**whole["model"]}) == saved[0]["model"]
    assert (whole["step"], whole["options"]) == (3, {"lr": (0.1, 0.2)})
    check_store(LocalStorage(root))
    assert cloudckpt.verify(root, deep=True).findings == ()


@pytest.mark.parametrize("ranks", [(4, 2), (2, 4)], ids="{0[0]}-to-{0[1]}".format)
@pytest.mark.parametrize("kind", ["fsdp", "tp", "ddp"])
def test_a_manager_and_dcp_read_each_others_checkpoints(
    four_ranks: Ranks, tmp_path: Path, kind: str, ranks: tuple[int, int]
) -> None:
    """Saved by one on some ranks, restored by the other on more or fewer."""
    before, after = ranks
    managed = str(tmp_path / "managed")
    saved = answers(four_ranks.run(sharded.save_sharded, root=managed, kind=kind, ranks=before, wrapped=True))
    loaded = answers(four_ranks.run(dcp_scenarios.load, root=managed, kind=kind, ranks=after))
    assert loaded[:after] == [saved[0]] * after
    own = str(tmp_path / "own")
    saved = answers(four_ranks.run(dcp_scenarios.save, root=own, kind=kind, ranks=before))
    loaded = answers(four_ranks.run(sharded.restore_sharded, root=own, kind=kind, ranks=after, wrapped=True))
    assert loaded[:after] == [saved[0]] * after


def test_what_all_ranks_have_is_written_once_and_by_all_of_them(four_ranks: Ranks, tmp_path: Path) -> None:
    """Replicated state is spread over the ranks; four writes of the manifest, and each INFO line once."""
    outcomes = four_ranks.run(dcp_scenarios.save, root=str(tmp_path / "run"), kind="ddp", ranks=4)
    (name,) = {value["name"] for value in answers(outcomes)}
    payload = [*(tmp_path / "run" / name).glob("*.safetensors")]
    assert len({path.name.split("-")[1] for path in payload}) == 4
    tensors = cloudckpt.open(tmp_path / "run").index("latest").tensors
    assert all(len(entry.chunks) == 1 for own in tensors.values() for entry in own.values())
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["revision"] == 4  # claim, announce, commit, close
    assert [line for outcome in outcomes[1:] for line in outcome.log] == []
    assert [line.split()[0] for line in outcomes[0].lines("INFO")] == ["saving", "saved"]


@pytest.mark.skipif(
    not hasattr(staging, "DefaultStager"),
    reason="async_save of this torch copies nothing that lies on the CPU, for no writer",
)
@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_async_save_stores_the_state_at_the_call(four_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    """The weights are zeroed while it is under way; what is loaded is what they were."""
    root = str(tmp_path / "run")
    saved = answers(four_ranks.run(dcp_scenarios.save, root=root, kind=kind, ranks=4, how="async_save"))
    loaded = answers(four_ranks.run(dcp_scenarios.load, root=root, kind=kind, ranks=4))
    assert loaded == [saved[0]] * 4


def test_pipeline_stages_make_one_state(four_ranks: Ranks, tmp_path: Path) -> None:
    """Keys that only one rank has are there, tensors and values alike, beside what all have."""
    assert answers(four_ranks.run(dcp_scenarios.save_and_load_stages, root=str(tmp_path))) == [{"same": True}] * 4
    whole = cloudckpt.open(tmp_path).load()
    assert {*whole["model"]} == {"shared", *(f"layers.{rank}.weight" for rank in range(4))}
    assert whole["options"]["stage-3"]["seen"][1].tolist() == [3, 3]


@pytest.mark.parametrize("how", ["value", "upload"])
@pytest.mark.parametrize("bad_rank", [0, 2])
def test_a_failure_of_one_rank_is_raised_on_all_and_nothing_is_committed(
    four_ranks: Ranks, tmp_path: Path, how: str, bad_rank: int
) -> None:
    """DCP names the rank; the next save works, and cleans up what the ranks before had written."""
    found = answers(four_ranks.run(dcp_scenarios.one_rank_cannot, root=str(tmp_path), bad_rank=bad_rank, how=how))
    for value in found:
        assert [*value["said"]] == [str(bad_rank)]
        text = {"value": "TypeError: y[", "upload": "No space left"}[how]
        assert text in value["said"][str(bad_rank)]
        assert value["committed"] == 1
    assert [c.step for c in cloudckpt.open(tmp_path).checkpoints(state=None)] == [0, 2]
    check_store(LocalStorage(tmp_path), settled=True)


def test_folders_that_are_not_shared_are_refused(four_ranks: Ranks, tmp_path: Path) -> None:
    """Each rank would write to a disk of its own: an error on all, and nothing is committed."""
    for said in answers(four_ranks.run(dcp_scenarios.folders_that_are_not_shared, root=str(tmp_path))):
        assert said.startswith("SaveError: ")
        assert "do not share this disk" in said
    assert cloudckpt.open(tmp_path / "node-0" / "runs").checkpoints() == ()


@pytest.mark.parametrize("odd_rank", [0, 3])
def test_ranks_that_choose_differently_load_nothing(four_ranks: Ranks, tmp_path: Path, odd_rank: int) -> None:
    """No mixture of two checkpoints: a clear error on every rank, and no tensor has changed."""
    for value in answers(four_ranks.run(dcp_scenarios.choices_that_differ, root=str(tmp_path), odd_rank=odd_rank)):
        assert value["said"].startswith("RankError: the ranks have chosen different checkpoints, checkpoint-1.")
        assert not value["changed"]


def test_ranks_that_save_different_steps_are_told_and_nothing_is_committed(four_ranks: Ranks, tmp_path: Path) -> None:
    """The coordinator's step counts; whoever has another one says so, and the save fails on all."""
    for said in answers(four_ranks.run(dcp_scenarios.steps_that_differ, root=str(tmp_path), odd_rank=2)):
        assert said == "2: ConfigError: this rank saves step 7, and the coordinator step 1"
    assert cloudckpt.open(tmp_path).checkpoints() == ()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_in_mid_upload_leaves_what_a_claim_settles(tmp_path: Path, victim: int) -> None:
    """DCP fails on the survivor, nothing became visible, and the next writer finds the run in order."""
    ranks = Ranks(2)
    try:
        outcomes = ranks.run(dcp_scenarios.die_in_upload, root=str(tmp_path), victim=victim)
    finally:
        ranks.close()
    assert outcomes[victim].gone
    assert outcomes[1 - victim].value
    assert [c.step for c in cloudckpt.open(tmp_path).checkpoints()] == [0]
    state = {"x": {str(rank): torch.zeros(1000) for rank in range(2)}}
    with cloudckpt.CheckpointManager(tmp_path) as ckpts:
        resumed = ckpts.restore(state)
        assert resumed is not None
        assert resumed.step == 0
        ckpts.save(1, state).wait()
    cloudckpt.gc(tmp_path, dry_run=False)
    check_store(LocalStorage(tmp_path), settled=True)
