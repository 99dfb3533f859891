"""The same stories on every backend: ``pytest tests/stories --on seaweedfs``."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cloudckpt.storage import Storage


@pytest.fixture(autouse=True)
def _on_another_backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    """Where a story says ``MemoryStorage()``, it gets an empty storage of the backend that was asked for."""
    kind = str(pytestconfig.getoption("--on"))
    if kind != "memory" and request.node.get_closest_marker("memory_only"):
        pytest.skip("reaches into the memory storage, to break it")
    if kind != "memory" and hasattr(request.module, "MemoryStorage"):
        new_storage: Callable[[str], Storage] = request.getfixturevalue("new_storage")
        monkeypatch.setattr(request.module, "MemoryStorage", lambda *_: new_storage(kind))
