"""A disk that is full at any write, a quota, a limit, a file system that turns read-only: nothing good is lost."""

from __future__ import annotations

import builtins
import contextlib
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, Settings, StorageError
from cloudckpt.storage import LocalStorage, local_lane, local_write
from cloudckpt.testing import History, check_recovery
from tests.power.disks import mounted, run
from tests.records import Recording

FAST = Settings(retry_base_s=1e-5, retry_cap_s=1e-4, manifest_deadline_s=0.05, storage_deadline_s=0.05)

#: What the system says, and whether it goes on saying it to every later write.
REFUSALS = {
    "full from then on": (errno.ENOSPC, True),
    "full once": (errno.ENOSPC, False),
    "over quota from then on": (errno.EDQUOT, True),
    "read-only from then on": (errno.EROFS, True),
    "an I/O error once": (errno.EIO, False),
    "an I/O error from then on": (errno.EIO, True),
}


class Tired:
    """Counts what a run asks of the disk, and refuses from one call on, or one call.

    It stands in for ``os`` and ``open`` in the modules that write: every other name is the real one.

    Args:
        at: which call is refused, from 0; None refuses none.
        number: the system's error number.
        lasting: whether every later one is refused as well.
    """

    def __init__(self, at: int | None = None, number: int = 0, *, lasting: bool = False) -> None:
        self._at, self._number, self._lasting = at, number, lasting
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def _asked(self, what: str) -> None:
        self.calls.append(what)
        at = len(self.calls) - 1
        if self._at is not None and (at == self._at or (self._lasting and at > self._at)):
            raise OSError(self._number, os.strerror(self._number))

    def open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        """A file that is opened for writing is made."""
        if flags & (os.O_WRONLY | os.O_RDWR):
            self._asked("open")
        return os.open(path, flags, mode, **more)

    def fsync(self, descriptor: int) -> None:
        """Delayed allocation tells of a full disk here."""
        self._asked("fsync")
        os.fsync(descriptor)

    def replace(self, source: Any, target: Any) -> None:
        """A rename needs room in a folder."""
        self._asked("rename")
        os.replace(source, target)  # noqa: PTH105 - what the module calls

    def pwritev(self, descriptor: int, buffers: Any, offset: int) -> int:
        """A part of a payload object."""
        self._asked("write")
        return os.pwritev(descriptor, buffers, offset)

    def open_file(self, file: Any, *words: Any, **named: Any) -> Any:
        """``open`` as the module calls it: what comes back counts its writes."""
        found = builtins.open(file, *words, **named)  # noqa: PTH123, SIM115 - handed on
        real = found.write

        class Counted:
            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                found.close()

            def fileno(self) -> int:
                return int(found.fileno())

            def write(inner, body: Any) -> int:  # noqa: N805 - self is the outer one
                self._asked("write")
                return int(real(body))

        return Counted()


@contextlib.contextmanager
def tired(monkeypatch: pytest.MonkeyPatch, disk: Tired) -> Iterator[Tired]:
    """The modules that write to a disk ask this one while the block runs."""
    with monkeypatch.context() as patch:
        for module in (local_write, local_lane):
            patch.setattr(module, "os", disk)
        patch.setattr(local_write, "open", disk.open_file, raising=False)
        yield disk


def live(root: Path, monkeypatch: pytest.MonkeyPatch, disk: Tired) -> History:
    """A history of two jobs on that disk."""
    history = History(LocalStorage(root), FAST)
    with tired(monkeypatch, disk):
        history.run()
    return history


def survive(root: Path, refusal: str, monkeypatch: pytest.MonkeyPatch, stride: int) -> int:
    """Refuse every ``stride``-th call of the history, and check what is left after each; how many those were."""
    number, lasting = REFUSALS[refusal]
    fine = Tired()
    assert len(live(root / "fine", monkeypatch, fine).acknowledged) == 5
    total = len(fine.calls)
    assert {"open", "write", "fsync", "rename"} == set(fine.calls)
    failures = []
    points = range([*REFUSALS].index(refusal) % stride, total, stride)
    for at in points:
        place = root / f"run-{at}"
        disk = Tired(at, number, lasting=lasting)
        history = live(place, monkeypatch, disk)
        try:
            check_recovery(LocalStorage(place), history, FAST)
        except (AssertionError, CloudCkptError) as exc:
            failures.append(f"call {at} ({disk.calls[at]}): {type(exc).__name__}: {exc}")
    assert not failures, f"{len(failures)} of {total}:\n" + "\n".join(failures)
    return len(points)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_disk_that_refuses_at_a_call(
    refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Recording
) -> None:
    """A sample of what the test below does."""
    with record("a history of two jobs", refusal, "local") as case:
        case.points = survive(tmp_path, refusal, monkeypatch, 17)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_disk_that_refuses_at_any_call(
    refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config, record: Recording
) -> None:
    """Each open, write, fsync and rename: what was acknowledged is there, and with room again all goes on."""
    with record("a history of two jobs", refusal, "local") as case:
        case.points = survive(tmp_path, refusal, monkeypatch, min(int(pytestconfig.getoption("--stride")), 5))


LIMITED = """
import json, resource, sys
from pathlib import Path
from cloudckpt.storage import LocalStorage
from cloudckpt.testing import History, check_recovery
root, stride = sys.argv[1], int(sys.argv[2])
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
free = History(LocalStorage(root + "-free"))
free.run()
largest = max(path.stat().st_size for path in Path(root + "-free").rglob("*") if path.is_file())
failures, points = [], 0
for limit in range(1, largest + 2, stride):
    storage = LocalStorage(f"{root}-{limit}")
    history = History(storage)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        history.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    points += 1
    try:
        check_recovery(storage, history)
    except Exception as exc:
        failures.append(f"limit {limit}: {type(exc).__name__}: {exc}")
print(json.dumps({"failures": failures, "points": points, "largest": largest}))
"""


@pytest.mark.processes
def test_a_limit_of_the_file_size_at_any_byte(tmp_path: Path, record: Recording) -> None:
    """Under ``ulimit -f`` of any size up to the largest file: writes fail in their middle, and nothing good is lost."""
    with record("a history of two jobs", "ulimit -f", "local") as case:
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(tmp_path / "run"), "97"],
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        case.points = found["points"]
        assert found["points"] > 20
        assert found["failures"] == []


def state_of(step: int) -> dict[str, Any]:
    """Half a mebibyte."""
    return {"model": {"w": torch.full((1 << 17,), float(step))}}


@pytest.mark.processes
@pytest.mark.slow
def test_a_small_disk_that_fills_up(tmp_path: Path, record: Recording) -> None:
    """With every amount of room from none on: saves fail with advice, and once there is room training goes on."""
    with (
        record("a trainer on a small disk", "full at every size", "tmpfs") as case,
        mounted(Path("tmpfs"), tmp_path / "small", "size=6m", kind="tmpfs") as place,
    ):
        for free_kib in range(0, 3072, 96):
            root = place / f"run-{free_kib}"
            with CheckpointManager(root, keep_last=None, settings=FAST) as ckpts:
                ckpts.save(1, state_of(1), block=True)
            ballast = place / "ballast"
            room = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
            ballast.write_bytes(bytes(max(room - free_kib * 1024, 0)))
            told = []
            with contextlib.suppress(CloudCkptError), CheckpointManager(root, settings=FAST) as ckpts:
                for step in (2, 3, 4, 5):
                    try:
                        ckpts.save(step, state_of(step), block=True)
                        told.append(step)
                    except CloudCkptError as exc:
                        assert "no space left on the device" in str(exc), exc
            ballast.unlink()
            state = state_of(0)
            with CheckpointManager(root, settings=FAST) as ckpts:
                resumed = ckpts.restore(state)
                assert resumed is not None
                assert resumed.step >= max([1, *told])  # what was sealed and not committed is rolled forward
                assert {c.step for c in ckpts.checkpoints()} >= {1, *told}
            for path in sorted(root.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            root.rmdir()
            case.points += 1


@pytest.mark.processes
def test_a_file_system_that_turns_read_only_and_back(tmp_path: Path, record: Recording) -> None:
    """In the middle of a run, as after a disk's error: saves fail and say so, readers read, and then all goes on."""
    with (
        record("a trainer and a reader", "remounted read-only", "tmpfs") as case,
        mounted(Path("tmpfs"), tmp_path / "disk", "size=32m", kind="tmpfs") as place,
    ):
        root = place / "run"
        with CheckpointManager(root, keep_last=None, settings=FAST) as ckpts:
            ckpts.save(1, state_of(1), block=True)
            before = (root / "manifest.json").read_bytes()
            run("mount", "-o", "remount,ro", str(place), must=True)
            acts: list[Callable[[], object]] = [
                lambda: ckpts.save(2, state_of(2), block=True),
                lambda: ckpts.pin(1),
                lambda: cloudckpt.gc(root, dry_run=False),
                lambda: cloudckpt.repair(root, dry_run=False),
                lambda: CheckpointManager(root, settings=FAST).restore(state_of(0)),
            ]
            for act in acts:
                with pytest.raises((StorageError, cloudckpt.SaveError), match=r"read-only|permission denied"):
                    act()
            assert (root / "manifest.json").read_bytes() == before
            assert torch.equal(cloudckpt.open(root).load(1)["model"]["w"], state_of(1)["model"]["w"])
            assert cloudckpt.verify(root, deep=True).ok
            run("mount", "-o", "remount,rw", str(place), must=True)
            ckpts.save(3, state_of(3), block=True)
        assert [c.step for c in cloudckpt.open(root).checkpoints()] == [1, 3]
        case.points = len(acts)
