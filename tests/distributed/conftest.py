"""Jobs of two and four ranks, kept from test to test; a test that kills a rank makes its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """A job of two ranks."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """A job of four ranks."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()
