"""Pulls one checkpoint, and is killed with SIGKILL at each of its calls to the file system in turn.

python pull_worker.py FOLDER SCENARIO

A process is forked for each call: before the call, or with half of it written, it is gone. What it left must be taken
up by the next pull, and must not have the final name unless it is whole. Prints the number of calls.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cloudckpt import CheckpointManager, Settings
from cloudckpt.pulling import pull_checkpoint
from cloudckpt.storage import ManifestStore, MemoryStorage, Storage

__all__ = ["SCENARIOS", "contents", "damage", "pull", "save"]

STEP = 3
QUICK = Settings(retry_base_s=0.001, retry_cap_s=0.01)
#: What is pulled: all of it, some components, or all of it over a damaged copy.
SCENARIOS: dict[str, list[str] | None] = {
    "all of it": None,
    "two components": ["model", "optimizer"],
    "over a damaged copy": None,
}
#: Calls that Python itself tells of, each with a path first.
_CALLS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def save(storage: Storage) -> None:
    """Make a run with one checkpoint, of three components."""
    state = {
        "model": {"w": torch.arange(5000.0), "b": torch.ones(3, dtype=torch.bfloat16)},
        "optimizer": {"m": torch.full((2000,), 2.0), "lr": 0.1},
        "extra": {"seen": torch.arange(100)},
    }
    with CheckpointManager(storage) as ckpts:
        ckpts.save(STEP, state, metrics={"loss": 0.5}, block=True)


def pull(storage: Storage, into: Path, components: list[str] | None) -> Path:
    """Pull it; the folder."""
    return pull_checkpoint(ManifestStore(storage, QUICK), STEP, into, components=components).folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def damage(folder: Path) -> None:
    """Flip the last byte of a payload object, and take another away."""
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    body = bytearray(first.read_bytes())
    body[-1] ^= 1
    first.write_bytes(body)
    second.unlink()


def die_at(at: int, below: Path) -> None:
    """Kill this process at its call number ``at``, from 0, to what lies below a folder."""
    numbers = itertools.count()  # of all threads

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hears(event: str, words: tuple[Any, ...]) -> None:
        if event in _CALLS and str(words[0]).startswith(str(below)) and next(numbers) == at:
            die()

    write, fsync = os.write, os.fsync

    def half_a_write(descriptor: int, body: Any) -> int:
        if next(numbers) == at:
            write(descriptor, memoryview(body).cast("B")[: len(body) // 2])
            die()
        return write(descriptor, body)

    def no_fsync(descriptor: int) -> None:
        if next(numbers) == at:
            die()
        fsync(descriptor)

    sys.addaudithook(hears)
    replacements: dict[str, Callable[..., Any]] = {"write": half_a_write, "fsync": no_fsync}
    for name, function in replacements.items():
        setattr(os, name, function)


def end_of(pid: int) -> int:
    """The exit code of a child."""
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def main(place: Path, scenario: str) -> int:
    """Kill a pull at every call; how many there were."""
    components = SCENARIOS[scenario]
    storage = MemoryStorage()
    save(storage)
    wanted = contents(pull(storage, place / "fine", components))
    damaged = scenario == "over a damaged copy"
    for at in itertools.count():
        into = place / f"killed-at-{at}"
        final = into / f"checkpoint-{STEP}"
        if damaged:
            damage(pull(storage, into, components))
        pid = os.fork()
        if pid == 0:
            try:  # the child never comes back into the loop
                die_at(at, into)
                pull(storage, into, components)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = end_of(pid)
        assert code in {0, -signal.SIGKILL}, f"call {at}: the pull failed by itself"
        if final.exists() and not damaged:
            assert contents(final) == wanted, f"call {at}: the final name is on half a checkpoint"
        assert contents(pull(storage, into, components)) == wanted, f"call {at}: the next pull does not mend it"
        assert [path.name for path in into.iterdir()] == [final.name], f"call {at}: something is left beside it"
        if code == 0:
            return at
    raise AssertionError("unreachable")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(main(Path(sys.argv[1]), sys.argv[2]))
