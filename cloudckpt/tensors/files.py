"""Files as rows of bytes, and rows of bytes as files: tensors over the files' own pages, with no copy of their own."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import crc32c
import numpy as np
import torch

from cloudckpt.core.folder import path_problem
from cloudckpt.core.model import TensorEntry
from cloudckpt.errors import ConfigError, StorageError
from cloudckpt.storage.pulled import PULLED_NAME
from cloudckpt.tensors.landing import HostMemory, blank, over
from cloudckpt.tensors.memory import byte_view

__all__ = ["Stamp", "flush_files", "folder_holds", "make_files", "map_files_of", "stamp_of"]


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which file it is, and when it was last written to, by what its disk says."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int

    def was_written(self, now: Stamp | None) -> bool:
        """Whether ``now`` is the same file, written to in place since. Another file under its name is not."""
        return now is not None and (now.device, now.inode) == (self.device, self.inode) and now != self


def stamp_of(path: Path) -> Stamp | None:
    """The stamp of a file as it is now; None if it is not there."""
    try:
        info = path.stat()
    except OSError:
        return None
    return Stamp(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


def map_files_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every file of a folder, by its path in the folder, as a row of bytes over its own pages. Nothing is read yet.

    A file that is removed afterwards stays readable through its row; one that is written to in place does not stay what
    it was. Links to files count as the files; folders without files are left out.

    Raises:
        ConfigError: something is neither a file nor a folder, or a name cannot be stored.
        StorageError: something cannot be opened.
    """
    found: dict[str, torch.Tensor] = {}
    try:
        for path in sorted(_paths(folder)):
            name = path.relative_to(folder).as_posix()
            size = _size_of_file(path)
            if (problem := path_problem(name)) is not None:
                raise ConfigError(f"{str(path)!r} cannot be stored under its name: {problem}. Rename it")
            found[name] = _row(path, size, mode="c")
    except (OSError, ValueError) as exc:
        if isinstance(exc, ConfigError):
            raise
        raise StorageError(f"{folder}: its files cannot be read: {exc}") from exc
    return found


def _paths(folder: Path) -> Iterator[Path]:
    for here, folders, files in os.walk(folder, onerror=_raise):
        for name in folders:
            # os.walk does not go there, and what is there would be missing without a word.
            if Path(here, name).is_symlink():
                raise ConfigError(f"{Path(here, name)} is a link to a folder: copy that folder in, or leave it out")
        for name in files:
            yield Path(here, name)


def _raise(error: OSError) -> None:
    raise error


def _size_of_file(path: Path) -> int:
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise ConfigError(f"{path} is no file (a socket, a pipe, a device?): remove it before the folder is saved")
    return info.st_size


def _row(path: Path, size: int, *, mode: Literal["c", "r+"]) -> torch.Tensor:
    if not size:  # nothing can be mapped
        return blank(torch.uint8, (0,), torch.device("cpu"))
    memory: HostMemory = np.asarray(np.memmap(path, dtype=np.uint8, mode=mode, shape=(size,)))
    return over(memory, 0, torch.uint8, (size,))


def make_files(folder: Path, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """New files of these sizes in bytes, by their paths in the folder, as rows: what goes into a row is in its file.

    Raises:
        StorageError: the disk has no room, or refuses a file.
    """
    rows: dict[str, torch.Tensor] = {}
    for name, size in sizes.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                _reserve(file.fileno(), size)
            rows[name] = _row(path, size, mode="r+")
        except OSError as exc:
            raise StorageError(f"{path}: {size} bytes cannot be written there: {exc.strerror or exc}") from exc
    return rows


def _reserve(descriptor: int, size: int) -> None:
    """Set room aside. A full disk that is found while a mapped page is written to would end the process."""
    if size and sys.platform == "linux":
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def flush_files(folder: Path) -> None:
    """Bring all files of a folder to the disk, and the folder itself.

    Raises:
        StorageError: the disk refuses.
    """
    try:
        for here, _, files in os.walk(folder, onerror=_raise):
            for path in [*(Path(here, name) for name in files), Path(here)]:
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
    except OSError as exc:
        raise StorageError(f"{folder}: its files did not reach the disk: {exc.strerror or exc}") from exc


def folder_holds(folder: Path, files: Mapping[str, TensorEntry]) -> bool:
    """Whether a folder has exactly these files, by their sizes and sums; beside them may lie what a pull has noted."""
    try:
        rows = map_files_of(folder)
    except (ConfigError, StorageError):
        return False
    if PULLED_NAME not in files:
        rows.pop(PULLED_NAME, None)
    return rows.keys() == files.keys() and all(_is(rows[path], entry) for path, entry in files.items())


def _is(row: torch.Tensor, entry: TensorEntry) -> bool:
    if tuple(row.shape) != entry.shape:
        return False
    pieces = ((chunk, row[chunk.offsets[0] : chunk.offsets[0] + chunk.lengths[0]]) for chunk in entry.chunks)
    return all(crc32c.crc32c(byte_view(piece)) == chunk.crc32c for chunk, piece in pieces)
