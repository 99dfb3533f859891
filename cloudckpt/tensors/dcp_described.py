"""A checkpoint as PyTorch's distributed checkpoint (DCP) wants it described, and what its planner asks for of it.

Everything comes out of the index: the names and paths that DCP would give the values of the state (by its own planner's
walk over them), shapes, chunks, and the values that are no tensors. Nothing is unpickled.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from cloudckpt.config import Settings
from cloudckpt.core.model import Checkpoint, Chunk, Index
from cloudckpt.errors import ConfigError, StateMismatchError
from cloudckpt.storage import Storage
from cloudckpt.tensors.fetch import fetch, read_chunks
from cloudckpt.tensors.landing import byte_tensor
from cloudckpt.tensors.memory import copy_bits, dtype_named, typed_view
from cloudckpt.tensors.outline import Outline, Place
from cloudckpt.tensors.targets import Homes
from cloudckpt.tensors.tree import unflatten

__all__ = ["Described"]


class Described:
    """One checkpoint, for DCP.

    Args:
        checkpoint: the checkpoint.
        index: its index.
        component: the component that is the whole state; None for all of them, each under its name.
        allow_pickle: whether pickled leaves may be loaded, which runs code from the checkpoint.

    Attributes:
        metadata: what DCP's planners need to know.

    Raises:
        ConfigError: there is no such component, or a leaf was pickled and may not be loaded.
        CorruptCheckpointError: the index describes what cannot be.
        FormatError: its structure is malformed.
        StateMismatchError: DCP would give two of its values one name.
    """

    def __init__(
        self, checkpoint: Checkpoint, index: Index, *, component: str | None = None, allow_pickle: bool = False
    ) -> None:
        self.checkpoint = checkpoint
        self._outline = Outline(checkpoint, index)
        structure = {name: node for name, node in index.structure.items() if component in {None, name}}
        values = unflatten(structure, self._outline.tensor, self._outline.array, allow_pickle=allow_pickle)
        if component is not None:
            values = _inside(values, component, index, checkpoint)
        # Its walk, and not one like it: names and paths are those that this very torch gives the state to be loaded.
        planner = DefaultSavePlanner(flatten_sharded_tensors=False)
        try:
            planner.set_up_planner(values, storage_meta=None, is_coordinator=True)
        except ValueError as exc:
            raise StateMismatchError(
                f"{checkpoint.url}: {exc}. PyTorch's distributed checkpoint cannot tell such values apart: load it "
                "with CheckpointManager.restore() or cloudckpt.open().load()"
            ) from exc
        self._values: dict[str, Any] = planner.state_dict
        self._dtypes: dict[str, torch.dtype] = {}
        self.metadata = Metadata(state_dict_metadata={}, planner_data=planner.mappings, storage_data={})
        for fqn, value in self._values.items():
            self._describe(fqn, value)

    def _describe(self, fqn: str, value: Any) -> None:
        place = self._outline.place_of(value) if isinstance(value, torch.Tensor) else None
        if place is None:
            self.metadata.state_dict_metadata[fqn] = BytesStorageMetadata()
            return
        entry = self._outline.entries[place]
        self._dtypes[fqn] = dtype_named(entry.dtype)
        self.metadata.state_dict_metadata[fqn] = TensorStorageMetadata(
            properties=TensorProperties(dtype=self._dtypes[fqn]),
            size=torch.Size(entry.shape),
            chunks=[ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.lengths)) for c in entry.chunks],
        )
        for chunk in entry.chunks:
            self.metadata.storage_data[MetadataIndex(fqn, chunk.offsets)] = chunk

    def read(self, storage: Storage, plan: LoadPlan, planner: LoadPlanner, settings: Settings) -> None:
        """Give the planner everything that the plan asks for, proven.

        Raises:
            CorruptCheckpointError: an object is missing, too short, or a checksum differs; names object and range.
            StateMismatchError: the planner's tensor has another shape than what is to be read into it.
            StorageError: the store refused. In each case the tensors may hold anything.
        """
        values = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        arrays = {memory.data_ptr(): place for place, memory in self._outline.arrays.items()}
        places = {place for item in values for place in self._places_in(self._values[item.storage_index.fqn], arrays)}
        fetch(storage, self._outline, Homes(), settings, done=self._outline.entries.keys() - places)
        landings = [
            self._landing(item, planner.resolve_tensor(item))
            for item in plan.items
            if item.type is not LoadItemType.BYTE_IO
        ]
        read_chunks(storage, self.checkpoint, _homes(landings), settings)
        for landing in landings:
            landing.settle()
            planner.commit_tensor(landing.item, landing.tensor)
        for item in values:
            body = io.BytesIO()
            # The interface's own form: what was decoded from JSON goes through memory to the planner, which loads it.
            torch.save(self._values[item.storage_index.fqn], body)
            body.seek(0)
            planner.load_bytes(item, body)

    def _landing(self, item: ReadItem, tensor: torch.Tensor) -> _Landing:
        fqn = item.storage_index.fqn
        if tuple(tensor.shape) != tuple(item.lengths):
            raise StateMismatchError(
                f"{fqn}: {tuple(item.lengths)} elements are to be read into a tensor of shape {tuple(tensor.shape)}"
            )
        return _Landing(item, self.metadata.storage_data[item.storage_index], self._dtypes[fqn], tensor)

    def _places_in(self, value: Any, arrays: Mapping[int, Place]) -> Iterator[Place]:
        """What has to be fetched before a value that is no tensor has all that is in it; arrays go by their address."""
        if isinstance(value, torch.Tensor):
            if (place := self._outline.place_of(value)) is not None:
                yield place
        elif isinstance(value, np.ndarray):
            if value.ctypes.data in arrays:
                yield arrays[value.ctypes.data]
        elif isinstance(value, Mapping):
            for pair in value.items():
                yield from self._places_in(pair, arrays)
        elif isinstance(value, list | tuple | set | frozenset):
            for inner in value:
                yield from self._places_in(inner, arrays)


def _inside(values: Mapping[str, Any], component: str, index: Index, checkpoint: Checkpoint) -> dict[str, Any]:
    if component not in values:
        raise ConfigError(
            f"{checkpoint.url} has no component {component!r}; it has {', '.join(map(repr, index.structure))}"
        )
    found = values[component]
    if not isinstance(found, Mapping):
        raise ConfigError(f"{checkpoint.url}: component {component!r} is no mapping of names to values")
    return dict(found)


@dataclass(slots=True)
class _Landing:
    """A box of a stored chunk on its way into a tensor of the planner's.

    Attributes:
        item: what the plan says.
        chunk: where the box is part of.
        dtype: as it is stored.
        tensor: where it goes.
        through: the whole chunk, where it cannot be read to where it belongs.
    """

    item: ReadItem
    chunk: Chunk
    dtype: torch.dtype
    tensor: torch.Tensor
    through: torch.Tensor | None = field(default=None)

    @property
    def direct(self) -> bool:
        """Whether the chunk's bytes are the tensor's."""
        tensor = self.tensor
        return (
            self.chunk.lengths == tuple(self.item.lengths)
            and tensor.dtype == self.dtype
            and tensor.layout == torch.strided
            and tensor.is_contiguous()
            and not (tensor.is_conj() or tensor.is_neg() or tensor.is_meta)
        )

    def settle(self) -> None:
        """What is left to be done once the bytes are there."""
        target = self.tensor.detach()
        if self.through is None:
            if not target.is_inference():
                torch.autograd.graph.increment_version(target)
            return
        box = typed_view(self.through, 0, self.dtype, self.chunk.lengths)
        for dimension, (start, length) in enumerate(zip(self.item.storage_offsets, self.item.lengths, strict=True)):
            box = box.narrow(dimension, start, length)
        if target.dtype == self.dtype:
            copy_bits(target, box)
        else:
            target.copy_(box)


def _homes(landings: Sequence[_Landing]) -> list[tuple[Chunk, torch.Tensor]]:
    """Where each chunk is read to: each once, however many boxes are cut out of it."""
    homes: list[tuple[Chunk, torch.Tensor]] = []
    shared: dict[Chunk, torch.Tensor] = {}
    for landing in landings:
        if landing.direct:
            homes.append((landing.chunk, byte_tensor(landing.tensor.detach())))
        else:
            if landing.chunk not in shared:
                shared[landing.chunk] = torch.empty(landing.chunk.length, dtype=torch.uint8, device="cpu")
                homes.append((landing.chunk, shared[landing.chunk]))
            landing.through = shared[landing.chunk]
    return homes
