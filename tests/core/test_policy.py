from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given

from cloudckpt.core.policy import (
    INHERIT,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepWithin,
    Policy,
    PolicyWords,
    resolve,
    tightened,
)
from cloudckpt.core.retention import plan_prune
from cloudckpt.errors import ConfigError
from cloudckpt.testing.strategies import checkpoint_lists, policies

LOSS = KeepBest("val_loss", "min", 2)
ACC = KeepBest("acc", "max", 1)
STORED = Policy(keep_last=5, keep_best=(LOSS,), keep_every=1000, keep_within_s=60, keep_unscored=1)


# -- rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KeepLast(0), "keep_last=0: expected an integer >= 1"),
        (lambda: KeepLast(-1), "keep_last=-1"),
        (lambda: KeepLast("3"), "keep_last='3': expected an integer"),  # type: ignore[arg-type]  # a user's mistake
        (lambda: KeepLast(2.5), "keep_last=2.5"),  # type: ignore[arg-type]  # a user's mistake
        (lambda: KeepLast(True), "keep_last=True"),
        (lambda: KeepBest("loss", "min", -1), "keep_best=-1: expected an integer >= 0"),
        (lambda: KeepBest("loss", "min", 1.0), "keep_best=1.0"),  # type: ignore[arg-type]  # a user's mistake
        (lambda: KeepBest("", "min"), "needs the name of a metric"),
        (lambda: KeepBest(7, "min"), "needs the name of a metric"),  # type: ignore[arg-type]  # a user's mistake
        (lambda: KeepBest("loss", "lower"), "mode='lower' for 'loss'"),
        (lambda: KeepEvery(0), "keep_every=0"),
        (lambda: KeepEvery(1.5), "keep_every=1.5"),  # type: ignore[arg-type]  # a user's mistake
        (lambda: KeepWithin(0), "keep_within=0"),
        (lambda: KeepWithin(-1.0), "keep_within=-1.0"),
        (lambda: KeepWithin(math.nan), "keep_within=nan"),
        (lambda: KeepWithin(math.inf), "keep_within=inf"),
        (lambda: KeepWithin("60"), "keep_within='60'"),  # type: ignore[arg-type]  # a user's mistake
        (lambda: Policy(keep_last=0), "keep_last=0"),
        (lambda: Policy(keep_every=0), "keep_every=0"),
        (lambda: Policy(keep_within_s=-1), "keep_within=-1"),
        (lambda: Policy(keep_unscored=-1), "keep_unscored=-1"),
        (lambda: Policy(keep_unscored=None), "keep_unscored=None"),  # type: ignore[arg-type]  # a user's mistake
        (lambda: Policy(keep_best=(LOSS, LOSS)), "names 'val_loss' more than once"),
    ],
)
def test_a_rule_that_cannot_be_meant_is_refused(make: Callable[[], object], message: str) -> None:
    """A number no rule can have is refused at construction and named, not at the first commit (L7)."""
    with pytest.raises(ConfigError) as refused:
        make()

    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("policy", "text"),
    [
        (Policy(), "last 3"),
        (Policy(keep_last=None), "keep all"),
        (
            Policy(keep_best=(LOSS, KeepBest("acc", "max", None))),
            "last 3, best 2 by val_loss (min), best all by acc (max)",
        ),
        (
            Policy(keep_last=1, keep_every=500, keep_within_s=3600),
            "last 1, every 500 steps, within 3600 s of the newest",
        ),
    ],
)
def test_a_policy_reads_as_a_sentence(policy: Policy, text: str) -> None:
    """What a log line says about a policy names every rule and its number."""
    assert str(policy) == text


def test_the_first_best_rule_is_the_monitor() -> None:
    """Log lines and ``best()`` speak of the first rule; without one there is no monitor."""
    assert Policy(keep_best=(LOSS, ACC)).monitor == LOSS
    assert Policy().monitor is None


# -- words meet the stored policy ----------------------------------------------------------------------------


def test_a_new_run_starts_with_the_last_three() -> None:
    """Without a word, a new run keeps the last 3; with a monitor, also the best 1."""
    silent = PolicyWords()
    assert silent.silent
    assert resolve(silent, None, has_entries=False) == Policy(keep_last=3)
    words = PolicyWords(monitor="val_loss", mode="min")
    assert not words.silent
    assert resolve(words, None, has_entries=False) == Policy(keep_last=3, keep_best=(KeepBest("val_loss", "min", 1),))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (PolicyWords(), STORED),
        (PolicyWords(keep_last=2), Policy(keep_last=2, keep_best=(LOSS,), keep_every=1000, keep_within_s=60, keep_unscored=1)),
        (PolicyWords(keep_last=None, keep_every=None, keep_within_s=None), Policy(keep_last=None, keep_best=(LOSS,), keep_unscored=1)),
        (PolicyWords(keep_unscored=0), Policy(keep_last=5, keep_best=(LOSS,), keep_every=1000, keep_within_s=60, keep_unscored=0)),
        (PolicyWords(monitor="val_loss"), STORED),
        (PolicyWords(mode="min"), STORED),
    ],
)  # fmt: skip
def test_a_word_left_out_inherits_the_stored_one(words: PolicyWords, expected: Policy) -> None:
    """A resume that forgets ``monitor=`` (or any other word) goes on under the stored policy (S7)."""
    assert resolve(words, STORED, has_entries=True) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (PolicyWords(keep_best=4), (KeepBest("val_loss", "min", 4), ACC)),
        (PolicyWords(keep_best=None), (KeepBest("val_loss", "min", None), ACC)),
        (PolicyWords(keep_best=0), (KeepBest("val_loss", "min", 0), ACC)),
        (PolicyWords(monitor="val_loss", keep_best=4), (KeepBest("val_loss", "min", 4), ACC)),
        (PolicyWords(keep_best=[LOSS, ACC, KeepBest("bleu", "max")]), (LOSS, ACC, KeepBest("bleu", "max"))),
    ],
)
def test_numbers_of_the_stored_rules_may_change(words: PolicyWords, expected: tuple[KeepBest, ...]) -> None:
    """Another number, or a further rule, keeps the run's metrics and directions and needs no permission."""
    stored = Policy(keep_best=(LOSS, ACC))
    assert resolve(words, stored, has_entries=True).keep_best == expected


CHANGED = [
    (PolicyWords(monitor="acc", mode="max"), (KeepBest("acc", "max", 1),)),
    (PolicyWords(monitor="val_loss", mode="max"), (KeepBest("val_loss", "max", 2), ACC)),
    (PolicyWords(mode="max"), (KeepBest("val_loss", "max", 2), ACC)),
    (PolicyWords(monitor=None), ()),
    (PolicyWords(keep_best=[]), ()),
    (PolicyWords(keep_best=[ACC, LOSS]), (ACC, LOSS)),
    (PolicyWords(keep_best=[LOSS]), (LOSS,)),
]


@pytest.mark.parametrize(("words", "expected"), CHANGED)
def test_another_metric_or_direction_needs_permission(words: PolicyWords, expected: tuple[KeepBest, ...]) -> None:
    """Another monitor or mode for a run with entries is refused, unless ``change_policy=True`` or nothing is there yet."""
    stored = Policy(keep_best=(LOSS, ACC))
    with pytest.raises(ConfigError, match=r"its best by val_loss \(min\), acc \(max\), and now .* change_policy=True"):
        resolve(words, stored, has_entries=True)

    assert resolve(words, stored, has_entries=True, change_policy=True).keep_best == expected
    assert resolve(words, stored, has_entries=False).keep_best == expected


def test_a_run_without_a_monitor_may_get_one() -> None:
    """The first monitor of a run changes nobody's judgement."""
    words = PolicyWords(monitor="acc", mode="max")
    assert resolve(words, Policy(), has_entries=True).keep_best == (KeepBest("acc", "max", 1),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (PolicyWords(monitor="val_loss"), 'add mode="min" or mode="max"; a loss is usually mode="min"'),
        (PolicyWords(monitor="eval/loss"), 'a loss is usually mode="min"'),
        (PolicyWords(monitor="perplexity"), 'monitor="perplexity" needs a direction, nobody guesses it'),
        (PolicyWords(monitor="loss", mode=None), "needs a direction"),
        (PolicyWords(keep_best=2), "keep_best=2 needs to know the metric"),
        (PolicyWords(keep_best=None), "keep_best=None needs to know the metric"),
        (PolicyWords(mode="min"), 'mode="min" needs to know the metric'),
        (PolicyWords(monitor="loss", mode="min", keep_best=[LOSS]), "leave monitor and mode out"),
        (PolicyWords(mode="min", keep_best=[LOSS]), "leave monitor and mode out"),
        (PolicyWords(keep_best=["val_loss"]), "needs rules in it"),  # type: ignore[list-item]  # a user's mistake
        (PolicyWords(monitor="loss", mode="min", keep_best="2"), "keep_best='2'"),  # type: ignore[arg-type]  # the same
    ],
)
def test_nobody_guesses_a_direction_or_a_metric(words: PolicyWords, message: str) -> None:
    """A monitor without a direction, and a number or direction without a monitor, say what to add (L8, S9)."""
    with pytest.raises(ConfigError) as refused:
        resolve(words, None, has_entries=False)

    assert message in str(refused.value)


def test_only_a_loss_gets_a_hint() -> None:
    """The hint names a direction for losses alone: a wrong guess would keep the worst."""
    with pytest.raises(ConfigError) as refused:
        resolve(PolicyWords(monitor="wer"), None, has_entries=False)

    assert "usually" not in str(refused.value)


def test_keep_best_zero_needs_no_monitor() -> None:
    """Nothing kept for being best: there is no metric to ask for (L7)."""
    assert resolve(PolicyWords(keep_best=0), None, has_entries=False).keep_best == ()


def test_fields_of_a_newer_version_stay_in_the_policy() -> None:
    """What this version does not know of the stored policy is carried along."""
    stored = Policy(extra={"keep_hourly": 3})
    assert resolve(PolicyWords(keep_last=1), stored, has_entries=True).extra == {"keep_hourly": 3}


def test_a_word_left_out_prints_as_what_it_is() -> None:
    """A signature in a help text says INHERIT, not an address."""
    assert repr(INHERIT) == "INHERIT"


# -- tightened -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {}, False),
        ({"keep_last": 3}, {"keep_last": 2}, True),
        ({"keep_last": 3}, {"keep_last": 4}, False),
        ({"keep_last": None}, {"keep_last": 100}, True),
        ({"keep_last": 3}, {"keep_last": None}, False),
        ({"keep_best": (LOSS,)}, {"keep_best": (KeepBest("val_loss", "min", 1),)}, True),
        ({"keep_best": (LOSS,)}, {"keep_best": (LOSS, ACC)}, False),
        ({"keep_best": (LOSS,)}, {"keep_best": (KeepBest("val_loss", "max", 2),)}, True),
        ({"keep_best": (KeepBest("acc", "max", 0),), "keep_unscored": 1}, {}, True),
        ({"keep_best": (KeepBest("acc", "max", 0),), "keep_unscored": 0}, {}, False),
        ({"keep_best": (LOSS,)}, {"keep_best": (LOSS,), "keep_unscored": 1}, True),
        ({}, {"keep_unscored": 0}, False),
        ({"keep_every": 100}, {}, True),
        ({"keep_every": 100}, {"keep_every": 50}, False),
        ({"keep_every": 100}, {"keep_every": 200}, True),
        ({}, {"keep_every": 100}, False),
        ({"keep_within_s": 60}, {"keep_within_s": 59}, True),
        ({"keep_within_s": 60}, {}, True),
        ({}, {"keep_within_s": 60}, False),
    ],
)
def test_what_counts_as_tighter(before: dict[str, Any], after: dict[str, Any], *, expected: bool) -> None:
    """A policy is tighter where it may let go of what the one before kept."""
    assert tightened(Policy(**before), Policy(**after)) is expected


@given(policies(), policies(), checkpoint_lists())
def test_a_policy_that_is_not_tighter_retires_nothing_more(before: Policy, after: Policy, entries: list[Any]) -> None:
    """Unless ``tightened`` says so, everything the policy before kept is kept by the one after."""
    if not tightened(before, after):
        kept = {c.id for c in plan_prune(entries, before).kept}
        assert kept <= {c.id for c in plan_prune(entries, after).kept}
