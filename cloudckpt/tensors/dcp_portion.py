"""One rank's part of a save that PyTorch's distributed checkpoint (DCP) has planned.

DCP's plan names each value by its path, joined with dots. The path says where it belongs: the component first, then the
place in the component's tree. Tensors go into one payload object per component and rank; every other value becomes a
JSON node on the rank that has it. Neither is ever pickled, and so the planner is asked for the object itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from cloudckpt.core.model import Chunk, PayloadObject
from cloudckpt.core.values import Encoded, Path, render_path
from cloudckpt.tensors.dcp import Box
from cloudckpt.tensors.memory import PLAIN, check_storable, dtype_name
from cloudckpt.tensors.planning import Payload, lay_out
from cloudckpt.tensors.tree import Identity, encode_value, identity_of

__all__ = ["Portion", "Stored", "Written", "name_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One box of one tensor, where it lies.

    Attributes:
        component: the component it belongs to.
        name: the tensor's name in there.
        dtype: the tensor's dtype.
        shape: the whole tensor's shape.
        chunk: the box, its byte range and its sum.
        object: the payload object that holds it.
    """

    component: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk: Chunk
    object: PayloadObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What was written for one item of the plan.

    Attributes:
        tensors: of a tensor the one box, of any other value the tensors and arrays inside of it.
        alias_of: the box of the tensor that this one is tied to, which has none of its own then.
        node: of a value that is no tensor, its JSON node.
        pickled: whether anything in the node had to be pickled.
    """

    tensors: tuple[Stored, ...] = ()
    alias_of: Stored | None = None
    node: Encoded | None = None
    pickled: bool = False

    @property
    def boxes(self) -> tuple[Stored, ...]:
        """Where its bytes lie, whoever's they are."""
        return self.tensors if self.alias_of is None else (self.alias_of,)


class Portion:
    """What one rank writes, taken item by item.

    Args:
        rank: which of the ranks that save together this is.
        world_size: how many they are.
        allow_pickle: pickle what nothing else can store, and ask planners that can only pickle.
    """

    def __init__(self, rank: int, world_size: int, *, allow_pickle: bool) -> None:
        self._rank = rank
        self._world_size = world_size
        self._allow_pickle = allow_pickle
        self._items: list[WriteItem] = []
        self._nodes: dict[int, tuple[Encoded, bool]] = {}
        self._boxes: dict[str, list[Box]] = {}
        self._tensors: dict[str, list[torch.Tensor]] = {}
        self._owners: dict[tuple[str, str, tuple[int, ...]], int] = {}
        self._names: set[tuple[str, str]] = set()
        self._first: dict[tuple[str, Identity], int] = {}
        self._aliases: dict[int, int] = {}

    def take(self, items: Sequence[WriteItem], paths: Mapping[str, Path], planner: SavePlanner) -> None:
        """Look up the items' values. No bytes move.

        Args:
            paths: where each value belongs, by the plan's name for it.

        Raises:
            TypeError: a value cannot be stored, or the planner can only give it pickled; names it.
        """
        tensors = [item for item in items if item.type is not WriteItemType.BYTE_IO]
        values = [item for item in items if item.type is WriteItemType.BYTE_IO]
        for item in tensors:  # these have their names before any tensor inside of another value
            self._take_tensor(item, paths[item.index.fqn], planner)
        for item in values:
            self._take_value(item, paths[item.index.fqn], self._looked_up(item, planner))

    def _take_tensor(self, item: WriteItem, path: Path, planner: SavePlanner) -> None:
        found = planner.resolve_data(item)
        if not isinstance(found, torch.Tensor) or item.tensor_data is None:
            raise TypeError(f"{render_path(path)}: the planner planned a tensor and gave a {type(found).__qualname__}")
        chunk = item.tensor_data.chunk
        if tuple(found.shape) != tuple(chunk.sizes):
            raise TypeError(
                f"{render_path(path)}: the planner planned a box of shape {tuple(chunk.sizes)} and gave one of "
                f"{tuple(found.shape)}"
            )
        box = Box(
            component=str(path[0]),
            name=name_of(path),
            dtype=found.dtype,
            offsets=tuple(chunk.offsets),
            lengths=tuple(chunk.sizes),
            shape=tuple(item.tensor_data.size),
        )
        number = len(self._items)
        first = self._tied_to(box, found, number)
        if first == number:
            self._add(box, found.detach(), path)
        else:
            self._names.add((box.component, box.name))
            self._aliases[number] = first
        self._items.append(item)

    def _tied_to(self, box: Box, tensor: torch.Tensor, number: int) -> int:
        """The number of the item that has stored the same memory, or this one's: to DCP tied names are unrelated."""
        if box.lengths != box.shape or not tensor.numel() or type(tensor) not in PLAIN:
            return number
        return self._first.setdefault((box.component, identity_of(tensor)), number)

    def _take_value(self, item: WriteItem, path: Path, value: object) -> None:
        def store(tensor: torch.Tensor, inner: Path) -> str:
            wanted = name_of(inner)
            free = (f"{wanted}~{number}" if number else wanted for number in itertools.count())
            name = next(name for name in free if (path[0], name) not in self._names)
            shape = tuple(tensor.shape)
            box = Box(
                component=str(path[0]),
                name=name,
                dtype=tensor.dtype,
                offsets=(0,) * len(shape),
                lengths=shape,
                shape=shape,
            )
            self._add(box, tensor.detach(), inner)
            return name

        node, pickled = encode_value(value, path, store, allow_pickle=self._allow_pickle)
        self._nodes[len(self._items)] = Encoded(node), pickled
        self._items.append(item)

    def _looked_up(self, item: WriteItem, planner: SavePlanner) -> object:
        look_up = getattr(planner, "lookup_object", None)
        if look_up is not None:
            return look_up(item.index)
        if not self._allow_pickle:
            raise TypeError(
                f"{item.index.fqn}: {type(planner).__qualname__} has no lookup_object(), and would give this value "
                "pickled. Derive the planner from torch.distributed.checkpoint.DefaultSavePlanner, or pass "
                "StorageWriter(..., allow_pickle=True)"
            )
        found = planner.resolve_data(item)
        if isinstance(found, torch.Tensor):
            return found
        found.seek(0)
        # Written by this very process a moment ago, and only with allow_pickle=True.
        return torch.load(found, weights_only=False)

    def _add(self, box: Box, tensor: torch.Tensor, path: Path) -> None:
        check_storable(tensor, render_path(path))
        self._names.add((box.component, box.name))
        self._owners[box.component, box.name, box.offsets] = len(self._items)
        self._boxes.setdefault(box.component, []).append(box)
        self._tensors.setdefault(box.component, []).append(tensor)

    def payloads(self) -> list[Payload]:
        """The payload objects with everything that was taken."""
        return [
            lay_out(component, boxes, self._tensors[component], self._rank, self._world_size)
            for component, boxes in self._boxes.items()
        ]

    def results(
        self, payloads: Sequence[Payload], objects: Sequence[PayloadObject], sums: Sequence[int]
    ) -> list[WriteResult]:
        """What is reported of each item, once everything is in place.

        Args:
            payloads: as ``payloads`` gave them.
            objects: the same, sealed.
            sums: the sums of their boxes, object after object.
        """
        stored: dict[int, list[Stored]] = {}
        for box in _stored(payloads, objects, sums):
            stored.setdefault(self._owners[box.component, box.name, box.chunk.offsets], []).append(box)
        found = []
        for number, item in enumerate(self._items):
            own = tuple(stored.get(number, ()))
            node, pickled = self._nodes.get(number, (None, False))
            tied = self._aliases.get(number)
            alias_of = None if tied is None else stored[tied][0]
            written = Written(tensors=own, alias_of=alias_of, node=node, pickled=pickled)
            found.append(WriteResult(item.index, sum(box.chunk.length for box in own), written))
        return found


def _stored(payloads: Sequence[Payload], objects: Sequence[PayloadObject], sums: Sequence[int]) -> Iterator[Stored]:
    left = iter(sums)
    for payload, sealed in zip(payloads, objects, strict=True):
        for box, place in zip(payload.boxes, payload.layout.places, strict=True):
            chunk = Chunk(
                object=payload.name,
                start=place.start,
                length=place.size_bytes,
                offsets=box.offsets,
                lengths=box.lengths,
                crc32c=next(left),
                stored_as=None if place.stored_as == box.name else place.stored_as,
            )
            yield Stored(
                component=box.component,
                name=box.name,
                dtype=dtype_name(box.dtype),
                shape=box.shape,
                chunk=chunk,
                object=sealed,
            )


def name_of(path: Path) -> str:
    """A tensor's name in its component: the path inside of it, joined with dots."""
    return ".".join(map(str, path[1:])) or str(path[0])
