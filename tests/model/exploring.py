"""Breadth-first search through everything that can happen, with every invariant asked in every state.

A state is what lies on the store, where each process stands, which requests are still on their way, and what was ever
named, committed or reported. One step is one request carried out (or refused, or carried out with its answer lost, or
delayed), or a delayed one landing. A process that is never moved again has died there; one that is moved after another
has claimed the run is a zombie: neither needs a step of its own. In every state the run is also recovered: by a claim, a
sweep and a gc of the real package, with everybody else stopped.

(Past 350 lines: the search and the state that it is over are one thing.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from cloudckpt import claiming, sweeping
from cloudckpt.core import keys
from cloudckpt.core.index_json import decode_index
from cloudckpt.core.manifest_json import decode_manifest
from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.policy import PolicyWords
from cloudckpt.errors import CloudCkptError, FormatError
from cloudckpt.storage import Landed, Lost, MemoryStorage
from cloudckpt.testing.invariants import check_store, delete_violations, put_violations, step_violations
from tests.model.replaying import Body, Gone, Library, Request, Slot, Table, Trouble, patient_store
from tests.model.roles import Event, Players, Role, Stop

#: What lies on the store beside the manifest: (key, bytes).
Objects = frozenset[tuple[str, Body]]

#: A state, packed: the number of each of its parts.
Packed = tuple[int, ...]


class Faults(NamedTuple):
    """How many requests may still go wrong in each way.

    Attributes:
        lost: a write is carried out, and its answer never comes.
        late: a write's answer never comes, and it may be carried out at any later moment, or never.
        refused: the store says no and does nothing.
    """

    lost: int = 0
    late: int = 0
    refused: int = 0


#: Everything is carried out and answered.
NO_FAULTS = Faults()


class Late(NamedTuple):
    """A write on its way: a manifest with its condition, or an object."""

    key: str
    slot: Slot | None
    expecting: str | None
    body: Body | None
    by_hand: bool


class Ghost(NamedTuple):
    """What nobody in the run knows, and the invariants speak of.

    Attributes:
        named: ids that any manifest has named.
        committed: ids that any manifest has called committed.
        doubted: ids whose commit was sent, and had no answer.
        epochs: writer epochs that a process holds or has held.
        words: what ranks were told: (topic, number of an entry).
    """

    named: frozenset[str] = frozenset()
    committed: frozenset[str] = frozenset()
    doubted: frozenset[str] = frozenset()
    epochs: frozenset[int] = frozenset()
    words: frozenset[tuple[str, int]] = frozenset()


class Situation(NamedTuple):
    """A state, written out. ``actors``: where each stands, and how many keys of a bulk delete are gone by now."""

    slot: Slot | None
    objects: Objects
    actors: tuple[tuple[int, int], ...]
    late: frozenset[Late]
    ghost: Ghost
    faults: Faults


class Step(NamedTuple):
    """What happens, where it leads, and what is wrong with it."""

    label: str
    there: Situation
    violations: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Who takes part, and what may go wrong.

    Attributes:
        before: what lies on the store at the beginning, by key.
    """

    name: str
    roles: tuple[Role, ...]
    faults: Faults = NO_FAULTS
    before: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a search has found.

    Attributes:
        stores: how many different contents of the store were recovered.
        runs: how often a call of the product was run.
        complete: whether every state that can be reached was looked at.
        violation: the first one, or None; ``trace`` are the steps that lead to it: no shorter way does.
    """

    scenario: str
    states: int
    steps: int
    stores: int
    runs: int
    complete: bool
    violation: str | None = None
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        how_far = "all of them" if self.complete else "stopped at the bound"
        found = f"\n{self.violation}, after\n  " + "\n  ".join(self.trace) if self.violation else ""
        return (
            f"{self.scenario}: {self.states} states ({how_far}), {self.steps} steps, {self.stores} stores recovered, "
            f"{self.runs} runs of the product's calls{found}"
        )


class Explorer:
    """Searches one scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._library = Library()
        self._players = Players(self._library, scenario.roles)
        self._stops: Table[Stop] = Table()
        self._answered: dict[tuple[int, Any], tuple[int, tuple[Event, ...]]] = {}
        self._looked: dict[tuple[int | None, Objects], list[str]] = {}
        self._judged: dict[tuple[Slot | None, Slot, bool], list[str]] = {}
        self._parts: Table[Any] = Table()
        self._came_from: dict[Packed, tuple[Packed, str] | None] = {}
        self._steps_made = 0

    # -- the search ------------------------------------------------------------------------------------------

    def search(self, limit: int | None = None) -> Report:
        """Look at every state, nearest first, up to a number of states or to the first violation."""
        start, wrong = self._start()
        here = self._packed(start)
        self._came_from[here] = None
        if wrong := wrong + self._look(start):
            return self._report(violation=wrong[0], at=here)
        queue = deque([here])
        while queue and (limit is None or len(self._came_from) < limit):
            here = queue.popleft()
            for step in self._steps(self._unpacked(here)):
                self._steps_made += 1
                there = self._packed(step.there)
                is_new = there not in self._came_from
                if wrong := step.violations or (self._look(step.there) if is_new else []):
                    return self._report(violation=wrong[0], at=here, last=step.label)
                if is_new:
                    self._came_from[there] = here, step.label
                    queue.append(there)
        return self._report(complete=not queue)

    def live(self) -> dict[str, bytes]:
        """One after the other, each to its end, and nothing goes wrong: what lies on the store afterwards."""
        here, wrong = self._start()
        for actor in range(len(here.actors)):
            while (steps := [*self._acts(here, actor)]) and not wrong:
                _, here, wrong = steps[0]
        assert not wrong, wrong
        assert here.slot is not None
        bodies = {key: self._library.bytes_of(body) for key, body in here.objects}
        return {**bodies, keys.MANIFEST: self._library.body(here.slot)}

    def _report(
        self, *, complete: bool = False, violation: str | None = None, at: Packed = (), last: str | None = None
    ) -> Report:
        trace = [] if last is None else [last]
        while violation is not None and (before := self._came_from[at]) is not None:
            at, label = before
            trace.append(label)
        return Report(
            scenario=self._scenario.name,
            states=len(self._came_from),
            steps=self._steps_made,
            stores=len(self._looked),
            runs=self._players.runs,
            complete=complete,
            violation=violation,
            trace=tuple(reversed(trace)),
        )

    def _packed(self, situation: Situation) -> Packed:
        # Two parts of different kinds may be equal (two empty sets are), and then share a number: harmless.
        number = self._parts.number
        return tuple([number(part) for part in situation])

    def _unpacked(self, packed: Packed) -> Situation:
        return Situation(*[self._parts[number] for number in packed])

    def _start(self) -> tuple[Situation, list[str]]:
        slot: Slot | None = None
        objects: set[tuple[str, Body]] = set()
        for key, body in self._scenario.before.items():
            if key == keys.MANIFEST:
                slot = self._library.shelve(decode_manifest(body))
            else:
                objects.add((key, self._library.keep(key, body)))
        ghost = Ghost() if slot is None else _noted(Ghost(), self._library.content(slot))
        wrong: list[str] = []
        actors: list[tuple[int, int]] = []
        for role in range(len(self._scenario.roles)):
            stop = self._players.start(role)
            ghost, found = _heard(ghost, stop.events)
            wrong += found
            actors.append((self._stops.number(stop._replace(events=())), 0))
        return Situation(slot, frozenset(objects), tuple(actors), frozenset(), ghost, self._scenario.faults), wrong

    # -- what can happen -------------------------------------------------------------------------------------

    def _steps(self, here: Situation) -> Iterator[Step]:
        for late in sorted(here.late, key=str):
            yield self._lands(here, late)
        for actor in range(len(here.actors)):
            yield from self._acts(here, actor)

    def _acts(self, here: Situation, actor: int) -> Iterator[Step]:
        """What can become of an actor's request: first of all, that it is carried out."""
        request = self._stops[here.actors[actor][0]].request
        if request is None:
            return
        match request.verb:
            case "create" | "replace" if request.slot is not None:
                yield from self._writes(here, actor, request, request.slot)
            case "create" | "put":
                yield from self._puts(here, actor, request)
            case "delete":
                yield from self._deletes(here, actor, request)
            case "hear":
                for topic, number in here.ghost.words:
                    if topic == request.keys[0]:
                        yield self._goes_on(here, actor, number, "")
            case _:
                yield self._goes_on(here, actor, self._found(here, request), "")

    def _found(self, here: Situation, request: Request) -> Any:
        """The answer to a request that changes nothing."""
        key = request.keys[0]
        if request.verb == "list":
            sizes = [(name, len(self._library.bytes_of(body))) for name, body in here.objects]
            # Nobody asks for the size of the manifest, and it would tell equal listings apart.
            sizes += [(keys.MANIFEST, 1)] if here.slot is not None else []
            return tuple(sorted(item for item in sizes if item[0].startswith(key)))[: request.limit]
        if key == keys.MANIFEST:
            return Gone() if here.slot is None else here.slot
        body = dict(here.objects).get(key)
        if body is None:
            return Gone()
        return body if request.verb == "read" else len(self._library.bytes_of(body))

    def _writes(self, here: Situation, actor: int, request: Request, slot: Slot) -> Iterator[Step]:
        if not _holds(here, request.expecting):
            yield self._goes_on(here, actor, Lost(), ", which is refused: the condition does not hold")
            if here.faults.lost:
                spent = here._replace(faults=here.faults._replace(lost=here.faults.lost - 1))
                yield self._goes_on(spent, actor, Trouble(retryable=True), ", which is refused, and that is lost")
            return
        landed, wrong = self._landed(here, slot, by_hand=self._scenario.roles[actor].by_hand)
        yield self._goes_on(landed, actor, Landed(slot.write_id), "", wrong)
        if here.faults.lost:
            spent = landed._replace(faults=here.faults._replace(lost=here.faults.lost - 1))
            spent = self._doubted(spent, here, slot)
            yield self._goes_on(spent, actor, Trouble(retryable=True), ", and the answer is lost", wrong)
        if here.faults.late:
            late = Late(request.keys[0], slot, request.expecting, None, self._scenario.roles[actor].by_hand)
            yield self._delayed(self._doubted(here, here, slot), actor, late)
        if here.faults.refused:
            yield self._refused(here, actor, Trouble(retryable=False))

    def _doubted(self, there: Situation, here: Situation, slot: Slot) -> Situation:
        """What a write without an answer would have committed is in doubt."""
        committed = {e.id for e in self._library.content(slot).entries if e.committed_at is not None}
        return there._replace(
            ghost=there.ghost._replace(doubted=there.ghost.doubted | committed - here.ghost.committed)
        )

    def _landed(self, here: Situation, slot: Slot, *, by_hand: bool) -> tuple[Situation, list[str]]:
        question = (here.slot, slot, by_hand)
        wrong = self._judged.get(question)
        if wrong is None:
            before = None if here.slot is None else self._library.manifest(here.slot)
            wrong = [*step_violations(before, self._library.manifest(slot), by_hand=by_hand)]
            self._judged[question] = wrong
        asked = {late.slot.write_id for late in here.late if late.slot is not None} | {slot.write_id}
        for number, _ in here.actors:
            asked |= self._stops[number].mentions
        ghost = _noted(here.ghost, self._library.content(slot))
        return here._replace(slot=replace(slot, history=slot.history & asked), ghost=ghost), wrong

    def _puts(self, here: Situation, actor: int, request: Request) -> Iterator[Step]:
        key, body = request.keys[0], request.body
        assert body is not None
        if request.verb == "create" and key in dict(here.objects):
            yield self._goes_on(here, actor, Lost(), ", which is refused: it exists")
            return
        there, wrong = _with(here, key, body)
        yield self._goes_on(there, actor, Landed("1") if request.verb == "create" else None, "", wrong)
        if here.faults.lost:
            spent = there._replace(faults=here.faults._replace(lost=here.faults.lost - 1))
            yield self._goes_on(spent, actor, Trouble(retryable=True), ", and the answer is lost", wrong)
        if here.faults.late:
            yield self._delayed(here, actor, Late(key, None, None, body, by_hand=False))
        if here.faults.refused:
            yield self._refused(here, actor, Trouble(retryable=False))

    def _deletes(self, here: Situation, actor: int, request: Request) -> Iterator[Step]:
        """A bulk delete, key by key: whoever dies in it has deleted the first ones."""
        number, done = here.actors[actor]
        key = request.keys[done]
        there = here
        wrong: list[str] = []
        body = dict(here.objects).get(key)
        if body is not None:
            manifest = None if here.slot is None else self._library.content(here.slot)
            wrong = [*delete_violations(key, manifest, doubted=here.ghost.doubted)]
            there = here._replace(objects=here.objects - {(key, body)})
        if done + 1 == len(request.keys):
            yield self._goes_on(there, actor, (), f": {key}", wrong)
        else:
            label = f"{self._scenario.roles[actor].name}: {request}: {key}"
            yield Step(label, _moved(there, actor, (number, done + 1)), wrong)
        if done == 0 and here.faults.refused:
            yield self._refused(here, actor, request.keys)

    def _delayed(self, here: Situation, actor: int, late: Late) -> Step:
        spent = here._replace(late=here.late | {late}, faults=here.faults._replace(late=here.faults.late - 1))
        return self._goes_on(spent, actor, Trouble(retryable=True), ", which is delayed")

    def _refused(self, here: Situation, actor: int, answer: Any) -> Step:
        spent = here._replace(faults=here.faults._replace(refused=here.faults.refused - 1))
        return self._goes_on(spent, actor, answer, ", which the store refuses")

    def _lands(self, here: Situation, late: Late) -> Step:
        """A request that was on its way arrives."""
        there = here._replace(late=here.late - {late})
        wrong: list[str] = []
        if late.body is not None:
            there, wrong = _with(there, late.key, late.body)
        elif late.slot is not None and _holds(here, late.expecting):
            there, wrong = self._landed(there, late.slot, by_hand=late.by_hand)
        return Step(f"a delayed write of {late.key} arrives", there, wrong)

    def _goes_on(self, there: Situation, actor: int, answer: Any, what: str, violations: Sequence[str] = ()) -> Step:
        """The actor has its answer, and runs to its next request."""
        number = there.actors[actor][0]
        request = self._stops[number].request
        after, events = self._answer(number, answer)
        ghost, wrong = _heard(there.ghost, events)
        label = f"{self._scenario.roles[actor].name}: {request}{what}"
        return Step(label, _moved(there._replace(ghost=ghost), actor, (after, 0)), [*violations, *wrong])

    def _answer(self, number: int, answer: Any) -> tuple[int, tuple[Event, ...]]:
        known = self._answered.get((number, answer))
        if known is None:
            stop = self._players.answered(self._stops[number], answer)
            # What was said on the way does not tell apart where two processes stand.
            known = self._answered[number, answer] = self._stops.number(stop._replace(events=())), stop.events
        return known

    # -- what must hold --------------------------------------------------------------------------------------

    def _look(self, here: Situation) -> list[str]:
        """What is wrong with what lies on the store, and with what a recovery makes of it."""
        question = (None if here.slot is None else here.slot.content, here.objects)
        wrong = self._looked.get(question)
        if wrong is None:
            wrong = self._looked[question] = self._recovered(here)
        return wrong

    def _recovered(self, here: Situation) -> list[str]:
        bodies = {key: self._library.bytes_of(body) for key, body in here.objects}
        storage = MemoryStorage()
        for key, body in bodies.items():
            storage.put(key, [body], size_bytes=len(body))
        before: Manifest | None = None
        if here.slot is not None:
            before = self._library.content(here.slot)
            body = self._library.body(here.slot)
            storage.put(keys.MANIFEST, [body], size_bytes=len(body))
        if wrong := _broken(storage, settled=False):
            return wrong
        try:
            claiming.claim_run(
                patient_store(storage, "recovery: claim"),
                PolicyWords(),
                change_policy=False,
                takeover="force",
                listener=lambda _: None,
            )
            sweeping.sweep_run(patient_store(storage, "recovery: sweep"), dry_run=False)
            sweeping.gc_run(patient_store(storage, "recovery: gc"), dry_run=False)
        except CloudCkptError as exc:
            return [f"I8 the run cannot be recovered: {exc}"]
        after = decode_manifest(storage.read(keys.MANIFEST, limit_bytes=2**30).body)
        wrong = [*_not_recovered(before, after, bodies)]
        foreign = [key for key in bodies if keys.parse(key).kind is keys.Kind.FOREIGN]
        left = {item.key for item in storage.list("")}
        wrong += [f"I12 a recovery deletes {key}" for key in foreign if key not in left]
        storage.delete(foreign)
        return wrong + _broken(storage, settled=True)


def _holds(here: Situation, expecting: str | None) -> bool:
    return here.slot is None if expecting is None else here.slot is not None and here.slot.write_id == expecting


def _moved(here: Situation, actor: int, to: tuple[int, int]) -> Situation:
    return here._replace(actors=(*here.actors[:actor], to, *here.actors[actor + 1 :]))


def _with(here: Situation, key: str, body: Body) -> tuple[Situation, list[str]]:
    """The situation with an object more, and what is wrong with putting it."""
    old = dict(here.objects).get(key)
    wrong = [*put_violations(key, overwrites=old not in {None, body}, named=here.ghost.named)]
    kept = here.objects if old is None else here.objects - {(key, old)}
    return here._replace(objects=kept | {(key, body)}), wrong


def _noted(ghost: Ghost, manifest: Manifest) -> Ghost:
    named = ghost.named.union(entry.id for entry in manifest.entries)
    committed = ghost.committed.union(e.id for e in manifest.entries if e.committed_at is not None)
    return ghost._replace(named=named, committed=committed)


def _heard(ghost: Ghost, events: Sequence[Event]) -> tuple[Ghost, list[str]]:
    """What processes say of themselves, and what is wrong with it."""
    wrong: list[str] = []
    for kind, what, number in events:
        match kind:
            case "tell":
                ghost = ghost._replace(words=ghost.words | {(what, number)})
            case "claimed":
                if number in ghost.epochs:
                    wrong.append(f"I6 two processes hold the run as writer {number}")
                ghost = ghost._replace(epochs=ghost.epochs | {number})
            case "acked" if what not in ghost.committed:
                wrong.append(f"I10 the save {what} is reported as committed, and no manifest ever said so")
            case "violation":
                wrong.append(what)
    return ghost, wrong


def _broken(storage: MemoryStorage, *, settled: bool) -> list[str]:
    try:
        check_store(storage, settled=settled)
    except AssertionError as exc:
        return str(exc).split("\n  ")[1:]
    return []


def _not_recovered(before: Manifest | None, after: Manifest, bodies: dict[str, bytes]) -> Iterator[str]:
    """What a recovery has lost of what was there, or has not found."""
    for entry in before.entries if before is not None else ():
        found = after.find(entry.id)
        is_there = found is not None and found.state is State.COMMITTED
        if entry.state is State.COMMITTED and not is_there:
            yield f"I5 {entry.name} was committed, and is not after a recovery"
        if entry.state is State.PENDING and not is_there and _is_whole(entry, bodies):
            yield f"I8 {entry.name} was sealed and whole when its process died, and is not rolled forward"


def _is_whole(entry: Checkpoint, bodies: dict[str, bytes]) -> bool:
    body = bodies.get(keys.index_key(entry.step, entry.id))
    try:
        index = None if body is None else decode_index(body)
    except FormatError:
        return False
    if index is None or index.id != entry.id:
        return False
    sizes = {key: len(found) for key, found in bodies.items()}
    return all(sizes.get(keys.payload_key(entry.step, entry.id, o.name)) == o.size_bytes for o in index.objects)
