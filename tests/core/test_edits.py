from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core import edits
from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.policy import KeepBest, Policy
from cloudckpt.testing.builders import at, checkpoint, manifest
from cloudckpt.testing.strategies import Move, histories, moves

NOW = at(1000)
BEST = Policy(keep_last=1, keep_best=(KeepBest("loss", "min", 1),))
ID = "00000064"

Edit = Callable[[Manifest], Manifest]

EDITS: dict[str, Edit] = {
    "pin": lambda m: edits.pin(m, ID, pinned=True, at=NOW),
    "unpin": lambda m: edits.pin(m, ID, pinned=False, at=NOW),
    "hold": lambda m: edits.hold(m, ID, held=True, at=NOW),
    "release": lambda m: edits.hold(m, ID, held=False, at=NOW),
    "tag": lambda m: edits.tag(m, ID, add=["new", "old", "new"], remove=["stale"], at=NOW),
    "mark": lambda m: edits.mark(m, ID, "diverged", at=NOW),
    "unmark": lambda m: edits.mark(m, ID, None, at=NOW),
    "damaged": lambda m: edits.damage(m, ID, "a byte flipped", at=NOW),
    "undamaged": lambda m: edits.damage(m, ID, None, at=NOW),
    "metrics": lambda m: edits.report_metrics(m, ID, {"loss": 0.5, "acc": math.nan}, at=NOW),
}


def entry(m: Manifest) -> Checkpoint:
    """The entry that every edit here is about."""
    found = m.find(ID)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("edit", "before", "changed", "detail"),
    [
        ("pin", {}, {"pinned": True}, None),
        ("unpin", {"pinned": True}, {"pinned": False}, None),
        ("hold", {}, {"held": True}, None),
        ("release", {"held": True}, {"held": False}, None),
        ("tag", {"tags": ("old", "stale")}, {"tags": ("old", "new")}, "new, old, new, -stale"),
        ("mark", {"marks": ("spike",)}, {"marks": ("spike", "diverged")}, "diverged"),
        ("unmark", {"marks": ("spike", "diverged")}, {"marks": ()}, None),
        ("damaged", {}, {"damaged": "a byte flipped"}, "a byte flipped"),
        ("undamaged", {"damaged": "a byte flipped"}, {"damaged": None}, None),
        ("metrics", {"metrics": {"loss": 0.7, "ppl": 3}}, {"metrics": {"loss": 0.5, "ppl": 3, "acc": math.nan}}, "loss=0.5, acc=nan"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("state", [State.PENDING, State.COMMITTED])
def test_an_edit_changes_its_own_field_and_says_so(
    edit: str, before: dict[str, Any], changed: dict[str, Any], detail: str | None, state: State
) -> None:
    """Each edit of a pending or committed entry changes one field, writes one line of journal, and happens once."""
    m = manifest(checkpoint(100, state=state, **before))
    after = EDITS[edit](m)

    assert entry(after) == replace(entry(m), **changed, kept_because=entry(after).kept_because)
    assert [(line.event, line.id, line.step, line.detail) for line in after.journal] == [(edit, ID, 100, detail)]
    assert EDITS[edit](after) is after
    assert (after.writer_epoch, after.next_seq, after.policy) == (m.writer_epoch, m.next_seq, m.policy)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("m", [manifest(checkpoint(100, state=State.RETIRED)), manifest()])
def test_what_is_retired_or_gone_is_not_edited(edit: str, m: Manifest) -> None:
    """There is no way back from retired: nothing about such an entry changes."""
    assert EDITS[edit](m) is m


def test_a_late_metric_counts_at_once() -> None:
    """An evaluator's metric for a committed checkpoint makes it the best, in the same write (I4)."""
    m = manifest(checkpoint(50, metrics={"loss": 0.9}), checkpoint(100), policy=BEST)
    after = edits.report_metrics(m, ID, {"loss": 0.5}, at=NOW)

    assert (m.best[0].ids, after.best[0].ids) == (("00000032",), (ID,))
    assert entry(after).kept_because == ("best #1", "last #1")


def test_a_metric_of_a_pending_save_waits_for_its_commit() -> None:
    """The metric is recorded, and the best list stays until the bytes are safe (I9)."""
    m = manifest(checkpoint(50, metrics={"loss": 0.9}), checkpoint(100, state=State.PENDING), policy=BEST)
    after = edits.report_metrics(m, ID, {"loss": 0.5}, at=NOW)

    assert entry(after).metrics == {"loss": 0.5}
    assert after.best == m.best


def test_a_diverged_best_gives_its_place_back() -> None:
    """Marking the best leaves the list to the others at once, and nothing is retired by it (S10)."""
    m = manifest(checkpoint(50, metrics={"loss": 0.9}), checkpoint(100, metrics={"loss": 0.1}), policy=BEST)
    after = edits.mark(m, ID, "diverged", at=NOW)

    assert (m.best[0].ids, after.best[0].ids, after.recent) == ((ID,), ("00000032",), ("00000032",))
    assert [e.state for e in after.entries] == [State.COMMITTED, State.COMMITTED]


def test_a_damaged_best_gives_its_place_back_and_stays() -> None:
    """A best whose bytes are gone frees its slot; only a person deletes it (H1, C10)."""
    m = manifest(checkpoint(50, metrics={"loss": 0.9}), checkpoint(100, metrics={"loss": 0.1}), policy=BEST)
    after = edits.damage(m, ID, "model is missing", at=NOW)

    assert after.best[0].ids == ("00000032",)
    assert entry(after).kept_because == ("damaged: only a person deletes it",)


def test_a_person_may_let_anything_go() -> None:
    """By hand even a pinned one, the best and the newest are retired, each once and with the reason given."""
    m = manifest(checkpoint(50), checkpoint(100, pinned=True, metrics={"loss": 0.1}), policy=BEST)
    after = edits.retire(m, [ID, ID, "0000dead"], "removed by hand", at=NOW)

    assert (entry(after).state, entry(after).retired_because) == (State.RETIRED, "removed by hand")
    assert (entry(after).kept_because, after.best[0].ids, after.recent) == ((), (), ("00000032",))
    assert [(line.event, line.id, line.detail) for line in after.journal] == [("retire", ID, "removed by hand")]


@pytest.mark.parametrize("state", [State.PENDING, State.RETIRED])
def test_only_what_is_committed_can_be_let_go_by_hand(state: State) -> None:
    """A pending save belongs to its writer, and a retired one is let go already."""
    m = manifest(checkpoint(100, state=state))
    assert edits.retire(m, [ID], "removed by hand", at=NOW) is m


BY_EDITORS = (
    "pin",
    "unpin",
    "hold",
    "release",
    "tag",
    "mark",
    "unmark",
    "damage",
    "undamage",
    "metrics",
    "retire",
    "prune",
)


@given(histories(), st.lists(moves(BY_EDITORS), min_size=1, max_size=5))
def test_editors_leave_the_writer_alone(story: list[tuple[Move, Manifest]], edit_moves: list[Move]) -> None:
    """No edit moves the epoch, the owner or the order, and none ends a pending save."""
    before = after = story[-1][1]
    for move in edit_moves:
        after = move.bind(after)(after)

    assert (after.writer_epoch, after.owner, after.next_seq, after.commits, after.claims, after.resumed_from) == (
        before.writer_epoch, before.owner, before.next_seq, before.commits, before.claims, before.resumed_from,
    )  # fmt: skip
    assert [e.id for e in after.in_state(State.PENDING)] == [e.id for e in before.in_state(State.PENDING)]
    assert [(e.id, e.seq, e.step) for e in after.entries] == [(e.id, e.seq, e.step) for e in before.entries]
