"""Plain builders of the core's values: everything a test does not speak of has a sound default."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from cloudckpt.core.manifest import RollForward, recompute
from cloudckpt.core.model import Checkpoint, Chunk, Index, Manifest, Owner, PayloadObject, State, TensorEntry
from cloudckpt.core.policy import Policy

__all__ = ["DIGEST", "RUN_ID", "at", "checkpoint", "index", "manifest", "owner", "sealed"]

RUN_ID = "0123456789abcdef" * 2
DIGEST = "sha256:" + "d" * 64

_BEGIN = datetime(2026, 1, 31, 12, tzinfo=UTC)
_MINUTES_IN_A_CENTURY = 52_594_920


def at(minutes: int) -> str:
    """The time label of that many minutes after noon of the last day of January 2026."""
    time = _BEGIN + timedelta(minutes=minutes % _MINUTES_IN_A_CENTURY)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def checkpoint(step: int, *, seq: int | None = None, state: State = State.COMMITTED, **fields: Any) -> Checkpoint:
    """An entry made at minute ``seq`` (by default its step) under writer epoch 1; its id spells ``seq``."""
    number = max(step, 1) if seq is None else seq
    committed = state is not State.PENDING
    given: dict[str, Any] = {
        "id": f"{number % 2**32:08x}",
        "writer_epoch": 1,
        "announced_at": at(number),
        "committed_at": at(number) if committed else None,
        "index_digest": DIGEST if committed else None,
        "size_bytes": 1000,
        "object_count": 2,
        "retired_because": "not in last 3" if state is State.RETIRED else None,
    }
    return Checkpoint(step=step, seq=number, state=state, **{**given, **fields})


def owner(token: str = "a" * 16, **fields: Any) -> Owner:
    """An owner that has not closed."""
    given: dict[str, Any] = {"host": "node-1", "pid": 4711, "run_key": None, "claimed_at": at(0)}
    return Owner(token=token, **{**given, **fields})


def manifest(*entries: Checkpoint, **fields: Any) -> Manifest:
    """A manifest at revision 7 under writer epoch 1, whose lists and reasons follow from its entries (I4)."""
    given: dict[str, Any] = {
        "run_id": RUN_ID,
        "revision": 7,
        "write_id": "7" * 16,
        "history": ("6" * 16, "7" * 16),
        "writer_epoch": max([1, *(e.writer_epoch for e in entries)]),
        "owner": owner(),
        "next_seq": max([0, *(e.seq for e in entries)]) + 1,
        "commits": sum(e.committed_at is not None for e in entries),
        "updated_at": at(0),
        "entries": tuple(sorted(entries, key=lambda e: e.seq)),
    }
    return recompute(Manifest(**{**given, **fields}))


def sealed(*, size_bytes: int = 1000, object_count: int = 2) -> RollForward:
    """What is known of a save that is whole."""
    return RollForward(index_digest=DIGEST, size_bytes=size_bytes, object_count=object_count)


def index(step: int = 100, **fields: Any) -> Index:
    """The index of a save with one component, two tensors of four bytes and one that is tied to the first."""
    name = "model-00000-of-00001.safetensors"
    chunk = Chunk(object=name, start=128, length=16, offsets=(0,), lengths=(4,), crc32c=0x11223344)
    weight = TensorEntry(dtype="float32", shape=(4,), chunks=(chunk,))
    bias = TensorEntry(
        dtype="float32",
        shape=(4,),
        chunks=(Chunk(object=name, start=144, length=16, offsets=(0,), lengths=(4,), crc32c=0, stored_as="b#1"),),
    )
    given: dict[str, Any] = {
        "run_id": RUN_ID,
        "id": f"{step % 2**32:08x}",
        "seq": max(step, 1),
        "writer_epoch": 1,
        "announced_at": at(step),
        "sealed_at": at(step),
        "world_size": 1,
        "metrics": {},
        "tags": (),
        "pinned": False,
        "policy": Policy(),
        "versions": {"cloudckpt": "0.1.0"},
        "objects": (PayloadObject(name=name, size_bytes=160, crc32c=0xDEADBEEF),),
        "tensors": {
            "model": {
                "weight": weight,
                "bias": bias,
                "tied": TensorEntry(dtype="float32", shape=(4,), alias_of="weight"),
            }
        },
        "structure": {"model": {"$ordered": {"items": []}}},
    }
    return Index(step=step, **{**given, **fields})
