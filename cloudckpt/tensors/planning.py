"""What a save writes, decided before a byte moves, and decided once: the plan is kept until the state changes shape.

A training state is the same from save to save but for its values. Its layout, the headers of its payload objects and
the text of its index are made at the first save; later ones compare names, dtypes and shapes, and fill in sums.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from cloudckpt.core import keys
from cloudckpt.core.index_json import TensorsText
from cloudckpt.core.layout import Item, Layout, plan_layout
from cloudckpt.core.model import Chunk, TensorEntry
from cloudckpt.tensors.dcp import Box, is_sharded, plan_save
from cloudckpt.tensors.memory import dtype_name
from cloudckpt.tensors.tree import FlatState, flatten

__all__ = ["Payload", "Plan", "Planner"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Payload:
    """One payload object of one save.

    Attributes:
        component: the component it belongs to.
        name: its name inside the checkpoint's folder.
        layout: where each box lies.
        bounds: where the header and then each box begins, and at last where the object ends. There are no holes.
        boxes: the boxes in the order of ``layout.places``.
        tensors: their data, in the same order.
    """

    component: str
    name: str
    layout: Layout
    bounds: tuple[int, ...]
    boxes: tuple[Box, ...]
    tensors: tuple[torch.Tensor, ...]

    @property
    def size_bytes(self) -> int:
        """The object's size in bytes."""
        return self.layout.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """One save of this rank.

    Attributes:
        flat: the state taken apart.
        payloads: one per component that has tensors.
        text: the index's part about tensors, complete but for the sums of the boxes, payload after payload.
    """

    flat: FlatState
    payloads: tuple[Payload, ...]
    text: TensorsText

    @property
    def size_bytes(self) -> int:
        """The payload objects' sizes together."""
        return sum(payload.size_bytes for payload in self.payloads)


@dataclass(frozen=True, slots=True, eq=False)
class _Outline:
    """A payload object without its data, and how its data is picked from the component's tensors."""

    empty: Payload
    order: tuple[int, ...]

    def with_data(self, tensors: Sequence[torch.Tensor]) -> Payload:
        empty, order = self.empty, self.order
        return Payload(
            component=empty.component,
            name=empty.name,
            layout=empty.layout,
            bounds=empty.bounds,
            boxes=empty.boxes,
            tensors=itemgetter(*order)(tensors) if len(order) > 1 else (tensors[order[0]],),
        )


class Planner:
    """Plans the saves of one rank, and remembers the last plan."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._key: object = None
        self._kept: tuple[tuple[_Outline, ...], TensorsText] | None = None

    def plan(self, state: Mapping[str, object], *, allow_pickle: bool) -> Plan:
        """Take a state apart and lay out what this rank writes of it. No bytes move.

        Raises:
            TypeError: something in it cannot be stored; names its path.
            ConfigError: the state is empty, or a component's name cannot be used.
        """
        with _no_collections():
            return self._plan(flatten(state, allow_pickle=allow_pickle))

    def _plan(self, flat: FlatState) -> Plan:
        pieces = plan_save(flat.tensors) if _any_sharded(flat) else None
        if pieces is None:
            data = {component: [*named.values()] for component, named in flat.tensors.items()}
        else:
            data = {component: [tensor for _, tensor in boxes] for component, boxes in pieces.items()}
        key = [
            (component, [*flat.tensors[component]], [*flat.aliases[component].items()], [*map(_kind, own)])
            for component, own in data.items()
        ]
        boxes = None if pieces is None else {c: [box for box, _ in own] for c, own in pieces.items()}
        if self._kept is None or (key, boxes) != self._key:
            self._kept = self._draw(flat, boxes or _whole(flat))
            self._key = (key, boxes)
        outlines, text = self._kept
        payloads = tuple(outline.with_data(data[outline.empty.component]) for outline in outlines)
        return Plan(flat=flat, payloads=payloads, text=text)

    def _draw(self, flat: FlatState, boxes: Mapping[str, Sequence[Box]]) -> tuple[tuple[_Outline, ...], TensorsText]:
        outlines = tuple(self._outline(component, own) for component, own in boxes.items() if own)
        return outlines, _text(flat, [outline.empty for outline in outlines])

    def _outline(self, component: str, boxes: Sequence[Box]) -> _Outline:
        layout = plan_layout([_item(box) for box in boxes])
        sizes = itertools.chain([len(layout.header)], (place.size_bytes for place in layout.places))
        order = tuple(place.number for place in layout.places)
        empty = Payload(
            component=component,
            name=keys.payload_name(component, self._rank, self._world_size),
            layout=layout,
            bounds=tuple(itertools.accumulate(sizes, initial=0)),
            boxes=tuple(boxes[number] for number in order),
            tensors=(),
        )
        return _Outline(empty, order)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Without Python's cycle collector, which would walk the many small objects made here, all of them to stay."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _kind(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, torch.device]:
    return tensor.dtype, tensor.shape, tensor.device


def _any_sharded(flat: FlatState) -> bool:
    return any(is_sharded(kind) for kind in {type(t) for named in flat.tensors.values() for t in named.values()})


def _whole(flat: FlatState) -> dict[str, list[Box]]:
    """Each tensor as one box: what every planner would say of a process that has all of every tensor."""
    return {
        component: [
            Box(
                component=component,
                name=name,
                dtype=tensor.dtype,
                offsets=(0,) * tensor.dim(),
                lengths=tuple(tensor.shape),
                shape=tuple(tensor.shape),
            )
            for name, tensor in named.items()
        ]
        for component, named in flat.tensors.items()
    }


def _item(box: Box) -> Item:
    return Item(name=box.name, dtype=dtype_name(box.dtype), shape=box.lengths, item_size=box.dtype.itemsize)


def _text(flat: FlatState, payloads: Sequence[Payload]) -> TensorsText:
    """The index's entries, each chunk numbered where its sum will be."""
    number = itertools.count()
    tensors: dict[str, dict[str, TensorEntry]] = {component: {} for component in flat.structure}
    for payload in payloads:
        named = tensors[payload.component]
        chunks: dict[str, list[Chunk]] = {}
        shapes: dict[str, Box] = {}
        for box, place in zip(payload.boxes, payload.layout.places, strict=True):
            shapes[box.name] = box
            chunks.setdefault(box.name, []).append(
                Chunk(
                    object=payload.name,
                    start=place.start,
                    length=place.size_bytes,
                    offsets=box.offsets,
                    lengths=box.lengths,
                    crc32c=next(number),
                    stored_as=None if place.stored_as == box.name else place.stored_as,
                )
            )
        for name, own in chunks.items():
            box = shapes[name]
            named[name] = TensorEntry(dtype=dtype_name(box.dtype), shape=box.shape, chunks=tuple(own))
    for component, aliases in flat.aliases.items():
        for name, first in aliases.items():
            known = tensors[component][first]
            tensors[component][name] = TensorEntry(dtype=known.dtype, shape=known.shape, alias_of=first)
    return TensorsText(tensors)
