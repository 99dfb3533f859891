"""PyTorch's distributed checkpoint (DCP) as the planning engine: who writes which box of which tensor.

Each process makes a local plan; what several would write is spread over them by ``core.spreading``. Only the planners
are used; bytes never pass through DCP. It is asked only where a state holds sharded tensors: of a tensor that one
process has whole there is nothing to decide, and its planners take 80 microseconds to say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from cloudckpt.core.model import TensorEntry
from cloudckpt.tensors.memory import dtype_named, same_bits_dtype

__all__ = ["Box", "Copy", "plan_copies", "plan_save"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """From a stored chunk (number ``chunk`` of its entry) to a target: equal boxes of ``lengths`` elements."""

    chunk: int
    chunk_offsets: tuple[int, ...]
    target_offsets: tuple[int, ...]
    lengths: tuple[int, ...]


def plan_save(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, list[tuple[Box, torch.Tensor]]]:
    """Which boxes this process holds and the data of each, by component, in a deterministic order."""
    names = {f"{n}": (component, name) for n, (component, name) in enumerate(_all_names(tensors))}
    state = {fqn: _plannable(tensors[component][name]) for fqn, (component, name) in names.items()}
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(state, storage_meta=None, is_coordinator=True)
    boxes: dict[str, list[tuple[Box, torch.Tensor]]] = {component: [] for component in tensors}
    for item in planner.create_local_plan().items:
        component, name = names[item.index.fqn]
        found = planner.lookup_object(item.index)
        if item.tensor_data is None or not isinstance(found, torch.Tensor):
            raise TypeError(f"{component}.{name}: planned as something that is no tensor")
        if found is state[item.index.fqn]:
            found = tensors[component][name]
        box = Box(
            component=component,
            name=name,
            dtype=found.dtype,
            offsets=tuple(item.tensor_data.chunk.offsets),
            lengths=tuple(found.shape),
            shape=tuple(item.tensor_data.size),
        )
        boxes[component].append((box, found))
    return boxes


def _plannable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a view of another dtype of the same width where DCP cannot tell how wide the dtype is."""
    dtype = tensor.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype in _KNOWN:
        return tensor
    return tensor.detach().view(same_bits_dtype(dtype))


def _all_names(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> list[tuple[str, str]]:
    return [(component, name) for component, named in tensors.items() for name in named]


def plan_copies(entry: TensorEntry, *, offsets: Sequence[int], lengths: Sequence[int]) -> list[Copy]:
    """How the stored chunks of a tensor fill one box of it."""
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
