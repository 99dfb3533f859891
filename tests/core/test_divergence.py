from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.divergence import Averages, Divergence, DivergenceRule, observe, saved_since
from cloudckpt.core.model import State
from cloudckpt.errors import ConfigError
from cloudckpt.testing.builders import checkpoint


def found_in(
    rule: DivergenceRule, values: list[float], *, start: Averages | None = None
) -> tuple[Averages, Divergence | None]:
    """The first divergence in values at steps 0, 1, 2 …, and the averages there."""
    averages = start or Averages()
    for step, value in enumerate(values):
        averages, divergence = observe(rule, averages, step, value)
        if divergence is not None:
            return averages, divergence
    return averages, None


def test_the_seeds_losses_fire_where_they_did() -> None:
    """3.154, then 7.860, 8.272, 8.389, 8.407 with 0.1, 0.01 and a threshold of 1: found at 8.389, bad since 7.860."""
    averages, divergence = found_in(DivergenceRule(mode="min", threshold=1.0), [3.154, 7.860, 8.272, 8.389, 8.407])
    assert divergence is not None
    assert (divergence.step, divergence.value, divergence.since) == (3, 8.389, 1)
    assert "short average 4.5193 is worse than its long one 3.3031 by 1.2162 >= 1" in divergence.reason
    assert averages.short == pytest.approx(4.5193, abs=1e-4)


def test_both_directions() -> None:
    """An accuracy that falls diverges under "max", and one that rises does not; the mirror image of "min"."""
    falling, rising = [0.9, 0.2, 0.1, 0.1, 0.1], [0.1, 0.8, 0.9, 0.9, 0.9]
    for mode, bad, good in (("max", falling, rising), ("min", rising, falling)):
        rule = DivergenceRule(mode=mode, threshold=0.2)
        _, divergence = found_in(rule, bad)
        assert divergence is not None
        assert divergence.since == 1
        assert found_in(rule, good)[1] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_what_is_no_number_is_a_divergence_at_once(value: float, mode: str) -> None:
    """NaN and the infinities fire, as the very first value too, and leave the averages as they were."""
    rule = DivergenceRule(mode=mode)
    for before in ([], [1.0, 1.5]):
        averages, divergence = found_in(rule, [*before, value])
        assert divergence is not None
        assert divergence.since == divergence.step == len(before)
        assert "no finite number" in divergence.reason
        known, _ = found_in(rule, before)
        assert (averages.short, averages.long) == (known.short, known.long)


def test_a_divergence_that_ends_in_nan_is_as_old_as_its_first_bad_value() -> None:
    """What was saved while the loss exploded is bad as well, not only what came with the NaN."""
    _, divergence = found_in(DivergenceRule(mode="min", threshold=5.0), [1.0, 1.1, 9.0, 12.0, math.nan])
    assert divergence is not None
    assert (divergence.step, divergence.since) == (4, 2)


def test_a_spike_that_passes_is_forgotten() -> None:
    """One bad value fires nothing, and the next excursion counts from its own beginning."""
    rule = DivergenceRule(mode="min", threshold=1.0)
    averages, divergence = found_in(rule, [3.0, 9.0, 3.0])
    assert divergence is None
    assert averages.since is None
    _, divergence = found_in(rule, [3.0, 9.0, 3.0, 9.0, 9.0, 9.0, 9.0])
    assert divergence is not None
    assert divergence.since == 3


def test_a_gap_without_a_bad_value_counts_from_now() -> None:
    """Averages that were apart when a value near the slow one comes: only that step is known to be bad."""
    start = Averages(short=9.0, long=3.0)
    _, divergence = found_in(DivergenceRule(mode="min", threshold=1.0), [3.5], start=start)
    assert divergence is not None
    assert divergence.since == 0


@given(st.lists(st.floats(-1e6, 1e6), max_size=20), st.integers(0, 20))
def test_stopping_and_going_on_changes_nothing(values: list[float], cut: int) -> None:
    """Averages that went through plain values, the initial ones included, go on bit for bit."""
    rule = DivergenceRule(mode="min", threshold=1e9)
    whole, _ = found_in(rule, values)
    first, _ = found_in(rule, values[:cut])
    again = Averages.from_json(first.to_json())
    assert again == first
    for step, value in enumerate(values[cut:], cut):
        again, _ = observe(rule, again, step, value)
    assert again == whole


@pytest.mark.parametrize(
    "words",
    [
        {"mode": "auto"},
        {"mode": "min", "threshold": 0.0},
        {"mode": "min", "threshold": math.nan},
        {"mode": "min", "short_alpha": 0.01, "long_alpha": 0.01},
        {"mode": "min", "short_alpha": 0.01, "long_alpha": 0.5},
        {"mode": "min", "short_alpha": 1.5},
        {"mode": "min", "long_alpha": 0.0},
    ],
)
def test_rules_that_cannot_work_are_refused(words: dict[str, float | str]) -> None:
    """A direction is never guessed, and averages that never part are no rule."""
    with pytest.raises(ConfigError):
        DivergenceRule(**words)  # type: ignore[arg-type]  # what is tested


def test_what_was_saved_since_is_of_this_attempt() -> None:
    """Back from the newest to the first bad step: an earlier attempt's higher steps are left alone, retired ones too."""
    entries = [
        checkpoint(100, seq=1),
        checkpoint(500, seq=2),
        checkpoint(130, seq=3),
        checkpoint(140, seq=4, state=State.RETIRED),
        checkpoint(150, seq=5),
        checkpoint(150, seq=6, state=State.PENDING),
    ]
    assert [(e.step, e.seq) for e in saved_since(entries, 130)] == [(150, 6), (150, 5), (130, 3)]
    assert [(e.step, e.seq) for e in saved_since(entries, 140)] == [(150, 6), (150, 5)]
    assert saved_since(entries, 151) == []
    assert saved_since([], 0) == []
