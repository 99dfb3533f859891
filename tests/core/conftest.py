"""How hypothesis runs here: the clock of a busy machine fails no property, and a sample has fewer, fixed examples."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("cloudckpt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# The same in every run: whether every branch is covered must not be a matter of luck.
settings.register_profile(
    "cloudckpt-sample", parent=settings.get_profile("cloudckpt"), max_examples=40, derandomize=True, database=None
)
settings.load_profile("cloudckpt")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test is imported: a property keeps the profile that it was written under."""
    if config.getoption("--sample"):
        settings.load_profile("cloudckpt-sample")
