"""The protocol as it is: nothing that can happen breaks an invariant, and from everywhere the run can be recovered."""

from __future__ import annotations

import pytest

from tests.model.exploring import Explorer, Faults, Scenario
from tests.model.replaying import PatientStore
from tests.model.roles import writer
from tests.model.scenarios import BEST, NEWEST, SCENARIOS, WORDS
from tests.records import Recording

#: How many states of one scenario are looked at, by depth. CI has a minute and a half for all.
LIMITS = {1: 8_000, 2: 200_000, 3: 1_000_000}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.timeout(0)
def test_no_order_of_events_breaks_an_invariant(name: str, pytestconfig: pytest.Config, record: Recording) -> None:
    """Whoever dies, sleeps, comes late or is not answered: I1 to I12 hold in every state, and it can be recovered."""
    depth = int(pytestconfig.getoption("--model-depth"))
    limit = LIMITS[depth]
    with record(name, "searched", "the model") as case:
        report = Explorer(SCENARIOS[name](depth)).search(limit)
        print(f"\n{report}")
        assert report.violation is None, str(report)
        # A search that stopped before it began would find nothing either.
        assert report.complete or report.states >= limit
        assert report.stores > 5
        case.points = report.states
        case.figures = {
            "steps": report.steps,
            "stores recovered": report.stores,
            "all of them": int(report.complete),
        }


def test_a_job_alone_reaches_its_end() -> None:
    """Without faults there is one way through the script of a single writer, and it leaves what the policy keeps."""
    scenario = Scenario(name="alone", roles=(writer("a", WORDS, BEST, NEWEST),))
    report = Explorer(scenario).search()
    assert report.violation is None, str(report)
    assert report.complete
    assert report.states == report.steps + 1
    left = {key for key in Explorer(scenario).live() if key.startswith("checkpoint-")}
    assert {key.partition("/")[0] for key in left} == {"checkpoint-1.0000000a", "checkpoint-2.0000000b"}


def test_a_lost_answer_is_one_more_way() -> None:
    """Each fault that may happen is looked at: with one lost answer there are more states, and all are sound."""
    roles = (writer("a", WORDS, BEST),)
    plain = Explorer(Scenario(name="plain", roles=roles)).search()
    faulty = Explorer(Scenario(name="faulty", roles=roles, faults=Faults(lost=1))).search()
    assert faulty.violation is None, str(faulty)
    assert faulty.complete
    assert faulty.states > 2 * plain.states


def test_a_search_says_how_it_got_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A violation comes with the steps that lead to it, and no shorter way does."""
    monkeypatch.setattr("cloudckpt.core.manifest.recompute", lambda manifest: manifest)
    report = Explorer(Scenario(name="wrong", roles=(writer("a", WORDS, BEST),))).search()
    assert report.violation is not None
    assert report.violation.startswith("I4 best is ()")
    assert report.trace == ("a: read(manifest.json)", "a: list()", "a: create(manifest.json)")
    assert report.violation in str(report)


def test_two_tries_are_made() -> None:
    """What a replay calls a deadline is two tries, so that a call ends after two answers that never came."""
    store = PatientStore.__new__(PatientStore)
    assert [*store._backoff(1.0).tries()] == [0, 1]
