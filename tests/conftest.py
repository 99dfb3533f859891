"""Fixtures that more than one suite uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudckpt.storage import LocalStorage, MemoryStorage


def pytest_addoption(parser: pytest.Parser) -> None:
    """How often the kill suite kills a real process."""
    parser.addoption("--kills", type=int, default=24, help="at how many moments the kill suite kills a trainer")


@pytest.fixture
def memory_storage() -> MemoryStorage:
    """An empty storage in memory."""
    return MemoryStorage()


@pytest.fixture
def local_storage(tmp_path: Path) -> LocalStorage:
    """A storage in a folder that does not exist yet."""
    return LocalStorage(tmp_path / "run")
