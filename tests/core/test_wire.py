from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given

from cloudckpt.core.wire import Reader, canonical, metric_to_json, metrics_to_json, parse_document
from cloudckpt.errors import FormatError
from cloudckpt.testing.strategies import json_values

LIMIT = 1_000_000


def parse(body: bytes) -> dict[str, Any]:
    """The document in ``body``, called ``x.json``."""
    return parse_document(body, what="x.json", limit_bytes=LIMIT)


def problems(value: object, read: Callable[[Reader], object]) -> list[str]:
    """What a reader has to say about one value, found at ``here``."""
    found: list[str] = []
    read(Reader(value, "here", found))
    return found


# -- documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "x.json is not valid JSON"),
        (b"\xff\xfe", "x.json is not valid JSON"),
        (b"\xef\xbb\xbf{}", "x.json is not valid JSON"),
        (b'{"format": 1', "x.json is not valid JSON (Expecting"),
        (b'{"format": 1,}', "x.json is not valid JSON"),
        (b"[1]", "x.json is not a JSON object"),
        (b"null", "x.json is not a JSON object"),
        (b'{"format": 1, "a": NaN}', "NaN is not JSON"),
        (b'{"format": 1, "a": -Infinity}', "-Infinity is not JSON"),
        (b'{"format": 1, "a": 1e999}', "the number 1e999 is too large"),
        (b'{"format": 1, "a": ' + b"9" * 5000 + b"}", "x.json is not valid JSON"),
        (b'{"format": 1, "a": 1, "b": 2, "a": 3}', 'the name "a" occurs twice in one object'),
        (b'{"format": 1, "a": [{"b": 1, "b": 1}]}', 'the name "b" occurs twice in one object'),
        (b'{"format": 1, "a": ' + b"[" * 100_000, "x.json is nested too deeply"),
        (b"{" + b" " * LIMIT + b"}", "x.json has 1000002 bytes, more than the 1000000 that are read"),
        (b"{}", "x.json: format: expected an integer >= 1, got null"),
        (b'{"format": "1"}', 'x.json: format: expected an integer >= 1, got "1"'),
        (b'{"format": true}', "x.json: format: expected an integer >= 1, got true"),
        (b'{"format": 0}', "x.json: format: expected an integer >= 1, got 0"),
        (b'{"format": [[[[]]]]}', "x.json: format: expected an integer >= 1, got an array"),
        (b'{"format": 2}', "x.json has format 2 and this cloudckpt reads formats up to 1: upgrade cloudckpt"),
    ],
)
def test_what_is_no_document_is_refused(body: bytes, message: str) -> None:
    """Truncated, repeated, not finite, nested without end, too long or from the future: refused, and told why (C11)."""
    with pytest.raises(FormatError) as refused:
        parse(body)

    assert message in str(refused.value)


def test_a_document_that_repeats_itself_endlessly_is_refused_quickly() -> None:
    """A hostile object with very many names costs one pass to refuse."""
    body = json.dumps({"format": 1, **{f"n{n}": n for n in range(60_000)}}).encode()
    with pytest.raises(FormatError, match="occurs twice"):
        parse(body[:-1] + b', "n59999": 0}')


@given(json_values())
def test_canonical_bytes_keep_every_value(value: Any) -> None:
    """Whatever JSON can say is read back as it was, and written again as the same bytes."""
    document = {"format": 1, "value": value}
    for readable in (True, False):
        body = canonical(document, readable=readable)
        assert parse(body) == document
        assert canonical(parse(body), readable=readable) == body


def test_the_readable_form_is_sorted_and_indented() -> None:
    """A manifest is read with ``cat``: names sorted, one to a line, text as UTF-8, a newline at the end."""
    assert canonical({"b": "ü", "a": [1]}, readable=True) == '{\n "a": [\n  1\n ],\n "b": "ü"\n}\n'.encode()


def test_the_compact_form_keeps_its_order() -> None:
    """In an index the order of names is content."""
    assert canonical({"b": 1, "a": 2}, readable=False) == b'{"b": 1, "a": 2}\n'


def test_a_name_that_is_no_text_is_escaped() -> None:
    """A lone surrogate, such as an undecodable file name has, survives in JSON's own escapes."""
    document = {"format": 1, "name": "\udcff"}
    assert canonical(document, readable=False) == b'{"format": 1, "name": "\\udcff"}\n'
    assert parse(canonical(document, readable=True)) == document


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_never_written(value: float) -> None:
    """A value other readers of JSON would choke on is refused where it is written."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"a": value}, readable=True)


@pytest.mark.parametrize(
    ("value", "spelled"), [(0.5, 0.5), (3, 3), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
def test_metrics_spell_what_json_cannot(value: float, spelled: object) -> None:
    """NaN and infinities are recorded as words and read back as what they were."""
    assert metric_to_json(value) == spelled
    assert metrics_to_json({"loss": value}) == {"loss": spelled}
    found = Reader(spelled, "", []).metric()
    assert found == value or (math.isnan(found) and math.isnan(value))


# -- the reader ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "read", "expected"),
    [
        ("1000", Reader.integer, 'an integer >= 0, got "1000"'),
        (-1, Reader.integer, "an integer >= 0, got -1"),
        (True, Reader.integer, "an integer >= 0, got true"),
        (1.0, Reader.integer, "an integer >= 0, got 1.0"),
        (None, Reader.integer, "an integer >= 0, got null"),
        (0, lambda r: r.integer(least=1), "an integer >= 1, got 0"),
        (2**63, Reader.integer, f"an integer <= {2**63 - 1}, got {2**63}"),
        (10**18 + 1, Reader.step, f"an integer <= {10**18}, got {10**18 + 1}"),
        (1, Reader.text, "a string, got 1"),
        ("", Reader.word, 'a string that is not empty, got ""'),
        ([], Reader.word, "a string that is not empty, got an array"),
        (1, Reader.boolean, "true or false, got 1"),
        ("0.5", Reader.number, 'a number, got "0.5"'),
        (True, Reader.number, "a number, got true"),
        (10**400, Reader.number, "a number, got 1" + "0" * 56 + "..."),
        ("NaN", Reader.metric, 'a number, got "NaN"'),
        ({}, Reader.items, "an array, got an object"),
        ([], Reader.mapping, "an object, got an array"),
        ([], Reader.object, "an object, got an array"),
        ("2026-01-31", Reader.time, 'a time such as 2026-01-31T12:00:00.000Z, got "2026-01-31"'),
        ("2026-01-31T12:00:00", Reader.time, 'a time such as 2026-01-31T12:00:00.000Z, got "2026-01-31T12:00:00"'),
        ("yesterday", Reader.time, 'a time such as 2026-01-31T12:00:00.000Z, got "yesterday"'),
        (7, Reader.time, "a time such as 2026-01-31T12:00:00.000Z, got 7"),
        ("9F3AC2E1", Reader.save_id, 'a save id, 8 lower-case hex digits, got "9F3AC2E1"'),
        (0, Reader.save_id, "a save id, 8 lower-case hex digits, got 0"),
        ("abc", lambda r: r.hex(4), '4 lower-case hex digits, got "abc"'),
        ("ABCD", lambda r: r.hex(4), '4 lower-case hex digits, got "ABCD"'),
        (None, lambda r: r.hex(4), "4 lower-case hex digits, got null"),
        ("sha256:abc", Reader.digest, 'a digest, "sha256:" and 64 hex digits, got "sha256:abc"'),
        (1, Reader.digest, 'a digest, "sha256:" and 64 hex digits, got 1'),
        ("up", lambda r: r.choice(["min", "max"]), 'one of min, max, got "up"'),
        ([], lambda r: r.choice(["min", "max"]), "one of min, max, got an array"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(value: object, read: Callable[[Reader], object], expected: str) -> None:
    """Each reader says where, what it expected and what it got."""
    assert problems(value, read) == [f"here: expected {expected}"]


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (0, Reader.integer),
        (2**63 - 1, Reader.integer),
        (10**18, Reader.step),
        ("", Reader.text),
        ("x", Reader.word),
        (False, Reader.boolean),
        (0.0, Reader.number),
        (10**300, Reader.number),
        (-1, Reader.metric),
        ("2026-01-31T12:00:00.000Z", Reader.time),
        ("9f3ac2e1", Reader.save_id),
        ("0af9", lambda r: r.hex(4)),
        ("sha256:" + "0" * 64, Reader.digest),
        ("max", lambda r: r.choice(["min", "max"])),
    ],
)
def test_a_right_value_is_given_back(value: object, read: Callable[[Reader], object]) -> None:
    """What the format allows is read as it stands, with its type."""
    found: list[str] = []
    result = read(Reader(value, "here", found))

    assert (result, type(result), found) == (value, type(value), [])


def test_places_are_spelled_like_paths() -> None:
    """Fields follow a dot, elements and free names stand in brackets."""
    found: list[str] = []
    root = Reader({"entries": [{"step": "1000"}, 7], "metrics": {"a.b": "high"}}, "", found)
    for item in root.at("entries").items():
        item.object().at("step").integer()
    root.at("metrics").metrics()
    root.at("tags").texts()
    root.at("copies").integers()
    root.complain("is odd")

    assert found == [
        'entries[0].step: expected an integer >= 0, got "1000"',
        "entries[1]: expected an object, got 7",
        "entries[1].step: expected an integer >= 0, got null",
        'metrics["a.b"]: expected a number, got "high"',
        "tags: expected an array, got null",
        "copies: expected an array, got null",
        "document: is odd",
    ]


def test_an_optional_field_may_be_absent_or_null() -> None:
    """Absent and null mean nothing; anything else is read and checked."""
    found: list[str] = []
    root = Reader({"a": None, "b": 5}, "", found)

    assert root.optional("a", Reader.integer) is None
    assert root.optional("c", Reader.integer) is None
    assert root.optional("b", Reader.integer) == 5
    assert (root.has("a"), root.has("b"), Reader([], "", found).has("b")) == (False, True, False)
    assert found == []


def test_fields_nobody_asked_for_are_the_rest() -> None:
    """What a newer version wrote is given back, whatever was read."""
    found: list[str] = []
    root = Reader({"a": 1, "b": {"c": [2]}}, "", found)
    root.at("a").integer()

    assert root.rest() == {"b": {"c": [2]}}
    assert Reader([], "", found).rest() == {}
    assert found == []


@pytest.mark.parametrize(
    ("depth", "expected"), [(100, []), (101, ["here: unknown fields are nested more than 100 deep"])]
)
def test_unknown_fields_that_could_not_be_written_again_are_refused(depth: int, expected: list[str]) -> None:
    """A field we only carry along may be nested as deeply as it can surely be written again."""
    value: object = {}
    for _ in range(depth - 1):
        value = [value]

    assert problems({"later": value}, Reader.rest) == expected


def test_all_problems_are_listed_up_to_twenty() -> None:
    """One error lists every problem of a document; a hostile one makes no endless message."""
    root = Reader({"a": ["x"] * 25}, "", [])
    root.at("a").integers()
    with pytest.raises(FormatError) as refused:
        root.finish("x.json")

    lines = str(refused.value).splitlines()
    assert lines[:2] == ["x.json is malformed:", '  a[0]: expected an integer >= 0, got "x"']
    assert lines[20:] == ['  a[19]: expected an integer >= 0, got "x"', "  and 5 more"]


def test_of_a_hostile_document_only_so_many_problems_are_kept() -> None:
    """A hundred thousand wrong things take the room of a thousand sentences, and are said to be more than those."""
    found: list[str] = []
    Reader({"a": ["x"] * 100_000}, "", found).at("a").integers()
    assert len(found) == 1000
    with pytest.raises(FormatError, match=r"\n  and at least 980 more$"):
        Reader({}, "", found).finish("x.json")


def test_a_few_problems_are_all_there_are() -> None:
    """With fewer problems nothing is left out; without any, ``finish`` says nothing."""
    root = Reader({"a": "x"}, "", [])
    root.finish("x.json")
    root.at("a").integer()
    with pytest.raises(FormatError) as refused:
        root.finish("x.json")

    assert str(refused.value) == 'x.json is malformed:\n  a: expected an integer >= 0, got "x"'
