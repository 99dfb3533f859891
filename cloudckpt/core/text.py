"""How numbers are spelled for people: one place, so that logs, tables and errors agree."""

from __future__ import annotations

__all__ = ["format_bytes", "format_duration", "format_metric", "format_rate"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(size_bytes: float) -> str:
    """``2.1 GiB``; whole numbers below one KiB."""
    size = float(size_bytes)
    for unit in _UNITS[:-1]:
        if abs(size) < 1023.95:  # from here on one decimal would read "1024.0"
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {_UNITS[-1]}"


def format_rate(size_bytes: float, seconds: float) -> str:
    """``182 MiB/s``; a duration too short to measure counts as a millisecond."""
    rate = size_bytes / max(seconds, 1e-3)
    for unit in _UNITS[:-1]:
        if rate < 1000:
            return f"{rate:.0f} {unit}/s"
        rate /= 1024
    return f"{rate:.0f} {_UNITS[-1]}/s"


def format_duration(seconds: float) -> str:
    """``40 ms``, ``11.8 s``, ``3 min``, ``2 h``, ``4 d``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds:.1f} s" if name == "s" else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.0f} d"


def format_metric(value: float) -> str:
    """Four decimals, as training logs have them; four significant digits for very small or large values."""
    plain = value == 0 or 1e-3 <= abs(value) < 1e6
    return f"{value:.4f}" if plain else f"{value:.4g}"
