"""A warm process that forks trainers to be killed. Reads jobs from its input, prints the pid of each trainer.

A job is one line of JSON: the root, the options of its storage, and the path beside which the notes are kept. A
trainer saves as quickly as it can, appends a line to ``<notes>.ack`` for each save it was told had succeeded, and
keeps one byte of ``<notes>.phase`` up to date with what it is doing, for whoever wants to kill it there.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from cloudckpt import CheckpointManager
from cloudckpt.config import Settings
from cloudckpt.errors import FencedError, SaveError, StorageError
from cloudckpt.storage import Buffer, Conditions, Listed, Outcome, Storage, Versioned, open_storage

PHASES = ("other", "claim", "announce", "upload", "seal", "seal-to-commit", "delete")
MEBIBYTE = 1024 * 1024


class NotingStorage:
    """The real storage; it notes which phase of a save each call belongs to."""

    def __init__(self, inner: Storage, note: mmap.mmap) -> None:
        self.conditions = Conditions.HONOURED
        self.url = inner.url
        self._inner = inner
        self._note = note

    def _enter(self, phase: str) -> None:
        self._note[0] = PHASES.index(phase)

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        return self._inner.read(key, limit_bytes=limit_bytes)

    def create(self, key: str, body: bytes) -> Outcome:
        self._enter("claim")
        return self._inner.create(key, body)

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        if PHASES[self._note[0]] not in {"seal-to-commit", "claim"}:
            self._enter("announce")
        try:
            return self._inner.replace(key, body, expecting=expecting)
        finally:
            self._enter("other")

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        sealing = key.endswith("/checkpoint.json")
        self._enter("seal" if sealing else "upload")
        self._inner.put(key, buffers, size_bytes=size_bytes, progress=progress)
        if sealing:
            self._enter("seal-to-commit")

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        self._inner.read_into(key, start, *targets)

    def size(self, key: str) -> int:
        return self._inner.size(key)

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        return self._inner.list(prefix, limit=limit)

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        self._enter("delete")
        try:
            return self._inner.delete(keys)
        finally:
            self._enter("other")

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        return self._inner.abort_uploads(prefix, spare=spare)

    def close(self) -> None:
        self._inner.close()


def state_of(step: int, size: int) -> dict[str, object]:
    """A state whose every bit follows from its step."""
    return {"model": {"w": torch.arange(size, dtype=torch.int64) * (step + 1)}, "extra": {"step": step}}


def loss_of(step: int) -> float:
    """Up and down, so that the best is sometimes old and sometimes new."""
    return float((step * 7919) % 101) / 101


def train(root: str, options: dict[str, Any], notes: str, size: int, *, synced: bool = True) -> None:
    """Resume and save until killed. Without ``synced`` nothing is ever told to be written to the disk."""
    if not synced:
        setattr(os, "fsync", lambda _: None)  # noqa: B010 - the control of the power cuts
    torch.set_num_threads(1)
    with Path(f"{notes}.phase").open("r+b") as file, Path(f"{notes}.ack").open("ab", buffering=0) as acks:
        note = mmap.mmap(file.fileno(), 1)
        note[0] = PHASES.index("claim")
        # Small parts, so that a payload object has several.
        settings = Settings(part_size_bytes=5 * MEBIBYTE)
        storage = NotingStorage(open_storage(root, storage_options=options, settings=settings), note)
        ckpts = CheckpointManager(storage, monitor="loss", mode="min", keep_best=2, keep_last=2)
        state = state_of(0, size)
        resumed = ckpts.restore(state)
        step = resumed.step + 1 if resumed else 0
        while True:
            try:
                pending = ckpts.save(step, state_of(step, size), metrics={"loss": loss_of(step)}, block=True)
            except SaveError:
                step += 1  # as a training loop goes on; if there is more to it, the next save says so
                continue
            line = {"id": pending.checkpoint.id, "step": step, "seq": pending.checkpoint.seq}
            acks.write(json.dumps(line).encode() + b"\n")
            step += 1


def main() -> None:
    """Fork a trainer for each line of input, and reap it when the next line says so."""
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                train(**job)
            except FencedError:
                os._exit(FencedError.exit_code)  # and not through the handlers of the process it was forked from
            finally:
                os._exit(1)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
