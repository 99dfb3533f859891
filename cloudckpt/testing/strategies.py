"""Hypothesis strategies: any manifest, any index, any policy, and any sequence of transitions.

A drawn ``Move`` is one thing that a writer, an editor or a person may do to a run. ``bind`` ties it to what a
manifest holds, so that the transition can be applied again, as it is after an answer that was lost.

(Past 350 lines: one strategy per noun of the model and per transition.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from hypothesis import strategies as st

from cloudckpt.core import edits
from cloudckpt.core import manifest as transitions
from cloudckpt.core.keys import STEP_LIMIT, payload_name
from cloudckpt.core.manifest import Abandon, Settlement
from cloudckpt.core.model import (
    Best,
    Cells,
    Checkpoint,
    Chunk,
    Claim,
    Index,
    JournalEvent,
    Manifest,
    Owner,
    PayloadObject,
    State,
    TensorEntry,
)
from cloudckpt.core.policy import KeepBest, Policy
from cloudckpt.testing.builders import at, checkpoint, manifest, owner, sealed

__all__ = [
    "BY_RULE",
    "METRICS",
    "Move",
    "checkpoint_lists",
    "components",
    "hex_digits",
    "histories",
    "indexes",
    "json_values",
    "labels",
    "manifests",
    "metrics",
    "moves",
    "policies",
    "steps",
]

#: Few names, so that drawn policies and drawn checkpoints speak of the same metrics.
METRICS: Final = ("loss", "eval_loss", "acc")

#: Kinds of moves by which only rules may retire a committed checkpoint.
BY_RULE: Final = ("announce", "commit", "claim", "settle", "resume", "prune", "prune_otherwise", "close")

_BY_HAND = ("pin", "unpin", "hold", "release", "tag", "mark", "unmark", "damage", "undamage", "metrics", "retire")
_KINDS = (*BY_RULE, *_BY_HAND, "forget")

Transition = Callable[[Manifest], Manifest]


def hex_digits(count: int) -> st.SearchStrategy[str]:
    """That many lower-case hex digits."""
    return st.integers(0, 16**count - 1).map(lambda number: f"{number:0{count}x}")


def steps() -> st.SearchStrategy[int]:
    """Training steps, often small and equal."""
    return st.integers(0, 20) | st.integers(0, STEP_LIMIT)


def labels() -> st.SearchStrategy[str]:
    """Tags, marks, host names: any text."""
    return st.text(max_size=8)


def components() -> st.SearchStrategy[str]:
    """Names of components, dots and odd characters included."""
    return st.text(min_size=1, max_size=12) | st.text("a./~%.-", min_size=1, max_size=8)


def _numbers() -> st.SearchStrategy[float]:
    usual = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1, 2, -1.5])
    odd = st.sampled_from([math.nan, math.inf, -math.inf])
    return usual | odd | st.floats(allow_nan=False) | st.integers(-(10**300), 10**300)


def metrics() -> st.SearchStrategy[dict[str, float]]:
    """Metrics as they are recorded; NaN and infinities among them."""
    return st.dictionaries(st.sampled_from(METRICS), _numbers(), max_size=3)


def json_values() -> st.SearchStrategy[Any]:
    """Anything JSON can say."""
    leaves = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | labels()
    finite = leaves.filter(lambda leaf: not isinstance(leaf, float) or math.isfinite(leaf))
    return st.recursive(
        finite, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(labels(), inner, max_size=3), max_leaves=6
    )


def _unknown_fields() -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(labels().map("later_".__add__), json_values(), max_size=2)


def _times() -> st.SearchStrategy[str]:
    return st.integers(0, 10**6).map(at)


def _counts(least: int = 0) -> st.SearchStrategy[int]:
    return st.integers(least, least + 5) | st.integers(least, 2**62)


def policies(*, unknown: bool = False) -> st.SearchStrategy[Policy]:
    """Retention policies; with ``unknown`` also ones of a newer version."""
    rules = st.lists(
        st.builds(KeepBest, st.sampled_from(METRICS), st.sampled_from(["min", "max"]), st.none() | st.integers(0, 3)),
        max_size=2,
        unique_by=lambda rule: rule.metric,
    )
    return st.builds(
        Policy,
        keep_last=st.none() | st.integers(1, 4),
        keep_best=rules.map(tuple),
        keep_every=st.none() | st.integers(1, 10),
        keep_within_s=st.none() | st.sampled_from([60, 0.5, 1e300]) | st.floats(0.1, 1e5),
        keep_unscored=st.integers(0, 3),
        extra=_unknown_fields() if unknown else st.just({}),
    )


def _owners() -> st.SearchStrategy[Owner]:
    return st.builds(
        Owner,
        token=hex_digits(16),
        host=labels(),
        pid=_counts(),
        run_key=st.none() | labels(),
        claimed_at=_times(),
        closed=st.booleans(),
        extra=_unknown_fields(),
    )


@st.composite
def _any_entry(draw: st.DrawFn, save_id: str, seq: int) -> Checkpoint:
    return checkpoint(
        draw(steps()),
        seq=seq,
        state=draw(st.sampled_from(State)),
        id=save_id,
        writer_epoch=draw(_counts(1)),
        announced_at=draw(_times()),
        metrics=draw(metrics()),
        size_bytes=draw(_counts()),
        object_count=draw(_counts()),
        world_size=draw(_counts(1)),
        tags=tuple(draw(st.lists(labels(), max_size=2))),
        pinned=draw(st.booleans()),
        held=draw(st.booleans()),
        damaged=draw(st.none() | labels()),
        marks=tuple(draw(st.lists(labels(), max_size=1))),
        kept_because=tuple(draw(st.lists(labels(), max_size=2))),
        retired_because=draw(st.none() | labels()),
        extra=draw(_unknown_fields()),
    )


def _events() -> st.SearchStrategy[JournalEvent]:
    return st.builds(
        JournalEvent,
        at=_times(),
        revision=_counts(),
        event=labels(),
        id=st.none() | hex_digits(8),
        step=st.none() | steps(),
        detail=st.none() | labels(),
        extra=_unknown_fields(),
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Any manifest that the format allows; its parts need not make sense together."""
    ids = draw(st.lists(hex_digits(8), max_size=4, unique=True))
    seqs = sorted(draw(st.sets(_counts(1), min_size=len(ids), max_size=len(ids))))
    write_id = draw(hex_digits(16))
    best = st.builds(
        Best,
        metric=labels(),
        mode=st.sampled_from(["min", "max"]),
        ids=st.lists(hex_digits(8), max_size=2).map(tuple),
    )
    claims = st.builds(Claim, writer_epoch=_counts(), identity=labels())
    return Manifest(
        requires=tuple(draw(st.lists(labels(), max_size=1))),
        run_id=draw(hex_digits(32)),
        revision=draw(_counts(1)),
        write_id=write_id,
        history=(*draw(st.lists(hex_digits(16), max_size=2)), write_id),
        writer_epoch=draw(_counts()),
        owner=draw(st.none() | _owners()),
        claims=tuple(draw(st.lists(claims, max_size=3))),
        next_seq=max([0, *seqs]) + 1,
        commits=draw(_counts()),
        resumed_from=draw(st.none() | hex_digits(8)),
        policy=draw(policies(unknown=True)),
        entries=tuple(draw(_any_entry(save_id, seq)) for save_id, seq in zip(ids, seqs, strict=True)),
        best=tuple(draw(st.lists(best, max_size=2))),
        recent=tuple(draw(st.lists(hex_digits(8), max_size=2))),
        journal=tuple(draw(st.lists(_events(), max_size=2))),
        copies=tuple(draw(st.lists(_counts(), max_size=2))),
        updated_at=draw(_times()),
        extra=draw(_unknown_fields()),
    )


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    """Any index: chunks inside of their objects and shapes, aliases of stored tensors."""
    objects: list[PayloadObject] = []
    tensors: dict[str, dict[str, TensorEntry]] = {}
    for component in draw(st.lists(components(), max_size=2, unique=True)):
        name = payload_name(component, draw(st.integers(0, 3)), 4)
        objects.append(draw(_payload_objects(name)))
        named = draw(st.dictionaries(labels(), _tensors(name), max_size=2))
        aliases = draw(st.dictionaries(labels(), st.sampled_from([*named]), max_size=1)) if named else {}
        tied = {alias: TensorEntry(dtype="uint8", shape=(1,), alias_of=of) for alias, of in aliases.items()}
        tensors[component] = {**tied, **named}
    return Index(
        requires=tuple(draw(st.lists(labels(), max_size=1))),
        run_id=draw(hex_digits(32)),
        id=draw(hex_digits(8)),
        step=draw(steps()),
        seq=draw(_counts(1)),
        writer_epoch=draw(_counts(1)),
        announced_at=draw(_times()),
        sealed_at=draw(_times()),
        world_size=draw(_counts(1)),
        metrics=draw(metrics()),
        tags=tuple(draw(st.lists(labels(), max_size=2))),
        pinned=draw(st.booleans()),
        policy=draw(policies(unknown=True)),
        versions=draw(st.dictionaries(labels(), labels(), max_size=2)),
        objects=tuple(objects),
        tensors=tensors,
        structure=draw(st.dictionaries(labels(), json_values(), max_size=2)),
        pickled=draw(st.booleans()),
        extra=draw(_unknown_fields()),
    )


@st.composite
def _payload_objects(draw: st.DrawFn, name: str) -> PayloadObject:
    sums = st.integers(0, 2**32 - 1)
    if draw(st.booleans()):
        return PayloadObject(name=name, size_bytes=draw(st.integers(100, 2**62)), crc32c=draw(sums))
    cell_bytes, count = 2 ** draw(st.integers(12, 30)), draw(st.integers(1, 5))
    cells = Cells(size_bytes=cell_bytes, crc32c=tuple(draw(st.lists(sums, min_size=count, max_size=count))))
    size = draw(st.integers((count - 1) * cell_bytes + 100, count * cell_bytes))
    return PayloadObject(name=name, size_bytes=size, crc32c=draw(sums), cells=cells)


@st.composite
def _tensors(draw: st.DrawFn, name: str) -> TensorEntry:
    shape = draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    chunk = Chunk(
        object=name,
        start=draw(st.integers(0, 50)),
        length=draw(st.integers(0, 50)),
        offsets=offsets,
        lengths=tuple(draw(st.integers(0, size - first)) for size, first in zip(shape, offsets, strict=True)),
        crc32c=draw(st.integers(0, 2**32 - 1)),
        stored_as=draw(st.none() | labels()),
    )
    return TensorEntry(dtype=draw(labels()), shape=shape, chunks=(chunk,) * draw(st.integers(0, 2)))


@st.composite
def checkpoint_lists(draw: st.DrawFn, *, max_size: int = 8) -> list[Checkpoint]:
    """Entries of a run in the order of their ``seq``, steps and times in any order."""
    return [
        checkpoint(
            draw(st.integers(0, 20)),
            seq=seq,
            state=draw(st.sampled_from([State.COMMITTED] * 6 + [State.PENDING, State.RETIRED])),
            committed_at=at(draw(st.integers(0, 30))),
            metrics=draw(metrics()),
            pinned=draw(_rarely()),
            held=draw(_rarely()),
            damaged="a byte flipped" if draw(_rarely()) else None,
            marks=("diverged",) if draw(_rarely()) else (),
        )
        for seq in range(1, draw(st.integers(0, max_size)) + 1)
    ]


def _rarely() -> st.SearchStrategy[bool]:
    return st.sampled_from([False] * 5 + [True])


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One transition to be: which kind, which entry (by a number), and what with."""

    kind: str
    pick: int
    step: int
    metrics: dict[str, float]
    policy: Policy

    def bind(self, before: Manifest) -> Transition:
        """The transition, tied to the entries that ``before`` holds; applying it twice changes nothing more."""
        now = at(before.revision)
        save_id = self._chosen(before)
        match self.kind:
            case "announce" | "commit" | "settle" | "claim" | "resume" | "close":
                return self._by_writer(before, now)
            case "prune":
                return lambda m: transitions.prune(m, at=now)
            case "prune_otherwise":
                return lambda m: transitions.prune(m, at=now, policy=self.policy)
            case "forget":
                return lambda m: transitions.forget(m, {save_id}, at=now)
            case "retire":
                return lambda m: edits.retire(m, [save_id], "removed by hand", at=now)
            case _:
                return lambda m: self._label(m, save_id, now)

    def _chosen(self, before: Manifest, states: Sequence[State] = tuple(State)) -> str:
        ids = [e.id for e in before.entries if e.state in states]
        return ids[self.pick % len(ids)] if ids else "ffffffff"

    def _by_writer(self, before: Manifest, now: str) -> Transition:
        epoch = before.writer_epoch
        pending = [e.id for e in before.in_state(State.PENDING)]
        ends: list[Settlement] = [sealed(), Abandon(reason="it failed")]
        settlements = {save_id: ends[(self.pick + n) % 2] for n, save_id in enumerate(pending)}
        if self.kind == "announce":
            entry = checkpoint(self.step, state=State.PENDING, id=f"{before.next_seq:08x}", metrics=self.metrics)
            gone = {self._chosen(before, [State.RETIRED])}
            return lambda m: transitions.announce(
                m, entry, writer_epoch=epoch, settlements=settlements, gone=gone, at=now
            )
        if self.kind == "commit":
            save_id = self._chosen(before, [State.PENDING]) if pending else self._chosen(before, [State.COMMITTED])
            known = before.find(save_id) is not None
            return lambda m: transitions.commit(m, save_id, sealed(), writer_epoch=epoch, at=now) if known else m
        if self.kind == "settle":
            return lambda m: transitions.settle(m, settlements, writer_epoch=epoch, at=now)
        if self.kind == "resume":
            save_id = self._chosen(before, [State.COMMITTED])
            return lambda m: transitions.resume_from(m, save_id, writer_epoch=epoch, at=now)
        if self.kind == "close":
            token = before.owner.token if before.owner else ""
            return lambda m: transitions.close(m, token, at=now)
        new = owner(f"{epoch:016x}", host=f"node-{self.pick % 3}")
        return lambda m: transitions.claim(
            m, new, policy=self.policy, settlements=settlements, takeover="force", at=now
        )

    def _label(self, m: Manifest, save_id: str, now: str) -> Manifest:
        label = f"label-{self.pick % 2}"
        match self.kind:
            case "pin" | "unpin":
                return edits.pin(m, save_id, pinned=self.kind == "pin", at=now)
            case "hold" | "release":
                return edits.hold(m, save_id, held=self.kind == "hold", at=now)
            case "tag":
                return edits.tag(m, save_id, add=[label], remove=["label-0"], at=now)
            case "mark" | "unmark":
                return edits.mark(m, save_id, label if self.kind == "mark" else None, at=now)
            case "damage" | "undamage":
                return edits.damage(m, save_id, label if self.kind == "damage" else None, at=now)
            case _:
                return edits.report_metrics(m, save_id, self.metrics, at=now)


def moves(kinds: Sequence[str] = _KINDS) -> st.SearchStrategy[Move]:
    """One move of one of these kinds; announces and commits are the most frequent."""
    often = [kind for kind in ("announce", "commit") if kind in kinds]
    return st.builds(
        Move,
        kind=st.sampled_from([*often * 6, *kinds]),
        pick=st.integers(0, 11),
        step=st.integers(0, 20),
        metrics=metrics(),
        policy=policies(),
    )


@st.composite
def histories(draw: st.DrawFn, *, kinds: Sequence[str] = _KINDS, max_size: int = 20) -> list[tuple[Move, Manifest]]:
    """A run from its beginning: each move, with the manifest that it is made upon."""
    current = manifest(policy=draw(policies()))
    story: list[tuple[Move, Manifest]] = []
    for number, move in enumerate(draw(st.lists(moves(kinds), min_size=1, max_size=max_size))):
        story.append((move, current))
        changed = move.bind(current)(current)
        if changed is not current:
            write_id = f"{number:016x}"
            current = transitions.stamped(changed, base=current, write_id=write_id, at=at(current.revision))
    return story
