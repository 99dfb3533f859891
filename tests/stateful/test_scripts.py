"""Stories that a search would have to be lucky to tell, told once each; and mistakes that only whole saves show."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from cloudckpt import choosing, loading, view
from cloudckpt.core.model import Checkpoint, Index, Manifest, State
from cloudckpt.errors import CorruptCheckpointError, StorageError
from cloudckpt.saving.job import Job
from cloudckpt.saving.leading import Leading
from cloudckpt.saving.saver import Saver
from cloudckpt.storage import Storage
from tests.stateful.machine import RunMachine
from tests.stateful.participants import Trouble

FINE = (None, 0)


@contextmanager
def told() -> Iterator[RunMachine]:
    """A story by hand: everything is asked at its end, and then the run is recovered."""
    machine = RunMachine()
    try:
        yield machine
        machine.every_step_was_sound()
        machine.what_lies_there_is_sound()
        machine.what_was_promised_is_kept()
    finally:
        machine.teardown()


def states(machine: RunMachine) -> dict[int, str]:
    """What became of each step."""
    manifest = machine.watch.manifest()
    assert isinstance(manifest, Manifest)
    return {entry.step: str(entry.state) for entry in manifest.entries}


def save(
    machine: RunMachine, loss: float | None, trouble: tuple[Trouble | None, int] = FINE, *, first: bool = True
) -> None:
    """The next step of a job."""
    machine.a_job_saves(first=first, loss=loss, forward=1, pin=False, trouble=trouble)


def start(machine: RunMachine, words: str = "1 and 1", *, first: bool = True) -> None:
    """A job begins."""
    machine.a_job_starts(words=words, first=first, takeover="last_wins")


def test_the_best_and_the_newest_are_kept() -> None:
    """Without any trouble: three saves, one best, one newest."""
    with told() as machine:
        start(machine)
        for loss in (2.0, 1.0, 3.0):
            save(machine, loss)
        assert {step for step, state in states(machine).items() if state == "committed"} == {2, 3}
        assert len(machine.acknowledged) == 3


@pytest.mark.parametrize("request_number", range(5))
def test_a_zombie_wakes_after_its_run_was_taken_over(request_number: int) -> None:
    """A save that sleeps at any of its requests wakes after another job has saved: it breaks nothing and is told so."""
    with told() as machine:
        start(machine)
        save(machine, 2.0)
        save(machine, 1.0, (Trouble.SLEEPS, request_number))
        start(machine, "forgotten")
        save(machine, 3.0)
        asleep = len(machine.sleepers)
        while machine.sleepers:
            machine.a_sleeper_wakes(number=0, dead=False, trouble=FINE)
        # Steady state of one small state: announce, payload, index, commit, and the delete of what it replaced.
        assert asleep == 1
        assert "committed" in states(machine).values()


def test_a_duel_is_refused_and_loses_nothing() -> None:
    """Two jobs that keep taking the run from each other without a commit: the third claim is refused."""
    with told() as machine:
        start(machine)
        save(machine, 1.0)
        machine.a_job_is_killed(first=True)
        for first in (False, True, False):
            start(machine, "forgotten", first=first)
            machine.a_job_restores(first=True, select="latest", trouble=FINE)
            if machine.jobs["a" if first else "b"].manager is not None:
                machine.a_job_is_killed(first=True)
        manifest = machine.watch.manifest()
        assert manifest is not None
        assert manifest.writer_epoch == 3  # a, b and a again
        assert states(machine) == {1: "committed"}


def test_gc_sleeps_while_a_save_begins_and_ends() -> None:
    """Gc has listed, and wakes when another save is committed: it takes nothing of it."""
    for request_number in range(6):
        with told() as machine:
            start(machine)
            save(machine, 2.0)
            machine.somebody_collects_garbage(trouble=(Trouble.SLEEPS, request_number))
            save(machine, 1.0)
            save(machine, 3.0)
            while machine.sleepers:
                machine.a_sleeper_wakes(number=0, dead=False, trouble=FINE)
            assert states(machine)[2] == "committed"


def test_a_reader_is_overtaken_by_retention() -> None:
    """What it reads is retired and deleted under it, at any of its requests: it chooses again, and never sees damage."""
    for request_number in range(4):
        with told() as machine:
            start(machine)
            save(machine, 3.0)
            machine.somebody_loads(select="latest", trouble=(Trouble.SLEEPS, request_number))
            save(machine, 2.0)
            save(machine, 1.0)
            while machine.sleepers:
                machine.a_sleeper_wakes(number=0, dead=False, trouble=FINE)


@pytest.mark.parametrize(
    "trouble", [Trouble.LOST, Trouble.LATE, Trouble.REFUSED, Trouble.DIES_BEFORE, Trouble.DIES_AFTER]
)
def test_every_request_of_a_save_may_go_wrong(trouble: Trouble) -> None:
    """Each request of a third save in turn; what was acknowledged before is never lost."""
    for request_number in range(6):
        with told() as machine:
            start(machine)
            save(machine, 1.0)
            save(machine, 2.0)
            save(machine, 3.0, (trouble, request_number))
            while machine.late:
                machine.a_late_request_arrives(number=0)
            assert states(machine)[1] == "committed"


def test_a_metric_that_comes_late_decides_what_is_best() -> None:
    """An evaluator reports for a save that has none; NaN never counts."""
    with told() as machine:
        start(machine)
        save(machine, 2.0)
        save(machine, None)
        machine.an_evaluator_reports(step=2, loss=0.5, trouble=FINE)
        save(machine, math.nan)
        assert states(machine)[2] == "committed"
        assert states(machine).get(1) != "committed"


def test_a_flipped_byte_is_stepped_over() -> None:
    """The newest is damaged and recorded as such; a restart goes on from the one before, and nothing of it is deleted."""
    with told() as machine:
        start(machine, "2 and 2")
        save(machine, 1.0)
        save(machine, 2.0)
        machine.a_byte_flips(number=1)
        machine.a_job_is_killed(first=True)
        start(machine, "forgotten")
        machine.a_job_restores(first=True, select="latest", trouble=FINE)
        assert machine.jobs["a"].step == 1
        save(machine, 3.0)
        manifest = machine.watch.manifest()
        assert manifest is not None
        assert [e.damaged for e in manifest.entries if e.state is State.COMMITTED and e.damaged] == ["a byte flipped"]


# -- mistakes ------------------------------------------------------------------------------------------------


def broken(machine: RunMachine) -> str:
    """What is wrong at the end of a story, or nothing."""
    for ask in (machine.every_step_was_sound, machine.what_lies_there_is_sound, machine.what_was_promised_is_kept):
        try:
            ask()
        except AssertionError as exc:
            return str(exc)
    return ""


@contextmanager
def told_wrong() -> Iterator[RunMachine]:
    """A story that ends badly: what is left is thrown away."""
    machine = RunMachine()
    try:
        yield machine
    finally:
        with suppress(AssertionError):
            machine.teardown()


def test_a_payload_before_its_announce_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the upload begins while the announce is still under way. I7 falls at the first byte."""

    def save_all(self: Saver, job: Job) -> Checkpoint:
        job.staged.wait()
        self._upload(job, job.pending.checkpoint)
        announced = self._side.announce(job)
        job.pending.mark_announced()
        job.pending.mark_staged()
        return self._side.commit(job, announced)

    monkeypatch.setattr(Saver, "_save", save_all)
    with told_wrong() as machine:
        start(machine)
        save(machine, 1.0)
        assert broken(machine).startswith("I7 ")


def test_a_failure_that_is_told_as_a_success_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: whatever a commit raises, the save is reported as done. I10 falls."""
    plain = Leading.commit

    def commit(self: Leading, job: Job, announced: Checkpoint) -> Checkpoint:
        with suppress(Exception):
            return plain(self, job, announced)
        return announced

    monkeypatch.setattr(Leading, "commit", commit)
    with told_wrong() as machine:
        start(machine)
        save(machine, 1.0)
        save(machine, 2.0, (Trouble.REFUSED, 3))
        assert broken(machine).startswith("I10 ")


def test_a_fault_of_the_network_that_is_taken_for_damage_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: what cannot be read is damaged. A checkpoint that is whole is called damaged, and I1 falls."""
    plain = view.read_index

    def read_index(storage: Storage, checkpoint: Checkpoint) -> Index:
        try:
            return plain(storage, checkpoint)
        except StorageError as exc:
            raise CorruptCheckpointError(str(exc), checkpoint_id=checkpoint.id) from exc

    monkeypatch.setattr(loading, "read_index", read_index)
    with told_wrong() as machine:
        start(machine)
        save(machine, 1.0)
        # The manifest is read, and then the index.
        machine.a_job_restores(first=True, select="latest", trouble=(Trouble.REFUSED, 1))
        assert broken(machine).startswith("I1 ")


def test_a_reader_that_does_not_look_again_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: what is missing is damaged, though it was retired meanwhile. A reader finds damage that nobody made."""

    def judge(self: choosing.Chooser, words: Any) -> list[bytes]:
        if any(words):
            assert self._own is not None
            raise self._own
        return [choosing.DONE] * len(words)

    monkeypatch.setattr(choosing.Chooser, "judge", judge)
    with told_wrong() as machine:
        start(machine)
        save(machine, 3.0)
        machine.somebody_loads(select="latest", trouble=(Trouble.SLEEPS, 1))
        save(machine, 2.0)
        save(machine, 1.0)
        machine.a_sleeper_wakes(number=0, dead=False, trouble=FINE)
        assert broken(machine).startswith("I1 ")
