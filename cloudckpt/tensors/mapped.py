"""Tensors over files of the local disk: paged in as they are touched, private to this process."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crc32c
import numpy as np

from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.checksum import format_crc32c
from cloudckpt.core.layout import ALIGNMENT
from cloudckpt.core.model import Chunk, TensorEntry
from cloudckpt.errors import CorruptCheckpointError, StorageError
from cloudckpt.tensors.landing import HostMemory, over
from cloudckpt.tensors.memory import dtype_named
from cloudckpt.tensors.outline import Outline, Place

__all__ = ["map_files"]


def map_files(root: Path, outline: Outline, settings: Settings, *, verify: bool) -> set[Place]:
    """Give tensors the file's own pages as their memory, where they lie in it as torch would have laid them.

    The pages are mapped copy-on-write: writing to such a tensor changes neither the file nor anybody else's view of it.

    Args:
        root: the folder of the run.
        verify: read all of it now and compare the checksums; otherwise nothing is read before it is touched.

    Returns:
        the tensors that are done; the others lie off the 64-byte boundaries, or in several pieces, and have to be read.

    Raises:
        CorruptCheckpointError: a file is missing or too short, or with ``verify`` a checksum differs.
        StorageError: the file cannot be opened.
    """
    files: dict[str, HostMemory] = {}
    found: dict[Place, Chunk] = {}
    for place, entry in outline.wanted():
        chunk = _mappable(entry)
        if chunk is None or place in outline.arrays:
            continue
        if chunk.object not in files:
            files[chunk.object] = _map(root, outline, chunk.object)
        memory = files[chunk.object]
        if chunk.start + chunk.length > len(memory):
            raise _damaged(outline, chunk, f"the file has {len(memory)} bytes")
        found[place] = chunk
        outline.settle(place, over(memory, chunk.start, dtype_named(entry.dtype), entry.shape))
    if verify:
        with ThreadPoolExecutor(settings.io_threads, thread_name_prefix="cloudckpt-check") as pool:
            # list() so that the first damage found is raised here.
            list(pool.map(lambda chunk: _check_sum(outline, chunk, files[chunk.object]), found.values()))
    return set(found)


def _mappable(entry: TensorEntry) -> Chunk | None:
    if len(entry.chunks) != 1 or not entry.chunks[0].length or entry.chunks[0].start % ALIGNMENT:
        return None
    return entry.chunks[0]


def _map(root: Path, outline: Outline, name: str) -> HostMemory:
    path = root / keys.payload_key(outline.checkpoint.step, outline.checkpoint.id, name)
    try:
        if path.exists() and not path.is_file():  # opened, a pipe would wait for whoever writes into it
            raise OSError(errno.EINVAL, "a pipe or a device (or a folder), and no object of a run")
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="c"))
    except FileNotFoundError as exc:
        raise CorruptCheckpointError(f"{path} does not exist", checkpoint_id=outline.checkpoint.id) from exc
    except ValueError as exc:  # an empty file cannot be mapped
        raise CorruptCheckpointError(f"{path} is empty", checkpoint_id=outline.checkpoint.id) from exc
    except OSError as exc:
        raise StorageError(f"{path}: it cannot be mapped: {exc.strerror or exc}") from exc


def _check_sum(outline: Outline, chunk: Chunk, memory: HostMemory) -> None:
    found = crc32c.crc32c(memoryview(memory)[chunk.start : chunk.start + chunk.length])  # type: ignore[arg-type]  # an ndarray is a buffer; its stub says so from 3.12 on
    if found != chunk.crc32c:
        raise _damaged(outline, chunk, f"checksum {format_crc32c(found)}, sealed as {format_crc32c(chunk.crc32c)}")


def _damaged(outline: Outline, chunk: Chunk, how: str) -> CorruptCheckpointError:
    checkpoint = outline.checkpoint
    return CorruptCheckpointError(
        f"{checkpoint.url}/{chunk.object} bytes {chunk.start}..{chunk.start + chunk.length}: {how}",
        checkpoint_id=checkpoint.id,
        key=keys.payload_key(checkpoint.step, checkpoint.id, chunk.object),
    )
