"""The questions asked at each write and delete find what is wrong with it, and let pass what is sound."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from cloudckpt.core import edits, keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.manifest_json import encode_manifest
from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.policy import KeepBest, Policy
from cloudckpt.errors import StorageError
from cloudckpt.storage import Landed, MemoryStorage
from cloudckpt.testing import Watch, oracle
from cloudckpt.testing.builders import at, checkpoint, manifest, owner, sealed
from cloudckpt.testing.invariants import delete_violations, manifest_violations, put_violations, step_violations
from cloudckpt.testing.strategies import BY_RULE, Move, checkpoint_lists, histories, policies

POLICY = Policy(keep_last=1, keep_best=(KeepBest("loss", "min"),))
BEST = checkpoint(1, metrics={"loss": 1.0})
NEWEST = checkpoint(2, metrics={"loss": 2.0})
PENDING = checkpoint(3, state=State.PENDING, metrics={"loss": 3.0})
RUN = manifest(BEST, NEWEST, PENDING, policy=POLICY)

PAYLOAD = "model-00000-of-00001.safetensors"

#: The clock of a busy machine fails no property.
QUIETLY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def written(after: Manifest, upon: Manifest = RUN) -> Manifest:
    """The manifest as ``transact`` writes it."""
    return transitions.stamped(after, base=upon, write_id=f"{upon.revision + 1:016x}", at=at(500))


def entry(change: Callable[[Checkpoint], Checkpoint], number: int = 0) -> Manifest:
    """The run with one entry changed, and its lists as they follow from that."""
    entries = tuple(change(e) if n == number else e for n, e in enumerate(RUN.entries))
    return transitions.recompute(replace(RUN, entries=entries))


# -- the rules, read once more -------------------------------------------------------------------------------


@QUIETLY
@given(checkpoint_lists(), policies())
def test_a_plain_reading_of_the_policy_agrees_with_the_plan(entries: list[Checkpoint], policy: Policy) -> None:
    """Two people who read the rules apart from each other found the same best, newest and protected entries (I4, I5)."""
    assert [*manifest_violations(manifest(*entries, policy=policy))] == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pinned": True}, "pinned"),
        ({"held": True}, "held"),
        ({"damaged": "a byte flipped"}, "damaged, which only a person deletes"),
    ],
)
def test_what_protects_an_entry_is_said(change: dict[str, Any], why: str) -> None:
    """An old entry that no rule chooses is protected by what a person, a repair or a reader wrote down."""
    old = checkpoint(1, **change)
    assert oracle.protected(manifest(old, checkpoint(2), policy=Policy(keep_last=1)))[old.id] == why


def test_what_the_run_resumed_from_is_protected() -> None:
    """Until its first commit the checkpoint that training goes on from is not let go."""
    run = manifest(checkpoint(1), checkpoint(2), policy=Policy(keep_last=1), resumed_from="00000001")
    assert oracle.protected(run) == {"00000001": "what the run resumed from", "00000002": "the newest usable"}


def test_the_newest_whole_one_is_protected_where_none_is_usable() -> None:
    """All marked: the newest of them stays."""
    run = manifest(checkpoint(1, marks=("odd",)), checkpoint(2, marks=("odd",)), policy=Policy(keep_last=1))
    assert oracle.protected(run) == {"00000002": "the newest, and none is usable"}
    assert oracle.protected(manifest(policy=POLICY)) == {}


# -- one step ------------------------------------------------------------------------------------------------

COMMITTED = written(transitions.commit(RUN, PENDING.id, sealed(), writer_epoch=1, at=at(100)))

SOUND: dict[str, tuple[Manifest | None, Manifest]] = {
    "a new run": (None, manifest(policy=POLICY)),
    "a commit": (RUN, COMMITTED),
    "a claim that rolls forward": (
        RUN,
        written(
            transitions.claim(
                RUN,
                owner("b" * 16),
                policy=POLICY,
                settlements={PENDING.id: sealed()},
                takeover="last_wins",
                at=at(100),
            )
        ),
    ),
    "damage that was found": (RUN, written(edits.damage(RUN, BEST.id, "a byte flipped", at=at(100)))),
    "retired bytes are gone": (
        COMMITTED,
        written(transitions.forget(COMMITTED, {NEWEST.id}, at=at(101)), COMMITTED),
    ),
    "a repair": (
        RUN,
        transitions.recompute(replace(RUN, run_id="f" * 32, revision=99, entries=RUN.entries[:1])),
    ),
}

WRONG: dict[str, tuple[Manifest, str]] = {
    "epoch falls": (written(replace(RUN, writer_epoch=0)), "I6 the writer epoch falls from 1 to 0"),
    "epoch jumps": (written(replace(RUN, writer_epoch=3)), "I6 the writer epoch jumps from 1 to 3"),
    "owner without an epoch": (written(replace(RUN, owner=owner("b" * 16))), "I6 writer 1 is b{16} and was a{16}"),
    "a write is lost": (replace(written(RUN), revision=7), "I6 revision 7 was written upon 7"),
    "an entry vanishes": (
        written(transitions.recompute(replace(RUN, entries=RUN.entries[1:]))),
        "I7 00000001 goes from committed to nowhere",
    ),
    "an entry comes back": (
        written(transitions.recompute(replace(COMMITTED, entries=RUN.entries)), COMMITTED),
        "I7 00000002 goes from retired to committed",
    ),
    "announced by somebody else": (
        written(replace(RUN, entries=(*RUN.entries, checkpoint(4, state=State.PENDING, writer_epoch=0)))),
        "I6 checkpoint-4.00000004 is announced by writer 0",
    ),
    "committed by somebody else": (
        written(transitions.recompute(replace(RUN, entries=(*RUN.entries[:2], checkpoint(3, writer_epoch=0))))),
        "I6 checkpoint-3.00000003 commits under writer 0",
    ),
    "the best is retired": (
        written(entry(lambda e: replace(e, state=State.RETIRED))),
        "I5 00000001 is among the best by loss, and a rule retired it",
    ),
    "the newest is retired": (
        written(entry(lambda e: replace(e, state=State.RETIRED), 1)),
        "I5 00000002 is the newest usable, and a rule retired it",
    ),
    "the best is replaced by nothing new": (
        written(entry(lambda e: replace(e, metrics={"loss": 9.0}))),
        "I9 00000001 leaves the best by loss",
    ),
    "lists are stale": (written(replace(RUN, recent=())), "I4 recent is"),
}


@pytest.mark.parametrize("what", SOUND)
def test_a_sound_step_passes(what: str) -> None:
    """What the transitions of the product do is never held against them."""
    before, after = SOUND[what]
    found = [*step_violations(before, after)]
    assert found == []


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_step_is_found(what: str) -> None:
    """Each way in which one write can break a promise has its number and its sentence."""
    after, says = WRONG[what]
    before = COMMITTED if what == "an entry comes back" else RUN
    found = [*step_violations(before, after)]
    assert any(re.match(says, line) for line in found), found


def test_a_person_may_take_the_best_away() -> None:
    """By hand the best is retired, or loses its place, and nothing is said."""
    for after in (
        edits.retire(RUN, [BEST.id], "removed by hand", at=at(100)),
        edits.mark(RUN, BEST.id, "diverged", at=at(100)),
        edits.report_metrics(RUN, BEST.id, {"loss": 9.0}, at=at(100)),
    ):
        assert [*step_violations(RUN, written(after), by_hand=True)] == []
        assert [*step_violations(RUN, written(after))] != []


@QUIETLY
@given(histories(kinds=BY_RULE))
def test_no_transition_that_follows_a_rule_is_ever_wrong(story: list[tuple[Move, Manifest]]) -> None:
    """Any sequence of announces, commits, claims and prunes passes step by step."""
    for move, before in story:
        after = move.bind(before)(before)
        if after is not before and move.kind != "prune_otherwise":  # a person's policy, for once
            found = [*step_violations(before, written(after, before))]
            assert found == [], move.kind


# -- objects -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "overwrites", "found"),
    [
        (f"checkpoint-3.00000003/{PAYLOAD}", False, None),
        ("manifest.json", True, None),
        ("manifest-000020.json", False, None),
        (".cloudckpt-probe-00c0ffee", True, None),
        (f"checkpoint-3.00000003/{PAYLOAD}", True, "I2 "),
        ("checkpoint-3.00000003/checkpoint.json", True, "I2 "),
        (f"checkpoint-4.00000004/{PAYLOAD}", False, "I7 "),
        ("notes.txt", False, "I12 "),
    ],
)
def test_what_is_wrong_with_a_put(key: str, overwrites: bool, found: str | None) -> None:
    """Only the manifest is overwritten, no byte comes before its announce, and foreign keys are left alone."""
    violations = [*put_violations(key, overwrites=overwrites, named={"00000003"})]
    assert [line[: len(found or "")] for line in violations] == ([found] if found else [])


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (f"checkpoint-2.00000002/{PAYLOAD}", None),
        (f"checkpoint-9.00000009/{PAYLOAD}", None),
        (f"checkpoint-1.00000001/.{PAYLOAD}.tmp", None),
        ("manifest-000020.json", None),
        (f"checkpoint-1.00000001/{PAYLOAD}", "I7 "),
        (f"checkpoint-3.00000003/.{PAYLOAD}.tmp", "I11 "),
        (f"checkpoint-3.00000003/{PAYLOAD}", "I11 "),
        ("manifest.json", "I2 "),
        ("notes.txt", "I12 "),
    ],
)
def test_what_is_wrong_with_a_delete(key: str, found: str | None) -> None:
    """Only what is retired or named nowhere may go; a save whose commit is in doubt least of all."""
    run = replace(COMMITTED, entries=(BEST, replace(NEWEST, state=State.RETIRED), PENDING))
    violations = [*delete_violations(key, run, doubted={PENDING.id})]
    assert [line[: len(found or "")] for line in violations] == ([found] if found else [])
    assert [*delete_violations(f"checkpoint-1.00000001/{PAYLOAD}", None)] == []


# -- the watch -----------------------------------------------------------------------------------------------


def test_a_watched_run_is_judged_as_it_happens() -> None:
    """Each view's writes, puts and deletes are looked at, and carried out all the same."""
    watch = Watch(MemoryStorage())
    view = watch.view()
    created = view.create(keys.MANIFEST, encode_manifest(RUN))
    assert isinstance(created, Landed)
    assert (watch.violations, watch.named, watch.committed) == (
        [],
        {BEST.id, NEWEST.id, PENDING.id},
        {BEST.id, NEWEST.id},
    )
    key = keys.payload_key(3, PENDING.id, PAYLOAD)
    view.put(key, [b"123"], size_bytes=3)
    view.put(key, [b"123"], size_bytes=3)
    assert watch.violations == []
    view.put(key, [b"124"], size_bytes=3)
    assert view.delete([key, "never/there"]) == {}
    stale = view.replace(keys.MANIFEST, encode_manifest(RUN), expecting="9")
    assert not isinstance(stale, Landed)
    assert [line[:3] for line in watch.violations] == ["I2 ", "I7 "]
    assert [item.key for item in view.list()] == [keys.MANIFEST]


def test_what_a_person_does_is_told_apart() -> None:
    """The same write is fine by hand and wrong by rule."""
    going = written(edits.mark(RUN, BEST.id, "diverged", at=at(100)))
    for by_hand in (True, False):
        watch = Watch(MemoryStorage())
        created = watch.view().create(keys.MANIFEST, encode_manifest(RUN))
        assert isinstance(created, Landed)
        watch.view(by_hand=by_hand).replace(keys.MANIFEST, encode_manifest(going), expecting=created.version)
        assert (watch.violations == []) is by_hand


def test_a_watch_knows_what_was_there_before() -> None:
    """A run that exists already is taken as it is."""
    inner = MemoryStorage()
    inner.create(keys.MANIFEST, encode_manifest(RUN))
    watch = Watch(inner)
    assert watch.named == {e.id for e in RUN.entries}
    watch.view().create(keys.manifest_copy(7), b"{}")
    assert watch.violations == []
    with pytest.raises(StorageError):
        watch.view().read("nothing", limit_bytes=1)


@pytest.mark.parametrize("by_hand", [True, False])
def test_views_share_what_is_known_of_conditions(by_hand: bool) -> None:
    """What one view learns of the store, every view knows."""
    watch = Watch(MemoryStorage())
    view = watch.view(by_hand=by_hand)
    view.conditions = watch.inner.conditions
    assert watch.view().conditions is watch.inner.conditions
