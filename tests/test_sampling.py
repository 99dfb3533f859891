"""A sample leaves out what it says and nothing else, is the same every time, and has every kind in it."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.sampling import FAMILIES, LONG_FIRST, Family, diagonal, divided, turn

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Case:
    """Looks like a collected test."""

    nodeid: str
    parameters: Mapping[str, object] = field(default_factory=dict)
    skipped: bool = False

    @property
    def callspec(self) -> Any:
        """Its parameters, as pytest has them."""
        return SimpleNamespace(params=self.parameters)

    def iter_markers(self, name: str) -> list[Any]:
        """Its marks of a name."""
        return [SimpleNamespace(args=(self.skipped,))] if name == "skipif" else []


def product(**values: int) -> list[dict[str, object]]:
    """Every combination of so many values of each parameter, the last one fastest."""
    names = [[f"{name}{number}" for number in range(count)] for name, count in values.items()]
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*names)]


def taken(cases: list[dict[str, object]], every: int) -> list[dict[str, object]]:
    """The cases of a sample."""
    return [case for case, is_in in zip(cases, diagonal(cases, every), strict=True) if is_in]


@pytest.mark.parametrize(("faults", "servers", "every"), [(8, 3, 3), (6, 15, 3), (11, 2, 2), (6, 4, 4), (12, 3, 3)])
def test_every_fault_and_every_server_is_in_a_sample(faults: int, servers: int, every: int) -> None:
    """It is no larger than was asked for, and each value of each parameter is somewhere in it."""
    cases = product(fault=faults, server=servers)
    found = taken(cases, every)
    assert len(found) <= -(-len(cases) // every)
    assert {case["fault"] for case in found} == {case["fault"] for case in cases}
    assert {case["server"] for case in found} == {case["server"] for case in cases}


def test_of_few_values_each_is_in_a_sample() -> None:
    """However small the sample is: each server, each judge, each role; of more values than four it may be some."""
    cases = product(fault=8, server=3, judge=2)
    found = taken(cases, 20)
    assert {case["server"] for case in found} == {"server0", "server1", "server2"}
    assert {case["judge"] for case in found} == {"judge0", "judge1"}
    assert len(found) < 5


def test_what_only_says_which_case_it_is_asks_for_nothing() -> None:
    """A table of rows is taken row by row: every n-th one, from the first on."""
    rows: list[dict[str, object]] = [{"url": f"u{number}", "message": f"m{number}"} for number in range(4)]
    assert diagonal(rows, 3) == [True, False, False, True]
    assert diagonal(rows[:2], 3) == [True, False]


def test_without_parameters_it_goes_by_position() -> None:
    """As for a class that is one family; and a test alone is always in."""
    assert diagonal([{}] * 5, 2) == [True, False, True, False, True]
    assert diagonal([{}], 8) == [True]
    assert diagonal([], 8) == []


def test_only_families_are_divided_and_the_longest_place_counts() -> None:
    """A name that begins alike is another one; what is skipped anyway stays; order stays."""
    families = (Family("tests/a.py", 2), Family("tests/a.py::test_x", 4), Family("tests/b.py::TestB", 3, whole=True))
    items = [
        *(Case(f"tests/a.py::test_x[{n}]", {"n": f"{n}"}) for n in range(8)),
        *(Case(f"tests/a.py::test_xy[{n}]", {"n": f"{n}"}, skipped=n == 0) for n in range(4)),
        Case("tests/a.py::test_alone"),
        Case("tests/ab.py::test_x[0]", {"n": "0"}),
        *(Case(f"tests/b.py::TestB::test_{n}") for n in range(4)),
        *(Case(f"tests/b.py::TestBoth::test_{n}") for n in range(2)),
    ]
    kept, left_out = divided(items, families)
    assert [item.nodeid.removeprefix("tests/") for item in kept] == [
        *("a.py::test_x[0]", "a.py::test_x[4]"),
        *("a.py::test_xy[0]", "a.py::test_xy[1]", "a.py::test_xy[3]"),
        *("a.py::test_alone", "ab.py::test_x[0]"),
        *("b.py::TestB::test_0", "b.py::TestB::test_3", "b.py::TestBoth::test_0", "b.py::TestBoth::test_1"),
    ]
    assert sorted([*kept, *left_out], key=items.index) == items


def test_every_place_is_there() -> None:
    """A file or a test that was renamed would be run in full, or late, and nobody would know why."""
    for place in {*(family.place for family in FAMILIES), *LONG_FIRST}:
        file, _, name = place.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not name or name in defined, place


def test_long_files_have_their_turn_first() -> None:
    """In the order of the table, and before all others."""
    items = [Case("tests/core/test_text.py::test_x"), *(Case(f"{file}::test_x[a::b]") for file in reversed(LONG_FIRST))]
    assert [item.nodeid.partition("::")[0] for item in sorted(items, key=turn)] == [
        *LONG_FIRST,
        "tests/core/test_text.py",
    ]


def test_a_run_of_a_sample_says_what_it_left_out() -> None:
    """Of four cases two, and through a worker of pytest-xdist as well."""
    family = "tests/stories/test_review_c_saves.py::test_a_save_that_has_ended_keeps_no_tensor_alive"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", family, "--sample", "-n", "1"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert re.findall(r"that were left out: (\d+)", done.stdout) == ["2"]
