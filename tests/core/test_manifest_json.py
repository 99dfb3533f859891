"""The manifest as bytes.

(Past 350 lines: a table of what is wrong with a document, a line each.)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.manifest_json import (
    MANIFEST_LIMIT_BYTES,
    decode_manifest,
    encode_manifest,
    entry_from_bytes,
    entry_to_bytes,
)
from cloudckpt.core.model import Best, Claim, JournalEvent, Manifest, State
from cloudckpt.core.policy import KeepBest, Policy
from cloudckpt.errors import FormatError
from cloudckpt.testing.builders import at, checkpoint, manifest, owner
from cloudckpt.testing.strategies import json_values, manifests

Document = dict[str, Any]
END = b"\n}\n"

#: One of everything.
FULL = manifest(
    checkpoint(100, metrics={"loss": 0.5, "acc": math.nan}, tags=("a",), pinned=True),
    checkpoint(200, state=State.RETIRED),
    checkpoint(300, metrics={"loss": 0.4}),
    checkpoint(400, state=State.PENDING),
    policy=Policy(keep_best=(KeepBest("loss", "min", 2),), keep_every=100, keep_within_s=60),
    owner=owner(run_key="job-7"),
    claims=(Claim(writer_epoch=1, identity="host node-1"),),
    resumed_from="00000064",
    journal=(
        JournalEvent(at=at(1), revision=7, event="claim"),
        JournalEvent(at=at(1), revision=7, event="announce", id="00000190", step=400, detail="by hand"),
    ),
    copies=(3, 5),
)


def document() -> Document:
    """The JSON of ``FULL`` without its digest, to be changed."""
    found: Document = json.loads(encode_manifest(FULL))
    del found["digest"]
    return found


def decoded(changed: Document) -> Manifest:
    """The manifest with this JSON."""
    return decode_manifest(json.dumps(changed).encode())


# -- round trip ----------------------------------------------------------------------------------------------


@given(manifests())
def test_a_manifest_survives_its_bytes(drawn: Manifest) -> None:
    """Decoding what was encoded gives an equal manifest, and encoding that gives the same bytes."""
    body = encode_manifest(drawn)
    found = decode_manifest(body)

    assert found == drawn
    assert encode_manifest(found) == body


def test_a_manifest_is_readable_with_cat() -> None:
    """UTF-8, sorted names, indented, a newline at the end; NaN as a word."""
    body = encode_manifest(replace(FULL, owner=owner(host="büro")))
    lines = body.decode("utf-8").splitlines()

    assert lines[:2] == ["{", ' "best": [']
    assert body.endswith(b"\n}\n")
    assert '  "host": "büro",' in lines
    assert '    "acc": "nan",' in lines
    assert list(document()) == sorted(document())


def test_the_root_of_an_entry_is_not_stored() -> None:
    """A run that was moved to another bucket is still the same run (L13)."""
    moved = replace(FULL, entries=tuple(replace(e, root="s3://bucket/run") for e in FULL.entries))
    assert encode_manifest(moved) == encode_manifest(FULL)


def _objects(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if isinstance(value, dict):
        yield path, value
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from _objects(inner, (*path, name))


@pytest.mark.parametrize("where", ["root", "policy", "owner", "entry", "event"])
@given(value=json_values())
def test_unknown_fields_survive(where: str, value: Any) -> None:
    """A field of a newer version is still there after an older version read the manifest and wrote it."""
    changed = document()
    place = {
        "root": changed,
        "policy": changed["policy"],
        "owner": changed["owner"],
        "entry": changed["entries"][1],
        "event": changed["journal"][0],
    }[where]
    place["later"] = value

    found = json.loads(encode_manifest(decoded(changed)))
    del found["digest"]
    assert found == changed


def test_the_last_field_is_the_digest_of_the_rest() -> None:
    """Anybody can check a manifest: cut the last field off and take the SHA-256."""
    body = encode_manifest(FULL)
    rest, field = body.rsplit(b',\n "digest": ', 1)

    assert field == f'"sha256:{hashlib.sha256(rest + END).hexdigest()}"'.encode() + END


def test_a_manifest_without_a_digest_is_read() -> None:
    """From before there was one, or edited by a person who took it out; what is written next has one."""
    rest, _ = encode_manifest(FULL).rsplit(b',\n "digest": ', 1)

    assert decode_manifest(rest + END) == FULL


def test_a_digest_that_an_older_writer_carried_along_is_none() -> None:
    """It keeps fields that it does not know, sorted by name: what it wrote since is right, and the digest is not."""
    stale = json.loads(encode_manifest(FULL)) | {"commits": FULL.commits + 1}
    found = decode_manifest(json.dumps(stale, sort_keys=True, indent=1).encode() + b"\n")

    assert found == replace(FULL, commits=FULL.commits + 1)
    assert decode_manifest(encode_manifest(found)) == found


def test_no_bit_that_flips_is_believed() -> None:
    """Whatever bit of whatever byte: the manifest is refused, or means the same."""
    body = encode_manifest(FULL)
    for place in range(len(body)):
        flipped = bytearray(body)
        flipped[place] ^= 1 << place % 8
        try:
            found = decode_manifest(bytes(flipped))
        except FormatError as exc:
            assert "manifest.json" in str(exc)
        else:
            assert replace(found, extra={}) == FULL, place  # the name of the field itself


def test_the_refusal_says_what_to_do_after_an_edit() -> None:
    """A person who changed a number is told why it is refused, and how it is not."""
    body = encode_manifest(FULL).replace(b'"revision": ', b'"revision": 1', 1)
    with pytest.raises(FormatError, match=r'changed after it was written.*take the line with "digest" out'):
        decode_manifest(body)


# -- bad input -----------------------------------------------------------------------------------------------


def _set(*path: Any) -> Callable[[Document], None]:
    *way, name, value = path

    def change(changed: Document) -> None:
        place: Any = changed
        for step in way:
            place = place[step]
        place[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("entries", 3, "step", "1000"), 'entries[3].step: expected an integer >= 0, got "1000"'),
        (_set("entries", 3, "step", 10**20), f"entries[3].step: expected an integer <= {10**18}"),
        (_set("entries", 0, "seq", 0), "entries[0].seq: expected an integer >= 1, got 0"),
        (_set("entries", 0, "state", "gone"), 'entries[0].state: expected one of pending, committed, retired, got "gone"'),
        (_set("entries", 0, "id", "../../x"), 'entries[0].id: expected a save id, 8 lower-case hex digits, got "../../x"'),
        (_set("entries", 0, "metrics", "loss", "low"), 'entries[0].metrics["loss"]: expected a number, got "low"'),
        (_set("entries", 0, "metrics", "loss", 10**400), 'entries[0].metrics["loss"]: expected a number'),
        (_set("entries", 0, "tags", [1]), "entries[0].tags[0]: expected a string, got 1"),
        (_set("entries", 0, "pinned", 1), "entries[0].pinned: expected true or false, got 1"),
        (_set("entries", 0, "index_digest", None), "entries[0]: a committed entry needs index_digest and committed_at"),
        (_set("entries", 0, "committed_at", None), "entries[0]: a committed entry needs index_digest and committed_at"),
        (_set("entries", 0, "index_digest", "md5:0"), "entries[0].index_digest: expected a digest"),
        (_set("entries", 0, "committed_at", "noon"), "entries[0].committed_at: expected a time"),
        (_set("entries", 0, 7), "entries[0]: expected an object, got 7"),
        (_set("entries", {}), "entries: expected an array, got an object"),
        (_set("entries", 1, "id", "00000064"), "entries: two entries have the same id"),
        (_set("entries", 1, "seq", 100), "entries: seq must rise from entry to entry and stay below next_seq"),
        (_set("entries", 1, "seq", 350), "entries: seq must rise"),
        (_set("next_seq", 400), "entries: seq must rise from entry to entry and stay below next_seq"),
        (_set("run_id", "x"), 'run_id: expected 32 lower-case hex digits, got "x"'),
        (_set("revision", 0), "revision: expected an integer >= 1, got 0"),
        (_set("write_id", "0" * 16), "history: does not hold write_id"),
        (_set("history", 0, "6"), 'history[0]: expected 16 lower-case hex digits, got "6"'),
        (_set("owner", "me"), 'owner: expected an object, got "me"'),
        (_set("owner", "pid", "4711"), 'owner.pid: expected an integer >= 0, got "4711"'),
        (_set("entries", 0, "writer_epoch", 0), "entries[0].writer_epoch: expected an integer >= 1, got 0"),
        (_set("claims", 0, "writer_epoch", -1), "claims[0].writer_epoch: expected an integer >= 0, got -1"),
        (_set("policy", None), "policy: expected an object, got null"),
        (_set("policy", "keep_last", 0), "policy.keep_last: expected an integer >= 1, got 0"),
        (_set("policy", "keep_best", 0, "metric", ""), "policy.keep_best[0].metric: expected a string that is not empty"),
        (_set("policy", "keep_best", 0, "mode", "up"), 'policy.keep_best[0].mode: expected one of min, max, got "up"'),
        (_set("policy", "keep_within_s", -5), "policy: keep_within=-5: expected a positive number of seconds"),
        (_set("policy", "keep_within_s", 10**400), "policy.keep_within_s: expected a number"),
        (_set("best", 0, "ids", ["x"]), 'best[0].ids[0]: expected a save id, 8 lower-case hex digits, got "x"'),
        (_set("recent", 5), "recent: expected an array, got 5"),
        (_set("resumed_from", ".."), 'resumed_from: expected a save id, 8 lower-case hex digits, got ".."'),
        (_set("journal", 1, "step", -1), "journal[1].step: expected an integer >= 0, got -1"),
        (_set("copies", ["3"]), 'copies[0]: expected an integer >= 0, got "3"'),
        (_set("updated_at", None), "updated_at: expected a time"),
        (_set("requires", "shared"), 'requires: expected an array, got "shared"'),
    ],
)  # fmt: skip
def test_every_problem_is_named_by_its_place(change: Callable[[Document], None], message: str) -> None:
    """A wrong value anywhere is refused, and the message says where it stands and what was expected (C11)."""
    changed = document()
    change(changed)
    with pytest.raises(FormatError) as refused:
        decoded(changed)

    assert "manifest.json is malformed:" in str(refused.value)
    assert f"\n  {message}" in str(refused.value)


def test_one_error_lists_all_problems() -> None:
    """Two wrong values, one error, two lines."""
    changed = document()
    changed["revision"] = "7"
    changed["entries"][0]["step"] = None
    with pytest.raises(FormatError) as refused:
        decoded(changed)

    assert str(refused.value).splitlines()[1:] == [
        '  revision: expected an integer >= 1, got "7"',
        "  entries[0].step: expected an integer >= 0, got null",
    ]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "s3://b/manifest.json is not valid JSON"),
        (encode_manifest(FULL)[:-200], "s3://b/manifest.json is not valid JSON"),
        (b" " * (MANIFEST_LIMIT_BYTES + 1), "bytes, more than the"),
        (encode_manifest(replace(FULL, format=2)), "upgrade cloudckpt"),
    ],
)
def test_the_object_that_cannot_be_read_is_named(body: bytes, message: str) -> None:
    """Truncated, endless or from a newer version: the error names the object by its URL (C11)."""
    with pytest.raises(FormatError) as refused:
        decode_manifest(body, what="s3://b/manifest.json")

    assert message in str(refused.value)


WRONG: list[Any] = [
    None,
    True,
    -1,
    0,
    10**400,
    2**64,
    1.5,
    "",
    "..",
    "nan",
    [],
    {},
    [[]],
    [None],
    {"": None},
    "2026-01-31",
]


@given(st.data())
def test_wrong_types_anywhere_are_refused_or_mean_what_they_say(data: st.DataObject) -> None:
    """Any value put at any place is refused with a FormatError, or gives a manifest that survives its own bytes."""
    changed = document()
    places = [(place, name) for _, place in _objects(changed) for name in place]
    place, name = data.draw(st.sampled_from(places))
    place[name] = data.draw(st.sampled_from(WRONG) | json_values())
    try:
        found = decoded(changed)
    except FormatError as exc:
        assert str(exc)
    else:
        assert decode_manifest(encode_manifest(found)) == found


@given(st.data())
def test_a_missing_field_is_refused_or_means_none(data: st.DataObject) -> None:
    """Any field taken away is refused with a FormatError, unless it is one that may be absent."""
    changed = document()
    path, place = data.draw(st.sampled_from([(path, place) for path, place in _objects(changed) if place]))
    name = data.draw(st.sampled_from(list(place)))
    del place[name]
    optional = {
        "owner", "resumed_from", "run_key", "damaged", "retired_because", "keep_last", "keep_every", "keep_within_s",
        "n", "id", "step", "detail", "loss", "acc", "index_digest", "committed_at",
    }  # fmt: skip
    if name in optional and not (path[:1] == ("entries",) and name in {"id", "step"}):
        return
    with pytest.raises(FormatError, match=name):
        decoded(changed)


@given(st.data())
def test_changed_bytes_are_refused_or_make_a_manifest(data: st.DataObject) -> None:
    """Bytes changed, removed or put in anywhere: a FormatError or a manifest that survives its own bytes, nothing else."""
    body = bytearray(encode_manifest(FULL))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(body)))
        end = min(len(body), start + data.draw(st.sampled_from([0, 1, 1, 1, 20])))
        body[start:end] = data.draw(
            st.binary(max_size=2) | st.sampled_from([b'"', b"{", b"9", b"null", b"-", b"1e999"])
        )
    try:
        found = decode_manifest(bytes(body))
    except FormatError as exc:
        assert "manifest.json" in str(exc)
    else:
        assert replace(found, extra={}) == FULL


def test_the_lists_of_a_decoded_manifest_are_as_stored() -> None:
    """``best`` and ``recent`` are read, not recomputed: a reader sees what the writer of this revision said (I3)."""
    stored = replace(FULL, best=(Best(metric="acc", mode="max", ids=("00000064",)),), recent=())
    found = decode_manifest(encode_manifest(stored))

    assert (found.best, found.recent) == (stored.best, ())


@given(manifests())
def test_an_entry_survives_the_way_to_another_rank(drawn: Manifest) -> None:
    """Alone, with everything that it has but its root."""
    for entry in drawn.entries:
        assert entry_from_bytes(entry_to_bytes(entry)) == entry


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"[]", "an entry is not a JSON object"),
        (b"{}", "id"),
        (b"\xff", "not valid JSON"),
        (b'{"id": 1, "id": 2}', "twice"),
    ],
)
def test_what_is_no_entry_is_refused(body: bytes, message: str) -> None:
    """By name."""
    with pytest.raises(FormatError, match=message):
        entry_from_bytes(body)
