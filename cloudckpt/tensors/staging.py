"""The copy that training waits for: tensors into host memory laid out as the payload objects themselves.

Offsets are known before a byte moves; the arena *is* the file, so an upload sends slices of it and nothing is
serialised a second time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import crc32c
import torch

from cloudckpt.core import keys
from cloudckpt.core.checksum import combine_all
from cloudckpt.core.layout import Item, Layout, plan_layout
from cloudckpt.core.model import Chunk, PayloadObject
from cloudckpt.tensors.dcp import Box
from cloudckpt.tensors.memory import byte_view, copy_bits, dtype_name, typed_view

__all__ = ["Arena", "Payload", "lay_out", "seal_payload", "slices", "stage"]

#: Uploads hand out slices of at most this size, so that progress moves and a cancel is noticed.
_SLICE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Payload:
    """One payload object before, while and after its bytes are staged.

    Attributes:
        component: the component it belongs to.
        name: its name inside the checkpoint's folder.
        layout: where each box lies.
        boxes: the boxes in the order of ``layout.places``.
    """

    component: str
    name: str
    layout: Layout
    boxes: tuple[Box, ...]


@dataclass(slots=True)
class Arena:
    """Host memory that is used again by the next save, so that its pages are faulted in only once.

    One save at a time uses it. A component that grew gets a new segment; one that left gives its own back.
    """

    _segments: dict[str, torch.Tensor] = field(default_factory=dict)

    def fit(self, payloads: Sequence[Payload]) -> None:
        """Have a segment of the right size for each payload object, keeping those that fit.

        Raises:
            MemoryError: the host has not that much.
        """
        wanted = {payload.name: payload.layout.size_bytes for payload in payloads}
        kept = {n: s for n, s in self._segments.items() if wanted.get(n) == s.numel()}
        self._segments = kept
        for name, size_bytes in wanted.items():
            if name not in kept:
                try:
                    kept[name] = torch.empty(size_bytes, dtype=torch.uint8)
                except RuntimeError as exc:
                    raise MemoryError(
                        f"no {size_bytes} bytes of host memory to stage {name}: save fewer components, or free memory"
                    ) from exc

    def fault_in(self) -> None:
        """Touch every page now, so that the first save does not pay for it."""
        for segment in self._segments.values():
            segment.zero_()

    def segment(self, payload: Payload) -> torch.Tensor:
        """The memory (uint8) of one payload object."""
        return self._segments[payload.name]


def lay_out(boxes: Sequence[Box], *, rank: int, world_size: int) -> list[Payload]:
    """The payload objects of this rank: one per component that has tensors."""
    by_component: dict[str, list[Box]] = {}
    for box in boxes:
        by_component.setdefault(box.component, []).append(box)
    payloads = []
    for component, own in by_component.items():
        layout = plan_layout([_item(box) for box in own])
        payloads.append(
            Payload(
                component=component,
                name=keys.payload_name(component, rank, world_size),
                layout=layout,
                boxes=tuple(own[place.number] for place in layout.places),
            )
        )
    return payloads


def _item(box: Box) -> Item:
    dtype = box.tensor.dtype
    return Item(name=box.name, dtype=dtype_name(dtype), shape=tuple(box.tensor.shape), item_size=dtype.itemsize)


def stage(payloads: Sequence[Payload], arena: Arena) -> None:
    """Copy every box to its place. Returns when the bytes are all there: the state may change from now on.

    Raises:
        MemoryError: the host has no room for the arena.
    """
    arena.fit(payloads)
    devices = set()
    for payload in payloads:
        segment = arena.segment(payload)
        segment[: len(payload.layout.header)] = torch.frombuffer(bytearray(payload.layout.header), dtype=torch.uint8)
        for box, place in zip(payload.boxes, payload.layout.places, strict=True):
            if place.size_bytes:
                target = typed_view(segment, place.start, box.tensor.dtype, box.tensor.shape)
                copy_bits(target, box.tensor, non_blocking=box.tensor.is_cuda)
                devices.add(box.tensor.device)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def slices(payload: Payload, arena: Arena) -> Iterator[memoryview]:
    """The staged bytes of one payload object, in order, as views of the arena."""
    view = byte_view(arena.segment(payload))
    for start in range(0, len(view), _SLICE_BYTES):
        yield view[start : start + _SLICE_BYTES]


def seal_payload(payload: Payload, arena: Arena) -> tuple[PayloadObject, list[tuple[Box, Chunk]]]:
    """The staged object's size and sums as the index records them, and the chunk of each box."""
    view = byte_view(arena.segment(payload))
    sums = [(crc32c.crc32c(payload.layout.header), len(payload.layout.header))]
    chunks = []
    for box, place in zip(payload.boxes, payload.layout.places, strict=True):
        value = crc32c.crc32c(view[place.start : place.start + place.size_bytes])
        sums.append((value, place.size_bytes))
        chunks.append(
            (
                box,
                Chunk(
                    object=payload.name,
                    start=place.start,
                    length=place.size_bytes,
                    offsets=box.offsets,
                    lengths=tuple(box.tensor.shape),
                    crc32c=value,
                    stored_as=None if place.stored_as == box.name else place.stored_as,
                ),
            )
        )
    sealed = PayloadObject(name=payload.name, size_bytes=payload.layout.size_bytes, crc32c=combine_all(sums))
    return sealed, chunks
