"""What callers may pass, checked at the border with an error that says what to write instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import SupportsFloat, SupportsIndex

from cloudckpt.core import keys
from cloudckpt.errors import ConfigError

__all__ = ["checked_deadline", "checked_label", "checked_labels", "checked_metrics", "checked_step"]

_LABEL_LIMIT = 200


def checked_step(step: object) -> int:
    """A training step as an int. Integer-like scalars (NumPy, 0-d tensors of an integer type) are taken.

    Raises:
        ConfigError: not an integer, a bool, negative, or beyond 10**18.
    """
    if isinstance(step, bool) or not isinstance(step, SupportsIndex):
        raise ConfigError(f"step={step!r}: expected an integer >= 0, got {type(step).__name__}")
    try:
        number = step.__index__()
    except TypeError:
        raise ConfigError(f"step={step!r}: expected an integer >= 0, got {type(step).__name__}") from None
    if not 0 <= number <= keys.STEP_LIMIT:
        raise ConfigError(
            f"step={number}: expected an integer from 0 to 10**18; steps count up from the start of the run"
        )
    return number


def checked_deadline(deadline_s: object) -> float | None:
    """How long a save may take, in seconds; zero or less is a deadline that has come, None is none.

    Raises:
        ConfigError: not a finite number.
    """
    if deadline_s is None:
        return None
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, int | float) or not math.isfinite(deadline_s):
        raise ConfigError(f"deadline_s={deadline_s!r}: write how many seconds there are, or None if there is no hurry")
    return float(deadline_s)


def checked_metrics(metrics: Mapping[str, SupportsFloat] | None) -> dict[str, float]:
    """Metrics as plain floats and ints. NaN and infinities are allowed: they are recorded and never best.

    Raises:
        ConfigError: a name that is not a usable label, or a value that is not one number.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ConfigError(f'metrics must be a mapping such as {{"val_loss": 0.41}}, got {type(metrics).__name__}')
    return {checked_label(name, "a metric's name"): _number(name, value) for name, value in metrics.items()}


def _number(name: str, value: SupportsFloat) -> float:
    if isinstance(value, bool | str | bytes):
        raise ConfigError(f"metric {name!r}: expected a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as exc:
        raise ConfigError(f"metric {name!r}: expected one number, got {type(value).__name__} ({exc})") from exc
    if type(value) is int:
        return value
    # One NaN object for all, so that equal metrics compare equal.
    return math.nan if math.isnan(number) else number


def checked_label(label: object, what: str) -> str:
    """A tag, mark or metric name: 1 to 200 printable characters.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(label, str) or not 1 <= len(label) <= _LABEL_LIMIT or not label.isprintable():
        raise ConfigError(f"{label!r} cannot be {what}: write 1 to {_LABEL_LIMIT} printable characters")
    return label


def checked_labels(labels: Iterable[object], what: str) -> tuple[str, ...]:
    """Several labels without repetition, in order.

    Raises:
        ConfigError: one of them is no label, or a plain string was given instead of a collection.
    """
    if isinstance(labels, str):
        raise ConfigError(f"{labels!r}: expected a list of labels, write [{labels!r}]")
    return tuple(dict.fromkeys(checked_label(label, what) for label in labels))
