"""What several ranks say of one component, as one."""

from __future__ import annotations

from typing import Any

import pytest

from cloudckpt.core.merging import conflict, is_like, merge, parts_missing, references
from cloudckpt.core.values import Codec


def test_what_only_one_rank_has_is_added_and_the_first_word_counts() -> None:
    """Pipeline stages: disjoint keys at any depth become one; a value that both have is the first one's."""
    first = {"a": {"lr": 1, "x": 2}, "b": [1, {"k": 1}]}
    second = {"a": {"lr": 9, "y": 3}, "b": [5, {"l": 2}], "c": "new"}
    assert merge(first, second) == {"a": {"lr": 1, "x": 2, "y": 3}, "b": [1, {"k": 1, "l": 2}], "c": "new"}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": [1, 2]}, {"a": [3]}),
        ({"a": 1}, {"a": "x"}),
        ({"a": {"$tensor": "w"}}, {"a": {"$tensor": "v"}}),
        ({"a": {"$tensor": "w"}}, {"a": {"b": 1}}),
        ([1, {"a": 1}], [2, {"a": 2}]),
        ({"$dict": [[1, "x"]]}, {"$dict": [[1, "y"]]}),
        ({"$ordered": {"items": [["a", 1]]}}, {"$ordered": {"items": [["a", 2]]}}),
        ({"$state": {"a": 1}}, {"$state": {"a": 1}}),
        (3, 4),
    ],
)
def test_a_rank_that_adds_nothing_changes_nothing(one: Any, two: Any) -> None:
    """The very same node: that is how rank zero sees who has to report."""
    assert merge(one, two) is one


def test_tagged_mappings_are_merged_as_mappings() -> None:
    """Mappings with other than string keys, ordered ones, states and parts per rank."""
    codec = Codec()
    merged = merge(codec.encode({1: {"a": 1}, 2: "x"}), codec.encode({1: {"b": 2}, 3: "y"}))
    assert codec.decode(merged) == {1: {"a": 1, "b": 2}, 2: "x", 3: "y"}
    ordered = merge({"$ordered": {"items": [["a", 1]]}}, {"$ordered": {"items": [["b", 2]], "attributes": {"m": 1}}})
    assert ordered == {"$ordered": {"items": [["a", 1], ["b", 2]], "attributes": {"m": 1}}}
    versions = merge(ordered, {"$ordered": {"items": [], "attributes": {"m": 2, "n": 3}}})
    assert versions == {"$ordered": {"items": [["a", 1], ["b", 2]], "attributes": {"m": 1, "n": 3}}}
    assert merge({"$per_rank": {"0": 1}}, {"$per_rank": {"1": 2}}) == {"$per_rank": {"0": 1, "1": 2}}
    assert merge({"$state": {"a": 1}}, {"$state": {"b": 1}}) == {"$state": {"a": 1, "b": 1}}


def test_states_are_alike_if_only_values_differ() -> None:
    """Other numbers, texts and bytes are; other keys, lengths, kinds or tensors are not."""
    assert is_like({"a": [1, {"b": "x"}], "c": None}, {"a": [2, {"b": 3.5}], "c": "now"})
    assert is_like({"$bytes": "AA=="}, {"$bytes": "AAAA"})
    assert is_like({"a": {"$tensor": "w"}}, {"a": {"$tensor": "w"}})
    assert not is_like({"a": {"$tensor": "w"}}, {"a": {"$tensor": "v"}})
    assert not is_like({"a": 1}, {"b": 1})
    assert not is_like([1], [1, 2])
    assert not is_like([1], 1)
    assert not is_like({"a": 1}, [1])


@pytest.mark.parametrize(
    ("first", "second", "place"),
    [
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "c.a[1].b"),
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1}, {"b": 1}, None),
        ([1], [1, 2], "c"),
        ({"a": [{"lr": 1}]}, {"a": [{"lr": 1}, {"lr": 2}]}, "c.a"),
        ({"a": 1}, {"a": {"b": 1}}, "c.a"),
        ({"a": {"$tensor": "w"}}, {"a": {"b": 1}}, "c.a"),
        ({"$tensor": "a"}, {"$tensor": "b"}, None),
        ({"$per_rank": {"0": 1}}, {"$per_rank": {"0": 2}}, None),
        ({"$dict": [[1, "x"], [2, "y"]]}, {"$dict": [[3, "z"], [1, "w"]]}, "c[1]"),
        ({"$ordered": {"items": [["a", 1]]}}, {"$ordered": {"items": [["b", 2], ["a", 3]]}}, "c.a"),
        (
            {"$ordered": {"items": [], "attributes": {"a": 1, "b": 1}}},
            {"$ordered": {"items": [], "attributes": {"c": 1, "b": 2}}},
            "c.attributes.b",
        ),
        ({"$tuple": [1, 2]}, {"$tuple": [1, 3]}, "c[1]"),
        ({"$state": {"a": 1, "b": 2}}, {"$state": {"b": 3}}, "c.b"),
        ({"$bytes": "AA=="}, {"$bytes": "AAAA"}, "c"),
    ],
)
def test_what_a_merge_would_lose_is_named_by_its_place(first: Any, second: Any, place: str | None) -> None:
    """The first one's word counts; what only one has, and what each rank has for itself, is not lost."""
    assert conflict(first, second, "c") == place
    assert (conflict(first, second) is None) == (place is None)


def group(lr: float, *names: str) -> dict[str, Any]:
    """The options of some parameters."""
    return {"lr": lr, "params": [*names]}


def test_groups_of_options_are_united_by_the_names_of_parameters() -> None:
    """Each stage's groups are added; a parameter that was there keeps its options, and a rank like the first adds none."""
    first = [group(1, "a", "b"), group(2)]
    assert merge(first, [group(1, "a", "b"), group(2)]) is first
    assert merge(first, [group(3, "c")]) == [*first, group(3, "c")]
    assert merge(first, [group(3, "b", "c"), group(4, "d"), group(5)]) == [*first, group(3, "c"), group(4, "d")]
    assert merge([group(1, "a")], []) == [group(1, "a")]
    numbered = [{"lr": 1, "params": [0]}]
    assert merge(numbered, [{"lr": 2, "params": [1]}]) == [{"lr": 1, "params": [0]}]


def test_options_that_differ_are_a_conflict_where_a_parameter_is_in_both() -> None:
    """However the parameters are grouped."""
    assert conflict([group(1, "a")], [group(2, "b")], "c") is None
    assert conflict([group(1, "a")], [group(1, "b", "a")], "c") is None
    assert conflict([group(9, "z"), group(1, "a")], [group(2, "b", "a")], "c") == "c[1].lr"
    named = [{**group(1, *names), "param_names": [*names]} for names in ("a", "ab")]
    assert conflict(named[:1], named[1:], "c") is None


def test_tuples_are_merged_as_lists_are() -> None:
    """Item by item; of another length, the first one counts."""
    first = {"$tuple": [{"a": 1}, 2]}
    assert merge(first, {"$tuple": [{"b": 1}, 2]}) == {"$tuple": [{"a": 1, "b": 1}, 2]}
    assert merge(first, {"$tuple": [1]}) is first
    assert merge(first, {"$tuple": [{"a": 5}, 3]}) is first


def test_keys_of_any_kind_are_places() -> None:
    """A mapping with another key is not alike, whatever the key's type."""
    codec = Codec()
    assert is_like(codec.encode({1: "x", 2: "y"}), codec.encode({1: "z", 2: "y"}))
    assert not is_like(codec.encode({1: "x"}), codec.encode({3: "x"}))
    ordered = {"$ordered": {"items": [["a", 1]]}}
    assert is_like(ordered, {"$ordered": {"items": [["a", 2]]}})
    assert not is_like(ordered, {"$ordered": {"items": [["b", 1]]}})


def test_parts_that_are_not_everywhere_are_found() -> None:
    """The place of what some rank has not declared, or has elsewhere."""
    whole = {"$per_rank": {"0": 1, "1": 2}}
    assert parts_missing({"a": [whole, {"$tuple": [whole]}], "b": 1}, 2, "c") is None
    assert parts_missing({"a": [1, {"$per_rank": {"0": 1}}]}, 2, "c") == "c.a[1]"
    assert parts_missing({"$tuple": [{"$per_rank": {"1": 1}}]}, 2, "c") == "c[0]"


def test_tensors_that_are_referred_to_are_found() -> None:
    """Also as the bytes of arrays, and at any depth."""
    node = {"a": [{"$tensor": "x"}, 1], "b": {"$per_rank": {"0": {"$ndarray": {"tensor": "y", "dtype": "<f4"}}}}}
    assert [*references(node)] == ["x", "y"]
