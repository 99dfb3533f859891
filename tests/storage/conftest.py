"""What uploads are tried on, and how they are broken off: real S3 servers, and processes in the middle of an upload."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import IO, Any

import pytest

from cloudckpt.testing import FakeGCS
from cloudckpt.testing.servers import MotoServer, SeaweedFS


@pytest.fixture(scope="module")
def gcs_server() -> Iterator[FakeGCS]:
    """A server for each file: uploads that another one's tests leave unfinished would be found here."""
    with FakeGCS() as server:
        yield server


@pytest.fixture(params=["s3_server", "seaweedfs"], ids=["moto", "seaweedfs"])
def server(request: pytest.FixtureRequest) -> MotoServer | SeaweedFS:
    """Each S3 server; the second one checks signatures."""
    found: MotoServer | SeaweedFS = request.getfixturevalue(str(request.param))
    return found


class Uploader:
    """A process that has said "sending", and is in the middle of an upload."""

    def __init__(self, process: subprocess.Popen[str], stdout: IO[str]) -> None:
        self._process, self._stdout = process, stdout

    def interrupt(self) -> list[str]:
        """Send SIGINT; the lines that it says until it has ended by itself, without an error."""
        self._process.send_signal(signal.SIGINT)
        said = self._stdout.read()
        assert self._process.wait(60) == 0
        return said.splitlines()

    def kill(self) -> None:
        """Send SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.wait(60)


@pytest.fixture
def uploading() -> Callable[[str, str, Any], AbstractContextManager[Uploader]]:
    """Runs a program on a bucket of a server, from the moment when it says that it is sending."""

    @contextlib.contextmanager
    def started(program: str, bucket: str, server: Any) -> Iterator[Uploader]:
        command = [sys.executable, "-c", program, bucket]
        environment = {**os.environ, **server.environment()}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "sending\n"
                yield Uploader(process, process.stdout)
            finally:
                process.kill()  # nothing, if it has ended

    return started
