"""By how much tensors differ between two checkpoints. Reads only those that ``diffing`` found to differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from cloudckpt.core.model import Checkpoint, Index
from cloudckpt.diffing import CheckpointDiff
from cloudckpt.events import Listeners
from cloudckpt.run import Run
from cloudckpt.storage import ManifestStore
from cloudckpt.view import read_index

__all__ = ["ValueChange", "compare_values"]

#: Tensors are read in groups of about this size: two of them, one from each side, are in memory.
_GROUP_BYTES = 256 * 1024 * 1024

#: Elements that are compared at once, as 64-bit numbers.
_ELEMENTS = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueChange:
    """By how much a tensor differs.

    Attributes:
        name: ``component.name``.
        elements: how many it has.
        changed: how many of them differ; NaN is the same as NaN.
        largest: the largest absolute difference; infinite where one side is not finite and the other is.
        relative: the norm of the difference by the norm of the tensor before; 0/0 is 0.
    """

    name: str
    elements: int
    changed: int
    largest: float
    relative: float


def compare_values(before: ManifestStore, after: ManifestStore, diff: CheckpointDiff) -> tuple[ValueChange, ...]:
    """Compare the tensors that differ and have the same shape. Those that turn out to be equal are left out.

    Raises:
        CheckpointNotFoundError: one of the checkpoints was retired meanwhile.
        CorruptCheckpointError: bytes on a store are not what was sealed.
        StorageError: a store refused.
    """
    wanted = {t.name for t in diff.tensors if t.kind in {"values", "dtype", "unknown"}}
    index = read_index(before.storage, diff.before)
    one, two = Run(before, Listeners()), Run(after, Listeners())
    found: list[ValueChange] = []
    for component, names in _groups(index, wanted):
        first = _loaded(one, diff.before, component, names)
        second = _loaded(two, diff.after, component, names)
        changes = (_compared(f"{component}.{name}", first[name], second[name]) for name in names)
        found += [change for change in changes if change.changed]
    return tuple(found)


def _groups(index: Index, wanted: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Components and names, about as much together as fits into memory twice."""
    for component, tensors in index.tensors.items():
        group: list[str] = []
        size = 0
        for name, entry in tensors.items():
            if f"{component}.{name}" not in wanted:
                continue
            stored = entry if entry.alias_of is None else tensors[entry.alias_of]
            length = sum(chunk.length for chunk in stored.chunks)
            if group and size + length > _GROUP_BYTES:
                yield component, group
                group, size = [], 0
            group.append(name)
            size += length
        if group:
            yield component, group


def _loaded(run: Run, checkpoint: Checkpoint, component: str, names: list[str]) -> Mapping[str, torch.Tensor]:
    values: Mapping[str, torch.Tensor] = run.load(checkpoint.name, components=[component], names=names)[component]
    return values


def _compared(name: str, before: torch.Tensor, after: torch.Tensor) -> ValueChange:
    one, two = before.reshape(-1), after.reshape(-1)
    changed, largest, squares, norm = 0, 0.0, 0.0, 0.0
    for start in range(0, one.numel(), _ELEMENTS):
        a, b = one[start : start + _ELEMENTS], two[start : start + _ELEMENTS]
        x, y = _wide(a), _wide(b)
        # Large integers have no 64-bit floats of their own: what is equal is asked before.
        whole = not (a.is_floating_point() or b.is_floating_point() or a.is_complex() or b.is_complex())
        differs = a != b if whole else ~((x == y) | (torch.isnan(x) & torch.isnan(y)))
        changed += int(differs.sum())
        distance = (x - y).abs()[differs]
        finite = distance[torch.isfinite(distance)]
        if finite.numel() < distance.numel():
            largest = math.inf
        elif finite.numel():
            largest = max(largest, float(finite.max()))
        squares += float(finite.square().sum())
        size = x.abs()
        norm += float(size[torch.isfinite(size)].square().sum())
    relative = math.sqrt(squares / norm) if norm else (math.inf if squares else 0.0)
    return ValueChange(name=name, elements=one.numel(), changed=changed, largest=largest, relative=relative)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
