"""What callers may pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cloudckpt.core.arguments import checked_deadline, checked_label, checked_labels, checked_metrics, checked_step
from cloudckpt.errors import ConfigError


@pytest.mark.parametrize("step", [0, 7, 10**18, np.int64(7), torch.tensor(7)])
def test_integers_are_steps(step: object) -> None:
    """Ints, NumPy integers and 0-d integer tensors are steps."""
    assert checked_step(step) == int(step)  # type: ignore[call-overload]  # each of them has __int__


@pytest.mark.parametrize("step", [True, -1, 1.0, "7", None, 10**18 + 1, torch.tensor(1.5), torch.zeros(3)])
def test_anything_else_is_no_step(step: object) -> None:
    """Bools, floats, text and negative numbers are refused with what was expected."""
    with pytest.raises(ConfigError, match="expected an integer"):
        checked_step(step)


@pytest.mark.parametrize(("given", "taken"), [(None, None), (25, 25.0), (0.5, 0.5), (0, 0.0), (-3.0, -3.0)])
def test_a_deadline_is_a_number_of_seconds(given: float | None, taken: float | None) -> None:
    """One that has come is a deadline as well, and None is none."""
    assert checked_deadline(given) == taken


@pytest.mark.parametrize("given", [True, "25", math.nan, math.inf, [25]])
def test_anything_else_is_no_deadline(given: object) -> None:
    """Refused with what to write instead."""
    with pytest.raises(ConfigError, match="write how many seconds there are"):
        checked_deadline(given)


def test_metrics_become_plain_numbers() -> None:
    """Scalars of any library become ints and floats; NaN and infinities stay, and all NaNs are one object."""
    metrics = checked_metrics(
        {"a": 1, "b": 0.0, "c": np.float32(0.5), "d": torch.tensor(2.0), "e": float("nan"), "f": math.inf}
    )
    assert metrics == {"a": 1, "b": 0.0, "c": 0.5, "d": 2.0, "e": math.nan, "f": math.inf}
    assert [type(v) for v in metrics.values()] == [int, float, float, float, float, float]
    assert metrics == checked_metrics({**metrics, "e": float("nan")})
    assert checked_metrics(None) == {}


@pytest.mark.parametrize("value", [True, "0.5", b"1", None, torch.zeros(3), [1], 1j])
def test_a_metric_is_one_number(value: object) -> None:
    """What is not one number is refused by the metric's name."""
    with pytest.raises(ConfigError, match="metric 'loss'"):
        checked_metrics({"loss": value})  # type: ignore[dict-item]  # that is the point


def test_metrics_are_a_mapping() -> None:
    """A bare number is refused with an example of what to write."""
    with pytest.raises(ConfigError, match="val_loss"):
        checked_metrics(0.5)  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("label", ["", "a\nb", "x" * 201, 7, None, "\ud800"])
def test_what_cannot_be_printed_is_no_label(label: object) -> None:
    """Labels are 1 to 200 printable characters."""
    with pytest.raises(ConfigError, match="cannot be a tag"):
        checked_label(label, "a tag")


def test_labels_are_a_list_without_repetition() -> None:
    """Order is kept and repetition dropped; a bare string is a mistake that is named."""
    assert checked_labels(["b", "a", "b"], "a tag") == ("b", "a")
    with pytest.raises(ConfigError, match=r"write \['release'\]"):
        checked_labels("release", "a tag")
