"""Python values as JSON and back, with their types.

(Past 350 lines: every type and every malformed spelling of it is one table.)
"""

from __future__ import annotations

import json
import math
import uuid
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.values import SKIP, Codec, Encoded, Path, render_path
from cloudckpt.errors import FormatError

Point = namedtuple("Point", "x y")  # noqa: PYI024 - its being a tuple is the point


class Colour(IntEnum):
    """An int in disguise."""

    RED = 1


class Dublin(tzinfo):
    """A zone with rules: an offset alone would lose them."""

    def utcoffset(self, moment: datetime | None) -> timedelta:
        return timedelta(hours=1)

    def tzname(self, moment: datetime | None) -> str:
        return "IST"

    def dst(self, moment: datetime | None) -> timedelta:
        return timedelta(0)


def noted_counter() -> Counter[str]:
    """A Counter that somebody hung an attribute on."""
    counter = Counter("ab")
    vars(counter)["note"] = "x"
    return counter


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


@pytest.mark.parametrize(
    "code_units",
    [(0xD83D, 0xDE00), (0x61, 0xD83D, 0xDE00, 0xD800), (0xDE00, 0xD83D), (0x1F600,)],
    ids=["a pair", "a pair and one", "the wrong way round", "the character itself"],
)
def test_surrogates_stay_apart(code_units: tuple[int, ...]) -> None:
    """Two surrogates side by side stay two, as a value, a key and a zone's name, though JSON would join them."""
    text = "".join(map(chr, code_units))
    zone = timezone(timedelta(hours=1), text)
    assert through_json([text, {text: 1}]) == [text, {text: 1}]
    assert through_json(datetime(2026, 1, 1, tzinfo=zone)).tzname() == text


@pytest.mark.parametrize("value", [2**2048 - 1, 2**2048, -(2**2048), 10**5000, -(10**5000)], ids=hex)
def test_ints_beyond_pythons_decimal_limit_come_back(value: int) -> None:
    """An int, a range and a fraction of more digits than Python converts to decimal come back as they were."""
    held = [value, range(value), Fraction(value, 7), {value: 1}]
    assert through_json(held) == held


def test_two_nan_keys_stay_two() -> None:
    """NaN equals nothing, so two NaN keys or items are two, and come back as two."""
    one, two = float("nan"), float("nan")
    assert len(through_json({one: 1, two: 2})) == 2
    assert len(through_json({one, two})) == 2


def test_a_fixed_offset_keeps_its_name() -> None:
    """A named zone comes back with its name, an unnamed one as it was."""
    named = timezone(timedelta(hours=1), "CET")
    assert through_json(datetime(2026, 1, 1, tzinfo=named)).tzname() == "CET"
    assert through_json(time(1, 2, tzinfo=named)).tzname() == "CET"
    assert Codec().encode(datetime(2026, 1, 1, tzinfo=UTC)) == {"$datetime": ["2026-01-01T00:00:00+00:00", 0]}


def test_an_ordered_dict_keeps_attributes_of_any_name() -> None:
    """An attribute that looks like a tag is an attribute, and none reaches the class."""
    value: OrderedDict[str, int] = OrderedDict(a=1)
    vars(value)["$dict"] = [1]
    assert vars(through_json(value)) == {"$dict": [1]}
    again = Codec().decode({"$ordered": {"items": [], "attributes": {"__class__": 5}}})
    assert type(again) is OrderedDict


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
        ({"t": datetime(2026, 1, 1, tzinfo=Dublin())}, r"scheduler\.t", "datetime in the time zone"),
        ({"t": time(1, tzinfo=Dublin())}, r"scheduler\.t", "time in the time zone"),
        ({"c": noted_counter()}, r"scheduler\.c", "Counter with attributes"),
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
        {"$fraction": [2, 4]},
        {"$fraction": []},
        {"$fraction": ["1/3"]},
        {"$fraction": ["1e999999999", 1]},
        {"$fraction": [1, "1e-999999999"]},
        {"$fraction": [1, True]},
        {"$range": [1]},
        {"$range": [True, 2, 1]},
        {"$slice": [1]},
        {"$complex": ["1", "2", "3"]},
        {"$complex": [1, 2]},
        {"$complex": "12"},
        {"$timedelta": [0.5, 0, 0]},
        {"$timedelta": [1, 2, 3, 4]},
        {"$datetime": ["2026-01-01", 0]},
        {"$datetime": ["2026-01-01T00:00:00", True]},
        {"$datetime": ["2026-01-01T00:00:00", 0, "CET"]},
        {"$time": ["01:00:00+01:00", 0, "UTC+01:00"]},
        {"$date": "20260101"},
        {"$uuid": "{00000000-0000-0000-0000-000000000005}"},
        {"$bytes": "YWJ="},
        {"$decimal": 1.1},
        {"$int": "0x5"},
        {"$int": 5},
        {"$str": "YWI="},
        {"$float": 1.0},
        {"$dict": {}},
        {"$dict": [["a", 1], ["a", 2]]},
        {"$set": [1, 1]},
        {"$frozenset": [1, True]},
        {"$ordered": {"items": [], "more": 1}},
        {"$ordered": {"items": [], "attributes": 5}},
        {"$defaultdict": {"items": []}},
        {"$deque": {"items": [1, 2], "maxlen": 1}},
        {"$deque": {"items": [], "maxlen": True}},
        math.nan,
        math.inf,
        (1, 2),
    ],
)
def test_a_malformed_node_is_refused_by_path(node: object) -> None:
    """Unknown tags and wrong payloads are a FormatError that names the place, and nothing else ever escapes."""
    with pytest.raises(FormatError, match=r"^extra\.leaf"):
        Codec().decode({"leaf": node}, ("extra",))


@pytest.mark.parametrize("key", ["x" * 10**6, "not an identifier " * 10**5])
def test_an_error_shows_the_beginning_of_what_is_long(key: str) -> None:
    """Neither a name nor a value of a megabyte makes a message of a megabyte."""
    long = ("$bytes", "$float", "$uuid", "$decimal", "$deque")
    payloads: list[Any] = ["!" * 10**6, "y" * 10**6, "0" * 10**6, "z" * 10**6, {"items": [], "maxlen": "x" * 10**6}]
    for node in (*({tag: payload} for tag, payload in zip(long, payloads, strict=True)), {"$unknown": 1}):
        with pytest.raises(FormatError) as refused:
            Codec().decode({key: node})
        assert len(str(refused.value)) < 1000
    with pytest.raises(TypeError) as unstorable:
        Codec().encode({key: object()})
    assert len(str(unstorable.value)) < 1000


def test_a_tower_of_nodes_is_refused() -> None:
    """Nodes nested without end are refused before Python's own limit."""
    node: Any = 1
    for _ in range(250):
        node = [node]
    with pytest.raises(FormatError, match="nested too deeply"):
        Codec().decode(node)


class Onion:
    """An object whose state is itself."""


class OnionHandler:
    """Peels it."""

    tag = "onion"

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        return codec.encode(value, path) if isinstance(value, Onion) else SKIP

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        return codec.decode(payload, path)


def test_handlers_that_go_round_in_circles_are_stopped() -> None:
    """An object that a handler turns into itself is refused by path, and so are nodes nested through a handler."""
    codec = Codec([OnionHandler()])
    with pytest.raises(TypeError, match=r"^a: this Onion contains itself"):
        codec.encode({"a": Onion()})
    node: Any = 1
    for _ in range(2000):
        node = {"$onion": node}
    with pytest.raises(FormatError, match=r"\$onion is malformed: RecursionError"):
        codec.decode(node)


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


class KelvinLeaf:
    """A value with nothing inside."""

    tag = "kelvin"

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        return value.degrees + 273.15 if isinstance(value, Celsius) else SKIP

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        return Celsius(payload - 273.15)


def test_leaves_are_asked_before_all_handlers() -> None:
    """A leaf that takes a value wins over a handler that would; one that does not passes it on."""
    codec = Codec([CelsiusHandler()], leaves=[KelvinLeaf()])
    assert codec.encode([Celsius(0.0), (1,)]) == [{"$kelvin": 273.15}, Codec().encode((1,))]
    assert codec.decode({"$kelvin": 273.15}).degrees == 0.0


def test_paths_read_like_python() -> None:
    """Identifiers with dots, everything else in brackets."""
    assert render_path(("optimizer", "state", 0, "exp avg")) == "optimizer.state[0]['exp avg']"
    assert render_path((0, "a")) == "[0].a"
    assert render_path(()) == "the state"


def test_what_somebody_else_encoded_is_taken_as_it_stands() -> None:
    """A tree put together from nodes is the node of the tree."""
    value = {"a": [(1, 2), {3: b"x"}], "b": math.inf}
    parts = {
        "a": [Encoded(Codec().encode((1, 2))), {3: Encoded(Codec().encode(b"x"))}],
        "b": Encoded({"$float": "inf"}),
    }
    assert Codec().encode(parts) == Codec().encode(value)
