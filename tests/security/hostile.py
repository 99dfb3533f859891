"""A real run on a local disk whose every byte somebody hostile may have written, seals and checksums included."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import crc32c
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, Settings
from cloudckpt.core.index_json import index_digest
from cloudckpt.storage import Storage

__all__ = ["QUICK", "READINGS", "WRITINGS", "Hostile", "looked_at", "resealed", "state_of"]

QUICK = Settings(retry_base_s=1e-4, retry_cap_s=1e-3, manifest_deadline_s=0.2, storage_deadline_s=0.2)


def state_of(step: int) -> dict[str, Any]:
    """A state with a bit of everything, and different bits at every step."""
    return {
        "model": {"w": torch.arange(300.0) * step, "b": torch.full((3,), float(step))},
        "extra": {"step": step, "note": "as it was", "betas": (0.9, 0.999), 7: [None, True, b"bytes"]},
    }


def resealed(document: dict[str, Any]) -> bytes:
    """An index with a digest of its own that is right, whatever it says."""
    plain = {name: value for name, value in document.items() if name != "digest"}
    body = json.dumps(plain).encode() + b"\n"
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    return body.removesuffix(b"}\n") + f', "digest": "{digest}"'.encode() + b"}\n"


class Hostile:
    """A closed run of the steps 1 and 2. Everything is changed in step 2, and the manifest agrees with it.

    Args:
        root: the run's folder, which is made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with CheckpointManager(root, settings=QUICK, keep_last=None) as ckpts:
            for step in (1, 2):
                ckpts.save(step, state_of(step), metrics={"loss": 1.0 / step}, tags=["mine"], block=True)
        self.folder = root / cloudckpt.open(root).select(2).name

    # -- the manifest ----------------------------------------------------------------------------------------

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as a plain document."""
        found: dict[str, Any] = json.loads((self.root / "manifest.json").read_bytes())
        return found

    def put_manifest(self, document: dict[str, Any]) -> None:
        """Replace it."""
        (self.root / "manifest.json").write_bytes(json.dumps(document).encode())

    # -- the index -------------------------------------------------------------------------------------------

    @property
    def index(self) -> dict[str, Any]:
        """The index of step 2 as a plain document."""
        found: dict[str, Any] = json.loads((self.folder / "checkpoint.json").read_bytes())
        return found

    def put_index(self, document: dict[str, Any]) -> None:
        """Replace it, sealed; the manifest is told its digest."""
        self.put_index_bytes(resealed(document))

    def put_index_bytes(self, body: bytes) -> None:
        """Replace it by any bytes; the manifest is told their digest."""
        (self.folder / "checkpoint.json").write_bytes(body)
        manifest = self.manifest
        manifest["entries"][-1]["index_digest"] = index_digest(body)
        self.put_manifest(manifest)

    # -- payload ---------------------------------------------------------------------------------------------

    def put_payload(self, component: str, change: Callable[[bytes], bytes]) -> None:
        """Change a payload object into another of the same size; index and manifest are told all of its sums."""
        name = f"{component}-00000-of-00001.safetensors"
        before = (self.folder / name).read_bytes()
        body = change(before)
        assert len(body) == len(before)
        (self.folder / name).write_bytes(body)
        index = self.index
        for item in index["objects"]:
            if item["name"] == name:
                item["crc32c"] = f"{crc32c.crc32c(body):08x}"
        for tensor in index["tensors"][component].values():
            for chunk in tensor.get("chunks", ()):
                part = body[chunk["start"] : chunk["start"] + chunk["length"]]
                chunk["crc32c"] = f"{crc32c.crc32c(part):08x}"
        self.put_index(index)


#: Whatever only reads.
READINGS: dict[str, Callable[[Path | Storage], object]] = {
    "checkpoints": lambda root: cloudckpt.open(root).checkpoints(state=None),
    "journal": lambda root: cloudckpt.open(root).journal(),
    "summary": lambda root: cloudckpt.open(root).get_best_checkpoints_summary(),
    "plan": lambda root: cloudckpt.open(root).plan(),
    "index": lambda root: cloudckpt.open(root).index(2),
    "load": lambda root: cloudckpt.open(root, settings=QUICK).load(2),
    "load names": lambda root: cloudckpt.open(root, settings=QUICK).load(2, names=["w"]),
    "load one component": lambda root: cloudckpt.open(root, settings=QUICK).load(2, components=["extra"]),
    "load shapes": lambda root: cloudckpt.open(root, settings=QUICK).load(2, device="meta"),
    "verify": lambda root: cloudckpt.verify(root),
    "verify deep": lambda root: cloudckpt.verify(root, deep=True),
    "gc, dry": lambda root: cloudckpt.gc(root),
    "sweep, dry": lambda root: cloudckpt.sweep(root),
    "repair, dry": lambda root: cloudckpt.repair(root),
}


def _train(root: Path | Storage) -> None:
    state = state_of(0)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        with contextlib.suppress(CloudCkptError):
            ckpts.restore(state)
        ckpts.save(9, state_of(9), block=True)


#: Whatever writes or deletes.
WRITINGS: dict[str, Callable[[Path | Storage], object]] = {
    "train": _train,
    "sweep": lambda root: cloudckpt.sweep(root, dry_run=False),
    "gc": lambda root: cloudckpt.gc(root, dry_run=False),
    "repair": lambda root: cloudckpt.repair(root, dry_run=False),
}


def looked_at(root: Path | Storage, *, also_write: bool = False) -> Iterator[tuple[str, object]]:
    """Do everything that can be done with a run: each act, and what it gave or the error of ours that it raised.

    Any other error comes out: whatever lies in a store, only errors of ours may follow from it.
    """
    for name, act in (READINGS | WRITINGS if also_write else READINGS).items():
        try:
            yield name, act(root)
        except CloudCkptError as exc:
            yield name, exc
