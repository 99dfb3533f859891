"""A warm process that forks trainers to be killed. Reads roots from its input, prints the pid of each trainer.

A trainer saves as quickly as it can, appends a line to ``<root>.ack`` for each save it was told had succeeded, and
keeps one byte of ``<root>.phase`` up to date with what it is doing, for whoever wants to kill it there.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from cloudckpt import CheckpointManager
from cloudckpt.errors import StorageError
from cloudckpt.storage import LocalStorage
from cloudckpt.storage.base import Buffer, Outcome

PHASES = ("other", "claim", "announce", "upload", "seal", "seal-to-commit", "delete")
SIZE = 200_000


class PhaseStorage(LocalStorage):
    """The real local storage; it notes which phase of a save each call belongs to."""

    def __init__(self, root: Path, note: mmap.mmap) -> None:
        super().__init__(root)
        self._note = note

    def _enter(self, phase: str) -> None:
        self._note[0] = PHASES.index(phase)

    def create(self, key: str, body: bytes) -> Outcome:
        self._enter("claim")
        return super().create(key, body)

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        if PHASES[self._note[0]] not in {"seal-to-commit", "claim"}:
            self._enter("announce")
        try:
            return super().replace(key, body, expecting=expecting)
        finally:
            self._enter("other")

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        sealing = key.endswith("/checkpoint.json")
        self._enter("seal" if sealing else "upload")
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)
        if sealing:
            self._enter("seal-to-commit")

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        self._enter("delete")
        try:
            return super().delete(keys)
        finally:
            self._enter("other")


def state_of(step: int) -> dict[str, object]:
    """A state whose every bit follows from its step."""
    return {"model": {"w": torch.arange(SIZE, dtype=torch.int64) * (step + 1)}, "extra": {"step": step}}


def loss_of(step: int) -> float:
    """Up and down, so that the best is sometimes old and sometimes new."""
    return float((step * 7919) % 101) / 101


def train(root: Path) -> None:
    """Resume and save until killed."""
    torch.set_num_threads(1)
    with Path(f"{root}.phase").open("r+b") as file, Path(f"{root}.ack").open("ab", buffering=0) as acks:
        note = mmap.mmap(file.fileno(), 1)
        note[0] = PHASES.index("claim")
        storage = PhaseStorage(root, note)
        ckpts = CheckpointManager(storage, monitor="loss", mode="min", keep_best=2, keep_last=2)
        state = state_of(0)
        resumed = ckpts.restore(state)
        step = resumed.step + 1 if resumed else 0
        while True:
            pending = ckpts.save(step, state_of(step), metrics={"loss": loss_of(step)}, block=True)
            line = {"id": pending.checkpoint.id, "step": step, "seq": pending.checkpoint.seq}
            acks.write(json.dumps(line).encode() + b"\n")
            step += 1


def main() -> None:
    """Fork a trainer for each line of input, and reap it when the next line says so."""
    for line in sys.stdin:
        root = Path(line.strip())
        pid = os.fork()
        if pid == 0:
            try:
                train(root)
            finally:
                os._exit(1)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
