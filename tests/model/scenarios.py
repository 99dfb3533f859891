"""What the search goes through: who takes part, what lies there at first, and what may go wrong.

``depth`` 1 is what CI runs; at 2 and 3 there are more saves, more people and more faults.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from cloudckpt.core import edits, keys
from cloudckpt.core.model import Manifest
from cloudckpt.core.policy import PolicyWords
from cloudckpt.storage import ManifestStore
from tests.model.exploring import Explorer, Faults, Scenario
from tests.model.roles import (
    Role,
    Save,
    editor,
    gc,
    mark,
    pin,
    pruner,
    rank,
    reader,
    report,
    resume_from,
    sweeper,
    writer,
)

__all__ = ["SCENARIOS"]

WORDS = PolicyWords(monitor="loss", mode="min", keep_best=1, keep_last=1)
#: A restart that gives no policy words goes on with the stored policy.
FORGOTTEN = PolicyWords()

BEST = Save(id="0000000a", step=1, loss=1.0)
NEWEST = Save(id="0000000b", step=2, loss=2.0)
NOTES = {"notes.txt": b"somebody else's"}

#: The calls of a writer before its first save, and of a save up to and with its seal.
_CLAIMED, _SEALED = 2, 4


def _run(*more: Role) -> dict[str, bytes]:
    """A closed run with a best and a newest checkpoint; then whatever ``more`` do to it, one after the other."""
    roles = (writer("earlier", WORDS, BEST, NEWEST), *more)
    return Explorer(Scenario(name="earlier", roles=roles)).live()


def _dies_sealed(save: Save) -> Role:
    """A writer that is killed between the seal and the commit."""
    role = writer("dead", FORGOTTEN, save)
    return replace(role, script=role.script[: _CLAIMED + _SEALED])


def two_writers(depth: int) -> Scenario:
    """Two jobs on a new root, each of which may be the zombie; answers get lost, and writes arrive late."""
    first = [Save(id=f"a000000{n}", step=n, loss=loss) for n, loss in enumerate([3.0, 1.0, 0.5][: depth + 1], 1)]
    second = [Save(id=f"b000000{n}", step=10 + n, loss=loss) for n, loss in enumerate([2.0, 4.0][:depth], 1)]
    third = [writer("c", FORGOTTEN, Save(id="c0000001", step=20, loss=0.1))] if depth > 2 else []
    roles = (writer("a", WORDS, *first), writer("b", WORDS, *second), *third)
    return Scenario(name="two writers", roles=roles, faults=Faults(lost=1, late=min(depth, 2)))


def doubtful_store(depth: int) -> Scenario:
    """One job, and a store that twice in a row does not answer: an outcome stays unknown."""
    saves = [Save(id=f"a000000{n}", step=n, loss=loss) for n, loss in enumerate([3.0, 1.0, 2.0][: depth + 1], 1)]
    return Scenario(
        name="a doubtful store", roles=(writer("a", WORDS, *saves),), faults=Faults(lost=1, late=2, refused=1)
    )


def gc_beside_a_save(depth: int) -> Scenario:
    """Somebody collects garbage while a job saves; late bytes of a dead process and foreign files lie there."""
    orphan = {f"checkpoint-7.dead0007/{name}": b"late" for name in NEWEST.names}
    saves = [Save(id=f"a000000{n}", step=2 + n, loss=3.0) for n in range(1, depth + 1)]
    roles = [writer("a", FORGOTTEN, *saves), gc()]
    if depth > 1:
        roles.append(gc("another gc"))
    return Scenario(
        name="gc beside a save",
        roles=tuple(roles),
        faults=Faults(lost=depth - 1, refused=depth - 1),
        before={**_run(), **orphan, **NOTES},
    )


def editors_beside_a_save(depth: int) -> Scenario:
    """A pin, a late metric for a save on its way, a mark and a prune, while a job goes on from an older checkpoint."""
    save = Save(id="a0000001", step=3, loss=3.0)
    people = [
        editor("a person", pin(2)),
        editor("an evaluator", report(3, 0.5), mark(1, "diverged")),
        *[pruner(), pruner("another pruner")][:depth],
    ]
    return Scenario(
        name="editors beside a save",
        roles=(writer("a", FORGOTTEN, save, first=[resume_from(BEST.id)]), *people),
        faults=Faults(lost=depth - 1),
        before=_run(),
    )


def readers_and_a_sweeper(depth: int) -> Scenario:
    """Two readers in the middle of a load while a save retires what they read, and somebody sweeps."""
    saves = [Save(id=f"a000000{n}", step=2 + n, loss=0.5 / n) for n in range(1, depth + 1)]
    return Scenario(
        name="readers and a sweeper",
        roles=(writer("a", FORGOTTEN, *saves), reader(), reader("evaluator", "best"), sweeper()),
        before=_run(),
    )


def ranks(depth: int) -> Scenario:
    """A save of two ranks, one of which may be late, dead or a zombie, and a job that takes over."""
    save = Save(id="a0000001", step=3, loss=0.5, ranks=2)
    return Scenario(
        name="ranks",
        roles=(
            writer("a", FORGOTTEN, save),
            rank("a, rank 1", 1, save),
            writer("b", FORGOTTEN, Save(id="b0000001", step=4, loss=2.0)),
        ),
        faults=Faults(lost=depth - 1, late=1),
        before=_run(),
    )


def after_a_crash(depth: int) -> Scenario:
    """Two jobs restart at once over a save that was sealed, whole, and never committed."""
    return Scenario(
        name="after a crash",
        roles=(
            writer("a", WORDS, Save(id="a0000001", step=4, loss=2.0)),
            writer("b", FORGOTTEN, *[Save(id="b0000001", step=4, loss=0.1)] * (depth > 1)),
        ),
        faults=Faults(lost=1),
        before=_run(_dies_sealed(Save(id="0000000c", step=3, loss=0.5))),
    )


def after_a_torn_save(depth: int) -> Scenario:
    """The same, and a payload object of it is shorter than it was sealed with."""
    dead = Save(id="0000000c", step=3, loss=0.5)
    before = _run(_dies_sealed(dead))
    torn = keys.payload_key(dead.step, dead.id, dead.names[0])
    before[torn] = before[torn][:-1]
    return Scenario(
        name="after a torn save",
        roles=(writer("a", FORGOTTEN, Save(id="a0000001", step=4, loss=2.0)), sweeper()),
        faults=Faults(lost=depth - 1),
        before=before,
    )


def odd_metrics(depth: int) -> Scenario:
    """NaN first, then equal values, then none; an evaluator reports what it measured when it gets to it."""
    losses = [math.nan, 1.0, 1.0, None][: depth + 2]
    saves = [Save(id=f"a000000{n}", step=n, loss=loss) for n, loss in enumerate(losses, 1)]
    return Scenario(
        name="odd metrics", roles=(writer("a", WORDS, *saves), editor("an evaluator", report(3, 0.5), report(1, 0.1)))
    )


def damaged_and_marked(depth: int) -> Scenario:
    """The newest is damaged and the best is marked: neither counts, and neither is lost."""

    def damage(store: ManifestStore) -> object:
        def change(manifest: Manifest, _: None) -> Manifest:
            return edits.damage(manifest, NEWEST.id, "a byte flipped", at=store.clock())

        return store.transact(change, prepare=lambda _: None)

    more = Save(id="0000000c", step=3, loss=3.0)
    before = _run(
        editor("a person", pin(1), pin(2)), writer("later", FORGOTTEN, more), editor("a critic", damage, mark(1, "odd"))
    )
    saves = [Save(id=f"a000000{n}", step=3 + n, loss=5.0 - n) for n in range(1, depth + 1)]
    return Scenario(
        name="damaged and marked", roles=(writer("a", FORGOTTEN, *saves), pruner(), reader()), before=before
    )


def duel(depth: int) -> Scenario:
    """Two jobs whose supervisors restart them again and again: the third claim in a row is refused."""
    saves = [Save(id=f"{n}0000000", step=n, loss=float(n)) for n in range(1, 5)]
    roles = (
        writer("a", WORDS, saves[0], closes=False),
        writer("b", WORDS, saves[1], closes=False),
        replace(writer("a", WORDS, saves[2], closes=False), name="a, restarted"),
        *[replace(writer("b", WORDS, saves[3], closes=False), name="b, restarted")] * (depth > 2),
    )
    return Scenario(name="duel", roles=roles, faults=Faults(lost=depth - 1))


SCENARIOS: dict[str, Callable[[int], Scenario]] = {
    make.__name__: make
    for make in (
        two_writers,
        doubtful_store,
        gc_beside_a_save,
        editors_beside_a_save,
        readers_and_a_sweeper,
        ranks,
        after_a_crash,
        after_a_torn_save,
        odd_metrics,
        damaged_and_marked,
        duel,
    )
}
