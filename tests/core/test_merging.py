"""What several ranks say of one component, as one."""

from __future__ import annotations

from typing import Any

import pytest

from cloudckpt.core.merging import difference, is_like, merge, parts_missing, references
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
    assert ordered == {"$ordered": {"items": [["a", 1], ["b", 2]]}}
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


def test_the_first_difference_is_named_by_its_place() -> None:
    """But not in what each rank has for itself, nor of tensors."""
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "options") == "options.a[1].b"
    assert difference({"a": 1}, {"a": 1}) is None
    assert difference({"$dict": [[1, "x"]]}, {"$dict": [[1, "y"]]}, "c") == "c[0][1]"
    assert difference({"$dict": [[1, "x"]]}, {"$dict": [[1, "y"]]}) == "$dict[0][1]"
    assert difference({"$per_rank": {"0": 1}}, {"$per_rank": {"0": 2}}, "c") is None
    assert difference({"$tensor": "a"}, {"$tensor": "b"}, "c") is None
    assert difference({"a": 1}, {"b": 1}, "c") == "c"
    assert difference([1], [1, 2], "c") == "c"


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
