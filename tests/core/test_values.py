"""Python values as JSON and back, with their types."""

from __future__ import annotations

import json
import math
import uuid
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.values import SKIP, Codec, Path, render_path
from cloudckpt.errors import FormatError

Point = namedtuple("Point", "x y")  # noqa: PYI024 - its being a tuple is the point


class Colour(IntEnum):
    """An int in disguise."""

    RED = 1


def through_json(value: object) -> Any:
    """Encoded, written as JSON, read, decoded."""
    return Codec().decode(json.loads(json.dumps(Codec().encode(value), allow_nan=False)))


def same(one: Any, two: Any) -> bool:
    """Equal in type as well, all the way down; NaN equals NaN and -0.0 differs from 0.0."""
    if type(one) is not type(two):
        return False
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(two)) or (one == two and math.copysign(1, one) == math.copysign(1, two))
    if isinstance(one, dict):
        return len(one) == len(two) and all(same(a, b) and same(one[a], two[b]) for a, b in zip(one, two, strict=True))
    if isinstance(one, list | tuple | deque):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
    | st.dates()
    | st.datetimes()
    | st.datetimes(timezones=st.just(UTC))
    | st.timedeltas()
    | st.times()
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.uuids()
)
plain_keys = st.text() | st.integers() | st.booleans() | st.none() | st.tuples(st.integers(), st.text()) | st.binary()
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(plain_keys, inner)
        | st.tuples(inner, inner)
        | st.lists(inner).map(deque)
        | st.dictionaries(st.text(), inner).map(OrderedDict)
        | st.dictionaries(st.text(), inner).map(lambda d: defaultdict(list, d))
    ),
    max_leaves=12,
)


@given(trees)
def test_values_come_back_with_their_types(value: object) -> None:
    """Any tree of plain values is the same after its way through JSON, types and order included."""
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "value",
    [
        {1, 2, 3},
        frozenset({"a", ("b", 1)}),
        bytearray(b"ab"),
        complex(-0.0, math.inf),
        Counter({"a": 3, 7: 0}),
        deque([1, 2], maxlen=5),
        range(3, 30, 4),
        slice(1, None, -1),
        defaultdict(None, {"a": 1}),
        datetime(2026, 10, 25, 2, 30, tzinfo=timezone(timedelta(hours=2)), fold=1),
        time(2, 30, fold=1),
        date(2026, 1, 31),
        Decimal("1.10"),
        Fraction(1, 3),
        uuid.UUID(int=5),
        "\ud800 lone surrogate",
        {"$dict": 1, "a": 2},
        {"$tensor": "w"},
        {1: "a", "1": "b", None: "c"},
        10**400,
        [],
        {},
        (),
    ],
)
def test_these_come_back_too(value: Any) -> None:
    """Sets, counters, ranges, clocks with fold, dollar keys and huge ints come back as they were."""
    again = through_json(value)
    assert again == value
    assert type(again) is type(value)
    if isinstance(value, datetime | time):
        assert again.fold == value.fold
    if isinstance(value, deque):
        assert again.maxlen == value.maxlen


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0])
def test_numbers_that_json_lacks_come_back(value: float) -> None:
    """NaN, both infinities and minus zero come back as they were."""
    assert same(through_json([value]), [value])


def test_an_ordered_dict_keeps_its_attributes() -> None:
    """A state dict's ``_metadata`` survives."""
    value: OrderedDict[str, int] = OrderedDict(b=1, a=2)
    value._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]  # as torch does
    again = through_json(value)
    assert list(again) == ["b", "a"]
    assert again._metadata == value._metadata  # type: ignore[attr-defined]  # as above
    assert type(again._metadata) is OrderedDict


def test_a_defaultdict_still_makes_its_default() -> None:
    """The factory comes back, not only the items."""
    assert through_json(defaultdict(list, a=[1]))["new"] == []


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"lr_lambdas": [lambda step: step]}, r"scheduler\.lr_lambdas\[0\]", "function"),
        ({"odd key": {"x": Point(1, 2)}}, r"scheduler\['odd key'\]\.x", "Point"),
        ([object()], r"scheduler\[0\]", "object"),
        ({"c": Colour.RED}, r"scheduler\.c", "Colour"),
        ({"d": defaultdict(lambda: 0)}, r"scheduler\.d", "defaultdict"),
        ({"d": defaultdict(Point)}, r"scheduler\.d", "defaultdict"),  # type: ignore[arg-type]  # any callable
    ],
)
def test_what_cannot_be_stored_is_refused_by_path(value: object, path: str, kind: str) -> None:
    """A leaf or a subclass that nobody knows is a TypeError that names where it is and what it is."""
    with pytest.raises(TypeError, match=rf"^{path}: .*{kind}"):
        Codec().encode(value, ("scheduler",))


def test_the_refusal_names_the_two_ways_out() -> None:
    """The message says what to do instead."""
    with pytest.raises(TypeError, match=r"state_dict\(\).*allow_pickle=True"):
        Codec().encode(object())


def test_cycles_and_towers_are_refused() -> None:
    """A container inside itself, and nesting without end, are named and not followed."""
    cycle: list[object] = []
    cycle.append({"again": cycle})
    with pytest.raises(TypeError, match=r"\[0\]\.again: this list contains itself"):
        Codec().encode(cycle)
    tower: list[object] = []
    for _ in range(200):
        tower = [tower]
    with pytest.raises(TypeError, match="nested more than 100 deep"):
        Codec().encode(tower)


def test_a_container_at_two_places_is_stored_twice() -> None:
    """Shared containers are no cycle."""
    shared = [1]
    assert through_json([shared, shared]) == [[1], [1]]


@pytest.mark.parametrize(
    "node",
    [
        {"$unknown": 1},
        {"$tuple": 1},
        {"$tuple": [1], "other": 2},
        {"$float": "huge"},
        {"$dict": [[1]]},
        {"$dict": [1]},
        {"$dict": [[[], 1]]},
        {"$bytes": "!"},
        {"$complex": []},
        {"$ordered": {}},
        {"$defaultdict": {"factory": "eval", "items": []}},
        {"$datetime": ["yesterday", 0]},
        {"$decimal": "many"},
        {"$range": [1, 2, 0]},
        {"$set": [[]]},
        {"$deque": 5},
        {"$fraction": [1, 0]},
    ],
)
def test_a_malformed_node_is_refused_by_path(node: object) -> None:
    """Unknown tags and wrong payloads are a FormatError that names the place, and nothing else ever escapes."""
    with pytest.raises(FormatError, match=r"^extra\.leaf"):
        Codec().decode({"leaf": node}, ("extra",))


def test_a_tower_of_nodes_is_refused() -> None:
    """Nodes nested without end are refused before Python's own limit."""
    node: Any = 1
    for _ in range(250):
        node = [node]
    with pytest.raises(FormatError, match="nested too deeply"):
        Codec().decode(node)


class Celsius:
    """A type that only a handler knows."""

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees


class CelsiusHandler:
    """Teaches it."""

    tag = "celsius"

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        return codec.encode([value.degrees], path) if isinstance(value, Celsius) else SKIP

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        if payload == ["cold"]:
            raise FormatError("too cold")
        return Celsius(codec.decode(payload, path)[0])


def test_a_handler_teaches_a_type_anywhere_in_the_tree() -> None:
    """Handlers are asked at every place, and their errors come out: their own as they are, others with the path."""
    codec = Codec([CelsiusHandler()])
    node = codec.encode({"a": [Celsius(20.5)]})
    assert node == {"a": [{"$celsius": [20.5]}]}
    assert codec.decode(node)["a"][0].degrees == 20.5
    with pytest.raises(FormatError, match="too cold"):
        codec.decode({"$celsius": ["cold"]})
    with pytest.raises(FormatError, match=r"the state: \$celsius is malformed"):
        codec.decode({"$celsius": 7})


def test_paths_read_like_python() -> None:
    """Identifiers with dots, everything else in brackets."""
    assert render_path(("optimizer", "state", 0, "exp avg")) == "optimizer.state[0]['exp avg']"
    assert render_path((0, "a")) == "[0].a"
    assert render_path(()) == "the state"
