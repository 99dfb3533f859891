"""Every known way to get the protocol wrong is found, and says which promise is broken."""

from __future__ import annotations

import pytest

from tests.model.exploring import Explorer
from tests.model.mutants import MUTANTS
from tests.model.scenarios import SCENARIOS
from tests.records import Recording

#: All of them fall long before.
LIMIT = 40_000


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, record: Recording) -> None:
    """The search finds a way to a broken invariant: the one that the mistake is about."""
    mutant = MUTANTS[name]
    scenario = SCENARIOS[mutant.scenario](1)  # what lies there at first was written by a sound product
    mutant.make(monkeypatch)
    with record(name, "a protocol mutant", "the model") as case:
        report = Explorer(scenario).search(LIMIT)
        print(f"\n{name}: {report}")
        assert report.violation is not None, f"nothing found in {report.states} states"
        assert report.violation.startswith(f"{mutant.falls} "), str(report)
        case.points, case.figures = 1, {"states": report.states, "steps to it": len(report.trace)}


def test_there_are_as_many_as_promised() -> None:
    """At least fifteen, and every invariant that a protocol can break falls to one of them."""
    assert len(MUTANTS) >= 15
    assert {mutant.falls for mutant in MUTANTS.values()} >= {
        "I1",
        "I2",
        "I4",
        "I5",
        "I6",
        "I7",
        "I8",
        "I10",
        "I11",
        "I12",
    }
