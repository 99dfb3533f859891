"""Payload objects to the store: one after the other while they are small, two at a time where they are large."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence

import torch

from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.model import Checkpoint, PayloadObject
from cloudckpt.progress import Meter
from cloudckpt.storage import Storage
from cloudckpt.tensors.planning import Payload
from cloudckpt.tensors.sources import Buffers, PayloadSource, TensorSource

__all__ = ["put_all", "tensor_sources"]

#: Payload objects of this size are put side by side; smaller ones in order, where a second connection gains nothing.
_LARGE_BYTES = 8 * 1024 * 1024

#: More objects than this at once gain nothing: each is sent in several parts at a time.
_OBJECTS_AT_ONCE = 2  # by the thread that saves and one more


def tensor_sources(payloads: Sequence[Payload], settings: Settings) -> list[PayloadSource]:
    """The payload objects in the tensors' own memory; nothing may change that until they are sealed."""
    devices = {tensor.device for payload in payloads for tensor in payload.tensors if tensor.is_cuda}
    for device in devices:
        # The threads that send look at the tensors from streams of their own.
        torch.cuda.synchronize(device)
    at_once = max(_OBJECTS_AT_ONCE * settings.parts_in_flight, settings.connections)
    buffers = Buffers(at_once, pinned=bool(devices))
    together_bytes = sum(payload.size_bytes for payload in payloads)
    return [TensorSource(payload, buffers, together_bytes=together_bytes) for payload in payloads]


def put_all(
    storage: Storage,
    entry: Checkpoint,
    sources: Sequence[PayloadSource],
    *,
    progress: Callable[[int], None] | None = None,
    meter: Meter | None = None,
) -> tuple[list[PayloadObject], list[int]]:
    """Put all objects into a checkpoint's folder; gives them as sealed, and the sums of their boxes in order.

    Args:
        progress: called with the number of further bytes.
        meter: told which objects are under way.

    Raises:
        SaveError: a tensor changed meanwhile, or the sources were stopped.
        StorageError: the store refused.
    """

    def put(source: PayloadSource) -> None:
        key = keys.payload_key(entry.step, entry.id, source.payload.name)
        with meter.carrying(source.payload.name) if meter is not None else contextlib.nullcontext():
            storage.put(key, source, size_bytes=source.size_bytes, progress=progress)

    large = [source for source in sources if source.size_bytes >= _LARGE_BYTES]
    side_by_side = large if len(large) > 1 else []
    for source in sources:
        if source not in side_by_side:
            put(source)
    if side_by_side:
        _put_side_by_side(put, side_by_side, sources)
    objects: list[PayloadObject] = []
    sums: list[int] = []
    for source in sources:
        # Here and not when the index is written: the caller may have the state back before.
        sealed, own = source.seal()
        objects.append(sealed)
        sums += own
    return objects, sums


def _put_side_by_side(
    put: Callable[[PayloadSource], None], sources: Sequence[PayloadSource], everything: Sequence[PayloadSource]
) -> None:
    """Put them in this thread and one more. No pool: while a process ends, it takes no work any more."""
    left = deque(sources)
    failures: list[BaseException] = []
    shared = (put, left, everything, failures)
    helper = threading.Thread(target=_put_what_is_left, args=shared, name="cloudckpt-put", daemon=False)
    try:
        helper.start()
    except RuntimeError:  # no further thread is to be had: one after the other
        _put_what_is_left(*shared)
    else:
        _put_what_is_left(*shared)
        helper.join()
    if failures:
        raise failures[0]


def _put_what_is_left(
    put: Callable[[PayloadSource], None],
    left: deque[PayloadSource],
    everything: Sequence[PayloadSource],
    failures: list[BaseException],
) -> None:
    # No closure: a frame that is kept with an error keeps its function, and that would keep the tensors.
    while not failures:
        try:
            source = left.popleft()
        except IndexError:
            return
        try:
            put(source)
        except BaseException as exc:  # noqa: BLE001 - raised in the thread that saves
            failures.append(exc)
            for other in everything:
                other.stop(f"another object failed: {exc}")
