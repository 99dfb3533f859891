"""The programs of ``tools/`` as modules; they are in no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["tool_module"]

_TOOLS = Path(__file__).parents[1] / "tools"


def tool_module(name: str) -> ModuleType:
    """The program of this name, loaded anew."""
    spec = importlib.util.spec_from_file_location(name, _TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there for the names in their annotations
    spec.loader.exec_module(module)
    return module
