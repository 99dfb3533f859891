"""Tensors of which this process holds a part: what they are, and the memory that they are here."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed

__all__ = ["has_parts", "held_parts", "is_in_shards", "is_many", "is_sharded", "like", "local_boxes", "why_not_stored"]


def is_sharded(kind: type) -> bool:
    """Whether tensors of this type say themselves which boxes of a larger tensor they hold."""
    return hasattr(kind, "__create_write_items__") or any(base.__name__ == "ShardedTensor" for base in kind.__mro__)


def held_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that this process holds of it; of a plain tensor, itself."""
    if not is_sharded(type(tensor)):
        return [tensor]
    sharded: Any = tensor
    if is_in_shards(tensor):
        return [shard.tensor for shard in _shards_of(tensor)]
    return [sharded._local_tensor]  # noqa: SLF001 - to_local() is an operation of autograd's, and copies views


def why_not_stored(tensor: torch.Tensor) -> str | None:
    """Why what this process holds of it is no part of its value; None if it is."""
    placements: Sequence[Any] = getattr(tensor, "placements", ())
    if any(placement.is_partial() for placement in placements):
        return "is a DTensor whose ranks hold summands (Partial): redistribute() it to Replicate or Shard first"
    return None


def local_boxes(tensor: torch.Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and lengths of the boxes that this process holds, in the whole tensor's elements."""
    sharded: Any = tensor
    if is_in_shards(tensor):
        placed = [shard.metadata for shard in _shards_of(tensor)]
        return [(tuple(one.shard_offsets), tuple(one.shard_sizes)) for one in placed]
    chunks: Sequence[Any] = sharded.__create_chunk_list__()  # DCP's protocol
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in chunks]


def like(template: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A tensor with the placements of ``template`` over other local memory of the same shape."""
    if is_in_shards(template):
        return _shards_like(template, local)
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
    """Whether it is distributed so that one with the same placements over other memory can be made."""
    return is_in_shards(tensor) or (hasattr(type(tensor), "__create_chunk_list__") and hasattr(tensor, "device_mesh"))


def is_in_shards(tensor: torch.Tensor) -> bool:
    """Whether it is a ShardedTensor, as FSDP1 gives them."""
    return hasattr(type(tensor), "local_shards")


def _shards_of(tensor: torch.Tensor) -> list[Any]:
    """The shards with elements: torch places those without beyond the tensor's end, and refuses such a place itself."""
    sharded: Any = tensor
    return [shard for shard in sharded.local_shards() if shard.tensor.numel()]


def _shards_like(template: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    from torch.distributed._shard import sharded_tensor  # noqa: PLC0415 - as above

    shown, torchs = cast(Any, template), cast(Any, sharded_tensor)
    whole = copy.deepcopy(shown.metadata())
    whole.tensor_properties.dtype = local.dtype
    whole.tensor_properties.requires_grad = False
    whole.shards_metadata = [placed for placed in whole.shards_metadata if 0 not in placed.shard_sizes]
    made = torchs.ShardedTensor._init_from_local_shards_and_global_metadata  # noqa: SLF001 - no other one asks no other rank
    shards = [torchs.Shard(local, shard.metadata) for shard in _shards_of(template)]
    found: torch.Tensor = made(shards, whole, process_group=shown._process_group)  # noqa: SLF001 - as above
    return found


def is_many() -> bool:
    """Whether this process is one of several: only then can anything be sharded."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()
