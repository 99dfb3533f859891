"""Whether one more save fits before a deadline."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.deadline import SHARE, Judgement, Pace, View, earlier, expected_seconds, judge

GIB = 1024**3
seconds = st.floats(0, 1e6, allow_nan=False)
moments = st.none() | st.floats(-1e6, 1e6, allow_nan=False)
paces = st.builds(Pace, size_bytes=st.integers(0, 2**50), seconds=seconds)
views = st.builds(
    View,
    left_s=st.floats(-1e6, 1e6, allow_nan=False),
    size_bytes=st.integers(0, 2**50),
    paces=st.lists(paces, max_size=3).map(tuple),
    busy=st.sampled_from(["", "checkpoint-5.9f3ac2e1"]),
)


def view(left_s: float, expected_s: float | None, *, size_bytes: int = GIB, busy: str = "") -> View:
    """One rank's, which has seen a save of the same size take so long."""
    measured = () if expected_s is None else (Pace(size_bytes=size_bytes, seconds=expected_s),)
    return View(left_s=left_s, size_bytes=size_bytes, paces=measured, busy=busy)


def expected(drawn: list[View]) -> float | None:
    """By the slowest of all saves that any rank has measured."""
    return expected_seconds(sum(one.size_bytes for one in drawn), [pace for one in drawn for pace in one.paces])


@pytest.mark.parametrize(
    ("left_s", "expected_s", "go"),
    [
        (30.0, 20.9, True),
        (30.0, 21.1, False),
        (0.0, 0.0, False),
        (-1.0, 0.0, False),
        (0.0, None, False),
        (0.1, None, True),
        (110.0, 76.0, True),
        (110.0, 78.0, False),
    ],
)
def test_seven_tenths_of_what_is_left_may_be_used(left_s: float, expected_s: float | None, go: bool) -> None:
    """Of 30 s a save may take 21. One that nobody has measured is tried, as long as anything is left."""
    assert judge([view(left_s, expected_s)]).go is go


def test_the_reason_has_all_numbers() -> None:
    """Size, expected duration, what is left, and how much of it may be used: enough to see why."""
    assert judge([view(30.0, 38.0, size_bytes=2 * GIB)]) == Judgement(
        go=False,
        left_s=30.0,
        reason="2.0 GiB would take about 38.0 s by the slowest of the last saves, and 30.0 s are left, of which 70% "
        "may be used",
    )


def test_a_save_that_is_still_on_its_way_comes_first() -> None:
    """Nothing is begun beside it, however much time another rank believes to have."""
    found = judge([view(50.0, 1.0), view(0.0, 1.0, busy="checkpoint-5.9f3ac2e1")])
    assert found.reason == "its deadline came while checkpoint-5.9f3ac2e1 was still being saved"
    assert not found.go


def test_over_is_over() -> None:
    """A deadline in the past is told as that."""
    assert judge([view(-3.0, 1.0)]).reason == "its deadline has come"


def test_what_was_never_measured_is_tried() -> None:
    """And the reason says so."""
    assert judge([view(20.0, None)]) == Judgement(
        go=True, left_s=20.0, reason="no save of this process has been measured yet, so it is tried"
    )


@given(st.lists(views, min_size=1, max_size=5))
def test_the_slowest_rank_and_the_earliest_deadline_count(drawn: list[View]) -> None:
    """All begin or none; if they begin, each of them has the time it needs."""
    found = judge(drawn)
    assert found.left_s == min(one.left_s for one in drawn)
    if found.go:
        assert found.left_s > 0
        assert not any(one.busy for one in drawn)
        assert all((expected(drawn) or 0.0) <= SHARE * one.left_s for one in drawn)
    else:
        late = expected(drawn)
        is_late = late is not None and late > SHARE * found.left_s
        assert found.left_s <= 0 or any(one.busy for one in drawn) or is_late


def test_a_rank_that_puts_nothing_delays_no_save() -> None:
    """Of what one rank put last time nothing follows: it may be all or nothing of the same save."""
    measured = (Pace(size_bytes=4000, seconds=0.1),)
    found = judge(
        [View(left_s=25.0, size_bytes=2000, paces=measured), View(left_s=25.0, size_bytes=2000, paces=measured)]
    )
    assert found.go
    assert found.reason.startswith("3.9 KiB would take about 100 ms by the slowest")


@given(st.lists(views, min_size=1, max_size=5), st.floats(0, 1e6, allow_nan=False))
def test_more_time_never_forbids(drawn: list[View], more_s: float) -> None:
    """What is begun with this much time is begun with more."""
    later = [
        View(left_s=one.left_s + more_s, size_bytes=one.size_bytes, paces=one.paces, busy=one.busy) for one in drawn
    ]
    assert judge(later).go or not judge(drawn).go


@given(st.integers(0, 2**50), st.lists(paces, max_size=4))
def test_no_save_is_expected_to_be_quicker_than_the_slowest(size_bytes: int, measured: list[Pace]) -> None:
    """And one that is no larger takes no longer than that."""
    found = expected_seconds(size_bytes, measured)
    if found is None:
        assert measured == []
        return
    slowest = max(pace.seconds for pace in measured)
    assert found >= slowest
    if all(size_bytes <= max(pace.size_bytes, 1) for pace in measured):
        assert found == slowest


@pytest.mark.parametrize(
    ("size_bytes", "expected_s"), [(GIB, 10.0), (2 * GIB, 20.0), (GIB // 2, 10.0), (0, 10.0), (3 * GIB, 30.0)]
)
def test_more_bytes_take_longer_in_proportion(size_bytes: int, expected_s: float) -> None:
    """Fewer are not trusted to be quicker."""
    assert expected_seconds(size_bytes, [Pace(size_bytes=GIB, seconds=10.0)]) == expected_s


@given(moments, moments)
def test_the_earlier_moment(one: float | None, other: float | None) -> None:
    """None is never."""
    known = [moment for moment in (one, other) if moment is not None]
    assert earlier(one, other) == (min(known) if known else None)


@given(views)
def test_a_view_goes_over_the_channel(drawn: View) -> None:
    """And comes back the same."""
    assert View.from_bytes(drawn.to_bytes()) == drawn


@given(st.lists(views, min_size=1, max_size=3))
def test_a_judgement_goes_over_the_channel(drawn: list[View]) -> None:
    """And comes back the same."""
    found = judge(drawn)
    assert Judgement.from_bytes(found.to_bytes()) == found
