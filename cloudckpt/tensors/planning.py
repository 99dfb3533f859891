"""What a save writes, decided before a byte moves, and decided once: the plan is kept until the state changes shape.

A training state is the same from save to save but for its values. Its layout, the headers of its payload objects and
the text of its index are made at the first save; later ones compare names, dtypes and shapes, and fill in sums.

A process alone has its plan at once. Of many, each looks at its own state; if all of them find what they found before,
the plan stands, otherwise each makes an offer, and rank zero divides the work.

(Past 350 lines: alone or among many, it is one plan, drawn by the same hand.)
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import marshal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from cloudckpt.core import keys
from cloudckpt.core.index_json import TensorsText
from cloudckpt.core.layout import Item, Layout, plan_layout
from cloudckpt.core.merging import is_like
from cloudckpt.core.model import Chunk, TensorEntry
from cloudckpt.tensors.dcp import Box, Where, plan_save
from cloudckpt.tensors.memory import dtype_name
from cloudckpt.tensors.replicas import Replica
from cloudckpt.tensors.sharded import is_sharded
from cloudckpt.tensors.sharing import Offer, Share, divide
from cloudckpt.tensors.tree import FlatState, flatten

__all__ = ["Look", "Payload", "Plan", "Planner", "lay_out", "no_collections"]


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
        payloads: one per component that has tensors for this rank to write.
        sends: components whose values this rank reports at every save.
        overall: what all ranks write together; on rank zero only.
    """

    flat: FlatState
    payloads: tuple[Payload, ...]
    sends: tuple[str, ...] = ()
    overall: Overall | None = None

    @property
    def size_bytes(self) -> int:
        """The payload objects' sizes together."""
        return sum(payload.size_bytes for payload in self.payloads)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Overall:
    """One save of all ranks, as the manifest and the index tell it.

    Attributes:
        objects: the payload objects' names and sizes in bytes, rank after rank.
        text: the index's part about tensors, complete but for the sums of the boxes, object after object.
        pickled: whether any leaf had to be pickled.
    """

    objects: tuple[tuple[str, int], ...]
    text: TensorsText
    pickled: bool

    @property
    def size_bytes(self) -> int:
        """The payload objects' sizes together."""
        return sum(size for _, size in self.objects)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Look:
    """What one rank has, before anything is agreed.

    Attributes:
        flat: the state taken apart.
        data: component -> the tensors that it holds, one per box.
        boxes: component -> which boxes of the whole tensors these are; None if they are all whole.
        same: whether it is what the plan at hand was made for.
    """

    flat: FlatState
    data: Mapping[str, Sequence[torch.Tensor]]
    boxes: Mapping[str, Sequence[Box]] | None
    same: bool

    def offer(self) -> Offer:
        """What it has, for rank zero."""
        boxes = _whole(self.flat) if self.boxes is None else self.boxes
        return Offer(boxes=boxes, aliases=self.flat.aliases, structure=self.flat.structure, pickled=self.flat.pickled)


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
        self._kept: tuple[_Outline, ...] = ()
        self._share = Share(keep={})
        self._overall: Overall | None = None
        self._drawn: Overall | None = None
        self._skeleton: dict[str, tuple[bytes, object]] = {}
        self._number = 0
        self._known: dict[object, Where] = {}
        #: By rank, which of them share the same tensors; on rank zero only.
        self.groups: Sequence[int] = ()
        self.mixed = False
        #: What people should know of the last division; on rank zero only.
        self.remarks: Sequence[str] = ()

    def plan(self, state: Mapping[str, object], *, allow_pickle: bool) -> Plan:
        """Take a state apart and lay out what a process that saves alone writes of it. No bytes move.

        Raises:
            TypeError: something in it cannot be stored; names its path.
            ConfigError: the state is empty, or a component's name cannot be used.
        """
        with no_collections():
            look = self._look(flatten(state, allow_pickle=allow_pickle))
            if not look.same or self._overall is None:
                boxes = _whole(look.flat) if look.boxes is None else look.boxes
                self._keep(look, Share(keep={component: range(len(own)) for component, own in boxes.items()}))
                drawn = [outline.empty for outline in self._kept]
                self._overall = _overall(drawn, look.flat.aliases, [*look.flat.structure], pickled=look.flat.pickled)
            return self._planned(look)

    def look(self, state: Mapping[str, object], *, allow_pickle: bool) -> Look:
        """Take this rank's state apart, and see whether it is what the last plan was for.

        Raises:
            TypeError: something in it cannot be stored; names its path.
            ConfigError: the state is empty, or a component's name cannot be used.
        """
        with no_collections():
            return self._look(flatten(state, allow_pickle=allow_pickle, rank=self._rank))

    def token(self, look: Look) -> bytes:
        """What says which plan this rank would go on with; empty for none."""
        same = look.same and self._same_skeleton(look.flat)
        return str(self._number).encode() if same and self._number else b""

    def divide(self, offers: Sequence[Offer]) -> Sequence[Share]:
        """On rank zero: who writes what. It is agreed once every rank has ``settle``d it.

        Raises:
            StateMismatchError: the ranks' states do not make one.
        """
        with no_collections():
            division = divide(offers)
            components = dict.fromkeys(c for offer in offers for c in offer.structure)
            drawn = [
                _outline(component, own, range(len(own)), rank, self._world_size).empty
                for rank, of_rank in enumerate(division.boxes)
                for component, own in of_rank.items()
                if own
            ]
            self._drawn = _overall(drawn, division.aliases, [*components], pickled=division.pickled)
            self.groups, self.mixed = division.groups, division.mixed
            self.remarks = division.remarks
            return division.shares

    def replicas(self, look: Look) -> list[Replica]:
        """What other ranks have as well, by the last plan that was settled."""
        boxes = _whole(look.flat) if look.boxes is None else look.boxes
        return [
            Replica(name=_replica_name(boxes[component][number]), tensor=look.data[component][number])
            for component, numbers in self._share.shared.items()
            for number in numbers
        ]

    def settle(self, look: Look, share: Share | None) -> Plan:
        """The plan of this rank.

        Args:
            share: what it writes; None for what it wrote before.
        """
        with no_collections():
            if share is not None:
                self._number += 1
                self._overall = self._drawn
                self._keep(look, share)
                self._remember_skeleton(look.flat)
            return self._planned(look)

    def _look(self, flat: FlatState) -> Look:
        pieces = plan_save(flat.tensors, self._known) if _any_sharded(flat) else None
        if pieces is None:
            data = {component: [*named.values()] for component, named in flat.tensors.items()}
        else:
            data = {component: [tensor for _, tensor in boxes] for component, boxes in pieces.items()}
        boxes = None if pieces is None else {c: [box for box, _ in own] for c, own in pieces.items()}
        return Look(
            flat=flat, data=data, boxes=boxes, same=self._key is not None and self._key == _key(flat, data, boxes)
        )

    def _keep(self, look: Look, share: Share) -> None:
        boxes = _whole(look.flat) if look.boxes is None else look.boxes
        self._key = _key(look.flat, look.data, look.boxes)
        self._share = share
        self._kept = tuple(
            _outline(component, boxes[component], keep, self._rank, self._world_size)
            for component, keep in share.keep.items()
            if keep
        )

    def _planned(self, look: Look) -> Plan:
        payloads = tuple(outline.with_data(look.data[outline.empty.component]) for outline in self._kept)
        return Plan(flat=look.flat, payloads=payloads, sends=self._share.sends, overall=self._overall)

    # What is no tensor may change its values from save to save, and must not change its places unnoticed.

    def _same_skeleton(self, flat: FlatState) -> bool:
        if flat.structure.keys() != self._skeleton.keys():
            return False
        for component, node in flat.structure.items():
            seen, known = self._skeleton[component]
            if marshal.dumps(node, _BY_VALUE) != seen and not is_like(node, known):
                return False
        return True

    def _remember_skeleton(self, flat: FlatState) -> None:
        self._skeleton = {c: (marshal.dumps(node, _BY_VALUE), node) for c, node in flat.structure.items()}


def _key(flat: FlatState, data: Mapping[str, Sequence[torch.Tensor]], boxes: object) -> object:
    return [
        (component, [*flat.tensors[component]], [*flat.aliases[component].items()], [*map(_kind, own)])
        for component, own in data.items()
    ], boxes


def _replica_name(box: Box) -> str:
    name = f"{box.component}.{box.name}"
    if box.lengths == box.shape:
        return name
    ends = (f"{start}:{start + length}" for start, length in zip(box.offsets, box.lengths, strict=True))
    return f"{name}[{', '.join(ends)}]"


#: The version of marshal in which equal values are equal bytes, whatever else shares them.
_BY_VALUE = 2


def _outline(component: str, boxes: Sequence[Box], keep: Sequence[int], rank: int, world_size: int) -> _Outline:
    own = [boxes[number] for number in keep]
    layout = plan_layout([_item(box) for box in own])
    sizes = itertools.chain([len(layout.header)], (place.size_bytes for place in layout.places))
    empty = Payload(
        component=component,
        name=keys.payload_name(component, rank, world_size),
        layout=layout,
        bounds=tuple(itertools.accumulate(sizes, initial=0)),
        boxes=tuple(own[place.number] for place in layout.places),
        tensors=(),
    )
    return _Outline(empty, tuple(keep[place.number] for place in layout.places))


def lay_out(
    component: str, boxes: Sequence[Box], tensors: Sequence[torch.Tensor], rank: int, world_size: int
) -> Payload:
    """One payload object with these boxes of a component's tensors, at least one, whoever has planned them.

    Args:
        tensors: the boxes' data.
        rank: which of the ranks that save together writes it.
        world_size: how many they are.
    """
    return _outline(component, boxes, range(len(boxes)), rank, world_size).with_data(tensors)


def _overall(
    payloads: Sequence[Payload],
    aliases: Mapping[str, Mapping[str, str]],
    components: Sequence[str],
    *,
    pickled: bool,
) -> Overall:
    return Overall(
        objects=tuple((payload.name, payload.size_bytes) for payload in payloads),
        text=_text(components, aliases, payloads),
        pickled=pickled,
    )


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
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


def _text(
    components: Sequence[str], aliases: Mapping[str, Mapping[str, str]], payloads: Sequence[Payload]
) -> TensorsText:
    """The index's entries, each chunk numbered where its sum will be."""
    number = itertools.count()
    tensors: dict[str, dict[str, TensorEntry]] = {component: {} for component in components}
    chunks: dict[tuple[str, str], list[Chunk]] = {}
    shapes: dict[tuple[str, str], Box] = {}
    for payload in payloads:
        for box, place in zip(payload.boxes, payload.layout.places, strict=True):
            shapes[payload.component, box.name] = box
            chunks.setdefault((payload.component, box.name), []).append(
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
    for (component, name), own in chunks.items():
        box = shapes[component, name]
        tensors[component][name] = TensorEntry(dtype=dtype_name(box.dtype), shape=box.shape, chunks=tuple(own))
    for component, named in aliases.items():
        for name, first in named.items():
            known = tensors[component][first]
            tensors[component][name] = TensorEntry(dtype=known.dtype, shape=known.shape, alias_of=first)
    return TensorsText(tensors)
