"""How hypothesis runs here: the clock of a busy machine fails no property."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("cloudckpt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("cloudckpt")
