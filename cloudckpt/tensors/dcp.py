"""PyTorch's distributed checkpoint (DCP) as the planning engine: who writes which box of which tensor.

Each process makes a local plan; what several would write is spread over them by ``core.spreading``. Only the planners
are used; bytes never pass through DCP. It is asked only of sharded tensors, and once for each way of sharding a shape:
of a tensor that one process has whole there is nothing to decide, and its planners take 80 microseconds to say so.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cloudckpt.core.model import TensorEntry
from cloudckpt.tensors.memory import dtype_named, same_bits_dtype
from cloudckpt.tensors.sharded import held_parts, is_sharded

__all__ = ["Box", "Copy", "Where", "plan_copies", "plan_save"]

# DCP takes as long to import as the rest of torch: where there is something to ask it.
# ruff: noqa: PLC0415

#: The dtypes besides floating-point and complex ones whose width ``torch.iinfo`` knows.
_KNOWN = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A box of one tensor that this rank writes.

    Attributes:
        component: the component it belongs to.
        name: the tensor's name.
        dtype: the tensor's dtype.
        offsets: where the box begins in the whole tensor, elements per dimension.
        lengths: the box's own shape.
        shape: the whole tensor's shape.
    """

    component: str
    name: str
    dtype: torch.dtype
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    shape: tuple[int, ...]


class Where(NamedTuple):
    """Which box of a whole tensor a process has: where it begins, and the whole tensor's shape."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """From a stored chunk (number ``chunk`` of its entry) to a target: equal boxes of ``lengths`` elements."""

    chunk: int
    chunk_offsets: tuple[int, ...]
    target_offsets: tuple[int, ...]
    lengths: tuple[int, ...]


def plan_save(
    tensors: Mapping[str, Mapping[str, torch.Tensor]], known: MutableMapping[object, Where]
) -> dict[str, list[tuple[Box, torch.Tensor]]]:
    """Which boxes this process holds and the data of each, by component, in a deterministic order.

    Args:
        known: the caller's, kept from save to save: a DTensor's spec (mesh, placements, shape) says which box of it
            this process has, so DCP is asked once for each.
    """
    new: dict[tuple[str, str], torch.Tensor] = {}
    for component, named in tensors.items():
        for name, tensor in named.items():
            if is_sharded(type(tensor)) and _spec_of(tensor) not in known:
                new[component, name] = tensor
    answered = _ask(new) if new else {}
    for place, found in answered.items():
        if (spec := _spec_of(new[place])) is not None and len(found) == 1:
            known[spec] = Where(found[0][0].offsets, found[0][0].shape)
    boxes: dict[str, list[tuple[Box, torch.Tensor]]] = {component: [] for component in tensors}
    for component, named in tensors.items():
        for name, tensor in named.items():
            own = answered.get((component, name))
            boxes[component] += [_box(component, name, tensor, known)] if own is None else own
    return boxes


def _spec_of(tensor: torch.Tensor) -> object:
    """What of a DTensor says which box this process has; None for any other tensor."""
    return getattr(tensor, "_spec", None)  # hashable, and compared by value


def _box(component: str, name: str, tensor: torch.Tensor, known: Mapping[object, Where]) -> tuple[Box, torch.Tensor]:
    (held,) = held_parts(tensor)
    shape = tuple(tensor.shape)
    where = known[_spec_of(tensor)] if held is not tensor else Where((0,) * len(shape), shape)
    box = Box(
        component=component,
        name=name,
        dtype=held.dtype,
        offsets=where.offsets,
        lengths=tuple(held.shape),
        shape=where.shape,
    )
    return box, held


def _ask(tensors: Mapping[tuple[str, str], torch.Tensor]) -> dict[tuple[str, str], list[tuple[Box, torch.Tensor]]]:
    """Which boxes of these this process holds, as DCP plans to save them."""
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    places = {f"{n}": place for n, place in enumerate(tensors)}
    state = {fqn: _plannable(tensors[place]) for fqn, place in places.items()}
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, storage_meta=None, is_coordinator=True)
    boxes: dict[tuple[str, str], list[tuple[Box, torch.Tensor]]] = {place: [] for place in tensors}
    for item in planner.create_local_plan().items:
        component, name = places[item.index.fqn]
        found = planner.lookup_object(item.index)
        if item.tensor_data is None or not isinstance(found, torch.Tensor):
            raise TypeError(f"{component}.{name}: planned as something that is no tensor")
        box = Box(
            component=component,
            name=name,
            dtype=found.dtype,
            offsets=tuple(item.tensor_data.chunk.offsets),
            lengths=tuple(found.shape),
            shape=tuple(item.tensor_data.size),
        )
        boxes[component, name].append((box, found))
    return boxes


def _plannable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a view of another dtype of the same width where DCP cannot tell how wide the dtype is."""
    dtype = tensor.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype in _KNOWN:
        return tensor
    return tensor.detach().view(same_bits_dtype(dtype))


def plan_copies(entry: TensorEntry, *, offsets: Sequence[int], lengths: Sequence[int]) -> list[Copy]:
    """How the stored chunks of a tensor fill one box of it."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    stored = TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype_named(entry.dtype)),
        size=torch.Size(entry.shape),
        chunks=[ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.lengths)) for c in entry.chunks],
    )
    box = ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths))
    number = {c.offsets: n for n, c in enumerate(entry.chunks)}
    return [
        Copy(
            chunk=number[tuple(item.storage_index.offset or ())],
            chunk_offsets=tuple(item.storage_offsets),
            target_offsets=tuple(item.dest_offsets),
            lengths=tuple(item.lengths),
        )
        for item in create_read_items_for_chunk_list("", stored, [box])
    ]
