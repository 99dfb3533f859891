"""Is a save whole? The one question that claim, repair and verify ask about a checkpoint's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cloudckpt.core import keys
from cloudckpt.core.index_json import decode_index, index_digest
from cloudckpt.core.manifest import Abandon, RollForward, Settlement
from cloudckpt.core.model import Checkpoint, Index
from cloudckpt.errors import FormatError, ObjectNotFoundError
from cloudckpt.storage import Storage
from cloudckpt.view import read_index_body

__all__ = ["Sealed", "judge_folder", "settlement_of", "summed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """A save whose index lies in its folder: the index is written last, so all of its payload was there then.

    Attributes:
        index: what it was sealed with.
        facts: what the manifest records of it.
        damaged: which payload object is gone or has another size by now; None if the save is whole.
    """

    index: Index
    facts: RollForward
    damaged: str | None = None


def summed(index: Index, body: bytes) -> RollForward:
    """What the manifest records of a sealed save."""
    return RollForward(
        index_digest=index_digest(body),
        size_bytes=sum(item.size_bytes for item in index.objects) + len(body),
        object_count=len(index.objects) + 1,
    )


def judge_folder(body: bytes, *, save_id: str, step: int, sizes: Mapping[str, int], what: str) -> Sealed | str:
    """The sealed save that a folder holds, whole or damaged, or why its index is not that of one.

    Args:
        body: the bytes of its index.
        sizes: the sizes of the objects in the folder, by name.
        what: the index's URL, for messages.

    Raises:
        FormatError: the index has a newer format than this version reads.
    """
    try:
        index = decode_index(body, what=what)
    except FormatError as exc:
        if "upgrade cloudckpt" in str(exc):
            raise  # it may be whole for all this version knows
        return str(exc)
    if (index.id, index.step) != (save_id, step):
        return f"{what} describes checkpoint-{index.step}.{index.id}"
    return Sealed(index=index, facts=summed(index, body), damaged=_damage(index, sizes))


def _damage(index: Index, sizes: Mapping[str, int]) -> str | None:
    for item in index.objects:
        size = sizes.get(item.name)
        if size is None:
            return f"{item.name} is missing"
        if size != item.size_bytes:
            return f"{item.name} has {size} bytes and was sealed with {item.size_bytes}"
    return None


def settlement_of(storage: Storage, entry: Checkpoint) -> Settlement:
    """What becomes of a pending save whose process is gone: one LIST of its folder, and the index if it is there."""
    prefix = keys.checkpoint_prefix(entry.step, entry.id)
    sizes = {item.key.removeprefix(f"{prefix}/"): item.size_bytes for item in storage.list(f"{prefix}/")}
    if keys.INDEX_NAME not in sizes:
        return Abandon(reason="its process ended before the save was complete")
    try:
        body = read_index_body(storage, entry)
    except ObjectNotFoundError:
        return Abandon(reason="its process ended before the save was complete")
    judged = judge_folder(
        body, save_id=entry.id, step=entry.step, sizes=sizes, what=f"{storage.url}/{prefix}/{keys.INDEX_NAME}"
    )
    problem = judged.damaged if isinstance(judged, Sealed) else judged
    if isinstance(judged, Sealed) and problem is None:
        return judged.facts
    return Abandon(reason=f"its process ended, and {problem}")
