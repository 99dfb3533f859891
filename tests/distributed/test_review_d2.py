"""What a second review of many ranks found: each test states what should be true, and fails while it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudckpt.tensors.sharing import Offer, divide
from tests.distributed import review_scenarios as scenarios
from tests.distributed.ranks import Ranks

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """On two ranks, which all tests here have in common; what the scenario returned on each."""
    job = Ranks(2)

    def on_both(scenario: Callable[..., Any], **words: Any) -> list[Any]:
        outcomes = job.run(scenario, timeout_s=60, **words)
        assert [outcome.error for outcome in outcomes] == [None, None]
        return [outcome.value for outcome in outcomes]

    yield on_both
    job.close()


@pytest.mark.parametrize("where", ["per rank", "nested"])
def test_names_that_only_one_rank_could_use_are_unexpected(run: Run, tmp_path: Path, where: str) -> None:
    """A rank that has nothing in a place, or another part of its own there, does not make a name expected."""
    for found in run(scenarios.names_to_spare, root=str(tmp_path / "run"), where=where):
        assert "StateMismatchError" in found["said"]
        assert "unexpected: other." in found["said"]


def test_what_ranks_but_not_rank_zero_have_differently_is_told() -> None:
    """Of a component, or a key, that rank zero does not have, one of the other ranks' values is stored."""
    structures = [{}, {"c": {"lr": 1}}, {"c": {"lr": 2}}, {"c": {"lr": 1, "k": 1}}, {"c": {"lr": 1, "k": 2}}]
    (first, second) = divide([Offer(boxes={}, aliases={}, structure=said) for said in structures]).remarks
    assert first.startswith("c.lr has another value on rank 2 than")
    assert second.startswith("c.k has another value on rank 4 than")


def test_experts_with_the_same_options_are_no_conflict(run: Run, tmp_path: Path) -> None:
    """Where groups on two ranks have some parameters in common, and begin with other ones, nothing is lost."""
    for found in run(scenarios.experts, root=str(tmp_path / "run")):
        assert found == {"saved": "", "restored": "", "lr": 0.5, "told": []}


@pytest.mark.parametrize("step", [None, 2])
def test_nobody_reads_what_another_rank_found_damaged(run: Run, tmp_path: Path, step: int | None) -> None:
    """What is given up anyway overwrites nothing, costs no read, and the one before it is restored."""
    for found in run(scenarios.damaged_for_one, root=str(tmp_path / "run"), step=step):
        assert "checkpoint-2" not in found["touched"]
        assert "partly" not in found["said"]
        assert (found["x"], bool(found["said"])) == ([0.0 if step else 1.0] * 4, step is not None)


def test_each_stage_gets_the_versions_of_its_modules_back(run: Run, tmp_path: Path) -> None:
    """A module's own migration is asked with the version that was saved, on every stage."""
    for found in run(scenarios.versions_of_stages, root=str(tmp_path / "run")):
        assert found == {"said": "", "version": 7}


def test_a_stage_may_have_nothing_to_optimize(run: Run, tmp_path: Path) -> None:
    """Its list of optimizers is empty; the other stages' states are stored and restored."""
    first, second = run(scenarios.stage_without_parameters, root=str(tmp_path / "run"))
    assert first == {"saved": "", "restored": "", "lr": 0.5}
    assert second == {"saved": "", "restored": "", "lr": 0.0}


def test_arrays_of_other_stages_are_not_read(run: Run, tmp_path: Path) -> None:
    """What a rank has no use for is not read there, whether it is a tensor or a NumPy array."""
    for rank, found in enumerate(run(scenarios.arrays_of_stages, root=str(tmp_path / "run"))):
        assert found == {"said": "", "counts": [0.0, 1.0, 2.0, 3.0, 4.0], "read_from": [f"{rank:05}"]}
