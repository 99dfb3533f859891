"""The parts of all ranks as one: what the index says of a save that PyTorch's distributed checkpoint (DCP) has led."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint.storage import WriteResult

from cloudckpt.core.model import PayloadObject, TensorEntry
from cloudckpt.core.values import Codec, Encoded, Path, render_path
from cloudckpt.errors import SaveError
from cloudckpt.tensors.dcp_portion import Stored, name_of

__all__ = ["Assembled", "assemble"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """What all ranks have written, as the index tells it.

    Attributes:
        objects: the payload objects, rank after rank.
        tensors: component -> name -> entry.
        structure: component -> JSON node.
        pickled: whether any value had to be pickled.
    """

    objects: tuple[PayloadObject, ...]
    tensors: dict[str, dict[str, TensorEntry]]
    structure: dict[str, Any]
    pickled: bool


def assemble(results: Sequence[WriteResult], paths: Mapping[str, Path]) -> Assembled:
    """Put together what the ranks report.

    Args:
        paths: where each value belongs, by the plan's name for it; in the order of the state.

    Raises:
        SaveError: the reports do not make one state.
    """
    objects: dict[str, PayloadObject] = {}
    entries: dict[tuple[str, str], TensorEntry] = {}
    owners: dict[tuple[str, str], str] = {}
    leaves: dict[str, Encoded] = {}
    for result in results:
        fqn, written = result.index.fqn, result.storage_data
        for box in written.tensors:
            objects[box.object.name] = box.object
            place = box.component, box.name
            if owners.setdefault(place, fqn) != fqn:
                raise SaveError(
                    f"{fqn} has a tensor inside of it whose name, {'.'.join(place)}, is {owners[place]}'s: rename one"
                )
            entries[place] = _grown(entries.get(place), box)
        if (first := written.alias_of) is not None:
            entries[first.component, name_of(paths[fqn])] = TensorEntry(
                dtype=first.dtype, shape=first.shape, alias_of=first.name
            )
        leaves[fqn] = written.node or Encoded({"$tensor": name_of(paths[fqn])})
    tree: dict[object, Any] = {}
    for fqn, path in paths.items():
        if fqn in leaves:
            _plant(tree, path, leaves[fqn])
    tensors: dict[str, dict[str, TensorEntry]] = {str(component): {} for component in tree}
    for (component, name), entry in entries.items():
        tensors[component][name] = entry
    return Assembled(
        objects=tuple(objects.values()),
        tensors=tensors,
        structure={str(component): Codec().encode(_as_it_was(node)) for component, node in tree.items()},
        pickled=any(result.storage_data.pickled for result in results),
    )


def _grown(entry: TensorEntry | None, box: Stored) -> TensorEntry:
    if entry is None:
        return TensorEntry(dtype=box.dtype, shape=box.shape, chunks=(box.chunk,))
    if (entry.dtype, entry.shape) != (box.dtype, box.shape):
        raise SaveError(
            f"{box.component}.{box.name} is {entry.dtype} of shape {entry.shape} on one rank and {box.dtype} of shape "
            f"{box.shape} on another"
        )
    return replace(entry, chunks=(*entry.chunks, box.chunk))


class _Row(dict[int, Any]):
    """A list that is filled in any order."""


def _plant(tree: dict[Any, Any], path: Path, leaf: Encoded) -> None:
    at: Any = tree
    for here, below in itertools.pairwise(path):
        at = at.setdefault(here, _Row() if type(below) is int else {})
        if not isinstance(at, dict) or isinstance(at, _Row) != (type(below) is int):
            raise SaveError(f"{render_path(path)}: the ranks have different kinds of values on the way to it")
    if path[-1] in at:
        raise SaveError(f"{render_path(path)}: there are two values for one place")
    at[path[-1]] = leaf


def _as_it_was(node: Any) -> Any:
    """The tree as the caller had it, as far as DCP's paths tell."""
    if isinstance(node, _Row):
        # What DCP leaves out of a list (an empty dict, say) it gives back as None.
        return [_as_it_was(node.get(number)) for number in range(max(node) + 1)]
    if not isinstance(node, dict):
        return node
    found = {key: _as_it_was(inner) for key, inner in node.items()}
    numbers = _parameter_numbers(found.get("param_groups"))
    if numbers is None or not isinstance(found.get("state", {}), dict):
        return found
    return {"state": {}} | found | {"state": {numbers.get(k, k): inner for k, inner in found.get("state", {}).items()}}


def _parameter_numbers(groups: Any) -> dict[str, int] | None:
    """By their text, the numbers of the parameters in the ``param_groups`` of an optimizer; None if it is none.

    Its ``state`` goes by the same numbers, which DCP makes into text: an optimizer that was given text would take it,
    and go on without its moments. One that has no state yet has an empty one, which DCP leaves out.
    """
    if not isinstance(groups, list) or not groups:
        return None
    leaves = [group.get("params") if isinstance(group, dict) else None for group in groups]
    if not all(isinstance(leaf, Encoded) and isinstance(leaf.node, list) for leaf in leaves):
        return None
    return {str(number): number for leaf in leaves if leaf for number in leaf.node if type(number) is int}
