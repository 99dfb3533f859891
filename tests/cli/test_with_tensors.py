"""The one module through which the command line reaches torch."""

from __future__ import annotations

import re
from pathlib import Path

import cloudckpt.cli


def test_only_one_module_of_the_command_line_names_what_needs_torch() -> None:
    """No other file below cloudckpt/cli imports exporting, importing, comparing, manager or run."""
    folder = Path(cloudckpt.cli.__file__).parent
    heavy = re.compile(r"cloudckpt\.(?:exporting|importing|comparing|manager|run|loading|tensors|saving)\b")
    naming = {path.name for path in folder.glob("*.py") if heavy.search(path.read_text(encoding="utf-8"))}
    assert naming == {"with_tensors.py"}
