"""What several ranks say of one component, as one.

Most state is the same on all ranks, or sharded under the same names. Pipeline stages have disjoint keys, and state that
was declared per rank has one place for each: what only one rank has is taken from it, everything else from the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["PER_RANK", "difference", "is_like", "merge", "parts_missing", "references"]

Json = Any

#: The tag of state that each rank has for itself: ``{"$per_rank": {"0": node, "1": node}}``.
PER_RANK = "$per_rank"

#: Tags whose payload, or whose payload's ``items``, are pairs of a key and a value.
_PAIRED = {"$dict", "$counter"}
_WITH_ITEMS = {"$ordered", "$defaultdict"}


def merge(first: Json, second: Json) -> Json:
    """Both nodes as one. The very first one if the second adds nothing."""
    if type(first) is not type(second):
        return first
    if isinstance(first, dict):
        return _merge_dicts(first, second)
    if isinstance(first, list) and len(first) == len(second):
        return _merge_lists(first, second)
    return first


def _merge_dicts(first: Mapping[str, Json], second: Mapping[str, Json]) -> Json:
    tag, other = _tag(first), _tag(second)
    if tag != other:
        return first
    if tag in _PAIRED:
        return _kept(first, {tag: _merge_pairs(first[tag], second[tag])})
    if tag == "$tuple":
        return _kept(first, {tag: merge(first[tag], second[tag])})
    if tag in _WITH_ITEMS:
        items = _merge_pairs(first[tag]["items"], second[tag]["items"])
        return first if items is first[tag]["items"] else {tag: {**first[tag], "items": items}}
    if tag is not None and tag not in {PER_RANK, "$state"}:
        return first  # a leaf
    found = {key: merge(node, second[key]) if key in second else node for key, node in first.items()}
    found |= {key: node for key, node in second.items() if key not in first}
    return _kept(first, found)


def _merge_pairs(first: Sequence[list[Json]], second: Sequence[list[Json]]) -> Sequence[list[Json]]:
    known = {repr(key): value for key, value in second}
    found = [[key, merge(value, known.pop(repr(key))) if repr(key) in known else value] for key, value in first]
    found += [pair for pair in second if repr(pair[0]) in known]
    return first if len(found) == len(first) and all(a[1] is b[1] for a, b in zip(found, first, strict=True)) else found


def _merge_lists(first: list[Json], second: list[Json]) -> list[Json]:
    found = [merge(a, b) for a, b in zip(first, second, strict=True)]
    return first if all(a is b for a, b in zip(found, first, strict=True)) else found


def _kept(first: Mapping[str, Json], found: dict[str, Json]) -> Mapping[str, Json]:
    same = len(found) == len(first) and all(found[key] is node for key, node in first.items())
    return first if same else found


def _tag(node: Mapping[str, Json]) -> str | None:
    return next((key for key in node if key.startswith("$")), None) if len(node) == 1 else None


def parts_missing(node: Json, world_size: int, path: str = "") -> str | None:
    """Where state that each rank has for itself is not there for every rank; None if it is everywhere."""
    if isinstance(node, dict):
        if _tag(node) == PER_RANK and {*node[PER_RANK]} != {str(rank) for rank in range(world_size)}:
            return path
        inner = [(path if key[:1] == "$" else f"{path}.{key}", value) for key, value in node.items()]
    else:
        inner = [(f"{path}[{n}]", value) for n, value in enumerate(node)] if isinstance(node, list) else []
    found = (parts_missing(value, world_size, place) for place, value in inner)
    return next((place for place in found if place is not None), None)


def references(node: Json) -> Iterator[str]:
    """The names of the tensors that a node refers to."""
    if isinstance(node, dict):
        tag = _tag(node)
        if tag == "$tensor":
            yield node[tag]
        elif tag == "$ndarray":
            yield node[tag]["tensor"]
        else:
            for value in node.values():
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def difference(one: Json, two: Json, path: str = "") -> str | None:
    """Where two nodes with the same places first have different values; "" for the nodes themselves, None if nowhere.

    What each rank has for itself, and tensors, are not looked at.
    """
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        if _tag(one) in {PER_RANK, "$tensor"}:
            return None
        pairs = [(f"{path}.{key}" if path and key[:1] != "$" else path or key, one[key], two[key]) for key in one]
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = [(f"{path}[{n}]", a, b) for n, (a, b) in enumerate(zip(one, two, strict=True))]
    else:
        return None if one == two else path
    found = (difference(a, b, place) for place, a, b in pairs)
    return next((place for place in found if place is not None), None)


def is_like(one: Json, two: Json) -> bool:
    """Whether two nodes differ in nothing but the values of their leaves."""
    if isinstance(one, dict) and isinstance(two, dict):
        if one.keys() != two.keys():
            return False
        if (tag := _tag(one)) == "$tensor":
            return bool(one == two)
        if tag in _PAIRED or tag in _WITH_ITEMS:
            pairs, others = (node[tag] if tag in _PAIRED else node[tag]["items"] for node in (one, two))
            return [key for key, _ in pairs] == [key for key, _ in others] and all(
                is_like(a[1], b[1]) for a, b in zip(pairs, others, strict=True)
            )
        return all(is_like(node, two[key]) for key, node in one.items()) if tag != "$bytes" else True
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(map(is_like, one, two))
    return not isinstance(one, dict | list) and not isinstance(two, dict | list)
