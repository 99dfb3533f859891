"""What several ranks say of one component, as one.

Most state is the same on all ranks, or sharded under the same names. Pipeline stages have disjoint keys, and state that
was declared per rank has one place for each: what only one rank has is taken from it, everything else from the first.
Items of lists have no names, but for the groups of an optimizer's options, ``[{"params": [names], "lr": ...}]`` as
``torch.distributed.checkpoint.state_dict`` gives them: those of all stages are one list.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["PER_RANK", "conflict", "is_like", "merge", "parts_missing", "references"]

Json = Any

#: The tag of state that each rank has for itself: ``{"$per_rank": {"0": node, "1": node}}``.
PER_RANK = "$per_rank"

#: Tags whose payload, or whose payload's ``items``, are pairs of a key and a value.
_PAIRED = {"$dict", "$counter"}
_WITH_ITEMS = {"$ordered", "$defaultdict"}
#: Whose options they are is not among the options.
_MEMBERS: Mapping[str, Json] = {"params": None, "param_names": None}


def merge(first: Json, second: Json) -> Json:
    """Both nodes as one. The very first one if the second adds nothing."""
    if type(first) is not type(second):
        return first
    if isinstance(first, dict):
        return _merge_dicts(first, second)
    if isinstance(first, list):
        if _are_groups(first) and _are_groups(second):
            return _merge_groups(first, second)
        if len(first) == len(second):
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
        rest, others = (_beside_items(node[tag]) for node in (first, second))
        merged = merge(rest, others)
        return first if items is first[tag]["items"] and merged is rest else {tag: {"items": items, **merged}}
    if tag is not None and tag not in {PER_RANK, "$state"}:
        return first  # a leaf
    found = {key: merge(node, second[key]) if key in second else node for key, node in first.items()}
    found |= {key: node for key, node in second.items() if key not in first}
    return _kept(first, found)


def _beside_items(payload: Mapping[str, Json]) -> dict[str, Json]:
    """What a mapping has besides: a module's state dict has the versions of its modules, by their names."""
    return {key: node for key, node in payload.items() if key != "items"}


def _merge_pairs(first: Sequence[list[Json]], second: Sequence[list[Json]]) -> Sequence[list[Json]]:
    known = {repr(key): value for key, value in second}
    found = [[key, merge(value, known.pop(repr(key))) if repr(key) in known else value] for key, value in first]
    found += [pair for pair in second if repr(pair[0]) in known]
    return first if len(found) == len(first) and all(a[1] is b[1] for a, b in zip(found, first, strict=True)) else found


def _merge_lists(first: list[Json], second: list[Json]) -> list[Json]:
    found = [merge(a, b) for a, b in zip(first, second, strict=True)]
    return first if all(a is b for a, b in zip(found, first, strict=True)) else found


def _are_groups(node: list[Json]) -> bool:
    return bool(node) and all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(isinstance(name, str) for name in group["params"])
        for group in node
    )


def _merge_groups(first: list[Json], second: list[Json]) -> list[Json]:
    """Both ranks' groups; a parameter that both have keeps the first one's options."""
    known = {name for group in first for name in group["params"]}
    more = [{**group, "params": [name for name in group["params"] if name not in known]} for group in second]
    more = [group for group in more if group["params"]]
    return [*first, *more] if more else first


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


def conflict(first: Json, second: Json, path: str = "") -> str | None:
    """Where the first of two nodes would win over something else in the second, were they merged; None if nowhere.

    What only one of them has is no conflict, nor is what each rank has for itself. Of tensors only their places count:
    their values are compared elsewhere.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        if (tag := _tag(first)) != _tag(second):
            return path
        if tag in {PER_RANK, "$tensor"}:
            return None
        if tag in _PAIRED or tag in _WITH_ITEMS:
            one, two = (node[tag] if tag in _PAIRED else node[tag]["items"] for node in (first, second))
            others = {repr(key): value for key, value in two}
            pairs = [(_within(path, key), value, others[repr(key)]) for key, value in one if repr(key) in others]
            if tag in _WITH_ITEMS:
                pairs.append((path, _beside_items(first[tag]), _beside_items(second[tag])))
        elif tag is None or tag in {"$tuple", "$state"}:
            common = [key for key in first if key in second]
            pairs = [(path if key[:1] == "$" else _within(path, key), first[key], second[key]) for key in common]
        else:
            return None if first == second else path
    elif isinstance(first, list) and isinstance(second, list) and _are_groups(first) and _are_groups(second):
        pairs = _shared_options(first, second, path)
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = [(f"{path}[{n}]", a, b) for n, (a, b) in enumerate(zip(first, second, strict=True))]
    else:
        return None if first == second else path
    found = (conflict(a, b, place) for place, a, b in pairs)
    return next((place for place in found if place is not None), None)


def _shared_options(first: list[Json], second: list[Json], path: str) -> list[tuple[str, Json, Json]]:
    """The options of every two groups that have a parameter in common, and the place of the first's."""
    pairs: dict[tuple[int, int], None] = {}
    place = {name: n for n, group in enumerate(first) for name in group["params"]}
    for m, group in enumerate(second):
        pairs |= dict.fromkeys((place[name], m) for name in group["params"] if name in place)
    return [(f"{path}[{n}]", first[n] | _MEMBERS, second[m] | _MEMBERS) for n, m in pairs]


def _within(path: str, key: Json) -> str:
    if not isinstance(key, str):
        return f"{path}[{key!r}]"
    return f"{path}.{key}" if path else key


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
