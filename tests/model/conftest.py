"""What makes a search a hundred times as fast as the run that it is about."""

from __future__ import annotations

import functools

import pytest

from cloudckpt import sealed, sweeping, view
from cloudckpt.core.index_json import decode_index
from cloudckpt.storage import manifest_store
from cloudckpt.testing import invariants
from tests.model import replaying


@pytest.fixture(autouse=True)
def _documents_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes are asked for thousands of times, and what they say never changes: the codecs are pure."""
    index = functools.lru_cache(maxsize=1024)(decode_index)
    for module in (invariants, sealed, sweeping, view):
        monkeypatch.setattr(module, "decode_index", index)
    for name in ("decode_manifest", "encode_manifest"):
        monkeypatch.setattr(manifest_store, name, getattr(replaying, name.removesuffix("_manifest")))
    monkeypatch.setattr(invariants, "decode_manifest", replaying.decode)
