"""Who takes part: each a script of calls of the product, run again and again by ``Players.advance``.

The order of a save's phases is the one of ``Saver._save`` and ``Leading.commit``, which have threads and tensors and are
driven by ``tests/stateful``; everything that decides, writes or deletes within a phase is the product's own code.

(Past 350 lines: one script after the other, and what they share.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import crc32c

from cloudckpt import claiming, editing, pruning, sweeping
from cloudckpt.choosing import DONE, Chooser
from cloudckpt.claiming import Claim
from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.manifest import RollForward
from cloudckpt.core.manifest_json import entry_from_bytes
from cloudckpt.core.model import Checkpoint, PayloadObject, State
from cloudckpt.core.policy import PolicyWords
from cloudckpt.core.selection import parse_selector
from cloudckpt.errors import CloudCkptError, CorruptCheckpointError, FencedError
from cloudckpt.saving.recording import Recorder
from cloudckpt.storage import Held, ManifestStore
from cloudckpt.testing.builders import at, checkpoint
from cloudckpt.view import placed, read_index
from tests.model.replaying import Blocked, Library, Mind, ReplayStorage, Request, Slot, patient_store

#: A word of a process to the model: what it was told of a save ("acked"), has claimed, or tells another rank.
Event = tuple[str, str, int]

COMPONENTS = ("model", "optimizer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """One save that a writer makes: its id, its metrics, and how many ranks write it."""

    id: str
    step: int
    loss: float | None = None
    ranks: int = 1

    @property
    def metrics(self) -> dict[str, float]:
        return {} if self.loss is None else {"loss": self.loss}

    @property
    def names(self) -> list[str]:
        """The payload objects: one of each component, spread over the ranks."""
        return [keys.payload_name(c, n % self.ranks, self.ranks) for n, c in enumerate(COMPONENTS)]

    def body(self, name: str) -> bytes:
        """Bytes that no other object has."""
        return f"{self.id}/{name}".encode()

    def objects(self) -> list[PayloadObject]:
        """What the index says of them."""
        return [
            PayloadObject(name=name, size_bytes=len(self.body(name)), crc32c=crc32c.crc32c(self.body(name)))
            for name in self.names
        ]


class Process:
    """A process in the middle of its script, as far as its memory and its answers go."""

    def __init__(self, library: Library, name: str, mind: Mind, answers: Sequence[Any]) -> None:
        self.storage = ReplayStorage(library, answers)
        self.store: ManifestStore = patient_store(self.storage, name)
        self.events: list[Event] = []
        self.entry = None if mind.entry is None else library.entry(mind.entry)
        self.sealed = mind.sealed
        self._library = library
        self._claimed = mind.claimed
        self._recorder: Recorder | None = None
        if mind.base is not None:
            self.store._base = Held(library.manifest(mind.base), mind.base.write_id)
        if mind.claimed is not None:
            claim = Claim(manifest=library.manifest(mind.claimed), writer_epoch=mind.writer_epoch, token=mind.token)
            self.store.refuse_rollback = True
            self._recorder = Recorder(self.store, claim, lambda _: None)
            self._recorder._unresolved = dict(mind.unresolved)
            self._recorder._names = {save_id: [*names] for save_id, names in mind.names}
            self._recorder._gone = set(mind.gone)
            self._recorder.fenced = mind.fenced

    @property
    def recorder(self) -> Recorder:
        """The writer's records."""
        assert self._recorder is not None
        return self._recorder

    def hold(self, claim: Claim) -> None:
        """From here on it is the writer."""
        self._claimed = self._library.shelve(claim.manifest)
        self._recorder = Recorder(self.store, claim, lambda _: None)
        self.events.append(("claimed", "", claim.writer_epoch))

    def tell(self, topic: str) -> None:
        """A word for another rank, with the entry it is about."""
        assert self.entry is not None
        self.events.append(("tell", topic, self._library.note(self.entry)))

    def hear(self, topic: str) -> Checkpoint:
        """Wait for a word of another rank."""
        return self._library.entry(self.storage.ask(Request("hear", (topic,))))

    def mind(self) -> Mind:
        """What it remembers after this call."""
        base = self.store._base
        recorder = self._recorder
        assert base is None or base.version is not None
        return Mind(
            base=None if base is None or recorder is None else self._library.shelve(base.manifest),
            claimed=self._claimed,
            writer_epoch=recorder.writer_epoch if recorder else 0,
            token=recorder._claim.token if recorder else "",
            entry=None if self.entry is None else self._library.note(self.entry),
            sealed=self.sealed,
            unresolved=tuple(recorder._unresolved.items()) if recorder else (),
            names=tuple((save_id, tuple(names)) for save_id, names in recorder._names.items()) if recorder else (),
            gone=frozenset(recorder._gone) if recorder else frozenset(),
            fenced=recorder.fenced if recorder else False,
        )


#: One call: it ends with the number of calls to go on by (1: the next one), or is blocked.
Call = Callable[[Process], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A participant: its script, and whether a person or an evaluator is behind it."""

    name: str
    script: tuple[Call, ...] = field(repr=False)
    by_hand: bool = False


# -- the writer ----------------------------------------------------------------------------------------------


@contextmanager
def _as_job(name: str) -> Iterator[None]:
    """Jobs are told apart by what their scheduler calls them."""
    before = os.environ.get("TORCHELASTIC_RUN_ID")
    os.environ["TORCHELASTIC_RUN_ID"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHELASTIC_RUN_ID"]
        else:
            os.environ["TORCHELASTIC_RUN_ID"] = before


_TO_THE_END = 1000


def claim_as(job: str, words: PolicyWords, *, takeover: str = "last_wins") -> Call:
    """Become the writer; whoever cannot is gone."""

    def call(process: Process) -> int:
        try:
            with _as_job(job):
                claim = claiming.claim_run(
                    process.store, words, change_policy=False, takeover=takeover, listener=lambda _: None
                )
        except CloudCkptError:
            return _TO_THE_END
        process.hold(claim)
        return 1

    return call


def clean_up_after_others(process: Process) -> int:
    """What a manager does first in the background."""
    process.recorder.clean_up_after_others()
    return 1


def resume_from(save_id: str) -> Call:
    """Go on with an older checkpoint: what ``CheckpointManager.restore`` writes down."""

    def call(process: Process) -> int:
        try:
            process.store.transact(
                lambda m, _: transitions.resume_from(
                    m, save_id, writer_epoch=process.recorder.writer_epoch, at=process.store.clock()
                ),
                prepare=lambda _: None,
            )
        except CloudCkptError:
            return _TO_THE_END
        return 1

    return call


class _Saving:
    """The phases of one save; a failure is noted as ``Leading.failed`` notes it, and goes on behind the save."""

    def __init__(self, save: Save, *, rank_objects: bool) -> None:
        self.save = save
        names = [n for n in save.names if not rank_objects or n == save.names[0]]
        puts = [self._phase(self._putting(name)) for name in names]
        waits = [self._phase(self._waiting(rank)) for rank in range(1, save.ranks)]
        self._left: dict[Call, int] = {}
        phases = [self._phase(self._announce), *puts, *waits, self._phase(self._seal), self._phase(self._commit)]
        self.script = (*phases, self._clean_up)
        for number, phase in enumerate(phases):
            self._left[phase] = len(self.script) - number

    def _phase(self, act: Callable[[Process], None]) -> Call:
        def call(process: Process) -> int:
            try:
                act(process)
            except CloudCkptError as exc:
                assert process.entry is not None
                process.recorder.give_up(process.entry, exc)
                process.entry = process.sealed = None
                return _TO_THE_END if isinstance(exc, FencedError) else self._left[call]
            return 1

        return call

    def _announce(self, process: Process) -> None:
        process.entry = checkpoint(
            self.save.step,
            seq=1,  # until the announce gives it its own
            state=State.PENDING,
            id=self.save.id,
            writer_epoch=process.recorder.writer_epoch,
            announced_at=at(0),
            metrics=self.save.metrics,
            world_size=self.save.ranks,
        )
        process.sealed = None
        process.recorder.expect(self.save.id, self.save.names)
        process.entry = process.recorder.announce(process.entry)
        process.tell(f"announced/{self.save.id}")

    def _putting(self, name: str) -> Callable[[Process], None]:
        def act(process: Process) -> None:
            put(process, self.save, name)

        return act

    def _waiting(self, rank: int) -> Callable[[Process], None]:
        def act(process: Process) -> None:
            process.hear(f"uploaded/{self.save.id}/{rank}")

        return act

    def _seal(self, process: Process) -> None:
        assert process.entry is not None
        process.sealed = process.recorder.seal(
            process.entry,
            objects=self.save.objects(),
            tensors={},
            structure={component: {"$ordered": {"items": []}} for component in COMPONENTS},
            pickled=False,
        )

    def _commit(self, process: Process) -> None:
        assert process.entry is not None
        assert isinstance(process.sealed, RollForward)
        committed = process.recorder.commit(process.entry, process.sealed)
        process.events.append(("acked", committed.id, 0))

    def _clean_up(self, process: Process) -> int:
        process.entry = process.sealed = None
        process.recorder.clean_up()
        return 1


def put(process: Process, save: Save, name: str) -> None:
    """One payload object."""
    body = save.body(name)
    process.storage.put(keys.payload_key(save.step, save.id, name), [body], size_bytes=len(body))


def close(process: Process) -> int:
    """End the run in order."""
    try:
        process.recorder.close()
    except CloudCkptError:
        return _TO_THE_END
    return 1


def writer(
    name: str,
    words: PolicyWords,
    *saves: Save,
    first: Sequence[Call] = (),
    takeover: str = "last_wins",
    closes: bool = True,
) -> Role:
    """A job: claim, save, save, close. ``first``: what it does between the claim and its first save."""
    phases = [call for save in saves for call in _Saving(save, rank_objects=save.ranks > 1).script]
    script = [claim_as(name, words, takeover=takeover), clean_up_after_others, *first, *phases]
    return Role(name=name, script=(*script, *((close,) if closes else ())))


def rank(name: str, number: int, save: Save) -> Role:
    """Another rank of a save: it puts its object once the announce is known to have landed, and reports."""

    def call(process: Process) -> int:
        process.entry = process.hear(f"announced/{save.id}")
        for mine in save.names:
            if f"-{number:05d}-of-" in mine:
                try:
                    put(process, save, mine)
                except CloudCkptError:
                    return _TO_THE_END
        process.tell(f"uploaded/{save.id}/{number}")
        return 1

    return Role(name=name, script=(call,))


# -- everybody else ------------------------------------------------------------------------------------------


def _tool(act: Callable[[ManifestStore], object]) -> Call:
    def call(process: Process) -> int:
        try:
            act(process.store)
        except CloudCkptError:
            return _TO_THE_END
        return 1

    return call


def gc(name: str = "gc") -> Role:
    """Somebody runs ``cloudckpt gc``."""
    return Role(name=name, script=(_tool(lambda store: sweeping.gc_run(store, dry_run=False)),))


def sweeper(name: str = "sweeper") -> Role:
    """Somebody runs ``cloudckpt sweep``."""
    return Role(name=name, script=(_tool(lambda store: sweeping.sweep_run(store, dry_run=False)),))


def editor(name: str, *edits: Callable[[ManifestStore], object]) -> Role:
    """A person or an evaluator, one command after the other."""
    return Role(name=name, script=tuple(_tool(act) for act in edits), by_hand=True)


def pin(selector: str | int) -> Callable[[ManifestStore], object]:
    """``cloudckpt pin``."""
    return lambda store: editing.pin(store, selector)


def mark(selector: str | int, label: str) -> Callable[[ManifestStore], object]:
    """``cloudckpt mark``."""
    return lambda store: editing.mark(store, selector, label)


def report(selector: str | int, loss: float) -> Callable[[ManifestStore], object]:
    """An evaluator reports what it measured."""
    return lambda store: editing.report_metrics(store, selector, {"loss": loss})


def pruner(name: str = "pruner") -> Role:
    """Somebody runs ``cloudckpt prune``, which is the rules' doing."""
    return Role(name=name, script=(_tool(lambda store: pruning.prune(store)),))


def reader(name: str = "reader", select: str = "latest") -> Role:
    """Somebody loads a checkpoint: the manifest once, then the index and each object as they are by then."""

    def call(process: Process) -> int:
        manifest = process.store.read()
        if manifest is None:
            return 1

        def no_damage(found: Checkpoint, error: CorruptCheckpointError) -> None:
            # Nobody damages anything here: what a reader can prove is our own doing.
            process.events.append(("violation", f"I1 a reader finds {found.name} damaged: {error}", 0))

        chooser = Chooser(process.store, manifest, parse_selector(select), no_damage)
        try:
            while True:
                chosen = entry_from_bytes(chooser.choose([b""])[0])
                word = b"" if (problem := _problem_of(process, chosen)) is None else str(problem).encode()
                if problem is not None:
                    chooser.note(problem)
                if chooser.judge([word])[0] == DONE:
                    return 1
        except CloudCkptError:
            return 1

    return Role(name=name, script=(call,))


def _problem_of(process: Process, chosen: Checkpoint) -> CorruptCheckpointError | None:
    storage = process.store.storage
    try:
        index = read_index(storage, placed(chosen, storage.url))
        for item in index.objects:
            key = keys.payload_key(chosen.step, chosen.id, item.name)
            try:
                size = storage.size(key)
            except CloudCkptError as exc:
                return CorruptCheckpointError(f"{key}: {exc}", checkpoint_id=chosen.id, key=key)
            if size != item.size_bytes:
                return CorruptCheckpointError(f"{key} has {size} bytes", checkpoint_id=chosen.id, key=key)
    except CorruptCheckpointError as exc:
        return exc
    return None


# -- running them --------------------------------------------------------------------------------------------


class Local(NamedTuple):
    """Where a process stands: its role, the call it is in, what it remembered before it, and the answers so far."""

    role: int
    call: int
    mind: Mind
    answers: tuple[Any, ...]


class Stop(NamedTuple):
    """Where a process stops: what it waits for (None: it has ended), and the write ids it may still ask about."""

    local: Local
    request: Request | None
    mentions: frozenset[str]
    events: tuple[Event, ...]


class Players:
    """Everybody, and what each does next."""

    def __init__(self, library: Library, roles: Sequence[Role]) -> None:
        self.roles = roles
        self.runs = 0
        self._library = library
        self._known: dict[Local, Stop] = {}

    def start(self, role: int) -> Stop:
        """A process that has done nothing yet."""
        return self.advance(Local(role, 0, Mind(), ()))

    def answered(self, stop: Stop, answer: Any) -> Stop:
        """What it does next."""
        local = stop.local
        return self.advance(local._replace(answers=(*local.answers, answer)))

    def advance(self, local: Local) -> Stop:
        """Run it to its next request, or to its end."""
        found = self._known.get(local)
        if found is None:
            found = self._known[local] = self._run(local)
        return found

    def _run(self, start: Local) -> Stop:
        role = self.roles[start.role]
        local = start
        events: list[Event] = []
        while local.call < len(role.script):
            process = Process(self._library, f"{role.name}/{local.call}", local.mind, local.answers)
            self.runs += 1
            try:
                step = role.script[local.call](process)
            except Blocked as blocked:
                return Stop(local, blocked.request, _mentions(local, process.storage.mentions), tuple(events))
            events += process.events
            local = Local(local.role, local.call + step, process.mind(), ())
        return Stop(Local(local.role, len(role.script), Mind(), ()), None, frozenset(), tuple(events))


def _mentions(local: Local, asked: set[str]) -> frozenset[str]:
    slots = [local.mind.base, *(answer for answer in local.answers if isinstance(answer, Slot))]
    return frozenset(asked | {slot.write_id for slot in slots if slot is not None})
