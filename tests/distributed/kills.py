"""One rank of a job is killed at some moment; what the others are told, and when."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cloudckpt import CheckpointManager, PerRank, loading
from tests.distributed.scenarios import QUICK

MOMENTS = ("announce", "upload", "commit", "restore")


def be_rank(rank: int, ranks: int, port: int, answers: Connection, words: dict[str, Any]) -> None:
    """Be one process of a job: join its group, and answer with what ``die`` gives."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    answers.send(die(**words))


def die(root: str, victim: int, moment: str, note: str) -> dict[str, Any]:
    """Save once; then the victim is killed with SIGKILL at a moment of the next save, or of a restore.

    Args:
        moment: "announce" (before it), "upload" (in the middle), "commit" (all of its own is uploaded, at rank zero
            everybody's; nothing is committed), "told" (rank zero has committed, and told nobody), or "restore" (everything
            is agreed, nothing read).
        note: a file that gets the time at which the victim died.
    """
    said, heard = "", 0.0
    with CheckpointManager(root, settings=QUICK) as ckpts:
        ckpts.save(0, {"x": PerRank(torch.ones(1000))}).wait(30)
        if dist.get_rank() == victim:
            _arm(ckpts, moment, note)
        try:
            if moment == "restore":
                ckpts.restore({"x": PerRank(torch.zeros(1000))})
            else:
                ckpts.save(1, {"x": PerRank(torch.ones(1000))}).wait(60)
        except Exception as exc:
            heard = time.monotonic()  # of the whole machine, not of the process
            said = f"{type(exc).__name__}: {exc}"
        with contextlib.suppress(Exception):
            ckpts.close()
    return {"said": said, "heard": heard}


def _arm(ckpts: CheckpointManager, moment: str, note: str) -> None:
    def die_now(*_: Any, **__: Any) -> Any:
        Path(note).write_text(repr(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)

    saver: Any = ckpts._saver
    if moment == "restore":
        setattr(loading, "fetch", die_now)  # noqa: B010 - it is not a public name of that module
    elif moment == "told":
        recorder = saver._side._recorder
        commit = recorder.commit

        def commit_and_die(*words: Any) -> Any:
            commit(*words)
            die_now()

        recorder.commit = commit_and_die
    elif moment == "upload":
        inner: Any = getattr(ckpts._store.storage, "inner", ckpts._store.storage)
        inner.put = _once_half_read(die_now)
    elif moment == "commit" and dist.get_rank() == 0:
        saver._side._recorder.seal = die_now  # by then it has heard that the others have uploaded all
    else:
        setattr(saver._side, moment, die_now)


def _once_half_read(die_now: Callable[[], None]) -> Callable[..., None]:
    def put(key: str, source: Any, *, size_bytes: int, **_: Any) -> None:
        with source.hold(0, size_bytes // 2):
            die_now()

    return put
