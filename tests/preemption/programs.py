"""Programs that tests start as processes of their own: ``python -m tests.preemption.programs NAME WORDS``."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from cloudckpt import CheckpointManager, ConfigError, PreemptionGuard
from cloudckpt.preemption import shield_worker


def say(what: object) -> None:
    """One line for the test."""
    print(json.dumps(what), flush=True)


def train(root: str, signals: dict[str, float], save_every: int = 10, *, tell: bool = False) -> None:
    """Train for ever, or until told to stop; ``tell`` that by the exit code."""
    state = {"w": torch.zeros(1000)}
    with PreemptionGuard(signals=signals) as guard, CheckpointManager(root, keep_last=1) as ckpts:
        resumed = ckpts.restore(state)
        step = resumed.step + 1 if resumed else 0
        say({"first": step, "w": state["w"][0].item()})
        while True:
            state["w"] += 1
            time.sleep(0.005)  # the work of a step
            if guard.should_stop(step):
                ckpts.save(step, state, deadline_s=guard.left_s)
                say({"stopped": step, "reason": guard.reason})
                break
            if (step + 1) % save_every == 0:
                ckpts.save(step, state).wait()
                say({"saved": step})
            step += 1
    if tell:
        sys.exit(guard.exit_code)


class Numbers(Dataset[torch.Tensor]):
    """Very many."""

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


def load(root: str, context: str, *, shielded: bool) -> None:
    """Train on what two workers load, and go on for thirty batches after the notice: longer than what they had ready."""
    loader = DataLoader(
        Numbers(),
        batch_size=4,
        num_workers=2,
        worker_init_fn=shield_worker if shielded else None,
        multiprocessing_context=context,
    )
    told = 0
    with PreemptionGuard(signals={"SIGTERM": 100, "SIGUSR1": 100}) as guard, CheckpointManager(root) as ckpts:
        for step, batch in enumerate(loader):
            told += guard.should_stop(step)
            if step == 10:
                say({"step": step})
            time.sleep(0.005)
            if told > 30:
                ckpts.save(step, {"batch": batch}, deadline_s=guard.left_s)
                say({"stopped": step})
                return


def fork() -> None:
    """A child of a process with a guard: signals end it as if there were none, and it cannot ask."""
    with PreemptionGuard(signals=["SIGUSR1"]) as guard:
        pid = os.fork()
        if pid == 0:
            try:
                handler = signal.getsignal(signal.SIGUSR1)
                try:
                    said = str(guard.should_stop(1))
                except ConfigError as exc:
                    said = str(exc)
                guard.close()
                say({"default": handler is signal.SIG_DFL, "said": said})
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        signal.raise_signal(signal.SIGUSR1)
        say({"parent": guard.should_stop(1)})


def _shielded(line: Connection) -> None:
    shield_worker(0)
    line.send("ready")
    while True:
        line.send(line.recv())


def shield(context: str) -> None:
    """A shielded child lives through a stranger's signals, and ends by its parent's."""
    made: Any = multiprocessing.get_context(context)
    here, there = made.Pipe()
    child = made.Process(target=_shielded, args=(there,))
    child.start()
    assert here.recv() == "ready"
    for name in ("TERM", "USR1", "USR2", "TERM"):
        subprocess.run(["sh", "-c", f"kill -{name} {child.pid}"], check=True)
        here.send(name)
        assert here.recv() == name
    child.terminate()
    child.join(30)
    say({"exit": child.exitcode})


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
