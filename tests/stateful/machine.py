"""One run, and everybody who may have to do with it, in any order: the real package over memory.

Two jobs save, restore, die, fall asleep in mid-call, are restarted beside their sleeping selves, and fight. People and
evaluators pin, mark, report, remove, prune, sweep and collect garbage, and fall asleep in the middle as well. Readers
load. Requests arrive late, answers are lost, the clock jumps back, a byte flips. After every step every invariant is
asked: of each write and delete by ``Watch``, at the moment it happened, and of what lies there by ``check_store``.

(Past 350 lines: a Hypothesis machine is one class: its rules share its state.)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import cloudckpt
from cloudckpt import CheckpointManager, editing, pruning
from cloudckpt.config import Settings
from cloudckpt.core import edits, keys
from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.errors import (
    CheckpointNotFoundError,
    CloudCkptError,
    ConflictError,
    CorruptCheckpointError,
)
from cloudckpt.pending import PendingSave
from cloudckpt.run import Run
from cloudckpt.saving.saver import Saver
from cloudckpt.storage import ManifestStore, MemoryStorage
from cloudckpt.storage.retry import Backoff
from cloudckpt.sweeping import gc_run, sweep_run
from cloudckpt.testing import Crash, Watch, check_store
from cloudckpt.testing.builders import at
from tests.stateful.participants import Call, Clock, Gate, Trouble

__all__ = ["RunMachine"]

FOREIGN = "notes.txt"
SETTINGS = Settings(manifest_deadline_s=20, storage_deadline_s=20)

#: What a job's program says about its policy; a restart may have forgotten all of it.
WORDS: dict[str, dict[str, Any]] = {
    "1 and 1": {"monitor": "loss", "mode": "min", "keep_best": 1, "keep_last": 1},
    "2 and 2": {"monitor": "loss", "mode": "min", "keep_best": 2, "keep_last": 2, "keep_unscored": 1},
    "by time": {"monitor": "loss", "mode": "min", "keep_last": 1, "keep_within": 120},
    "every second": {"monitor": "loss", "mode": "min", "keep_every": 2, "keep_last": 1},
    "forgotten": {},
}


@dataclass
class Job:
    """A training job, and its current process, if it runs."""

    name: str
    manager: CheckpointManager | None = None
    gate: Gate | None = None
    step: int = 0


@dataclass
class Sleeper:
    """A call that stands still, and what to do when it has ended."""

    call: Call
    then: Callable[[Call], None]


def troubles(*, often: int = 3) -> st.SearchStrategy[tuple[Trouble | None, int]]:
    """What goes wrong in a call, and at which of its requests; mostly nothing."""
    return st.tuples(st.sampled_from([*[None] * 3 * often, *Trouble]), st.integers(0, 9))


LOSSES = st.sampled_from([None, math.nan, 0.0, 1.0, 1.0, 2.0, 3.0, 4.0])
SELECTORS = st.sampled_from(["latest", "best"])


class RunMachine(RuleBasedStateMachine):
    """The suite's state machine; its rules can also be called one by one, as a script."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MemoryStorage()
        self.watch = Watch(self.inner)
        self.clock = Clock()
        self.late: list[Callable[[], object]] = []
        self.sleepers: list[Sleeper] = []
        self.jobs = {name: Job(name) for name in ("a", "b")}
        self.acknowledged: list[str] = []
        self.spoilt: set[str] = set()
        self.made: dict[int, int] = {}
        self.wrong: list[str] = []
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(ManifestStore, "_backoff", lambda store, deadline_s: self._backoff(deadline_s))
        self._patch.setattr(Saver, "submit", _at_once)
        self._patch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        self._managers: list[tuple[CheckpointManager, Gate]] = []

    def _backoff(self, deadline_s: float) -> Backoff:
        return Backoff(
            deadline_s=deadline_s, now=self.clock.now, sleep=self.clock.sleep, uniform=lambda low, high: high / 2
        )

    def _label(self) -> str:
        return at(self.clock.minutes)

    # -- calls -----------------------------------------------------------------------------------------------

    def _do(self, name: str, gate: Gate, act: Callable[[], object], then: Callable[[Call], None]) -> None:
        self._go_on(Sleeper(Call(name, gate, act), then))

    def _go_on(self, sleeper: Sleeper) -> None:
        """Let a call run until it has ended, or sleeps."""
        gate = sleeper.call.gate
        if sleeper.call.rest():
            gate.arm(None, 0)  # what did not come to pass in this call does not come in another one
            gate.wake()  # a thread of it that fell asleep when nobody needed it any more
            sleeper.then(sleeper.call)
        else:
            self.sleepers.append(sleeper)

    def _gate(self, trouble: tuple[Trouble | None, int], *, by_hand: bool = False) -> Gate:
        gate = Gate(self.watch.view(by_hand=by_hand), self.late)
        gate.arm(*trouble)
        return gate

    def _expect(self, call: Call, *fine: type[BaseException]) -> None:
        """Whatever a call raised is one of the errors that callers know, or its process is dead."""
        if call.error is not None and not isinstance(call.error, (*fine, CloudCkptError, Crash)):
            raise call.error

    # -- jobs ------------------------------------------------------------------------------------------------

    def _as(self, job: Job) -> tuple[CheckpointManager, Gate]:
        assert job.manager is not None
        assert job.gate is not None
        self._patch.setenv("SLURM_JOB_ID", job.name)
        return job.manager, job.gate

    def _run_as(
        self, job: Job, what: str, act: Callable[[CheckpointManager], object], then: Callable[[Call], None]
    ) -> None:
        manager, gate = self._as(job)

        def call() -> object:
            try:
                return act(manager)
            finally:
                if manager._saver is not None:
                    manager._saver._pool.submit(lambda: None).result()  # what goes on in the background is done by then

        def ended(call: Call) -> None:
            self._expect(call)
            if job.manager is manager and (gate.dead or isinstance(call.error, ConflictError)):
                job.manager = job.gate = None
            if job.manager is not manager:
                self._bury(manager, gate)
            then(call)

        self._do(f"{job.name} {what}", gate, call, ended)
        if gate.asleep:
            # Its supervisor believes it dead, and may start another one beside it.
            job.manager = job.gate = None

    def _bury(self, manager: CheckpointManager, gate: Gate) -> None:
        """The process is no more, whatever it still wanted to do."""
        gate.wake(dead=True)
        with contextlib.suppress(Crash, CloudCkptError):
            manager.close()

    @precondition(lambda self: any(job.manager is None for job in self.jobs.values()))
    @rule(words=st.sampled_from(sorted(WORDS)), first=st.booleans(), takeover=st.sampled_from(["last_wins", "force"]))
    def a_job_starts(self, words: str, first: bool, takeover: str) -> None:
        """One of the jobs that do not run is started, by hand or by its supervisor."""
        idle = [job for job in self.jobs.values() if job.manager is None]
        job = idle[0 if first else -1]
        job.gate = self._gate((None, 0))
        job.manager = CheckpointManager(job.gate, takeover=takeover, settings=SETTINGS, **WORDS[words])
        job.manager._store.clock = self._label
        self._managers.append((job.manager, job.gate))

    def _running(self, first: bool) -> Job | None:
        running = [job for job in self.jobs.values() if job.manager is not None]
        return running[0 if first else -1] if running else None

    @rule(
        first=st.booleans(),
        loss=LOSSES,
        forward=st.integers(-1, 2),
        pin=st.sampled_from([False, False, False, True]),
        trouble=troubles(),
    )
    def a_job_saves(
        self, first: bool, loss: float | None, forward: int, pin: bool, trouble: tuple[Trouble | None, int]
    ) -> None:
        """A save of one of the jobs; its step may be one that was saved before."""
        job = self._running(first)
        if job is None:
            return
        job.step = max(0, job.step + forward)
        number, step = len(self.made), job.step
        self.made[number] = step
        assert job.gate is not None
        job.gate.arm(*trouble)

        def act(manager: CheckpointManager) -> PendingSave:
            metrics = {} if loss is None else {"loss": loss}
            return manager.save(step, state_of(number), metrics=metrics, pin=pin, block=True)

        def then(call: Call) -> None:
            if call.error is None:
                assert isinstance(call.value, PendingSave)
                self.acknowledged.append(call.value.checkpoint.id)

        self._run_as(job, f"saves step {step}", act, then)

    @rule(first=st.booleans(), select=SELECTORS, trouble=troubles())
    def a_job_restores(self, first: bool, select: str, trouble: tuple[Trouble | None, int]) -> None:
        """A restore of one of the jobs: whole, of one save, or an error; and never a fresh start where there is one."""
        job = self._running(first)
        if job is None:
            return
        assert job.gate is not None
        job.gate.arm(*trouble)
        state = state_of(-1)
        commits = self._commits()

        def then(call: Call) -> None:
            if isinstance(call.value, Checkpoint):
                self._check_whole(call.value, state)
                job.step = call.value.step
            elif call.error is None and commits:
                self.wrong.append(f"I10 {call.name}: None, and {commits} saves were committed before it began")
            self._check_damage(call)

        self._run_as(job, f"restores {select}", lambda manager: manager.restore(state, select), then)

    @precondition(lambda self: any(job.manager is not None for job in self.jobs.values()))
    @rule(first=st.booleans(), trouble=troubles())
    def a_job_closes(self, first: bool, trouble: tuple[Trouble | None, int]) -> None:
        """The training of one of the jobs is over."""
        job = self._running(first)
        assert job is not None
        manager, gate = self._as(job)
        gate.arm(*trouble)
        job.manager = job.gate = None

        def then(call: Call) -> None:
            self._expect(call)
            self._bury(manager, gate)

        self._do(f"{job.name} closes", gate, manager.close, then)

    @precondition(lambda self: any(job.manager is not None for job in self.jobs.values()))
    @rule(first=st.booleans())
    def a_job_is_killed(self, first: bool) -> None:
        """Between two calls."""
        job = self._running(first)
        assert job is not None
        manager, gate = self._as(job)
        job.manager = job.gate = None
        self._bury(manager, gate)

    # -- those that sleep ------------------------------------------------------------------------------------

    @precondition(lambda self: self.sleepers)
    @rule(number=st.integers(0, 9), dead=st.sampled_from([False, False, True]), trouble=troubles(often=6))
    def a_sleeper_wakes(self, number: int, dead: bool, trouble: tuple[Trouble | None, int]) -> None:
        """A zombie goes on where it stood, or is found dead; it may fall asleep again."""
        sleeper = self.sleepers.pop(number % len(self.sleepers))
        sleeper.call.gate.arm(*trouble)
        sleeper.call.gate.wake(dead=dead)
        self._go_on(sleeper)

    @precondition(lambda self: self.late)
    @rule(number=st.integers(0, 9))
    def a_late_request_arrives(self, number: int) -> None:
        """Long after whoever sent it has given up."""
        self.late.pop(number % len(self.late))()

    # -- everybody else --------------------------------------------------------------------------------------

    def _tool(
        self, name: str, trouble: tuple[Trouble | None, int], act: Callable[[ManifestStore], object], *, by_hand: bool
    ) -> None:
        gate = self._gate(trouble, by_hand=by_hand)
        store = ManifestStore(gate, SETTINGS, clock=self._label)
        self._do(name, gate, lambda: act(store), self._expect)

    @rule(trouble=troubles())
    def somebody_sweeps(self, trouble: tuple[Trouble | None, int]) -> None:
        """``cloudckpt sweep``."""
        self._tool("sweep", trouble, lambda store: sweep_run(store, dry_run=False), by_hand=False)

    @rule(trouble=troubles(often=2))
    def somebody_collects_garbage(self, trouble: tuple[Trouble | None, int]) -> None:
        """``cloudckpt gc``."""
        self._tool("gc", trouble, lambda store: gc_run(store, dry_run=False), by_hand=False)

    @rule(trouble=troubles())
    def somebody_prunes(self, trouble: tuple[Trouble | None, int]) -> None:
        """``cloudckpt prune``: the rules, at a person's word."""
        self._tool("prune", trouble, lambda store: pruning.prune(store), by_hand=False)

    @rule(step=st.integers(0, 8), pinned=st.booleans(), trouble=troubles())
    def somebody_pins(self, step: int, pinned: bool, trouble: tuple[Trouble | None, int]) -> None:
        """``cloudckpt pin`` and ``unpin``."""
        self._tool("pin", trouble, lambda store: editing.pin(store, step, pinned=pinned), by_hand=True)

    @rule(step=st.integers(0, 8), label=st.sampled_from(["diverged", None]), trouble=troubles())
    def somebody_marks(self, step: int, label: str | None, trouble: tuple[Trouble | None, int]) -> None:
        """``cloudckpt mark``."""
        self._tool("mark", trouble, lambda store: editing.mark(store, step, label), by_hand=True)

    @rule(step=st.integers(0, 8), trouble=troubles())
    def somebody_tags(self, step: int, trouble: tuple[Trouble | None, int]) -> None:
        """``cloudckpt tag``."""
        self._tool("tag", trouble, lambda store: editing.tag(store, step, add=["seen"]), by_hand=True)

    @rule(step=st.integers(0, 8), loss=st.sampled_from([math.nan, 0.5, 1.0, 2.5]), trouble=troubles())
    def an_evaluator_reports(self, step: int, loss: float, trouble: tuple[Trouble | None, int]) -> None:
        """Late metrics, of a save on its way, a committed one, or one that is gone."""
        self._tool("report", trouble, lambda store: editing.report_metrics(store, step, {"loss": loss}), by_hand=True)

    @rule(step=st.integers(0, 8), trouble=troubles())
    def somebody_removes(self, step: int, trouble: tuple[Trouble | None, int]) -> None:
        """``cloudckpt rm``."""
        self._tool("rm", trouble, lambda store: editing.remove(store, [step]), by_hand=True)

    @rule(select=SELECTORS, trouble=troubles(often=1))
    def somebody_loads(self, select: str, trouble: tuple[Trouble | None, int]) -> None:
        """An evaluator loads a checkpoint, and is overtaken in the middle of it."""
        gate = self._gate(trouble)
        run = cloudckpt.open(gate, settings=SETTINGS)

        def then(call: Call) -> None:
            self._expect(call)
            self._check_damage(call)
            if call.error is None:
                assert isinstance(call.value, dict)
                self._check_values(call.name, call.value)

        self._do(f"loads {select}", gate, lambda: load(run, select), then)

    # -- the world -------------------------------------------------------------------------------------------

    @rule(minutes=st.sampled_from([1, 1, 1, 3, 60, -30]))
    def time_passes(self, minutes: int) -> None:
        """Or jumps back."""
        self.clock.minutes = max(0, self.clock.minutes + minutes)

    @precondition(lambda self: self._committed())
    @rule(number=st.integers(0, 9))
    def a_byte_flips(self, number: int) -> None:
        """In one committed checkpoint; whoever reads it will record that, and somebody does at once."""
        found = self._committed()
        entry = found[number % len(found)]
        key = next(i.key for i in self.inner.list(f"{entry.name}/") if not i.key.endswith(keys.INDEX_NAME))
        body = bytearray(self.inner.read(key, limit_bytes=2**30).body)
        body[-1] ^= 1
        self.inner.put(key, [body], size_bytes=len(body))
        self.spoilt.add(entry.id)
        store = ManifestStore(self.watch.view(), SETTINGS, clock=self._label)

        def damage(manifest: Manifest, _: None) -> Manifest:
            return edits.damage(manifest, entry.id, "a byte flipped", at=self._label())

        store.transact(damage, prepare=lambda _: None)

    @precondition(lambda self: self.watch.manifest() is not None)
    @rule()
    def somebody_leaves_a_file(self) -> None:
        """A file of somebody else's, under our root."""
        self.inner.put(FOREIGN, [b"mine"], size_bytes=4)

    # -- what must hold --------------------------------------------------------------------------------------

    def _committed(self) -> list[Checkpoint]:
        manifest = self.watch.manifest()
        return [e for e in manifest.committed if e.damaged is None] if manifest is not None else []

    def _commits(self) -> int:
        manifest = self.watch.manifest()
        return manifest.commits if manifest is not None else 0

    def _check_whole(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        self._check_values(f"restored {checkpoint.name}", state)
        if self.made.get(int(state["extra"]["number"])) != checkpoint.step:
            self.wrong.append(f"I1 {checkpoint.name} holds the bytes of another step")

    def _check_values(self, name: str, values: dict[str, Any]) -> None:
        number = int(values["extra"]["number"])
        if not (torch.equal(values["model"]["w"], torch.full((16,), float(number))) and number in self.made):
            self.wrong.append(f"I1 {name}: {values} is no state that was ever saved")

    def _check_damage(self, call: Call) -> None:
        if isinstance(call.error, CorruptCheckpointError) and call.error.checkpoint_id not in self.spoilt:
            self.wrong.append(f"I1 {call.name} finds damage that nobody made: {call.error}")

    @invariant()
    def every_step_was_sound(self) -> None:
        """I2, I5, I6, I7, I9, I11, I12: at the moment of each write and delete."""
        assert not self.watch.violations, "\n".join(self.watch.violations)

    @invariant()
    def what_lies_there_is_sound(self) -> None:
        """I1, I3, I4, I5, I6: whatever was interrupted; and nothing is called damaged that is not."""
        check_store(self.inner)
        manifest = self.watch.manifest()
        damaged = [e for e in manifest.entries if e.damaged is not None] if manifest is not None else []
        slandered = [f"I1 {e.name} is called damaged ({e.damaged})" for e in damaged if e.id not in self.spoilt]
        assert not slandered, "\n".join(slandered)

    @invariant()
    def what_was_promised_is_kept(self) -> None:
        """I10, and what readers saw."""
        promised = [
            f"I10 {save_id} was reported as committed" for save_id in {*self.acknowledged} - self.watch.committed
        ]
        assert not self.wrong + promised, "\n".join(self.wrong + promised)

    def teardown(self) -> None:
        """I8, I12: in the end a claim, a sweep and a gc account for everything, and files of others are still there."""
        try:
            self._end()
        finally:
            for sleeper in self.sleepers:
                sleeper.call.gate.wake(dead=True)
                sleeper.call.rest()
            for manager, gate in self._managers:
                if not manager._closed:
                    self._bury(manager, gate)
            self._patch.undo()

    def _end(self) -> None:
        while self.sleepers:
            self.a_sleeper_wakes(0, len(self.sleepers) % 2 == 0, (None, 0))
        for job in self.jobs.values():
            if job.manager is not None and job.gate is not None:
                self._bury(job.manager, job.gate)
                job.manager = job.gate = None
        while self.late:
            self.a_late_request_arrives(0)
        if self.watch.manifest() is None:
            return
        had_foreign = any(item.key == FOREIGN for item in self.inner.list(FOREIGN))
        with CheckpointManager(self.watch.view(), takeover="force", settings=SETTINGS) as manager:
            state = state_of(-1)
            try:
                resumed = manager.restore(state)
            except CheckpointNotFoundError:
                resumed = None  # all that there is is marked or damaged
            except CorruptCheckpointError as exc:
                assert exc.checkpoint_id in self.spoilt
                resumed = None
            if resumed is not None:
                self._check_whole(resumed, state)
        store = ManifestStore(self.watch.view(), SETTINGS)
        sweep_run(store, dry_run=False)
        gc_run(store, dry_run=False)
        assert any(item.key == FOREIGN for item in self.inner.list(FOREIGN)) is had_foreign, "I12"
        self.inner.delete([FOREIGN])
        check_store(self.inner, settled=True)
        self.every_step_was_sound()
        self.what_was_promised_is_kept()
        manifest = self.watch.manifest()
        assert manifest is not None
        assert {entry.state for entry in manifest.entries} <= {State.COMMITTED}, "I8"


def state_of(number: int) -> dict[str, Any]:
    """A state every bit of which says which save it is."""
    return {"model": {"w": torch.full((16,), float(number))}, "extra": {"number": number}}


def load(run: Run, select: str) -> dict[str, Any]:
    """All of a checkpoint."""
    return run.load(select)


def _at_once(saver: Saver, work: Callable[[], None]) -> None:
    """What a new writer deletes in the background, before its first call goes on.

    Beside that call its requests would come in another order each time, and a story could not be told again.
    """
    saver._pool.submit(work).result()
