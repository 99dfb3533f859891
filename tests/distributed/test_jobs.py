"""Jobs of several real processes: one checkpoint, one error, one set of log lines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cloudckpt
from tests.distributed import scenarios
from tests.distributed.ranks import Ranks


def test_ranks_save_one_checkpoint_and_restore_it(four_ranks: Ranks, tmp_path: Path) -> None:
    """Replicated state is written once, spread over the ranks; each rank's own comes back to it."""
    saved = four_ranks.run(scenarios.save_replicated, root=str(tmp_path / "run"))
    assert [outcome.error for outcome in saved] == [None] * 4
    assert len({json.dumps(outcome.value) for outcome in saved}) == 1
    folder = tmp_path / "run" / saved[0].value["names"][0]
    writers = {path.name.split("-")[1] for path in folder.glob("*.safetensors")}
    assert writers == {"00000", "00001", "00002", "00003"}
    restored = four_ranks.run(scenarios.restore_replicated, root=str(tmp_path / "run"))
    assert [outcome.error for outcome in restored] == [None] * 4
    for outcome in restored:
        assert outcome.value == {
            "name": saved[0].value["names"][0],
            "model": saved[0].value["model"],
            "optimizer": saved[0].value["optimizer"],
        }
    loaded = cloudckpt.open(tmp_path / "run").load()
    assert scenarios.digest(loaded["model"]) == saved[0].value["model"]
    assert [part["rank"] for part in loaded["rng"]] == [0, 1, 2, 3]


def test_a_save_of_four_ranks_writes_the_manifest_twice_and_logs_once(four_ranks: Ranks, tmp_path: Path) -> None:
    """Two revisions a save, and each INFO line from rank zero only."""
    saved = four_ranks.run(scenarios.save_replicated, root=str(tmp_path / "run"), saves=3)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["revision"] == 1 + 2 * 3 + 1  # the claim, the saves, the close
    lines = [line for outcome in saved for line in outcome.lines("INFO") if set(line) != {"="}]
    assert len(lines) == len(set(lines))
    assert sum(line.startswith("saved checkpoint-") for line in lines) == 3
    assert all(not outcome.log for outcome in saved[1:])


@pytest.mark.parametrize("how", ["plan", "stage", "upload"])
@pytest.mark.parametrize("bad_rank", [0, 2])
def test_an_error_of_one_rank_is_raised_on_all(four_ranks: Ranks, tmp_path: Path, how: str, bad_rank: int) -> None:
    """One SaveError on every rank, which names the rank and the cause; the next save works."""
    outcomes = four_ranks.run(scenarios.one_rank_cannot, root=str(tmp_path / "run"), bad_rank=bad_rank, how=how)
    assert [outcome.error for outcome in outcomes] == [None] * 4
    for outcome in outcomes:
        assert outcome.value["said"].startswith("SaveError: "), outcome.value
        assert f"rank {bad_rank}" in outcome.value["said"]
        cause = {"plan": "y: a builtins.object", "stage": "illegal memory", "upload": "No space left"}[how]
        assert cause in outcome.value["said"]
        assert outcome.value["steps"] == [0, 2]
        assert outcome.value["took"] < 15


def test_ranks_that_disagree_get_one_answer(four_ranks: Ranks, tmp_path: Path) -> None:
    """Another step, or another set of components, is told on every rank, with who says what."""
    outcomes = four_ranks.run(scenarios.save_with_steps, root=str(tmp_path / "run"), steps=[5, 5, 6, 5])
    texts = {outcome.error["message"] if outcome.error else "" for outcome in outcomes}
    assert len(texts) == 1, texts
    (text,) = texts
    assert "ranks 0-1, 3: save(step=5)" in text
    assert "rank 2 (" in text
    outcomes = four_ranks.run(
        scenarios.save_components, root=str(tmp_path / "run"), names=[["a", "b"], ["a"], ["a", "b"], ["a", "b"]]
    )
    texts = {outcome.error["message"] if outcome.error else "" for outcome in outcomes}
    assert len(texts) == 1, texts
    assert "the components" in texts.pop()


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_by_the_survivors(victim: int, tmp_path: Path) -> None:
    """SIGKILL in mid-upload: the others know at once who, and nothing was committed."""
    ranks = Ranks(3)
    try:
        outcomes = ranks.run(scenarios.die_in_upload, root=str(tmp_path / "run"), victim=victim)
    finally:
        ranks.close()
    assert [outcome.gone for outcome in outcomes] == [rank == victim for rank in range(3)]
    for outcome in outcomes:
        if not outcome.gone:
            assert outcome.error is None, outcome.error
            assert f"rank {victim} (" in outcome.value["said"]
            assert "is gone" in outcome.value["said"]
            assert outcome.value["took"] < 10
            assert outcome.value["committed"] == [0]
    assert [c.step for c in cloudckpt.open(tmp_path / "run").checkpoints()] == [0]
