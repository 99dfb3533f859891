"""Installs the peers into the environment that runs this; one that cannot be had is named, and stops nothing.

What is missing fails by name when its cases are run, and the page says so.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

_REQUIREMENTS = Path(__file__).with_name("requirements.txt")


def main() -> None:
    """All at once, which resolves best; otherwise one by one."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        # A peer must not exchange the torch that everything is measured with.
        constraints.write(f"torch=={importlib.metadata.version('torch')}\n")
        constraints.flush()
        if _installed(["-r", str(_REQUIREMENTS)], constraints.name):
            return
        lines = [line.partition("#")[0].strip() for line in _REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
        missing = [line for line in lines if line and not _installed([line], constraints.name)]
    print(f"could not be installed, and will be missing from the results: {', '.join(missing) or 'nothing'}")


def _installed(what: list[str], constraints: str) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", constraints, *what]
    return subprocess.run(command, check=False).returncode == 0


if __name__ == "__main__":
    main()
