"""What a hostile look at the local lane found: each test is one way in which it went wrong."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile  # the parents of pytest's own folders are the owner's alone
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudckpt.storage import LocalStorage
from cloudckpt.storage.base import Part
from cloudckpt.testing import BytesSource

FEW_FILES = """
import os, resource, sys
from cloudckpt.errors import StorageError
from cloudckpt.storage import LocalStorage
from cloudckpt.testing import BytesSource
storage = LocalStorage(sys.argv[1])
body = BytesSource(bytes(64 * 1024 * 1024))
storage.put("a", body, size_bytes=body.size_bytes)
def open_now():
    return sorted(os.listdir("/proc/self/fd"))
before = open_now()
top = int(max(map(int, before)))
for more in range(1, 10):
    resource.setrlimit(resource.RLIMIT_NOFILE, (top + more, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        storage.put("a", body, size_bytes=body.size_bytes)
    except StorageError as exc:
        assert exc.retryable, exc
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    assert open_now() == before, (more, open_now(), before)
print("ok")
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc")
def test_too_few_descriptors_are_an_error_of_the_storage(tmp_path: Path) -> None:
    """At whatever open or dup the limit is met, it is told as a StorageError, and none stays open."""
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, str(tmp_path)], check=False, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "ok\n", done.stderr


OWN_FILE = """
import os, sys
from cloudckpt.storage import LocalStorage
from cloudckpt.testing import BytesSource
if os.getuid() == 0:
    os.chmod(sys.argv[1], 0o777)
    os.setgid(65534)
    os.setuid(65534)
os.umask(0o222)
body = BytesSource(bytes(1024 * 1024))
LocalStorage(sys.argv[1]).put("a", body, size_bytes=body.size_bytes)
print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="there are no users")
def test_files_that_are_made_read_only_can_be_written_past_the_page_cache() -> None:
    """A umask that makes files read-only (an archive) hinders nobody from writing the file that he has open."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", OWN_FILE, folder], check=False, capture_output=True, text=True, timeout=60
        )
    assert done.stdout == "ok\n", done.stderr


class Interrupting(BytesSource):
    """Sends SIGINT from a helper's part while the caller waits for the helper."""

    def __init__(self, waiting: threading.Event, ended: threading.Event) -> None:
        super().__init__(bytes(4 * 8 * 1024 * 1024))
        self.waiting, self.ended = waiting, ended
        self.outlived: list[bool] = []

    @contextlib.contextmanager
    def hold(self, start: int, length: int) -> Iterator[Part]:
        with super().hold(start, length) as part:
            if threading.current_thread() is not threading.main_thread() and not self.outlived:
                self.outlived.append(False)
                self.waiting.wait(30)
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                self.outlived[0] = self.ended.wait(1)
            yield part


def test_ctrl_c_while_waiting_for_the_last_part_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When ``put`` has ended, interrupted or not, nobody reads the caller's memory any more."""
    waiting, ended = threading.Event(), threading.Event()
    join = threading.Thread.join

    def joining(thread: threading.Thread, timeout: float | None = None) -> None:
        if thread.name == "cloudckpt-write":
            waiting.set()
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", joining)
    source = Interrupting(waiting, ended)
    with pytest.raises(KeyboardInterrupt):
        LocalStorage(tmp_path).put("a", source, size_bytes=source.size_bytes)
    ended.set()
    for thread in threading.enumerate():
        if thread.name == "cloudckpt-write":
            join(thread, 30)
    assert source.outlived == [False]
    assert list(tmp_path.iterdir()) == []
