"""MemoryStorage keeps every promise of a storage."""

from __future__ import annotations

import pytest

from cloudckpt.storage import MemoryStorage, Storage
from cloudckpt.testing import StorageContract


class TestMemory(StorageContract):
    @pytest.fixture
    def storage(self, memory_storage: MemoryStorage) -> Storage:
        return memory_storage


def test_a_url_means_one_storage() -> None:
    """Every ``memory://`` URL of one spelling is one storage within a process, and another spelling another."""
    one = MemoryStorage.named("memory://test-memory/one")
    one.put("object", [b"1"], size_bytes=1)

    assert MemoryStorage.named("memory://test-memory/one") is one
    assert [*MemoryStorage.named("memory://test-memory/two").list()] == []
    assert one.url == "memory://test-memory/one"


def test_a_delete_may_be_fed_by_the_same_storage(memory_storage: MemoryStorage) -> None:
    """The keys to delete may come from an iterator that asks this very storage meanwhile."""
    for n in range(3):
        memory_storage.put(f"{n}", [b"1"], size_bytes=1)

    assert memory_storage.delete(item.key for item in memory_storage.list() if memory_storage.size(item.key)) == {}
    assert [*memory_storage.list()] == []
