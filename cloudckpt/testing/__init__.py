"""For tests of this package, of other storages, and of programs that use it: public, and needs ``cloudckpt[testing]``.

Nothing is loaded before it is used, so importing this package needs neither pytest nor hypothesis.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloudckpt.testing.contract import StorageContract
    from cloudckpt.testing.fake_gcs import FakeGCS
    from cloudckpt.testing.fault_proxy import FaultProxy
    from cloudckpt.testing.history import History, check_recovery
    from cloudckpt.testing.invariants import check_store
    from cloudckpt.testing.scripted import Call, Crash, Fault, ScriptedStorage
    from cloudckpt.testing.sources import BytesSource
    from cloudckpt.testing.watching import Watch

__all__ = [
    "BytesSource",
    "Call",
    "Crash",
    "FakeGCS",
    "Fault",
    "FaultProxy",
    "History",
    "ScriptedStorage",
    "StorageContract",
    "Watch",
    "check_recovery",
    "check_store",
]

_PLACES = {
    "BytesSource": "sources",
    "Call": "scripted",
    "Crash": "scripted",
    "FakeGCS": "fake_gcs",
    "Fault": "scripted",
    "FaultProxy": "fault_proxy",
    "History": "history",
    "ScriptedStorage": "scripted",
    "StorageContract": "contract",
    "Watch": "watching",
    "check_recovery": "history",
    "check_store": "invariants",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.{_PLACES[name]}"
    if _PLACES[name] == "contract":
        # A failing promise shows its values only if pytest rewrites the asserts, which it does for test files alone.
        importlib.import_module("pytest").register_assert_rewrite(module)
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
