"""Jobs of several real processes: one checkpoint, one error, one set of log lines."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

import cloudckpt
from tests.distributed import scenarios
from tests.distributed.ranks import Outcome, Ranks


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


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned, where none raised."""
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    return [outcome.value for outcome in outcomes]


def test_stages_of_a_pipeline_make_one_checkpoint(four_ranks: Ranks, tmp_path: Path) -> None:
    """Tensors and values that only one rank has are all in it, with their newest values."""
    found = values(four_ranks.run(scenarios.save_stages, root=str(tmp_path / "run")))
    assert len({json.dumps(value) for value in found}) == 1
    assert found[0]["names"] == [*(f"layers.{n}.weight" for n in range(4)), "shared"]
    assert found[0]["options"] == {**{f"stage-{n}": {"lr": 0.2 * (n + 1)} for n in range(4)}, "all": 1}


@pytest.mark.parametrize("busy_rank", [0, 3])
def test_one_busy_rank_makes_all_skip(four_ranks: Ranks, tmp_path: Path, busy_rank: int) -> None:
    """All skip that save, and none skips the next."""
    found = values(four_ranks.run(scenarios.save_while_busy, root=str(tmp_path / "run"), busy_rank=busy_rank))
    assert found == [{"second": 0, "third": 2, "steps": [0, 2]}] * 4


@pytest.mark.parametrize("lazy_rank", [0, 1])
def test_a_rank_that_skips_a_call_is_named(four_ranks: Ranks, tmp_path: Path, lazy_rank: int) -> None:
    """Everybody gets one error, the lazy rank at its next call; and then the job saves again."""
    outcomes = four_ranks.run(scenarios.one_rank_skips_a_save, root=str(tmp_path / "run"), lazy_rank=lazy_rank)
    found = values(outcomes)
    assert len({json.dumps(value["said"]) for value in found}) == 1
    (said,) = found[0]["said"]
    assert said.startswith("RankError: save(step=1): no call of it came from rank " + str(lazy_rank))
    assert all(value["took"] < 15 for value in found)
    assert len({value["name"] for value in found}) == 1


def test_bad_arguments_on_one_rank_are_told_to_all(four_ranks: Ranks, tmp_path: Path) -> None:
    """The rank itself gets its own error, the others learn whose arguments they were."""
    found = values(four_ranks.run(scenarios.bad_arguments_on_one_rank, root=str(tmp_path / "run"), bad_rank=2))
    assert found[2].startswith("ConfigError: step=-1")
    assert all(found[rank].startswith("RankError: save(step=1): rank 2 (") for rank in (0, 1, 3))
    assert all("step=-1" in text for text in found)


def test_a_folder_that_is_not_shared_is_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    """Before anything is claimed, on every rank, with advice."""
    found = values(two_ranks.run(scenarios.folders_that_are_not_shared, root=str(tmp_path)))
    assert len(set(found)) == 1
    assert found[0].startswith("ConfigError: claim failed on rank 1 (")
    assert "do not share this disk" in found[0]
    assert "s3://" in found[0]
    assert [*(tmp_path / "node-0" / "runs").glob("manifest*")] == []


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_a_state_that_fits_on_some_ranks_changes_none(four_ranks: Ranks, tmp_path: Path, bad_rank: int) -> None:
    """No rank reads a byte before the state of every rank fits."""
    found = values(
        four_ranks.run(scenarios.restore_state_that_fits_on_some, root=str(tmp_path / "run"), bad_rank=bad_rank)
    )
    for value in found:
        assert value["said"].startswith("StateMismatchError"), value
        assert f"failed on rank {bad_rank} (" in value["said"]
        assert "nothing was changed" in value["said"]
        assert "partly overwritten" not in value["said"]
        assert value["said"].count("failed on") == 1
        assert not value["changed"]


@pytest.mark.parametrize("seeing_rank", [0, 3])
def test_all_ranks_fall_back_together(four_ranks: Ranks, tmp_path: Path, seeing_rank: int) -> None:
    """What one rank finds damaged, none restores; the damage is written down once."""
    root = str(tmp_path / "run")
    outcomes = four_ranks.run(scenarios.damaged_for_one, root=root, seeing_rank=seeing_rank)
    assert values(outcomes) == [{"step": 1, "value": 1.0}] * 4
    assert [c.step for c in cloudckpt.open(root).checkpoints() if c.damaged] == [2]
    assert sum("is damaged" in line for outcome in outcomes for line in outcome.lines("WARNING")) == 1


def test_state_of_each_rank_needs_as_many_ranks(four_ranks: Ranks, tmp_path: Path) -> None:
    """It is refused by name, or given to those that there are."""
    root = str(tmp_path / "run")
    values(four_ranks.run(scenarios.save_with_rank_state, root=root))
    found = values(four_ranks.run(scenarios.restore_rank_state_on_two, root=root, strict=True))[:2]
    for value in found:
        assert value["said"].startswith("StateMismatchError")
        assert "rng was saved by 4 ranks" in value["said"]
        assert "there are 2 now" in value["said"]
    found = values(four_ranks.run(scenarios.restore_rank_state_on_two, root=root, strict=False))[:2]
    assert found == [{"x": [1.0, 1.0, 1.0], "seed": 0}, {"x": [1.0, 1.0, 1.0], "seed": 1}]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_stopped_rank_is_named_by_the_others(victim: int, tmp_path: Path) -> None:
    """Its connection stands, and it says nothing: known after ``coordination_timeout_s``."""
    ranks = Ranks(3)
    try:
        ranks.start(scenarios.stop_one, {"root": str(tmp_path / "run"), "victim": victim})
        outcomes = ranks.outcomes_of([rank for rank in range(3) if rank != victim])
        for process in ranks.processes:
            process.send_signal(signal.SIGCONT)
        ranks.processes[victim].kill()
    finally:
        ranks.close()
    for outcome in outcomes:
        assert outcome.error is None, outcome.error
        assert f"rank {victim} (" in outcome.value["said"]
        assert "has been silent for" in outcome.value["said"]
        assert outcome.value["took"] < 20


def test_a_forked_child_does_not_hide_a_dead_rank(tmp_path: Path) -> None:
    """The child lives on for half a minute; the others know within seconds."""
    ranks = Ranks(2)
    try:
        ranks.start(scenarios.die_beside_a_forked_child, {"root": str(tmp_path / "run"), "victim": 1})
        outcomes = ranks.outcomes_of([0])
    finally:
        ranks.close()
    assert outcomes[0].value["said"].startswith("RankError: save(step=1): rank 1 (")
    assert outcomes[0].value["took"] < 10


@pytest.mark.parametrize(("how", "element"), [("sample", 0), ("sample", 1999), ("full", 3), ("off", 0)])
def test_copies_that_differ_are_named(four_ranks: Ranks, tmp_path: Path, how: str, element: int) -> None:
    """The tensor and the rank, on every rank; unless nobody looks."""
    found = values(
        four_ranks.run(scenarios.replicas_that_differ, root=str(tmp_path / "run"), how=how, odd_rank=2, element=element)
    )
    assert len({value["said"] for value in found}) == 1
    if how == "off":
        assert found[0]["said"] == ""
    else:
        assert "model.layer7.weight on rank 2" in found[0]["said"]
        assert found[0]["said"].startswith("StateMismatchError: the ranks have different values")


def test_an_interrupt_in_a_call_ends_the_job_for_all(tmp_path: Path) -> None:
    """Ctrl-C on a rank that waits for the others: they learn of it, and wait for nothing."""
    ranks = Ranks(3)
    try:
        found = values(ranks.run(scenarios.interrupted_in_a_vote, root=str(tmp_path / "run"), victim=1))
    finally:
        ranks.close()
    assert found[1]["said"].startswith("KeyboardInterrupt")
    assert "rank 1 has left: it was interrupted in save" in found[1]["closing"]
    for value in (found[0], found[2]):
        assert value["said"].startswith("RankError: "), value
        assert "has left: it was interrupted in save: KeyboardInterrupt" in value["said"]
    assert [c.step for c in cloudckpt.open(tmp_path / "run").checkpoints()] == [0]


def test_values_that_differ_are_told_once(four_ranks: Ranks, tmp_path: Path) -> None:
    """Rank zero's is stored; a warning names the place. And nothing of a save that has ended is kept."""
    outcomes = four_ranks.run(scenarios.values_that_differ, root=str(tmp_path / "run"))
    assert values(outcomes) == [0] * 4
    told = [line for outcome in outcomes for line in outcome.lines("WARNING")]
    assert len(told) == 1, told
    assert told[0].startswith("options.best[0] has another value on rank 1, 2, 3 than on the first rank that has it")


def test_summands_are_refused_by_name(two_ranks: Ranks, tmp_path: Path) -> None:
    """What a rank holds of a Partial DTensor is not a part of its value."""
    for said in values(two_ranks.run(scenarios.save_summands, root=str(tmp_path / "run"))):
        assert said.startswith("SaveError: save failed on rank 0")
        assert "x: this tensor is a DTensor whose ranks hold summands (Partial)" in said
