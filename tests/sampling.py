"""Which cases of a family ``make test`` and ``make ci-extra`` run: with ``--sample``, a part of what is too many.

Where the same thing is tried in many ways (every fault on every server, every role by every judge, every parallelism
into every other), a test function is a family of cases, and its place is in ``FAMILIES``. A run with ``--sample`` takes
one of ``every`` of its cases, says at its end how many it left out, and which command runs them. Without the option,
as in ``make full`` or when one test is named by hand, every case runs.

The choice is by position and always the same: on a diagonal through the parameters, so that of eight faults on three
servers each fault meets one server and each server nearly three faults. Where there are several parameters, those of
few values (a server, a judge, a role) have each of them in the sample. What is not parametrised is never left out, except where a whole class holds one
more server to a contract that others are held to in full.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

__all__ = ["FAMILIES", "FEW", "LONG_FIRST", "Family", "Item", "diagonal", "divided", "turn"]

#: Of a parameter with at most so many values, each is in the sample.
FEW = 4


@dataclass(frozen=True, slots=True)
class Family:
    """Cases of which a sample is run.

    Attributes:
        place: how their node ids begin: a file, a class or a test function.
        every: one of so many is run.
        whole: everything in the place is one family; otherwise each test function in it is one of its own.
    """

    place: str
    every: int
    whole: bool = False


#: The longest place that fits counts. In full everywhere, and so not here: every operation, broken at every call in
#: every way in memory and on a local disk; power cuts; resharding on an object store; the contracts of memory, local
#: disk, SeaweedFS and both kinds of GCS; every block of the documentation.
FAMILIES = (
    # -- faults
    Family("tests/crash/test_faults_on_the_wire.py", 3),  # 8 faults, 3 servers
    Family("tests/crash/test_faults_on_the_wire.py::test_no_save_fails_by_a_fault_on_the_wire", 8),  # more in ci-extra
    # A whole history; its operations one at a time are in full.
    Family("tests/crash/test_stop_at_every_call.py::test_the_store_survives_every_fault_at_every_call", 4),
    Family("tests/crash/test_bad_days.py::test_a_stale_listing_only_misses_garbage", 1),
    Family("tests/crash/test_bad_days.py", 3),  # 8 days, 12 broken downloads, and hands, each on 3 servers
    Family("tests/crash/test_pause_at_every_call.py", 2),
    Family("tests/power/test_full_disks.py", 3),  # 6 ways to refuse
    Family("tests/soak/test_long_runs.py::test_some_hundred_saves_with_faults", 2),  # both kinds in ci-extra
    # -- the same, slow: in ci-extra
    Family("tests/crash/test_stop_at_every_call.py::test_every_store_survives_every_fault_at_every_call", 4),
    Family("tests/crash/test_every_operation_on_stores.py", 6),  # 15 operations, 3 or 4 servers
    Family("tests/crash/test_pause_at_every_call.py::test_somebody_else_between_any_two_calls", 8),
    Family("tests/crash/test_faults_on_the_wire.py::test_no_save_fails_by_a_fault_at_any_request", 6),
    Family("tests/power/test_power_cuts.py::test_without_syncing_the_same_cuts_lose_saves", 3),  # the control
    # -- many ranks
    Family("tests/distributed/test_resharding.py::test_each_parallelism_restores_what_every_other_saved", 3),
    Family("tests/distributed/test_jobs.py", 3),
    Family("tests/distributed/test_review_d.py", 3),
    Family("tests/distributed/test_dcp.py", 3),  # 3 kinds, 5 changes of the number of ranks
    Family("tests/distributed/test_preemption.py", 2),
    Family("tests/preemption/test_together.py", 2),
    # -- stores
    Family("tests/storage/test_s3.py::TestMoto", 3, whole=True),  # SeaweedFS is held to all of it
    Family("tests/storage/test_generic.py::TestOnSFTP", 3, whole=True),  # so is a folder, through the same code
    Family("tests/benchmarks/test_sink.py::TestContract", 3, whole=True),  # the benchmarks' own server
    Family("tests/storage/test_races.py::test_eight_processes_count_to_four_hundred", 2),  # 5 stores
    Family("tests/storage/test_local_lane.py", 3),  # sizes, sources and ways
    Family("tests/storage/test_uploads.py", 3),
    Family("tests/storage/direct/test_s3_lane.py", 2),
    Family("tests/storage/direct/test_gcs_lane.py", 2),
    Family("tests/stories/test_bad_input_s3.py", 3),
    Family("tests/stories/test_copy.py", 2),
    Family("tests/security/test_secrets.py", 3),
    Family("tests/security/test_places.py::test_a_manifest_names_no_place", 3),  # hostile names, every field
    # -- one process
    Family("tests/tensors/test_overlap.py", 2),  # optimizers, and ways to step
    Family("tests/stories/test_staging.py", 2),
    Family("tests/stories/test_review_c_saves.py", 2),
    Family("tests/ui/test_page.py::test_everything_is_there_and_can_be_read", 2),  # 2 widths, 2 themes
)

#: Files that take long, the longest first: a worker that begins one of them last is waited for. Those of many ranks
#: do not stand side by side, because each takes more than one core. From the durations that each run prints.
LONG_FIRST = (
    "tests/distributed/test_resharding.py",
    "tests/crash/test_every_operation_on_stores.py",
    "tests/crash/test_every_operation_on_disk.py",
    "tests/crash/test_every_operation.py",
    "tests/distributed/test_review_d.py",
    "tests/crash/test_stop_at_every_call.py",
    "tests/tensors/test_overlap_processes.py",
    "tests/distributed/test_jobs.py",
    "tests/docs/test_docs.py",
    "tests/storage/test_s3.py",
    "tests/distributed/test_torchrun_kills.py",
    "tests/distributed/test_kill_loop.py",
    "tests/distributed/test_torchrun_signals.py",
    "tests/crash/test_kill.py",
    "tests/soak/test_long_runs.py",
    "tests/tensors/test_overlap.py",
    "tests/distributed/test_object_store.py",
    "tests/preemption/test_processes.py",
    "tests/stateful/test_stateful.py",
    "tests/model/test_model.py",
    "tests/stories/test_bad_input_s3.py",
    "tests/stories/test_review_c_saves.py",
    "tests/distributed/test_torchrun.py",
    "tests/crash/test_bad_days.py",
    "tests/crash/test_faults_on_the_wire.py",
    "tests/crash/test_zombie.py",
    "tests/power/test_power_cuts.py",
    "tests/power/test_full_disks.py",
    "tests/storage/direct/test_review_c_s3.py",
    "tests/cli/test_cli.py",
    "tests/terraform/test_modules.py",
    "tests/terraform/test_aws_statements.py",
    "tests/terraform/test_aws_doctor.py",
    "tests/terraform/test_aws_roles.py",
    "tests/storage/direct/test_s3_lane.py",
    "tests/security/test_secrets.py",
    "tests/benchmarks/test_measuring.py",
    "tests/distributed/test_dcp.py",
    "tests/distributed/test_preemption.py",
    "tests/preemption/test_together.py",
    "tests/storage/test_uploads.py",
    "tests/security/test_bounds.py",
)
_TURNS = {file: number for number, file in enumerate(LONG_FIRST)}


class Item(Protocol):
    """What is asked of a collected test; ``pytest.Item`` has it."""

    @property
    def nodeid(self) -> str:
        """Where it stands, and which case it is."""


_Item = TypeVar("_Item", bound=Item)


def turn(item: Item) -> int:
    """When its file has its turn: 0 for the one that takes longest."""
    return _TURNS.get(item.nodeid.partition("::")[0], len(LONG_FIRST))


def divided(items: Sequence[_Item], families: Iterable[Family] = FAMILIES) -> tuple[list[_Item], list[_Item]]:
    """What a sample runs, in its order, and what it leaves out.

    Cases that are skipped anyway (no CUDA device here) take no place in the sample: they stay, and are skipped.
    """
    by_length = sorted(families, key=lambda one: -len(one.place))
    cases: dict[tuple[str, int, bool], list[int]] = {}
    for number, item in enumerate(items):
        family = next((one for one in by_length if _is_in(item, one)), None)
        if family is not None and not _skipped(item):
            name = family.place if family.whole else item.nodeid.partition("[")[0]
            cases.setdefault((name, family.every, family.whole), []).append(number)
    left_out: set[int] = set()
    for (_, every, whole), numbers in cases.items():
        chosen = diagonal([{} if whole else _parameters(items[number]) for number in numbers], every)
        left_out.update(number for number, is_in in zip(numbers, chosen, strict=True) if not is_in)
    return (
        [item for number, item in enumerate(items) if number not in left_out],
        [item for number, item in enumerate(items) if number in left_out],
    )


def diagonal(cases: Sequence[Mapping[str, object]], every: int) -> list[bool]:
    """Of cases with the same parameters, which ones a sample of one in ``every`` takes.

    A case is taken if the positions of its values add up to a multiple of ``every``, or if it is the first with one of
    ``FEW`` values. Values are told apart as objects: one that several cases share is the same object in all of them.
    """
    names = set(cases[0]).intersection(*cases) if cases else set[str]()
    axes = sorted({_positions(case[name] for case in cases) for name in names}) or [tuple(range(len(cases)))]
    chosen = [sum(axis[number] for axis in axes) % every == 0 for number in range(len(cases))]
    # A parameter that is different in every case says which case it is, and nothing about it.
    few = [axis for axis in axes if max(axis, default=0) < min(FEW, len(cases) - 1)]
    met = {(n, axis[number]) for n, axis in enumerate(few) for number, is_in in enumerate(chosen) if is_in}
    for number in range(len(cases)):
        new = {(n, axis[number]) for n, axis in enumerate(few)} - met
        chosen[number] = chosen[number] or bool(new)
        met |= new
    return chosen


def _positions(values: Iterable[object]) -> tuple[int, ...]:
    """Each value as the number of values before it that are others."""
    seen: dict[int, int] = {}
    return tuple(seen.setdefault(id(value), len(seen)) for value in values)


def _is_in(item: Item, family: Family) -> bool:
    rest = item.nodeid.removeprefix(family.place)
    return rest != item.nodeid and (not rest or rest.startswith(("::", "[")))


def _parameters(item: Item) -> Mapping[str, object]:
    found: Mapping[str, object] = getattr(getattr(item, "callspec", None), "params", {})
    return found


def _skipped(item: Item) -> bool:
    marks_of = getattr(item, "iter_markers", None)
    return marks_of is not None and any(mark.args[:1] == (True,) for mark in marks_of("skipif"))
