from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core import keys
from cloudckpt.core.garbage import GarbagePlan, Orphan, plan_garbage
from cloudckpt.core.keys import Kind
from cloudckpt.core.model import Checkpoint, State
from cloudckpt.testing.builders import checkpoint, manifest
from cloudckpt.testing.strategies import checkpoint_lists

PAYLOAD = "model-00000-of-00001.safetensors"

RUN = manifest(
    checkpoint(100, seq=1, id="aaaa0001"),
    checkpoint(200, seq=2, id="aaaa0002", state=State.PENDING),
    checkpoint(300, seq=3, id="aaaa0003", state=State.RETIRED),
    checkpoint(400, seq=4, id="aaaa0004", state=State.RETIRED),
)

KEPT = None
NOT_OURS = "foreign"
UNNAMED = "no entry of the manifest names its folder"


@pytest.mark.parametrize(
    ("key", "verdict"),
    [
        ("manifest.json", KEPT),
        ("manifest-replaced-00c0ffee.json", KEPT),
        (".cloudckpt.lock", KEPT),
        (".cloudckpt-swap.tmp", KEPT),
        (".cloudckpt-probe-00c0ffee", "left by a probe of the store"),
        (f"checkpoint-100.aaaa0001/{PAYLOAD}", KEPT),
        ("checkpoint-100.aaaa0001/checkpoint.json", KEPT),
        (f"checkpoint-100.aaaa0001/.{PAYLOAD}.tmp", "left by a put that never ended"),
        (f"checkpoint-200.aaaa0002/{PAYLOAD}", KEPT),
        (f"checkpoint-200.aaaa0002/.{PAYLOAD}.tmp", KEPT),
        (f"checkpoint-300.aaaa0003/{PAYLOAD}", "retired: not in last 3"),
        (f"checkpoint-300.aaaa0003/.{PAYLOAD}.tmp", "retired: not in last 3"),
        (f"checkpoint-500.bbbb0005/{PAYLOAD}", UNNAMED),
        ("checkpoint-101.aaaa0001/checkpoint.json", UNNAMED),
        ("checkpoint-100.aaaa0001/notes.txt", NOT_OURS),
        ("checkpoint-300.aaaa0003/notes.txt", NOT_OURS),
        ("checkpoint-99.partial/model.safetensors", NOT_OURS),
        ("../other-run/manifest.json", NOT_OURS),
        ("README.md", NOT_OURS),
    ],
)
def test_who_needs_each_key(key: str, verdict: str | None) -> None:
    """Live folders keep their bytes, retired and unnamed ones do not, and what is not ours is only reported (L15, I7, I12)."""
    plan = plan_garbage(RUN, [(key, 7)])

    orphans = () if verdict in {KEPT, NOT_OURS} else (Orphan(key=key, size_bytes=7, reason=str(verdict)),)
    assert (plan.orphans, plan.foreign) == (orphans, (key,) if verdict == NOT_OURS else ())
    assert plan.size_bytes == 7 * len(orphans)


def test_the_newest_two_copies_of_the_manifest_stay() -> None:
    """Repair starts from the newest readable copy: two are kept, older ones go."""
    listing = [(keys.manifest_copy(revision), 1) for revision in (1_000_000, 40, 20, 60)]
    plan = plan_garbage(RUN, listing)

    assert [(o.key, o.reason) for o in plan.orphans] == [
        ("manifest-000040.json", "an older copy of the manifest; the newest 2 are kept"),
        ("manifest-000020.json", "an older copy of the manifest; the newest 2 are kept"),
    ]


def test_a_copy_that_the_write_behind_the_plan_has_left_is_one_of_the_two() -> None:
    """It came after the listing; one that an earlier write has named and that is not listed could not be written."""
    listing = [(keys.manifest_copy(revision), 1) for revision in (10, 19)]
    written = replace(RUN, revision=20, copies=(19, 20))
    assert [o.key for o in plan_garbage(written, listing).orphans] == ["manifest-000010.json"]
    assert plan_garbage(replace(written, revision=21), listing).orphans == ()
    assert plan_garbage(written, [*listing[1:], (keys.manifest_copy(20), 1)]).orphans == ()


def test_retired_entries_of_which_nothing_is_left_can_be_forgotten() -> None:
    """Of two retired entries one still has bytes; the other is named as empty."""
    assert plan_garbage(RUN, [(f"checkpoint-300.aaaa0003/{PAYLOAD}", 7)]).empty_of == ("aaaa0004",)


def test_an_empty_listing_has_no_garbage() -> None:
    """Nothing there, nothing to delete."""
    assert plan_garbage(manifest(), []) == GarbagePlan(orphans=(), foreign=(), empty_of=())


@given(checkpoint_lists(), st.lists(st.text(max_size=20), max_size=5))
def test_garbage_is_exactly_what_no_live_entry_owns(entries: list[Checkpoint], foreign: list[str]) -> None:
    """Every key of a pending or committed entry stays, every one of a retired or unknown one goes, foreign ones stay (I7, I8, I12)."""
    unknown = checkpoint(7, seq=4711)
    owned = {
        key: e.state if e is not unknown else None
        for e in [*entries, unknown]
        for key in (keys.index_key(e.step, e.id), keys.payload_key(e.step, e.id, PAYLOAD))
    }
    others = [key for key in foreign if keys.parse(key).kind is Kind.FOREIGN]
    plan = plan_garbage(manifest(*entries), [(key, 1) for key in [*owned, *others]])

    assert {o.key for o in plan.orphans} == {key for key, state in owned.items() if state in {None, State.RETIRED}}
    assert list(plan.foreign) == others
    assert plan.empty_of == ()
