"""The sink as the harness holds it: a process of its own, gone when the ``with`` ends or its holder dies."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.meter import cpu_s_of

__all__ = ["SinkProcess", "Statistics", "make_certificate", "statistics_of"]

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Statistics:
    """What a sink was asked up to a moment."""

    requests: dict[str, int] = field(default_factory=dict)
    bytes_in: int = 0
    bytes_out: int = 0

    def since(self, before: Statistics) -> Statistics:
        """What was asked after ``before``; kinds that were not asked for are left out."""
        fresh = {kind: count - before.requests.get(kind, 0) for kind, count in self.requests.items()}
        return Statistics(
            {kind: count for kind, count in fresh.items() if count},
            self.bytes_in - before.bytes_in,
            self.bytes_out - before.bytes_out,
        )


def statistics_of(url: str, *, asking: str = "stats") -> Statistics:
    """Ask a sink what it was asked. ``asking="clear"`` makes it forget its objects as well."""
    context = ssl._create_unverified_context() if url.startswith("https") else None  # noqa: SLF001 - loopback
    with urllib.request.urlopen(f"{url}/_sink/{asking}", context=context) as answer:
        found: dict[str, Any] = json.load(answer)
    return Statistics(found["requests"], found["bytes_in"], found["bytes_out"])


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-made certificate for 127.0.0.1, and its key; made by the ``openssl`` program if not there yet.

    Raises:
        RuntimeError: there is no ``openssl``, or it failed.
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    if not certificate.exists():
        folder.mkdir(parents=True, exist_ok=True)
        names = "subjectAltName=DNS:localhost,IP:127.0.0.1"
        curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        where = ["-keyout", str(key), "-out", str(certificate)]
        command = ["openssl", "req", "-x509", *curve, *where, "-days", "30", "-subj", "/CN=localhost", "-addext", names]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as exc:
            raise RuntimeError(f"the TLS cases need the openssl program to make a certificate: {exc}") from exc
    return certificate, key


class SinkProcess:
    """A running sink.

    Args:
        discard: drop payload instead of keeping it.
        delay_ms: to the first byte of every answer.
        connection_mb_per_s: the body rate of each connection; 0 is unlimited.
        tls: a certificate and its key.
    """

    def __init__(
        self,
        *,
        discard: bool = False,
        delay_ms: float = 0.0,
        connection_mb_per_s: float = 0.0,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        flags = ["--discard"] if discard else []
        flags += ["--delay-ms", str(delay_ms), "--connection-mb-per-s", str(connection_mb_per_s)]
        self.certificate = tls[0] if tls else None
        if tls:
            flags += ["--tls", *map(str, tls)]
        self._flags = flags
        self._scheme = "https" if tls else "http"
        self.url = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sink", *self._flags],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if self._process.stdout is None:
            raise RuntimeError("the sink has no output to read its port from")
        self.url = f"{self._scheme}://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def cpu_s(self) -> float:
        """CPU seconds it has used."""
        return cpu_s_of(self._process.pid)

    def environment(self) -> dict[str, str]:
        """What makes clients of S3 in a child process speak to it."""
        found = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "sink",
            "AWS_SECRET_ACCESS_KEY": "sink",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_S3_FORCE_PATH_STYLE": "true",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }
        if self.certificate:
            named = str(self.certificate)
            found |= {"AWS_CA_BUNDLE": named, "SSL_CERT_FILE": named, "BENCH_CERTIFICATE": named}
        return found
