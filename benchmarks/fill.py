"""What the load cases read: each format that a case knows, written once before the round. Nothing here is timed.

python -m benchmarks.fill PATH --sizes SIZE ... [--only NAME ...]
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cloudckpt import CheckpointManager

from benchmarks.cases.base import Place, peer, s3_options
from benchmarks.cases.pytorch import dcp_fsspec_save, serialised
from benchmarks.cases.s3_clients import s3fs_filesystem
from benchmarks.state import State, make_state, tensors, view

__all__: list[str] = []

#: As Any: it exports names without saying so.
dcp: Any = peer("torch.distributed.checkpoint")


def _ordered(state: State) -> bytes:
    return b"".join(view(tensor) for tensor in tensors(state).values())


def _own(state: State, root: str, options: dict[str, object] | None) -> None:
    with CheckpointManager(root, storage_options=options) as ckpts:
        ckpts.save(0, state, block=True)


def _to_disk(state: State, folder: Path) -> dict[str, Callable[[], object]]:
    folder.mkdir(parents=True)
    return {
        "raw": lambda: (folder / "raw").write_bytes(_ordered(state)),
        "cloudckpt": lambda: _own(state, str(folder / "cloudckpt"), None),
        "pt": lambda: torch.save(state, folder / "pt"),
        "safetensors": lambda: peer("safetensors.torch").save_file(tensors(state), folder / "st.safetensors"),
        "dcp": lambda: dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "dcp"), no_dist=True),
    }


def _to_s3(state: State, place: Place) -> dict[str, Callable[[], object]]:
    def put(name: str, body: bytes) -> None:
        s3fs_filesystem().pipe(f"{place.path}/{name}", body)

    return {
        "raw": lambda: put("raw", _ordered(state)),
        "cloudckpt": lambda: _own(state, f"s3://{place.path}/cloudckpt", s3_options()),
        "pt": lambda: put("pt", serialised(state).getvalue()),
        "safetensors": lambda: put("st.safetensors", peer("safetensors.torch").save(tensors(state))),
        "dcp": lambda: dcp_fsspec_save(state, place / "dcp"),
    }


def main() -> None:
    """Write what the command line asks for; what fails is told, and its cases will say so themselves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--sizes", nargs="+", required=True)
    parser.add_argument("--only", nargs="*")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for size in given.sizes:
        state = make_state(size)
        place = Place(given.path) / size
        jobs = _to_disk(state, Path(place.path)) if given.path.startswith("/") else _to_s3(state, place)
        for name, job in jobs.items():
            if given.only and name not in given.only:
                continue
            try:
                job()
            except Exception as exc:  # its cases fail, the others go on
                print(f"{size} {name} could not be written: {type(exc).__name__}: {exc}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(0)  # some clients keep native threads that slow or break a clean exit


if __name__ == "__main__":
    main()
