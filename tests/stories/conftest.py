"""The same stories on every backend: ``pytest tests/stories --on seaweedfs``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from cloudckpt.storage import Storage
from cloudckpt.tensors import overlap


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


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """The thread that copies beside training waits until the event is set."""
    go = threading.Event()
    plain = overlap._plain_copy
    me = threading.current_thread()

    def copy(copying: overlap.Copying) -> None:
        if threading.current_thread() is not me:
            assert go.wait(60)
        plain(copying)

    monkeypatch.setattr(overlap, "_plain_copy", copy)
    yield go
    go.set()
