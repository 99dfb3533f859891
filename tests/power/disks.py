"""File systems of our own on loop devices: cut from the power, filled up, made read-only.

A power cut is a clone of the image under a mounted file system. The image lies on a file system with reflinks, so that
the clone is of one moment; what had not left the page cache of the inner file system by then is not in it. That is what
a disk without a cache of its own holds when the power goes; no device mapper is needed.

Mounting needs root and loop devices. Where they are missing, or a ``mkfs`` is, the test is skipped with the reason, and
the skip is written down with ``--record`` like any other outcome.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

__all__ = ["KINDS", "Disk", "mounted"]

#: What a disk is formatted with, and how a clone of it is mounted beside (or after) its original.
KINDS: dict[str, tuple[list[str], str]] = {
    "ext4": (["mkfs.ext4", "-q", "-F"], "loop"),
    "xfs": (["mkfs.xfs", "-q", "-f"], "loop,nouuid"),
    "btrfs": (["mkfs.btrfs", "-q", "-f"], "loop"),
}
#: XFS takes no less than 300 MB.
_SIZE_BYTES = 512 * 1024 * 1024
_SHELF_BYTES = 4 * 1024 * 1024 * 1024


def run(*command: str, must: bool = False) -> None:
    """Run a command. What it says when it fails is why the test is skipped; or fails, where it ``must`` work."""
    program = shutil.which(command[0])
    if program is None:
        pytest.skip(f"{command[0]} is not installed here")
    done = subprocess.run([program, *command[1:]], check=False, capture_output=True, text=True, timeout=120)
    if done.returncode:
        said = f"{' '.join(command)}: {done.stderr.strip() or done.returncode}"
        assert not must, said
        pytest.skip(said)


@contextlib.contextmanager
def mounted(image: Path, place: Path, options: str, *, kind: str | None = None, must: bool = False) -> Iterator[Path]:
    """A file system in an image (or, by its kind, without one), mounted while the block runs."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    place.mkdir(exist_ok=True)
    run("mount", *(("-t", kind) if kind else ()), "-o", options, str(image), str(place), must=must)
    try:
        yield place
    finally:
        # Lazily, should anything still have a file open there: a test must not leave a mount behind.
        done = subprocess.run(["umount", str(place)], check=False, capture_output=True, timeout=120)
        if done.returncode:
            subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True, timeout=120)


class Disk:
    """One file system on a loop device, mounted at ``place`` until ``pull_out``.

    Args:
        folder: for the images and the mounts.
        kind: one of ``KINDS``.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._format, self._options = KINDS[kind]
        self._open = contextlib.ExitStack()
        self.place = folder / "disk"
        self.cuts = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opening:
            shelf = self._folder / "shelf.img"
            _sparse(shelf, _SHELF_BYTES)
            # The shelf is always XFS: of the three it is the one whose clones are made at once.
            run("mkfs.xfs", "-q", "-f", "-m", "reflink=1", str(shelf))
            self._shelf = opening.enter_context(mounted(shelf, self._folder / "shelf", "loop"))
            self._image = self._shelf / "disk.img"
            _sparse(self._image, _SIZE_BYTES)
            run(*self._format, str(self._image))
            self._disk = opening.enter_context(contextlib.ExitStack())
            self._disk.enter_context(mounted(self._image, self.place, "loop"))
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def cut(self) -> int:
        """Cut the power, for whoever looks at it later; the cut's number. What is running notices nothing."""
        self.cuts += 1
        subprocess.run(
            ["cp", "--reflink=always", str(self._image), str(self._shelf / f"cut-{self.cuts}.img")],
            check=True,
            capture_output=True,
            timeout=120,
        )
        return self.cuts

    def pull_out(self) -> None:
        """Unmount the disk itself: two file systems with one identity are not looked at side by side."""
        self._disk.close()

    @contextlib.contextmanager
    def after(self, cut: int) -> Iterator[Path]:
        """The disk as the machine finds it when the power is back: mounted, which replays its log."""
        image = self._shelf / f"cut-{cut}.img"
        with mounted(image, self._folder / "after", self._options, must=True) as place:
            yield place
        image.unlink()


def _sparse(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
