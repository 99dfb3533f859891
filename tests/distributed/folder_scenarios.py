"""What the ranks of a job do with folders in the tests: each function runs on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from cloudckpt import CheckpointManager
from tests.distributed.scenarios import QUICK


def save_staged(root: str, within: str, saves: int = 1) -> dict[str, Any]:
    """As Accelerate writes: rank zero the weights, each rank its own random state, all into one folder."""
    rank = dist.get_rank()
    seen = []
    with CheckpointManager(root, keep_last=None, settings=QUICK) as ckpts:
        for step in range(saves):
            with ckpts.staging(step, metrics={"loss": 1.0}, within=within) as folder:
                seen.append(str(folder))
                (folder / f"random_states_{rank}.pkl").write_bytes(bytes([rank, step]) * 1000)
                if rank == 0:
                    (folder / "model.safetensors").write_bytes(bytes([step]) * 50_000)
                    (folder / "empty").write_bytes(b"")
        ckpts.wait()
    return {"folders": seen, "left": [name for name in seen if Path(name).exists()]}


def save_apart(root: str, within: str, same: bool) -> str:
    """As machines without a common disk have it: each rank's folder has files of its own, and one that all have."""
    rank = dist.get_rank()
    folder = Path(within, f"node-{rank}")
    folder.mkdir(parents=True)
    (folder / f"shard-{rank}.bin").write_bytes(bytes([rank]) * 3000)
    (folder / "config.json").write_bytes(b"{}" if same else str(rank).encode())
    try:
        with CheckpointManager(root, settings=QUICK) as ckpts:
            ckpts.save_folder(5, folder).wait(30)
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""


def restore_staged(root: str, into: str, apart: bool = False) -> dict[str, Any]:
    """The files, on every rank: of one folder that all see, or of one for each."""
    place = Path(into, f"node-{dist.get_rank()}") if apart else Path(into)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        found = ckpts.restore_folder(place)
        if found is None:
            return {"path": None}
        files = {path.name: path.read_bytes().hex() for path in found.iterdir()}
        return {"path": str(found), "files": files}


def one_body_raises(root: str, within: str, bad_rank: int) -> dict[str, Any]:
    """One rank cannot write its files: nothing is saved, all are told, and the next save works."""
    said = ""
    with CheckpointManager(root, settings=QUICK) as ckpts:
        try:
            with ckpts.staging(1, within=within) as folder:
                (folder / f"{dist.get_rank()}").write_bytes(b"1")
                if dist.get_rank() == bad_rank:
                    raise OSError("the disk is full")
        except Exception as exc:
            said = f"{type(exc).__name__}: {exc}"
        gone = not folder.exists()
        with ckpts.staging(2, within=within) as folder:
            (folder / f"{dist.get_rank()}").write_bytes(b"2")
        ckpts.wait()
        return {"said": said, "gone": gone, "steps": [c.step for c in ckpts.checkpoints(state=None)]}
