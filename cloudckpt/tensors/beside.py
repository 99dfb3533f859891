"""Staging beside training, or why not: the arena's places as the targets of an overlapping copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.optim.optimizer import Optimizer

from cloudckpt.tensors import overlap
from cloudckpt.tensors.arena import Arena, positions
from cloudckpt.tensors.memory import copy_elements
from cloudckpt.tensors.overlap import Copying, Snapshot
from cloudckpt.tensors.planning import Payload, no_collections
from cloudckpt.tensors.staging import put_header
from cloudckpt.tensors.train_state import OptimizerState

__all__ = ["Beside", "optimizers_of", "stage_beside", "why_not_beside"]


class Beside:
    """A copy that goes on while training does. Made before it begins, so that an interrupt loses no sight of it."""

    def __init__(self) -> None:
        self._snapshot: Snapshot | None = None

    def wait_staged(self) -> None:
        """See ``Staging.wait_staged``."""
        if self._snapshot is not None:
            self._snapshot.wait_copied()

    def confirm(self) -> None:
        """See ``Staging.confirm``."""
        if self._snapshot is not None:
            self._snapshot.confirm()

    def give_back(self) -> None:
        """See ``Staging.give_back``."""
        if self._snapshot is not None:
            self._snapshot.wait()

    def follow(self, snapshot: Snapshot) -> None:
        """This is the copy."""
        self._snapshot = snapshot


def optimizers_of(state: Mapping[str, object]) -> list[Optimizer]:
    """The torch optimizers among the components of a state, each once."""
    found: dict[int, Optimizer] = {}
    for value in state.values():
        several = value.optimizers if isinstance(value, OptimizerState) else [value]
        found |= {id(one): one for one in several if isinstance(one, Optimizer)}
    return [*found.values()]


def why_not_beside(state: Mapping[str, object], payloads: Sequence[Payload]) -> str | None:
    """Why this state must be copied before ``save()`` returns; None if the copy may overlap."""
    return overlap.why_not(optimizers_of(state), (tensor for payload in payloads for tensor in payload.tensors))


def stage_beside(
    beside: Beside, state: Mapping[str, object], payloads: Sequence[Payload], arena: Arena, *, borrow_bytes: int = 0
) -> None:
    """Begin to copy every payload object to its place in the arena, which is large enough.

    What no optimizer of the state writes to is copied when this returns; the rest is copied beside training, as it
    is now.

    Args:
        beside: told of the copy before it goes on in the background.
        borrow_bytes: CUDA memory that may be used while the copy lasts.
    """
    starts, _ = positions([payload.size_bytes for payload in payloads])
    copies: list[Copying] = []
    for payload, start in zip(payloads, starts, strict=True):
        put_header(arena, start, payload.layout.header)
        for tensor, box, place in zip(payload.tensors, payload.boxes, payload.layout.places, strict=True):
            if place.size_bytes:
                copies += _copies(f"{payload.component}.{box.name}", tensor, arena, start + place.start)
    with no_collections():
        overlap.begin(copies, optimizers_of(state), borrow_bytes=borrow_bytes, tell=beside.follow)


def _copies(path: str, tensor: torch.Tensor, arena: Arena, at: int) -> Iterator[Copying]:
    """One copy of a tensor that lies within a segment; of one that crosses into the next, a copy for each."""
    # A tensor of our own over the same memory: model.half() or ``p.data = ...`` would give the caller's another.
    tensor = tensor.detach()
    size, item = tensor.dtype.itemsize * tensor.numel(), tensor.dtype.itemsize
    pieces = [*arena.pieces(at, size)]
    done = 0
    for segment, offset, length in pieces:
        arena.claim(segment)
        target = segment.memory[offset : offset + length].view(tensor.dtype)
        if len(pieces) == 1:
            yield Copying(path=path, source=tensor, target=target.view(tensor.shape))
        elif tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
            source = tensor.view(-1)[done // item : (done + length) // item]
            yield Copying(path=path, source=source, target=target)
        else:
            # Odd strides over a boundary between segments: rare and not worth a way of its own.
            copy_elements(target, tensor, done // item, (done + length) // item)
        done += length
