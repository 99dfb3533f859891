"""Every transition of the manifest, and what each refuses.

(Past 350 lines: the transitions are one table, and their invariants hold over all of them.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core import manifest as transitions
from cloudckpt.core.manifest import Abandon, Settlement
from cloudckpt.core.manifest_json import decode_manifest, encode_manifest
from cloudckpt.core.model import HISTORY_LENGTH, JOURNAL_LENGTH, Checkpoint, Claim, Manifest, Owner, State
from cloudckpt.core.policy import KeepBest, Policy
from cloudckpt.core.retention import metric_value
from cloudckpt.errors import ConflictError, FencedError
from cloudckpt.testing.builders import DIGEST, at, checkpoint, manifest, owner, sealed
from cloudckpt.testing.strategies import BY_RULE, Move, histories, moves

NOW = at(1000)
FAILED = Abandon(reason="the save failed: no space left")

Story = list[tuple[Move, Manifest]]


def announced(m: Manifest, step: int, save_id: str, **fields: Any) -> Manifest:
    """The manifest with a save announced under its current epoch."""
    given: dict[str, Any] = {"writer_epoch": m.writer_epoch, "settlements": {}, "gone": (), "at": NOW, **fields}
    return transitions.announce(m, checkpoint(step, seq=0, state=State.PENDING, id=save_id), **given)


def committed(m: Manifest, save_id: str) -> Manifest:
    """The manifest with an announced save committed."""
    return transitions.commit(m, save_id, sealed(), writer_epoch=m.writer_epoch, at=NOW)


def claimed(m: Manifest, by: Owner, *, takeover: str = "last_wins", **settlements: Settlement) -> Manifest:
    """The manifest claimed by ``by`` under the stored policy; settlements by save id, after an ``s``."""
    found = {name.removeprefix("s"): settlement for name, settlement in settlements.items()}
    return transitions.claim(m, by, policy=m.policy, settlements=found, takeover=takeover, at=NOW)


def states(m: Manifest) -> dict[int, str]:
    """The state of each entry, by step."""
    return {e.step: str(e.state) for e in m.entries}


def events(m: Manifest) -> list[str]:
    """What the journal says, oldest first."""
    return [line.event for line in m.journal]


# -- announce ------------------------------------------------------------------------------------------------


def test_an_announce_names_the_save_before_its_first_byte() -> None:
    """The new entry is pending, newest in the run's order, with its expected standing; it evicts nothing (S1, I7, I9)."""
    before = manifest(
        *(checkpoint(step, metrics={"loss": 1.0}) for step in (1, 2)),
        policy=Policy(keep_last=1, keep_best=(KeepBest("loss", "min", 1),)),
        next_seq=9,
    )
    entry = checkpoint(3, seq=0, state=State.PENDING, id="00000003", metrics={"loss": 0.5})
    after = transitions.announce(before, entry, writer_epoch=1, settlements={}, gone=(), at=NOW)

    assert after.find("00000003") == replace(
        entry, seq=9, announced_at=NOW, kept_because=("best #1", "last #1"), writer_epoch=1
    )
    assert after.entries[:2] == before.entries
    assert (after.next_seq, after.best, after.recent) == (10, before.best, before.recent)
    assert (events(after), after.journal[-1].step, after.journal[-1].revision) == (["announce"], 3, 8)


def test_an_announce_settles_this_writers_failed_save_and_drops_what_is_deleted() -> None:
    """One write abandons the failed save, completes the one whose commit nobody confirmed, forgets the deleted one."""
    before = manifest(
        checkpoint(1, state=State.RETIRED),
        checkpoint(2, state=State.PENDING),
        checkpoint(3, state=State.PENDING),
        claims=(Claim(writer_epoch=1, identity="host node-1"),),
    )
    after = announced(before, 4, "00000004", settlements={"00000002": FAILED, "00000003": sealed()}, gone={"00000001"})

    assert states(after) == {2: "retired", 3: "committed", 4: "pending"}
    assert events(after) == ["abandon", "roll-forward", "delete", "announce"]
    assert (after.recent, after.commits, after.claims) == (("00000003",), 2, ())


def test_an_announce_drops_only_what_is_retired() -> None:
    """A committed entry is never dropped, whoever says that its bytes are gone."""
    before = manifest(checkpoint(1), checkpoint(2, state=State.PENDING))
    assert states(announced(before, 3, "00000003", gone={"00000001", "00000002"})) == {
        1: "committed",
        2: "pending",
        3: "pending",
    }


@pytest.mark.parametrize("taken", [checkpoint(1), checkpoint(5, seq=1, writer_epoch=0)])
def test_a_save_id_that_is_taken_is_refused(taken: Checkpoint) -> None:
    """A random id that another save has already is refused: its folder must not be written to (I2)."""
    with pytest.raises(ConflictError, match="the save id 00000001 is taken by checkpoint-"):
        announced(manifest(taken), 5, "00000001")


# -- commit --------------------------------------------------------------------------------------------------


def test_a_commit_retires_what_its_successor_displaces() -> None:
    """The old best leaves in the write that makes its successor durable, not before (S1, S4, L28, I9)."""
    policy = Policy(keep_last=1, keep_best=(KeepBest("loss", "min", 1),))
    before = manifest(
        checkpoint(1, metrics={"loss": 0.9}),
        checkpoint(2, metrics={"loss": 1.5}),
        checkpoint(3, state=State.PENDING, metrics={"loss": 0.5}),
        policy=policy,
    )
    after = committed(before, "00000003")

    assert states(after) == {1: "retired", 2: "retired", 3: "committed"}
    assert [e.retired_because for e in after.entries] == ["not in best 1, not in last 1"] * 2 + [None]
    assert after.best[0].ids == after.recent == ("00000003",)
    assert after.find("00000003") == replace(
        before.entries[2],
        state=State.COMMITTED,
        committed_at=NOW,
        index_digest=DIGEST,
        kept_because=("best #1", "last #1"),
    )
    assert events(after) == ["commit", "retire", "retire"]


def test_a_failed_save_costs_nothing_but_itself() -> None:
    """Limit 2, N 1: 1 (loss 1.0) saved, 2 (0.9) fails, 3, 4, 5 saved: 1, 4 and 5 remain, 1 is the best (L28)."""
    m = manifest(policy=Policy(keep_last=2, keep_best=(KeepBest("loss", "min", 1),)))
    settlements: dict[str, Settlement] = {}
    for step, loss in [(1, 1.0), (2, 0.9), (3, 1.3), (4, 1.2), (5, 1.1)]:
        save_id = f"{step:08x}"
        entry = checkpoint(step, state=State.PENDING, metrics={"loss": loss})
        m = transitions.announce(m, entry, writer_epoch=1, settlements=settlements, gone=(), at=NOW)
        settlements = {save_id: FAILED} if step == 2 else {}
        m = m if step == 2 else committed(m, save_id)

    assert states(m) == {1: "committed", 2: "retired", 3: "retired", 4: "committed", 5: "committed"}
    assert m.best[0].ids == ("00000001",)


def test_the_first_commit_ends_the_protection_of_what_was_resumed_from() -> None:
    """The checkpoint resumed from is kept up to the first commit, which is the newer and better one (I5)."""
    m = manifest(*(checkpoint(step) for step in (1, 2, 3)), policy=Policy(keep_last=2))
    m = transitions.resume_from(m, "00000001", writer_epoch=1, at=NOW)
    assert m.entries[0].kept_because == ("resumed from",)
    assert states(transitions.prune(m, at=NOW)) == {1: "committed", 2: "committed", 3: "committed"}

    m = committed(announced(m, 4, "00000004"), "00000004")

    assert (m.resumed_from, states(m)) == (None, {1: "retired", 2: "retired", 3: "committed", 4: "committed"})


def test_a_commit_that_was_answered_late_is_a_success() -> None:
    """Committed already, by us or rolled forward by our successor, even retired since: nothing changes (I10)."""
    once = committed(manifest(checkpoint(1, state=State.PENDING)), "00000001")
    rolled = claimed(manifest(checkpoint(1, state=State.PENDING)), owner("b" * 16), s00000001=sealed())
    gone = manifest(checkpoint(1, state=State.RETIRED), writer_epoch=2)

    for m in (once, rolled, gone):
        assert transitions.commit(m, "00000001", sealed(), writer_epoch=1, at=NOW) is m


@pytest.mark.parametrize(
    ("m", "message"),
    [
        (manifest(), "save 00000001 was abandoned: save again"),
        (
            manifest(checkpoint(1, state=State.RETIRED, committed_at=None, retired_because="it failed")),
            r"save 00000001 was abandoned \(it failed\): save again",
        ),
    ],
)
def test_an_abandoned_save_cannot_be_committed(m: Manifest, message: str) -> None:
    """Retired is terminal: what was settled as abandoned never becomes committed, and says why."""
    with pytest.raises(ConflictError, match=message):
        transitions.commit(m, "00000001", sealed(), writer_epoch=1, at=NOW)


# -- fencing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act",
    [
        lambda m: transitions.announce(
            m, checkpoint(9, state=State.PENDING), writer_epoch=1, settlements={}, gone=(), at=NOW
        ),
        lambda m: transitions.announce(m, m.entries[1], writer_epoch=1, settlements={}, gone=(), at=NOW),
        lambda m: transitions.commit(m, "00000002", sealed(), writer_epoch=1, at=NOW),
        lambda m: transitions.commit(m, "0000dead", sealed(), writer_epoch=1, at=NOW),
        lambda m: transitions.settle(m, {"00000002": FAILED}, writer_epoch=1, at=NOW),
        lambda m: transitions.resume_from(m, "00000001", writer_epoch=1, at=NOW),
    ],
)
def test_a_replaced_writer_can_change_nothing(act: Callable[[Manifest], Manifest]) -> None:
    """An old process that wakes after a new one took over is told who did, and changes nothing (C13, I6)."""
    m = manifest(checkpoint(1), checkpoint(2, state=State.PENDING, writer_epoch=2), owner=owner(run_key="job-9"))
    with pytest.raises(FencedError, match=r"writer 1 .* replaced by writer 2, pid 4711 on node-1 \(run job-9\): stop"):
        act(m)


def test_a_replaced_writer_cannot_close_its_successors_run() -> None:
    """Closing is by token: the old owner's close changes nothing, the new one's does, once."""
    m = manifest(owner=owner("b" * 16))
    assert transitions.close(m, "a" * 16, at=NOW) is m
    assert transitions.close(manifest(owner=None), "a" * 16, at=NOW).owner is None

    closed = transitions.close(m, "b" * 16, at=NOW)

    assert closed.owner == replace(m.owner, closed=True)  # type: ignore[type-var]  # it has an owner
    assert transitions.close(closed, "b" * 16, at=NOW) is closed


# -- claim ---------------------------------------------------------------------------------------------------


def test_a_claim_takes_the_next_epoch_and_settles_everything_pending() -> None:
    """What is whole rolls forward, what is not is abandoned; nothing is pending after a claim (C1, C2, L10)."""
    before = manifest(checkpoint(1), checkpoint(2, state=State.PENDING), checkpoint(3, state=State.PENDING))
    after = claimed(before, owner("b" * 16, host="node-2"), s00000002=FAILED, s00000003=sealed(size_bytes=77))

    assert states(after) == {1: "committed", 2: "retired", 3: "committed"}
    assert (after.writer_epoch, after.commits, after.recent) == (2, 2, ("00000003", "00000001"))
    assert [e.size_bytes for e in after.committed] == [1000, 77]
    assert [(line.event, line.detail) for line in after.journal] == [
        ("claim", "pid 4711 on node-2, taking over from pid 4711 on node-1"),
        ("abandon", "the save failed: no space left"),
        ("roll-forward", None),
    ]


def test_a_claim_retires_nothing_by_rule() -> None:
    """A tighter policy rules from the claim on, but what it lets go of leaves at the first commit only (I9)."""
    before = manifest(*(checkpoint(step) for step in (1, 2, 3)))
    after = transitions.claim(
        before, owner("b" * 16), policy=Policy(keep_last=1), settlements={}, takeover="last_wins", at=NOW
    )

    assert states(after) == {1: "committed", 2: "committed", 3: "committed"}
    assert [e.kept_because for e in after.entries] == [(), (), ("last #1",)]
    assert (after.policy, after.recent) == (Policy(keep_last=1), ("00000003",))


def test_the_first_claim_of_a_run_takes_over_from_nobody() -> None:
    """A new run, or one that was closed, has no previous owner to speak of."""
    for before in (manifest(owner=None, writer_epoch=0), manifest(owner=owner(closed=True), writer_epoch=0)):
        after = claimed(before, owner("b" * 16))
        assert (after.writer_epoch, after.journal[-1].detail) == (1, "pid 4711 on node-1")


def test_refuse_means_that_a_second_job_fails() -> None:
    """With takeover="refuse" an open run of another job is not taken; the message names both (C8)."""
    before = manifest(owner=owner(host="node-1", run_key="job-1"))
    for by in (owner("b" * 16, host="node-2", run_key="job-2"), owner("b" * 16, host="node-1")):
        with pytest.raises(ConflictError, match=r"held by pid 4711 on node-1 \(run job-1\) since .* asked for by pid"):
            claimed(before, by, takeover="refuse")


@pytest.mark.parametrize(
    ("before", "by"),
    [
        (owner(run_key="job-1"), owner("b" * 16, host="node-2", run_key="job-1")),
        (owner(run_key="job-1", closed=True), owner("b" * 16, run_key="job-2")),
    ],
)
def test_refuse_lets_the_same_job_and_a_closed_run_pass(before: Owner, by: Owner) -> None:
    """The same job, restarted by its scheduler, is not a second one; a closed run is free."""
    assert claimed(manifest(owner=before), by, takeover="refuse").owner == by


A, B = owner("a" * 16, host="node-a"), owner("b" * 16, host="node-b")


def again(by: Owner, number: int) -> Owner:
    """The same job, started once more."""
    return replace(by, token=f"{number:08x}{by.token[:8]}")


@pytest.mark.parametrize(("one", "other", "host"), [(A, B, "node-b"), (B, A, "node-a")])
def test_the_third_claim_of_a_duel_is_refused(one: Owner, other: Owner, host: str) -> None:
    """Two jobs that a supervisor restarts take the run from each other; the third claim without a commit is refused (C8)."""
    m = claimed(claimed(manifest(owner=None), one), other)
    with pytest.raises(
        ConflictError, match=f"two jobs fight over this run: pid 4711 on {host} has claimed it between two"
    ):
        claimed(m, again(one, 1))

    forced = claimed(m, again(one, 1), takeover="force")

    assert (forced.owner, len(forced.claims)) == (again(one, 1), 3)


@pytest.mark.parametrize(
    "others",
    [
        [A, again(A, 1), again(A, 2), again(A, 3)],
        [A, B, again(B, 1), again(A, 1), again(A, 2)],
        [A, B, owner("c" * 16, host="node-c"), again(A, 1), again(B, 1)],
    ],
)
def test_restarts_and_moves_are_no_duel(others: list[Owner]) -> None:
    """One job restarted again and again, moved once, or moved from host to host, may claim."""
    m = manifest(owner=None)
    for by in others:
        m = claimed(m, by)

    assert (m.owner, m.writer_epoch) == (others[-1], 1 + len(others))


@pytest.mark.parametrize("end", ["commit", "close", "roll-forward in the claim", "roll-forward in an announce"])
def test_a_commit_or_a_close_ends_a_duel(end: str) -> None:
    """Alternating owners that make progress in between, however it was committed, are no duel."""
    m = announced(claimed(claimed(manifest(owner=None), A), B), 1, "00000001")
    settlements: dict[str, Settlement] = {"s00000001": FAILED}
    if end == "commit":
        m = committed(m, "00000001")
    elif end == "close":
        m = transitions.close(m, B.token, at=NOW)
    elif end == "roll-forward in the claim":
        settlements = {"s00000001": sealed()}
    else:
        m = announced(m, 2, "00000002", settlements={"00000001": sealed()})
        settlements = {"s00000002": FAILED}
    after = claimed(m, again(A, 1), **settlements)  # type: ignore[arg-type]  # settlements only

    assert [claim.identity for claim in after.claims] == ["host node-a"]


def test_a_claim_that_was_answered_late_is_not_made_twice() -> None:
    """Our token is there: the claim had landed, and the epoch does not rise again."""
    once = claimed(manifest(), B)
    assert claimed(once, B) is once


# -- small ones ----------------------------------------------------------------------------------------------


def test_what_was_retired_meanwhile_is_not_resumed_from() -> None:
    """A checkpoint that a person removed while it was being read cannot be protected any more."""
    m = manifest(checkpoint(1, state=State.RETIRED), checkpoint(2))
    for save_id in ("00000001", "0000dead"):
        assert transitions.resume_from(m, save_id, writer_epoch=1, at=NOW) is m


def test_settling_what_is_settled_changes_nothing() -> None:
    """Only pending entries are settled; committed, retired and unknown ones stay as they are."""
    m = manifest(checkpoint(1), checkpoint(2, state=State.RETIRED))
    settlements: dict[str, Settlement] = {"00000001": FAILED, "00000002": sealed(), "0000dead": FAILED}
    assert transitions.settle(m, settlements, writer_epoch=1, at=NOW) is m


def test_forgetting_says_what_is_gone() -> None:
    """The journal's line about a deleted checkpoint names why it was let go."""
    m = transitions.forget(manifest(checkpoint(1, state=State.RETIRED)), ["00000001"], at=NOW)
    line = m.journal[-1]

    assert (m.entries, line.event, line.id, line.step, line.detail) == ((), "delete", "00000001", 1, "not in last 3")


def test_changing_what_is_not_there_changes_nothing() -> None:
    """A missing entry, and a change that changes nothing, give back the same manifest."""
    m = manifest(checkpoint(1))
    assert transitions.change_entry(m, "0000dead", lambda e: replace(e, pinned=True)) is m
    assert transitions.change_entry(m, "00000001", lambda e: replace(e, pinned=False)) is m
    assert transitions.change_entry(m, "00000001", lambda e: replace(e, pinned=True)).entries[0].pinned


def test_a_prune_by_another_policy_leaves_the_stored_one() -> None:
    """A policy given to one command retires by it once; the lists go on following the stored one."""
    m = transitions.prune(manifest(*(checkpoint(step) for step in (1, 2, 3))), policy=Policy(keep_last=1), at=NOW)

    assert states(m) == {1: "retired", 2: "retired", 3: "committed"}
    assert (m.policy, m.entries[2].kept_because) == (Policy(), ("last #1",))


def test_a_stamp_is_one_revision_further() -> None:
    """Revision + 1 of what it is written upon, a fresh write id, which also ends the history."""
    base = manifest()
    stamp = transitions.stamped(replace(base, commits=5), base=base, write_id="8" * 16, at=NOW)

    assert (stamp.revision, stamp.write_id, stamp.updated_at, stamp.commits) == (8, "8" * 16, NOW, 5)
    assert stamp.history == (*base.history, "8" * 16)


def test_history_and_journal_are_bounded() -> None:
    """However long a run is, its manifest remembers the last 32 writes and the last 100 events."""
    m = manifest()
    for number in range(150):
        noted = transitions.note(m, "gc", at=NOW, detail=str(number))
        m = transitions.stamped(noted, base=m, write_id=f"{number:016x}", at=NOW)

    assert m.history == tuple(f"{n:016x}" for n in range(150 - HISTORY_LENGTH, 150))
    assert [line.detail for line in m.journal] == [str(n) for n in range(150 - JOURNAL_LENGTH, 150)]


# -- for any sequence of transitions -------------------------------------------------------------------------


@given(histories())
def test_every_transition_is_idempotent(story: Story) -> None:
    """Applied again, as after an answer that was lost, a transition gives back the very same manifest (I11)."""
    for move, before in story:
        transition = move.bind(before)
        once = transition(before)
        assert transition(once) is once, move.kind


@given(histories())
def test_the_lists_follow_from_the_entries(story: Story) -> None:
    """After any sequence of transitions ``best``, ``recent`` and every reason equal a recomputation (I4, S3)."""
    for move, before in story:
        after = move.bind(before)(before)
        assert transitions.recompute(after) is after, move.kind
        listed = {*after.recent, *(save_id for best in after.best for save_id in best.ids)}
        assert listed <= {e.id for e in after.committed if e.usable}
        assert not any(e.kept_because for e in after.in_state(State.RETIRED))


@given(histories())
def test_best_is_sort_all_take_n_at_every_moment(story: Story) -> None:
    """At every revision a reader could see, the best list is sorted, no longer than N, and misses none (S3, L1)."""
    for _, m in story:
        for rule, best in zip(m.policy.keep_best, m.best, strict=True):
            sign = 1 if rule.mode == "min" else -1
            rows = [(metric_value(e.metrics, rule.metric), e) for e in m.committed if e.usable]
            order = sorted((sign * value, e.seq, e.id) for value, e in rows if value is not None)
            assert list(best.ids) == [save_id for _, _, save_id in order][: rule.n]


@given(histories())
def test_the_way_of_an_entry_is_one_way(story: Story) -> None:
    """Pending becomes committed or retired, committed becomes retired, retired becomes gone, and nothing comes back."""
    allowed = {
        (None, State.PENDING),
        (State.PENDING, State.COMMITTED),
        (State.PENDING, State.RETIRED),
        (State.COMMITTED, State.RETIRED),
        (State.RETIRED, None),
    }
    gone: set[str] = set()
    for move, before in story:
        after = move.bind(before)(before)
        old = {e.id: e.state for e in before.entries}
        new = {e.id: e.state for e in after.entries}
        for save_id in old.keys() | new.keys():
            now, then = new.get(save_id), old.get(save_id)
            in_one_commit = move.kind == "commit" and (then, now) == (State.PENDING, State.RETIRED)
            assert now is then or (then, now) in allowed or in_one_commit, (move.kind, save_id)
        assert not gone & new.keys()
        gone |= old.keys() - new.keys()


@given(histories(kinds=(*BY_RULE, "pin", "hold", "mark", "damage", "metrics")))
def test_rules_never_retire_the_good_ones(story: Story) -> None:
    """What only rules let go of is neither pinned, held, damaged, resumed from, the newest usable nor among the best (I5)."""
    for move, before in story:
        after = move.bind(before)(before)
        stood = {e.id for e in before.committed}
        going = [e for e in after.in_state(State.RETIRED) if e.id in stood]
        usable = [e for e in after.committed if e.usable]
        for e in going:
            assert not e.pinned
            assert not e.held
            assert e.damaged is None
            assert e.id != after.resumed_from
            assert e.marks or any(other.seq > e.seq for other in usable), move.kind
            for best in after.best if move.kind == "commit" and not e.marks else ():
                rule = next(rule for rule in after.policy.keep_best if rule.metric == best.metric)
                value = metric_value(e.metrics, rule.metric)
                assert value is None or (rule.n is not None and len(best.ids) == rule.n)
        if stood:
            assert after.committed, "a run that has committed something is never empty again by rule"


@given(histories(), moves(["announce", "commit", "settle", "resume"]))
def test_a_fenced_writer_can_change_nothing(story: Story, move: Move) -> None:
    """After a claim every transition of the writer before it is refused, or is one that had landed already (I6)."""
    before = story[-1][1]
    transition = move.bind(before)
    pending = {f"s{e.id}": FAILED for e in before.in_state(State.PENDING)}
    after = claimed(before, owner("f" * 16), takeover="force", **pending)
    try:
        changed = transition(after)
    except FencedError:
        return
    assert changed is after


@given(histories())
def test_order_is_by_seq_and_seq_only_rises(story: Story) -> None:
    """Entries stand in the order of their announce, numbers are never given twice, epochs and commits never fall (L14)."""
    for move, before in story:
        after = move.bind(before)(before)
        seqs = [e.seq for e in after.entries]
        assert seqs == sorted(set(seqs))
        assert all(seq < after.next_seq for seq in seqs)
        new = [e for e in after.entries if before.find(e.id) is None]
        assert all(e.seq >= before.next_seq for e in new)
        assert (after.next_seq, after.writer_epoch, after.commits) >= (before.next_seq, before.writer_epoch, 0)
        assert after.commits >= before.commits
        order = [e.id for e in sorted(after.committed, key=lambda e: -e.seq) if e.usable]
        assert list(after.recent) == order[: after.policy.keep_last]


@given(histories())
def test_every_manifest_of_a_run_can_be_stored(story: Story) -> None:
    """Whatever was done to a run, its manifest is read back as it was written; journal and history stay bounded."""
    for _, m in story:
        assert decode_manifest(encode_manifest(m)) == m
        assert len(m.journal) <= JOURNAL_LENGTH
        assert len(m.history) <= HISTORY_LENGTH
        assert len(m.claims) <= 3


@given(histories(), st.integers(0, 3))
def test_nothing_is_pending_after_a_claim(story: Story, pick: int) -> None:
    """A claim leaves pending nothing that an earlier writer announced, and retires nothing that was committed."""
    before = story[-1][1]
    move = Move(kind="claim", pick=pick, step=0, metrics={}, policy=before.policy)
    after = move.bind(before)(before)

    assert after.in_state(State.PENDING) == ()
    assert {e.id for e in before.committed} <= {e.id for e in after.committed}
    assert after.writer_epoch == before.writer_epoch + 1
