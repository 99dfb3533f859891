"""A fresh reader's list of what could go wrong while saving: what was found by breaking it, one story each.

(Past 350 lines: a list.)
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError, SaveError, Settings, StorageError
from cloudckpt.events import Event, SaveFailed
from cloudckpt.storage import MemoryStorage
from cloudckpt.storage.base import Source
from cloudckpt.tensors import host, staging
from tests.stories.test_review_c_loads import Wrapper

pytestmark = pytest.mark.memory_only

OVERLAP = Settings(stage="overlap")


# -- wrong bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", ["half", "double", "data"])
def test_a_parameter_that_gets_other_memory_during_the_copy_is_saved_as_it_was(
    held: threading.Event, convert: str
) -> None:
    """model.half() or p.data = ... right after save(): parameters given as they are come back bit for bit."""
    model = torch.nn.Linear(256, 256)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = model.weight.detach().clone()
    storage = MemoryStorage()
    with CheckpointManager(storage, settings=OVERLAP) as ckpts:
        pending = ckpts.save(1, {"weights": list(model.parameters()), "optimizer": optimizer})
        if convert == "data":
            model.weight.data = torch.zeros(256, 256)
        else:
            getattr(model, convert)()
        held.set()
        pending.wait()
    assert torch.equal(cloudckpt.open(storage).load()["weights"][0], expected)


class Gated(MemoryStorage):
    """Memory that takes payload only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
        if key.endswith(".safetensors"):
            assert self.gate.wait(60)
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)


def test_the_save_after_an_interrupted_one_is_not_written_over(
    held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in save() after its copy has begun, and an emergency save at once: what that one holds is its own."""
    model = torch.nn.Linear(512, 512)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    storage = Gated()
    start = threading.Thread.start
    copies: list[threading.Thread] = []

    def start_and_interrupt(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "cloudckpt-copy":
            copies.append(thread)
            raise KeyboardInterrupt

    # The copy goes on once the next save is staged, or when that waits for the copy: then it never will be.
    staged = threading.Event()

    def let_go() -> None:
        staged.wait(1)
        held.set()

    release = threading.Thread(target=let_go)
    release.start()
    with CheckpointManager(storage, settings=OVERLAP) as ckpts:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start_and_interrupt)
            with pytest.raises(KeyboardInterrupt):
                ckpts.save(1, {"model": model, "optimizer": optimizer})
        emergency = {"values": torch.arange(600_000, dtype=torch.float32)}
        pending = ckpts.save(2, emergency)
        staged.set()
        for thread in (release, *copies):
            thread.join()
        storage.gate.set()
        pending.wait()
    assert torch.equal(cloudckpt.open(storage).load(2)["values"], emergency["values"])


def test_the_save_after_a_copy_that_was_interrupted_twice_is_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the copy, and once more while it waits for its helpers: the next save waits for them."""
    me = threading.current_thread()
    first, helping, staged = threading.Event(), threading.Event(), threading.Event()
    plain, shutdown = host.copy_large, ThreadPoolExecutor.shutdown
    helpers: list[threading.Thread] = []

    def copy(target: int, source: int, size_bytes: int) -> object:
        if threading.current_thread() is me:
            if not first.is_set():
                raise KeyboardInterrupt
        elif not first.is_set():
            helpers.append(threading.current_thread())
            helping.set()
            staged.wait(1)  # until the next save is staged, or for ever if that waits for this
        return plain(target, source, size_bytes)

    def shut_down_and_interrupt(pool: ThreadPoolExecutor, wait: bool = True, **words: Any) -> None:
        if pool._thread_name_prefix == "cloudckpt-stage" and not first.is_set():
            assert helping.wait(60)
            shutdown(pool, wait=False)
            raise KeyboardInterrupt
        shutdown(pool, wait, **words)

    monkeypatch.setattr(staging, "copy_large", copy)
    monkeypatch.setattr(staging, "cpus", lambda: 2)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut_down_and_interrupt)
    storage = Gated()
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(KeyboardInterrupt):
            ckpts.save(1, {"before": torch.ones(10_000_000)})
        first.set()
        emergency = {"values": torch.arange(10_000_000, dtype=torch.float32)}
        pending = ckpts.save(2, emergency)
        staged.set()
        for helper in helpers:
            helper.join()
        storage.gate.set()
        pending.wait()
    assert torch.equal(cloudckpt.open(storage).load(2)["values"], emergency["values"])


# -- lost saves ------------------------------------------------------------------------------------------------


def run_to_the_end(script: str, *arguments: str) -> None:
    """Run a program in a process of its own, which ends well."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_last_save_of_a_script_that_never_closes_is_committed(tmp_path: Path) -> None:
    """Several large objects, no wait(), no close(): the process ends when the save is committed."""
    script = (
        "import sys, torch\n"
        "from cloudckpt import CheckpointManager\n"
        "ckpts = CheckpointManager(sys.argv[1])\n"
        "ckpts.save(1, {name: torch.ones(4_000_000) for name in 'abc'})\n"
    )
    run_to_the_end(script, str(tmp_path / "run"))
    assert [c.step for c in cloudckpt.open(tmp_path / "run").checkpoints()] == [1]


def test_the_last_save_of_a_script_to_a_bucket_is_committed_as_well(gcs_root: str) -> None:
    """The same over the direct lane: what is still to be sent is sent before the process ends."""
    script = (
        "import sys, torch\n"
        "from cloudckpt import CheckpointManager\n"
        "ckpts = CheckpointManager(sys.argv[1])\n"
        "ckpts.save(1, {name: torch.ones(30_000_000) for name in 'ab'})\n"
    )
    run_to_the_end(script, gcs_root)
    assert [c.step for c in cloudckpt.open(gcs_root).checkpoints()] == [1]


# -- hangs -----------------------------------------------------------------------------------------------------


class Refusing(MemoryStorage):
    """Memory that takes no payload."""

    def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
        if key.endswith(".safetensors"):
            raise StorageError("no room")
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)


class RefusingInside(MemoryStorage):
    """The same in a nested function, as storages have them that send parts: its frame keeps what it closes over."""

    def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
        def send() -> None:
            if isinstance(buffers, Source):
                raise StorageError("no room")
            MemoryStorage.put(self, key, buffers, size_bytes=size_bytes, progress=progress)

        send()


def test_a_listener_that_exits_hangs_nobody() -> None:
    """sys.exit() in a listener that is told of a failed save: the save still ends, with its own error."""

    def listener(event: Event) -> None:
        if isinstance(event, SaveFailed):
            sys.exit(3)

    ckpts = CheckpointManager(Refusing(), listeners=[listener])
    pending = ckpts.save(1, {"m": {"w": torch.ones(10)}})
    with pytest.raises(SaveError, match="no room"):
        pending.wait(10)
    ckpts.close()


def test_memory_whose_thread_cannot_be_had_is_waited_for_by_nobody(tmp_path: Path) -> None:
    """No further thread for prepare(): that is told, and wait(), the next save and close() go on without."""
    script = (
        "import faulthandler, sys, threading, torch\n"
        "faulthandler.dump_traceback_later(20, exit=True)\n"
        "from cloudckpt import CheckpointManager\n"
        "state = {'m': torch.ones(10_000)}\n"
        "with CheckpointManager(sys.argv[1]) as ckpts:\n"
        "    threading.stack_size(1 << 46)\n"
        "    try:\n"
        "        ckpts.prepare(state)\n"
        "    except RuntimeError as exc:\n"
        "        print(exc)\n"
        "    threading.stack_size(0)\n"
        "    ckpts.wait()\n"
        "    ckpts.save(1, state)\n"
    )
    run_to_the_end(script, str(tmp_path / "run"))
    assert [c.step for c in cloudckpt.open(tmp_path / "run").checkpoints()] == [1]


# -- crashes ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("call", ["save", "block", "prepare", "close"])
def test_a_forked_child_that_saves_is_told_not_to(call: str, tmp_path: Path) -> None:
    """A manager that came over by fork: its saving half says so, and neither crashes, nor hangs, nor writes."""
    script = (
        "import faulthandler, os, sys, torch\n"
        "from cloudckpt import CheckpointManager, ConfigError\n"
        "state = {'m': torch.ones(10_000)}\n"
        "call = sys.argv[2]\n"
        "with CheckpointManager(sys.argv[1]) as ckpts:\n"
        "    ckpts.save(1, state).wait()\n"
        "    revision = ckpts.manifest().revision\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        faulthandler.dump_traceback_later(20, exit=True)\n"
        "        try:\n"
        "            if call == 'close': ckpts.close()\n"
        "            elif call == 'prepare': ckpts.prepare(state)\n"
        "            else: ckpts.save(2, state, block=call == 'block').wait(10)\n"
        "        except ConfigError as exc:\n"
        "            os._exit(7 if 'fork' in str(exc) else 8)\n"
        "        except BaseException as exc:\n"
        "            print(repr(exc), file=sys.stderr, flush=True)\n"
        "            os._exit(9)\n"
        "        os._exit(7 if call == 'close' else 10)\n"
        "    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "    assert ckpts.manifest().revision == revision\n"
        "    ckpts.save(3, state).wait()\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), call],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 7, (done.returncode, done.stderr)
    assert [c.step for c in cloudckpt.open(tmp_path / "run").checkpoints()] == [1, 3]


@pytest.mark.parametrize("stage", ["copy", "overlap"])
def test_an_optimizer_without_groups_of_its_own_is_saved(stage: str) -> None:
    """A wrapper without param_groups is saved by its state dict, and copied at once."""
    model = torch.nn.Linear(3, 3)
    inner = torch.optim.SGD(model.parameters(), lr=0.25)
    storage = MemoryStorage()
    with CheckpointManager(storage, settings=Settings(stage=stage)) as ckpts:
        ckpts.save(1, {"model": model, "optimizer": Wrapper(inner)})
    assert cloudckpt.open(storage).load()["optimizer"]["param_groups"][0]["lr"] == 0.25


# -- leaks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("settings", [Settings(), OVERLAP])
def test_a_save_that_has_ended_keeps_no_tensor_alive(settings: Settings, fails: bool) -> None:
    """Neither the manager nor the pending save holds the state once it is committed, or has failed."""
    parameter = torch.nn.Parameter(torch.ones(100_000))
    given = {"w": parameter, "copy": torch.ones(100_000), "o": torch.optim.SGD([parameter])}
    alive = weakref.ref(given["copy"])
    ckpts = CheckpointManager(Refusing() if fails else MemoryStorage(), settings=settings)
    try:
        pending = ckpts.save(1, given)
        pending.wait_quietly()
        ckpts._saver._pool.submit(lambda: None).result()  # type: ignore[union-attr]  # its thread has let go as well
        del given, parameter
        gc.collect()
        assert alive() is None
        assert pending.done()
    finally:
        with pytest.raises(SaveError) if fails else contextlib.nullcontext():
            ckpts.close()


@pytest.mark.parametrize("storage", [Refusing, RefusingInside])
def test_a_failure_among_objects_that_are_sent_side_by_side_keeps_no_tensor_alive(storage: type[MemoryStorage]) -> None:
    """Two objects that are large enough to be sent at once, and neither is taken."""
    given = {name: {"w": torch.ones(3_000_000)} for name in ("a", "b")}  # 12 MB each
    alive = [weakref.ref(component["w"]) for component in given.values()]
    ckpts = CheckpointManager(storage())
    try:
        pending = ckpts.save(1, given)
        pending.wait_quietly()
        ckpts._saver._pool.submit(lambda: None).result()  # type: ignore[union-attr]  # its thread has let go as well
        del given
        gc.collect()
        assert [found() for found in alive] == [None, None]
    finally:
        with pytest.raises(SaveError, match="no room"):
            ckpts.close()


def test_a_closed_manager_makes_no_memory() -> None:
    """prepare() after close() is refused like save() and restore(): nobody would give the memory back."""
    ckpts = CheckpointManager(MemoryStorage())
    ckpts.close()
    with pytest.raises(ConfigError, match="closed"):
        ckpts.prepare({"m": torch.ones(10)})
    assert ckpts._arena.size_bytes == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_learning_rate_on_the_device_may_change_right_after_save() -> None:
    """scheduler.step() after save(), with lr a CUDA tensor: the save holds the rate of the call and does not fail."""
    model = torch.nn.Linear(8, 8, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5, device="cuda"), fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    storage = MemoryStorage()
    with CheckpointManager(storage, settings=OVERLAP) as ckpts:
        model(torch.ones(2, 8, device="cuda")).sum().backward()
        optimizer.step()
        pending = ckpts.save(1, {"model": model, "optimizer": optimizer, "scheduler": scheduler})
        scheduler.step()
        pending.wait()
    assert cloudckpt.open(storage).load()["optimizer"]["param_groups"][0]["lr"].item() == 0.5
