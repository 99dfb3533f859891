"""Everything that is done to a run, one story each: what was there before, what is done, what must hold whatever fails.

The history of ``cloudckpt.testing`` is one long story of two jobs. These are short ones, so that each call of each
operation is broken while little else is going on: saves in the background and waited for, late metrics, labels, prune,
removal by hand, restore over damage and by name, the claim of what another process left, sweep, gc, repair, and readers.

(Past 350 lines: each story is a few lines, and there are many of them.)
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CheckpointNotFoundError,
    CloudCkptError,
    FormatError,
    PendingSave,
    Settings,
    State,
    editing,
)
from cloudckpt.core.policy import Policy
from cloudckpt.pruning import prune
from cloudckpt.repairing import repair_run
from cloudckpt.storage import LocalStorage, ManifestStore, MemoryStorage, Storage
from cloudckpt.sweeping import gc_run, sweep_run
from cloudckpt.testing import Crash, Fault, ScriptedStorage, check_store
from cloudckpt.testing.scripted import Call
from cloudckpt.verifying import verify_run

__all__ = ["FAST", "STORIES", "Story", "Told", "check", "count_calls", "go_on", "live", "sample", "state_of", "survive"]

FAST = Settings(retry_base_s=1e-5, retry_cap_s=1e-4, manifest_deadline_s=0.05, storage_deadline_s=0.05)

#: What the program was told had been done.
Told = list[Any]

FOREIGN = "notes.txt"
_LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """One operation.

    Attributes:
        name: what is done.
        prepare: makes what was there before; nothing fails in it.
        act: does it, and notes what it was told had been done.
        holds: raises if something that was told is not so.
        keeps: the steps that must come back to the last bit, whatever failed.
        harmed: whether the run breaks invariants before it is mended.
    """

    name: str
    prepare: Callable[[Storage], None]
    act: Callable[[Storage, Told], None]
    holds: Callable[[Storage, Told], None] = lambda *_: None
    keeps: Sequence[int] = ()
    harmed: bool = False


def state_of(step: int) -> dict[str, Any]:
    """Different bits at every step, in two components."""
    return {"model": {"w": torch.arange(64.0) * step}, "extra": {"bias": torch.full((7,), step), "step": step}}


def attempt(act: Callable[[], object]) -> None:
    """What the store refuses is survived, as a training loop would; a crash is not."""
    with contextlib.suppress(CloudCkptError):
        act()


def live(story: Story, storage: Storage) -> Told:
    """Live through it, to its end or to the crash; what was told."""
    told: Told = []
    with contextlib.suppress(Crash):
        story.act(storage, told)
    return told


@contextlib.contextmanager
def job(storage: Storage, **words: Any) -> Iterator[CheckpointManager]:
    """A training job; however it ends, its manager is closed, as far as that goes."""
    ckpts = CheckpointManager(storage, settings=FAST, **words)
    try:
        yield ckpts
    finally:
        attempt(ckpts.close)


# -- what was there before -----------------------------------------------------------------------------------


def nothing(storage: Storage) -> None:
    """An empty root."""


def three_saves(storage: Storage) -> None:
    """A closed run of three checkpoints, all of which are kept."""
    with job(storage, monitor="loss", mode="min", keep_last=None) as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, state_of(step), metrics={"loss": _LOSSES[step]}, block=True)


def _damaged_newest(storage: Storage) -> None:
    three_saves(storage)
    key = f"{cloudckpt.open(storage).select(3).name}/model-00000-of-00001.safetensors"
    body = bytearray(storage.read(key, limit_bytes=10**6).body)
    body[-1] ^= 1
    storage.put(key, [bytes(body)], size_bytes=len(body))


def _dying(storage: Storage) -> None:
    with job(storage, keep_last=1) as ckpts:
        for step in (1, 2, 3):
            attempt(partial(ckpts.save, step, state_of(step), block=True))


def _left_by(fault: Fault, is_last: Callable[[Call], bool]) -> Callable[[Storage], None]:
    """What a process leaves that dies in the first call for which ``is_last`` is true."""

    def prepare(storage: Storage) -> None:
        rehearsal = ScriptedStorage(MemoryStorage())
        _dying(rehearsal)
        at = next(number for number, call in enumerate(rehearsal.calls) if is_last(call))
        with contextlib.suppress(Crash):
            _dying(ScriptedStorage(storage, at, fault))

    return prepare


def _in_folder(call: Call, verb: str, start: str, end: str) -> bool:
    return call.verb == verb and any(key.startswith(start) and key.endswith(end) for key in call.keys)


sealed_and_not_committed = _left_by(
    Fault.CRASH_AFTER, lambda call: _in_folder(call, "put", "checkpoint-3.", "/checkpoint.json")
)
half_uploaded = _left_by(Fault.CRASH_AFTER, lambda call: _in_folder(call, "put", "checkpoint-3.", ".safetensors"))
retired_and_not_deleted = _left_by(
    Fault.CRASH_BEFORE, lambda call: _in_folder(call, "delete", "checkpoint-2.", ".safetensors")
)


def _with_garbage(storage: Storage) -> None:
    retired_and_not_deleted(storage)
    for key in (
        "checkpoint-7.deadbeef/model-00000-of-00001.safetensors",
        "checkpoint-7.deadbeef/extra-00000-of-00001.safetensors",
        ".cloudckpt-probe-0a1b2c3d",
        FOREIGN,
    ):
        storage.put(key, [b"x"], size_bytes=1)


def _without_manifest(storage: Storage) -> None:
    three_saves(storage)
    gone = [item.key for item in storage.list("manifest")]
    assert storage.delete(gone) == {}


def _with_half_a_manifest(storage: Storage) -> None:
    three_saves(storage)
    found = storage.read("manifest.json", limit_bytes=10**7)
    storage.replace("manifest.json", found.body[: len(found.body) // 2], expecting=found.version)


# -- what is done --------------------------------------------------------------------------------------------


def _saves(storage: Storage, told: Told) -> None:
    on_their_way: list[PendingSave] = []
    try:
        with job(storage, monitor="loss", mode="min", keep_best=1, keep_last=1) as ckpts:
            attempt(partial(ckpts.restore, state_of(0)))
            for step, loss in _LOSSES.items():
                state = state_of(step)
                with contextlib.suppress(CloudCkptError):
                    # It returns once the state may change; the next call waits for it, and is told of its failure.
                    on_their_way.append(ckpts.save(step, state, metrics={"loss": loss}))
                    state["model"]["w"].zero_()
    finally:
        for pending in on_their_way:
            with contextlib.suppress(CloudCkptError, Crash):
                if pending.done():
                    told.append(pending.wait())


def _saves_and_waits(storage: Storage, told: Told) -> None:
    with job(storage, monitor="loss", mode="min", keep_best=1, keep_last=1) as ckpts:
        attempt(partial(ckpts.restore, state_of(0)))
        for step, loss in _LOSSES.items():
            with contextlib.suppress(CloudCkptError):
                told.append(ckpts.save(step, state_of(step), metrics={"loss": loss}, block=True).wait())


def _saved_holds(storage: Storage, told: Told) -> None:
    committed = cloudckpt.open(storage).checkpoints()
    if told:
        assert max(c.seq for c in committed) >= max(c.seq for c in told), "the newest acknowledged is not there (I5)"
        best = min(c.metrics["loss"] for c in told)
        assert any(c.metrics["loss"] <= best for c in committed), "the best acknowledged is lost (I9)"
    for checkpoint in committed:
        _check_bits(storage, checkpoint.name, checkpoint.step)


def _store(storage: Storage) -> ManifestStore:
    return ManifestStore(storage, FAST)


def _reports(storage: Storage, told: Told) -> None:
    def report(step: int, metric: str, value: float) -> None:
        if editing.report_metrics(_store(storage), step, {metric: value}):
            told.append((step, metric, value))

    attempt(lambda: report(2, "accuracy", 0.5))
    attempt(lambda: report(1, "loss", 0.1))


def _reported_holds(storage: Storage, told: Told) -> None:
    run = cloudckpt.open(storage)
    for step, metric, value in told:
        assert run.select(step).metrics[metric] == value
    if (1, "loss", 0.1) in told:
        best = run.best()
        assert best is not None
        assert best.step == 1


def _labels(storage: Storage, told: Told) -> None:
    attempt(lambda: told.append(("pinned", editing.pin(_store(storage), 1).step)))
    attempt(lambda: told.append(("tagged", editing.tag(_store(storage), 2, add=["release"]).step)))
    attempt(lambda: told.append(("marked", editing.mark(_store(storage), 3, "diverged").step)))


def _labels_hold(storage: Storage, told: Told) -> None:
    run = cloudckpt.open(storage)
    for what, step in told:
        found = run.select(step)
        assert {"pinned": found.pinned, "tagged": "release" in found.tags, "marked": bool(found.marks)}[what]
    for step in (1, 2, 3):  # a label changes no byte
        _check_bits(storage, run.select(step).name, step)


def _prunes(storage: Storage, told: Told) -> None:
    attempt(lambda: told.append(prune(_store(storage), policy=Policy(keep_last=1)).retired))
    attempt(lambda: sweep_run(_store(storage), dry_run=False))


def _removes(storage: Storage, told: Told) -> None:
    attempt(lambda: told.append(editing.remove(_store(storage), [1])))
    attempt(lambda: sweep_run(_store(storage), dry_run=False))


def _removed_holds(storage: Storage, told: Told) -> None:
    if told:
        assert 1 not in {c.step for c in cloudckpt.open(storage).checkpoints()}, "what was let go is back"


def _restores(select: str | int) -> Callable[[Storage, Told], None]:
    def act(storage: Storage, told: Told) -> None:
        with job(storage) as ckpts:
            fresh = state_of(0)

            def restore() -> None:
                resumed = ckpts.restore(fresh, select)
                assert resumed is not None
                # What came back is one checkpoint's state, and never a mixture.
                assert torch.equal(fresh["model"]["w"], state_of(resumed.step)["model"]["w"])
                assert fresh["extra"]["step"] == resumed.step
                told.append(resumed.step)

            attempt(restore)

    return act


def _resumed_holds(storage: Storage, told: Told) -> None:
    steps = {c.step for c in cloudckpt.open(storage).checkpoints()}
    assert set(told) <= steps, "what was resumed from is gone"


def _claims(storage: Storage, told: Told) -> None:
    with job(storage) as ckpts:
        attempt(lambda: told.append(ckpts.restore(state_of(0))))


def _sweeps(storage: Storage, told: Told) -> None:
    attempt(lambda: told.append(sweep_run(_store(storage), dry_run=False)))


def _collects(storage: Storage, told: Told) -> None:
    attempt(lambda: told.append(gc_run(_store(storage), dry_run=False)))


def _collected_holds(storage: Storage, told: Told) -> None:
    del told
    assert storage.read(FOREIGN, limit_bytes=10).body == b"x", "a foreign object was touched (I12)"
    storage.delete([FOREIGN])  # nothing of ours may account for it below


def _repairs(storage: Storage, told: Told) -> None:
    attempt(lambda: told.append(repair_run(_store(storage), dry_run=False)))


def _repaired_holds(storage: Storage, told: Told) -> None:
    if told:
        assert {(c.step, c.held) for c in cloudckpt.open(storage).checkpoints()} == {(1, True), (2, True), (3, True)}


def _reads(storage: Storage, told: Told) -> None:
    run = cloudckpt.open(storage, settings=FAST)

    def load() -> None:
        told.append(run.load("best")["extra"]["step"])

    attempt(run.checkpoints)
    attempt(load)
    attempt(run.plan)
    attempt(lambda: verify_run(_store(storage)))
    attempt(lambda: verify_run(_store(storage), deep=True))


def _read_holds(storage: Storage, told: Told) -> None:
    assert set(told) <= {2}
    assert cloudckpt.open(storage).manifest().owner is not None
    assert {c.state for c in cloudckpt.open(storage).checkpoints(state=None)} == {State.COMMITTED}


STORIES = (
    Story(name="saves in the background, retention, close", prepare=nothing, act=_saves, holds=_saved_holds),
    Story(name="report_metrics", prepare=three_saves, act=_reports, holds=_reported_holds, keeps=(1, 2, 3)),
    # What is marked counts in no rule, "keep all" included: the commit of the next job lets step 3 go.
    Story(name="pin, tag and mark", prepare=three_saves, act=_labels, holds=_labels_hold, keeps=(1, 2)),
    Story(name="prune and sweep", prepare=three_saves, act=_prunes, keeps=(3,)),
    Story(name="removal by hand", prepare=three_saves, act=_removes, holds=_removed_holds, keeps=(2, 3)),
    Story(
        name="restore over damage",
        prepare=_damaged_newest,
        act=_restores("latest"),
        holds=_resumed_holds,
        keeps=(1, 2),
        harmed=True,
    ),
    Story(name="restore of an older one", prepare=three_saves, act=_restores(1), holds=_resumed_holds, keeps=(1, 2, 3)),
    Story(name="claim of a sealed save", prepare=sealed_and_not_committed, act=_claims, keeps=(3,)),
    Story(name="claim of half an upload", prepare=half_uploaded, act=_claims, keeps=(2,)),
    Story(name="claim of retired bytes", prepare=retired_and_not_deleted, act=_claims, keeps=(3,)),
    Story(name="sweep", prepare=retired_and_not_deleted, act=_sweeps, keeps=(3,)),
    Story(name="gc", prepare=_with_garbage, act=_collects, holds=_collected_holds, keeps=(3,)),
    Story(
        name="repair of a lost manifest",
        prepare=_without_manifest,
        act=_repairs,
        holds=_repaired_holds,
        keeps=(1, 2, 3),
        harmed=True,
    ),
    Story(
        name="repair of half a manifest",
        prepare=_with_half_a_manifest,
        act=_repairs,
        holds=_repaired_holds,
        keeps=(1, 2, 3),
        harmed=True,
    ),
    Story(name="open, load and verify", prepare=three_saves, act=_reads, holds=_read_holds, keeps=(1, 2, 3)),
    Story(name="saves that are waited for", prepare=nothing, act=_saves_and_waits, holds=_saved_holds),
)


# -- what must hold ------------------------------------------------------------------------------------------


def _check_bits(storage: Storage, name: str, step: int) -> None:
    loaded = cloudckpt.open(storage).load(name)
    assert torch.equal(loaded["model"]["w"], state_of(step)["model"]["w"]), f"{name} is torn or mixed (I1)"
    assert loaded["extra"]["step"] == step


def _mend(storage: Storage) -> None:
    """What a person does whose run has no manifest that can be read."""
    try:
        cloudckpt.open(storage).manifest()
    except (FormatError, CheckpointNotFoundError):
        if [*storage.list("checkpoint-")]:
            repair_run(_store(storage), dry_run=False)


def go_on(storage: Storage) -> None:
    """The next job resumes, saves, and settles the rest; then every object is accounted for."""
    _mend(storage)
    # The policy is the run's own; only the empty one has none yet.
    with CheckpointManager(storage, settings=FAST, keep_last=None) as ckpts:
        ckpts.restore(state_of(0))
        ckpts.save(9, state_of(9), metrics={"loss": 9.0}, block=True)
    gc_run(_store(storage), dry_run=False)
    check_store(storage, settled=True)
    assert {c.state for c in cloudckpt.open(storage).checkpoints(state=None)} == {State.COMMITTED}


def check(story: Story, storage: Storage, told: Told) -> None:
    """Everything that must hold after a story, however it ended."""
    if story.harmed:
        _mend(storage)
    else:
        check_store(storage)
    story.holds(storage, told)
    go_on(storage)
    for step in story.keeps:
        _check_bits(storage, cloudckpt.open(storage).select(step).name, step)


# -- every point ---------------------------------------------------------------------------------------------


def count_calls(story: Story, storage: Storage) -> int:
    """How many requests the story makes when nothing goes wrong, and that it ends well then."""
    story.prepare(storage)
    scripted = ScriptedStorage(storage)
    told = live(story, scripted)
    assert told, f"{story.name}: nothing was done"
    check(story, storage, told)
    return len(scripted.calls)


def sample(total: int, faults: int, stride: int, offset: int) -> dict[int, list[int]]:
    """Every ``stride``-th of all pairs of a fault and a call: the calls by the number of the fault."""
    found: dict[int, list[int]] = {}
    for number in range(offset % stride, faults * total, stride):
        found.setdefault(number // total, []).append(number % total)
    return found


def prepared(story: Story, make: Callable[[], Storage]) -> Callable[[], Storage]:
    """Makes storages that hold what was there before; in memory and on a disk it is made once, and then copied.

    To make it takes longer than most stories. On a server a copy would be as many requests.
    """
    first = make()
    if not isinstance(first, MemoryStorage | LocalStorage):
        first.close()

        def anew() -> Storage:
            storage = make()
            story.prepare(storage)
            return storage

        return anew
    story.prepare(first)

    def copied() -> Storage:
        storage = make()
        if isinstance(first, LocalStorage):
            if first.exists:  # nothing was there before the first story
                shutil.copytree(first.url, storage.url)
            return storage
        for item in first.list(""):
            body = first.read(item.key, limit_bytes=10**9).body
            storage.put(item.key, [body], size_bytes=len(body))
        return storage

    return copied


def survive(story: Story, make: Callable[[], Storage], fault: Fault, points: Sequence[int]) -> int:
    """Fault these calls of a story in turn, and check what is left after each; how many were hit."""
    failures, hit = [], 0
    ready = prepared(story, make)
    for number in points:
        inner = ready()
        scripted = ScriptedStorage(inner, number, fault)
        told = live(story, scripted)
        scripted.land()
        hit += scripted.fired
        where = scripted.calls[number] if scripted.fired else "never reached"
        try:
            check(story, inner, told)
        except (AssertionError, CloudCkptError) as exc:
            failures.append(f"call {number} ({where}): {type(exc).__name__}: {exc}")
        inner.close()
    assert not failures, f"{story.name}, {fault}: {len(failures)} of {len(points)}:\n" + "\n".join(failures)
    # Requests of threads that run side by side may be fewer once one of them has failed, and no more than that.
    assert hit >= len(points) - 2
    return hit
