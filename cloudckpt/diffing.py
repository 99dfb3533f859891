"""What differs between two checkpoints, from their indexes alone: no payload is read.

Checksums tell whether a tensor's bytes are the same, as far as both are cut alike; by how much values differ is for
``comparing`` to say, which reads only those that do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from cloudckpt.core.checksum import combine_all
from cloudckpt.core.model import Checkpoint, Index, TensorEntry
from cloudckpt.storage import ManifestStore
from cloudckpt.view import RunView, read_index

__all__ = ["Change", "CheckpointDiff", "TensorChange", "diff_checkpoints"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A fact that is not the same; None where one side does not have it."""

    name: str
    before: float | str | None
    after: float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """A tensor that is not the same.

    Attributes:
        name: ``component.name``.
        kind: "added", "removed", "shape", "dtype", "values", or "unknown" where the two are cut in different ways, so
            that only reading them tells.
        before: dtype and shape as text; None if it was added.
        after: the same; None if it was removed.
    """

    name: str
    kind: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointDiff:
    """What differs between two checkpoints.

    Attributes:
        before: the first.
        after: the second.
        metrics: metrics that differ.
        components: names of components that only one has.
        facts: world size, versions, tags and the like, where they differ.
        tensors: tensors that are not the same.
        values: components whose plain values (learning rates, counters) differ.
        same_tensors: how many tensors have the same bytes.
    """

    before: Checkpoint
    after: Checkpoint
    metrics: tuple[Change, ...]
    components: tuple[Change, ...]
    facts: tuple[Change, ...]
    tensors: tuple[TensorChange, ...]
    values: tuple[str, ...]
    same_tensors: int

    @property
    def same(self) -> bool:
        """Whether state and metrics are the same."""
        return not (self.metrics or self.components or self.tensors or self.values)


def diff_checkpoints(
    before: ManifestStore, select_before: str | int, after: ManifestStore, select_after: str | int
) -> CheckpointDiff:
    """Compare two committed checkpoints, of one run or of two. Reads two indexes.

    Raises:
        CheckpointNotFoundError: a selector means nothing.
        CorruptCheckpointError: an index is missing or was changed.
        StorageError: a store refused.
    """
    one, two = RunView(before).select(select_before), RunView(after).select(select_after)
    first, second = read_index(before.storage, one), read_index(after.storage, two)
    tensors, same = _tensors(first, second)
    common = [name for name in first.structure if name in second.structure]
    return CheckpointDiff(
        before=one,
        after=two,
        metrics=_changes(one.metrics, two.metrics),
        components=_changes(
            {name: "component" for name in first.structure if name not in common},
            {name: "component" for name in second.structure if name not in common},
        ),
        facts=_changes(_facts(one, first), _facts(two, second)),
        tensors=tensors,
        values=tuple(n for n in common if _spelled(first.structure[n]) != _spelled(second.structure[n])),
        same_tensors=same,
    )


def _changes(before: Mapping[str, float | str], after: Mapping[str, float | str]) -> tuple[Change, ...]:
    names = dict.fromkeys([*before, *after])
    return tuple(
        Change(name=name, before=before.get(name), after=after.get(name))
        for name in names
        # As text: NaN is the same as NaN here.
        if repr(before.get(name)) != repr(after.get(name))
    )


def _facts(checkpoint: Checkpoint, index: Index) -> dict[str, float | str]:
    return {
        "step": checkpoint.step,
        "world size": index.world_size,
        "size in bytes": checkpoint.size_bytes,
        "tags": ", ".join(checkpoint.tags),
        "pickled": str(index.pickled),
        **{f"{name} version": version for name, version in index.versions.items()},
    }


def _spelled(node: object) -> str:
    # As text, since Python finds 1, 1.0 and True equal; the order of a state dict is part of it.
    return json.dumps(node)


def _tensors(before: Index, after: Index) -> tuple[tuple[TensorChange, ...], int]:
    found: list[TensorChange] = []
    same = 0
    one, two = _named(before), _named(after)
    for name in dict.fromkeys([*one, *two]):
        kind = _kind(one.get(name), two.get(name))
        if kind is None:
            same += 1
        else:
            found.append(
                TensorChange(name=name, kind=kind, before=_described(one.get(name)), after=_described(two.get(name)))
            )
    return tuple(found), same


def _named(index: Index) -> dict[str, TensorEntry]:
    """Every tensor under its full name; tied ones as the one that holds their bytes."""
    found: dict[str, TensorEntry] = {}
    for component, tensors in index.tensors.items():
        for name, entry in tensors.items():
            found[f"{component}.{name}"] = entry if entry.alias_of is None else tensors[entry.alias_of]
    return found


def _described(entry: TensorEntry | None) -> str | None:
    return None if entry is None else f"{entry.dtype} [{', '.join(map(str, entry.shape))}]"


def _kind(before: TensorEntry | None, after: TensorEntry | None) -> str | None:
    """How two entries of one name differ; None if their bytes are the same."""
    if before is None or after is None:
        return "added" if before is None else "removed"
    if before.shape != after.shape:
        return "shape"
    if before.dtype != after.dtype:
        return "dtype"
    one, two = _cut(before), _cut(after)
    if [place for place, _, _ in one] == [place for place, _, _ in two]:
        return None if one == two else "values"
    if (first := _in_rows(before)) is not None and (second := _in_rows(after)) is not None:
        return None if first == second else "values"
    return "unknown"


def _cut(entry: TensorEntry) -> list[tuple[tuple[tuple[int, ...], tuple[int, ...]], int, int]]:
    """Its boxes in order of place, each with sum and length."""
    return sorted(((c.offsets, c.lengths), c.crc32c, c.length) for c in entry.chunks if c.length)


def _in_rows(entry: TensorEntry) -> int | None:
    """The sum of the whole tensor, from its boxes, where these are whole rows laid end to end; else None."""
    chunks = sorted((c for c in entry.chunks if c.length), key=lambda c: c.offsets)
    at = 0
    for chunk in chunks:
        if chunk.lengths[1:] != entry.shape[1:] or chunk.offsets != (at, *[0] * (len(entry.shape) - 1)):
            return None
        at += chunk.lengths[0]
    if not entry.shape or at != entry.shape[0]:
        return None
    return combine_all((c.crc32c, c.length) for c in chunks)
