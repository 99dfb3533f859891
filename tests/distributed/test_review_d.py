"""What a review of many ranks found: each test states what should be true, and fails while it is not."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch

import cloudckpt
from cloudckpt.coordination.channel import Channel, Peer, _framed
from tests.distributed import review_scenarios as scenarios
from tests.distributed.ranks import Ranks

_JOBS: dict[int, Ranks] = {}


@pytest.fixture(scope="module", autouse=True)
def _ended_with_the_module() -> Iterator[None]:
    yield
    while _JOBS:
        _JOBS.popitem()[1].close()


def run(
    count: int, scenario: Callable[..., Any], timeout_s: float = 60, *, apart: bool = False, **words: Any
) -> list[Any]:
    """On so many ranks, kept for the next scenario; ``apart``: in processes of their own, for what leaves traces."""
    ranks = Ranks(count) if apart or count not in _JOBS else _JOBS.pop(count)
    try:
        outcomes = ranks.run(scenario, timeout_s=timeout_s, **words)
    except BaseException:
        ranks.close()
        raise
    if apart or any(outcome.error or outcome.gone for outcome in outcomes):
        ranks.close()
    else:
        _JOBS[count] = ranks
    assert [outcome.error for outcome in outcomes] == [None] * count
    return [outcome.value for outcome in outcomes]


# -- wrong or lost values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
def test_distributed_tensors_in_a_dict_are_restored(tmp_path: Path, in_place: bool) -> None:
    """Also those that are not read in place: by the settings, or because the local part is not contiguous."""
    root = str(tmp_path / "run")
    for found in run(4, scenarios.corner_tensors, root=root, in_place=in_place, converted=False):
        assert found == {"saved": "", "restored": "", "differ": []}


@pytest.mark.parametrize("kind", ["plain", "plain in a module", "plain in a train state", "replicated"])
def test_a_tied_tensor_is_restored_into_untied_ones(tmp_path: Path, kind: str) -> None:
    """Both get the stored values, whatever the placements of each."""
    whole = torch.arange(8.0).reshape(4, 2).tolist()
    for found in run(2, scenarios.untied, root=str(tmp_path / "run"), kind=kind):
        assert found == {"said": "", "a": whole, "b": whole}


def test_each_stages_optimizer_gets_its_options_back(tmp_path: Path) -> None:
    """A stage's learning rate is stored and restored, as a stage and as a part of the whole model."""
    for rank, found in enumerate(run(2, scenarios.stages_with_options, root=str(tmp_path / "run"))):
        assert found == {"saved": "", "restored": "", "lr": [0.25, 0.125][rank], "whole": [0.25, 0.125], "one": ANY}
        assert "layer0.weight and layer1.weight are in one group, and were saved with different lr" in found["one"]


def test_options_that_ranks_have_differently_are_told(tmp_path: Path) -> None:
    """Also where the lists are of different lengths: one of them is stored, and somebody should know."""
    found = run(2, scenarios.lists_of_different_lengths, root=str(tmp_path / "run"), apart=True)
    assert [(rank["saved"], rank["told"]) for rank in found] == [("", 1), ("", 0)]  # once, by rank zero


@pytest.mark.parametrize("which", ["tuple", "one rank only", "lists"])
def test_per_rank_state_that_was_saved_can_be_restored(tmp_path: Path, which: str) -> None:
    """Wherever it is nested, and whichever ranks have it: or the save is refused."""
    for found in run(2, scenarios.save_state, root=str(tmp_path / "run"), which=which):
        assert found["saved"] or not found["restored"], found


def test_what_each_stage_has_in_a_tuple_is_stored(tmp_path: Path) -> None:
    """Disjoint keys are joined inside a tuple as inside a list; or the save is refused."""
    found = run(2, scenarios.save_state, root=str(tmp_path / "run"), which="stages in a tuple")
    if not found[0]["saved"]:
        assert [*cloudckpt.open(tmp_path / "run").load()["x"][0]] == ["stage0", "stage1"]


def test_a_tensor_that_no_rank_holds_is_refused(tmp_path: Path) -> None:
    """What is committed can be read."""
    found = run(4, scenarios.outside_of_the_group, root=str(tmp_path / "run"))
    if not found[2]["said"]:
        assert "w" in cloudckpt.open(tmp_path / "run").load()["m"]


def test_copies_that_drift_apart_between_shards_are_named(tmp_path: Path) -> None:
    """check_replicas="full" finds a buffer that differs between ranks which hold other shards, at any save."""
    for found in run(4, scenarios.drift_between_groups, root=str(tmp_path / "run")):
        assert found["first"] == ""
        assert "m.buf" in found["second"]


def test_an_int_key_that_only_one_rank_has_is_stored(tmp_path: Path) -> None:
    """As at a first save, where both keys are stored."""
    run(2, scenarios.keys_move, root=str(tmp_path / "run"))
    assert cloudckpt.open(tmp_path / "run").load()["x"] == {0: "own", 1: "own"}


def test_no_marker_of_ours_reaches_the_callers_objects(tmp_path: Path) -> None:
    """A rank without a part of its own gets nothing for it, not an object that means nothing."""
    for found in run(4, scenarios.more_ranks_than_parts, root=str(tmp_path / "run")):
        assert "object object" not in f"{found['got']} {found['y']}"


def test_tied_distributed_tensors_are_saved_where_a_rank_has_no_rows(tmp_path: Path) -> None:
    """Five rows on four ranks."""
    for found in run(4, scenarios.tied_and_uneven, root=str(tmp_path / "run")):
        assert found["said"] == ""


@pytest.mark.parametrize("kind", ["modules", "train states"])
def test_stages_restore_the_modules_that_they_saved(tmp_path: Path, kind: str) -> None:
    """The other stages' names are not unexpected, and their bytes are not read; what no stage knows is refused."""
    for found in run(2, scenarios.stages_strictly, root=str(tmp_path / "run"), kind=kind):
        assert found["said"] == ""
        assert found["right"]
        assert found["read_from"] == found["own"]
        assert "model: unexpected: layer1.bias, layer1.weight" in found["of one only"]


# -- hangs, and errors that do not arrive ------------------------------------------------------------------------


def test_an_upload_that_fails_while_rank_zero_waits_is_told(tmp_path: Path) -> None:
    """One error on every rank, and no hang."""
    for found in run(2, scenarios.upload_fails_after_the_others, root=str(tmp_path / "run")):
        assert "No space left" in found["said"]


def test_a_slow_clean_up_makes_no_rank_decide_alone(tmp_path: Path) -> None:
    """All ranks save, or all raise."""
    first, second = run(2, scenarios.slow_deletes, apart=True, root=str(tmp_path / "run"))
    assert bool(first["said"]) == bool(second["said"])
    assert not first["ended"].startswith("TimeoutError")


def test_an_object_that_refuses_its_state_is_told_to_all(tmp_path: Path) -> None:
    """No rank trains on while another one has not been restored."""
    for found in run(2, scenarios.refused_by_one, root=str(tmp_path / "run")):
        assert "the data set has another length" in found["said"]


def test_what_keeps_one_rank_from_the_index_is_told_to_all(tmp_path: Path) -> None:
    """The cause, and at once."""
    for found in run(2, scenarios.index_unreadable_for_one, root=str(tmp_path / "run")):
        assert "no permission for the index" in found["said"]
        assert "partly overwritten" not in found["said"]


def test_what_keeps_rank_zero_from_the_manifest_is_told_to_all(tmp_path: Path) -> None:
    """A restore in the middle of a training."""
    for found in run(2, scenarios.manifest_unreadable_at_second_restore, root=str(tmp_path / "run")):
        assert "no permission for the manifest" in found["said"]


def test_what_keeps_rank_zero_from_protecting_the_choice_is_told_to_all(tmp_path: Path) -> None:
    """restore() raises on every rank, or on none."""
    for found in run(2, scenarios.protecting_fails, root=str(tmp_path / "run")):
        assert "no permission to write the manifest" in found["said"]


def test_an_interrupt_on_every_rank_is_an_interrupt_on_every_rank(tmp_path: Path) -> None:
    """Ctrl-C reaches all processes of a terminal's job: none of them turns it into an error to go on from."""
    for found in run(2, scenarios.interrupted_everywhere, apart=True, root=str(tmp_path / "run")):
        assert found["said"].startswith("KeyboardInterrupt")


def test_a_call_that_blocks_on_one_rank_is_decided_for_all(tmp_path: Path) -> None:
    """With on_busy="skip": all save, all skip, or all raise."""
    first, second = run(2, scenarios.blocks_on_one, root=str(tmp_path / "run"))
    assert (bool(first["said"]), first["steps"]) == (bool(second["said"]), second["steps"])


def test_a_state_that_is_none_on_one_rank_is_told_to_all(tmp_path: Path) -> None:
    """The others learn why, and at once."""
    first, _ = run(2, scenarios.no_state_on_one, apart=True, root=str(tmp_path / "run"))
    assert "no call of it came" not in first["said"]


# -- the house ---------------------------------------------------------------------------------------------------


def test_no_rank_keeps_anything_of_saves_that_have_ended(tmp_path: Path) -> None:
    """Neither their states, nor what was said about them."""
    for found in run(2, scenarios.copies_left, apart=True, root=str(tmp_path / "run"), saves=4):
        assert found["unwanted"] <= 64  # names only, of the last ones
        assert found == {"alive": 0, "watchers": 0, "unwanted": found["unwanted"], "letters": 0}


def test_no_letter_of_a_failed_save_is_left(tmp_path: Path) -> None:
    """A job whose store refuses for a night does not fill the mailboxes."""
    for found in run(2, scenarios.letters_after_failures, apart=True, root=str(tmp_path / "run")):
        assert found["left"] == []


def test_what_every_rank_reports_is_written_once(tmp_path: Path) -> None:
    """report_metrics() and the like with the same words on four ranks are one write."""
    for found in run(4, scenarios.report_everywhere, root=str(tmp_path / "run")):
        assert found["writes"] == 3


@pytest.mark.parametrize("token", ["\N{LATIN SMALL LETTER E WITH ACUTE}", "deep"])
def test_a_stranger_does_not_end_the_channel(token: str) -> None:
    """Whatever a stranger says before it has proven to belong to the job, only its own connection ends."""
    channel = Channel(Peer(rank=0, host="here", pid=1), 2, silence_s=30)
    port = channel.listen("127.0.0.1", "secret")
    said = json.dumps({"token": token}, ensure_ascii=False).encode() if token != "deep" else b"[" * 4000
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as stranger:
            stranger.sendall(_framed(".hello", said))
            assert stranger.recv(1) == b""
        assert channel._leaving is None
        channel.post(0, "to myself", b"x")
        assert channel.take("to myself", 0, timeout_s=10) == b"x"
    finally:
        channel.leave("the test is over")
