"""Tensors of which this process holds a part: what they are, and the memory that they are here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

__all__ = ["has_parts", "held_parts", "is_many", "is_sharded", "like", "local_boxes", "why_not_stored"]


def is_sharded(kind: type) -> bool:
    """Whether tensors of this type say themselves which boxes of a larger tensor they hold."""
    return hasattr(kind, "__create_write_items__") or any(base.__name__ == "ShardedTensor" for base in kind.__mro__)


def held_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that this process holds of it; of a plain tensor, itself."""
    if not is_sharded(type(tensor)):
        return [tensor]
    sharded: Any = tensor
    if hasattr(sharded, "local_shards"):
        return [shard.tensor for shard in sharded.local_shards()]
    return [sharded._local_tensor]  # noqa: SLF001 - to_local() is an operation of autograd's, and copies views


def why_not_stored(tensor: torch.Tensor) -> str | None:
    """Why what this process holds of it is no part of its value; None if it is."""
    placements: Sequence[Any] = getattr(tensor, "placements", ())
    if any(placement.is_partial() for placement in placements):
        return "is a DTensor whose ranks hold summands (Partial): redistribute() it to Replicate or Shard first"
    return None


def local_boxes(tensor: torch.Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and lengths of the boxes that this process holds of a DTensor, in the whole tensor's elements."""
    chunks: Sequence[Any] = tensor.__create_chunk_list__()  # type: ignore[attr-defined]  # DCP's protocol
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]


def like(template: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A DTensor with the placements of ``template`` over other local memory of the same shape."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - only where there are some: it takes a second to import

    shown: Any = template
    found: torch.Tensor = DTensor.from_local(
        local,
        shown.device_mesh,
        shown.placements,
        run_check=False,
        shape=template.shape,
        stride=template.stride(),
    )
    return found


def has_parts(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor: one with the same placements over other memory can be made."""
    return hasattr(type(tensor), "__create_chunk_list__") and hasattr(tensor, "device_mesh")


def is_many() -> bool:
    """Whether this process is one of several: only then can anything be sharded."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
