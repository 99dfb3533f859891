"""One plan for many ranks: each says what it has, rank zero says who writes what, and everybody remembers that.

The offsets in every payload object follow from the boxes that its rank writes, so rank zero, which knows all of them,
can write the index without seeing a byte. A later save with the same state agrees by one number.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloudckpt.core.merging import conflict, merge, parts_missing, references
from cloudckpt.core.spreading import spread
from cloudckpt.errors import StateMismatchError
from cloudckpt.tensors.dcp import Box
from cloudckpt.tensors.memory import dtype_name, dtype_named

__all__ = ["Division", "Offer", "Share", "divide"]

_Place = tuple[str, str]
#: More differing tensors than this say nothing new.
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What one rank has.

    Attributes:
        boxes: component -> the boxes it holds, in its own order.
        aliases: component -> name -> the name under which a tied tensor is stored.
        structure: component -> JSON node.
        pickled: whether any leaf had to be pickled.
    """

    boxes: Mapping[str, Sequence[Box]]
    aliases: Mapping[str, Mapping[str, str]]
    structure: Mapping[str, Any]
    pickled: bool = False

    def to_bytes(self) -> bytes:
        """As it goes over the channel."""
        boxes = {
            component: [[b.name, dtype_name(b.dtype), b.offsets, b.lengths, b.shape] for b in own]
            for component, own in self.boxes.items()
        }
        said = {"boxes": boxes, "aliases": self.aliases, "structure": self.structure, "pickled": self.pickled}
        return zlib.compress(json.dumps(said, separators=(",", ":")).encode(), 1)

    @classmethod
    def from_bytes(cls, body: bytes) -> Offer:
        """The offer again."""
        said = json.loads(zlib.decompress(body))
        boxes = {
            component: [
                Box(
                    component=component,
                    name=name,
                    dtype=dtype_named(dtype),
                    offsets=tuple(offsets),
                    lengths=tuple(lengths),
                    shape=tuple(shape),
                )
                for name, dtype, offsets, lengths, shape in own
            ]
            for component, own in said["boxes"].items()
        }
        return cls(boxes=boxes, aliases=said["aliases"], structure=said["structure"], pickled=said["pickled"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one rank writes.

    Attributes:
        keep: component -> which of its boxes, by their numbers in its offer.
        sends: components of whose values it has some that no rank before it has: it reports them at every save.
        shared: component -> which of its boxes other ranks have as well.
    """

    keep: Mapping[str, Sequence[int]]
    sends: tuple[str, ...] = ()
    shared: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As it goes over the channel."""
        keep = {component: _runs(numbers) for component, numbers in self.keep.items()}
        shared = {component: _runs(numbers) for component, numbers in self.shared.items()}
        return json.dumps({"keep": keep, "sends": self.sends, "shared": shared}, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Share:
        """The share again."""
        said = json.loads(body)
        return cls(keep=_numbers(said["keep"]), sends=tuple(said["sends"]), shared=_numbers(said["shared"]))


def _numbers(runs: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, list[int]]:
    return {c: [n for first, count in own for n in range(first, first + count)] for c, own in runs.items()}


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Who writes what, as rank zero keeps it.

    Attributes:
        shares: by rank.
        boxes: by rank: component -> what it writes.
        aliases: component -> name -> the name under which a tied tensor is stored, on any rank.
        pickled: whether any rank had to pickle a leaf.
        groups: by rank, a number that ranks have in common which share the same boxes with others.
        mixed: whether ranks of different groups have some of these boxes in common.
        remarks: values that ranks have differently, of which only one is stored; sentences.
    """

    shares: Sequence[Share]
    boxes: Sequence[Mapping[str, Sequence[Box]]]
    aliases: Mapping[str, Mapping[str, str]]
    pickled: bool
    groups: Sequence[int]
    remarks: Sequence[str]
    mixed: bool


def divide(offers: Sequence[Offer]) -> Division:
    """Give each box that any rank has to one rank.

    Raises:
        StateMismatchError: ranks that have the same name have other shapes or dtypes for it, or all of them together
            have only a part of a tensor.
    """
    holders: dict[tuple[str, str, tuple[int, ...], tuple[int, ...]], tuple[int, list[int]]] = {}
    _check_alike(offers)
    for rank, offer in enumerate(offers):
        for component, own in offer.boxes.items():
            for box in own:
                if _is_empty(box):
                    continue  # of a tensor that has more, elsewhere: nothing is written, and nothing is known of ties
                size = math.prod(box.lengths) * box.dtype.itemsize
                holders.setdefault((component, box.name, box.offsets, box.lengths), (size, []))[1].append(rank)
    _check_whole(offers, holders)
    writers = spread(holders, len(offers))
    shares, boxes, groups = [], [], []
    structure: dict[str, Any] = {}
    known: dict[object, int] = {}
    conflicts: dict[str, list[int]] = {}
    for rank, offer in enumerate(offers):
        keep = {
            component: [n for n, b in enumerate(own) if writers.get((component, b.name, b.offsets, b.lengths)) == rank]
            for component, own in offer.boxes.items()
        }
        shared = {
            component: [
                n
                for n, b in enumerate(own)
                if not _is_empty(b) and len(holders[component, b.name, b.offsets, b.lengths][1]) > 1
            ]
            for component, own in offer.boxes.items()
        }
        for place in _conflicts(structure, offer.structure):
            conflicts.setdefault(place, []).append(rank)
        sends = tuple(_added(structure, offer.structure)) if rank else ()
        shares.append(Share(keep=keep, sends=sends, shared=shared))
        names = tuple(
            (c, b.name, b.offsets, b.lengths) for c, ns in shared.items() for b in (offer.boxes[c][n] for n in ns)
        )
        groups.append(known.setdefault(names, len(known)))
        if not rank:
            structure |= offer.structure
        boxes.append({component: [offer.boxes[component][n] for n in kept] for component, kept in keep.items()})
    stored = {(component, name) for component, name, _, _ in holders}
    aliases = _aliases(offers, stored)
    pickled = any(offer.pickled for offer in offers)
    _check_structure(structure, stored, aliases, len(offers))
    mixed = any(len({groups[rank] for rank in ranks}) > 1 for _, ranks in holders.values())
    return Division(
        shares=shares,
        boxes=boxes,
        aliases=aliases,
        pickled=pickled,
        groups=groups,
        remarks=_remarks(conflicts),
        mixed=mixed,
    )


def _aliases(offers: Sequence[Offer], stored: set[_Place]) -> dict[str, dict[str, str]]:
    aliases: dict[str, dict[str, str]] = {component: {} for component in offers[0].structure}
    for offer in offers:
        for component, named in offer.aliases.items():
            for name, first in named.items():
                if (component, name) not in stored:
                    aliases.setdefault(component, {}).setdefault(name, first)
    return aliases


def _is_empty(box: Box) -> bool:
    return not math.prod(box.lengths) and bool(math.prod(box.shape))


def _check_structure(
    structure: Mapping[str, Any], stored: set[_Place], aliases: Mapping[str, Mapping[str, str]], world_size: int
) -> None:
    """Refuse what could be written and never be read: places that ranks have so differently that one would be lost."""
    problems: list[str] = []
    for component, node in structure.items():
        if (place := parts_missing(node, world_size, component)) is not None:
            problems.append(f"{place} is declared PerRank, and not on every rank in the same place")
        known = {name for owner, name in stored if owner == component} | {*aliases.get(component, ())}
        referred = {*references(node)}
        problems += [f"{component}.{name}: no rank here has any of it" for name in sorted(referred - known)]
        problems += [
            f"{component}.{name} stands where other ranks have something else (a list or tuple of another length?)"
            for name in sorted(known - referred)
        ]
    _refuse(problems, "the ranks' states do not make one")


def _conflicts(known: Mapping[str, Any], said: Mapping[str, Any]) -> Iterator[str]:
    """Where a rank has something else than what is stored, which is that of the ranks before it."""
    for component, node in said.items():
        place = conflict(known[component], node, component) if component in known else None
        if place is not None:
            yield place


def _remarks(conflicts: Mapping[str, Sequence[int]]) -> list[str]:
    return [
        f"{place} has another value on rank {', '.join(map(str, ranks[:_SHOWN]))} than on the first rank that has it, "
        "whose is stored: declare it PerRank(...) if each rank needs its own"
        for place, ranks in conflicts.items()
    ]


def _added(known: dict[str, Any], said: Mapping[str, Any]) -> list[str]:
    """The components to which a rank adds something; ``known`` has it from then on."""
    found = []
    for component, node in said.items():
        merged = merge(known[component], node) if component in known else node
        if component not in known or merged is not known[component]:
            known[component] = merged
            found.append(component)
    return found


def _check_alike(offers: Sequence[Offer]) -> None:
    seen: dict[_Place, tuple[int, Box]] = {}
    problems: list[str] = []
    for rank, offer in enumerate(offers):
        for component, own in offer.boxes.items():
            for box in own:
                first, other = seen.setdefault((component, box.name), (rank, box))
                if (other.shape, other.dtype) != (box.shape, box.dtype):
                    problems.append(
                        f"{component}.{box.name} has {dtype_name(other.dtype)} of shape {other.shape} on rank {first} "
                        f"and {dtype_name(box.dtype)} of shape {box.shape} on rank {rank}"
                    )
    _refuse(problems, "the ranks have different tensors under one name; give what belongs to one rank to PerRank()")


def _check_whole(
    offers: Sequence[Offer], holders: Mapping[tuple[str, str, tuple[int, ...], tuple[int, ...]], Any]
) -> None:
    covered: Counter[_Place] = Counter()
    for component, name, _, lengths in holders:
        covered[component, name] += math.prod(lengths)
    # A rank that has nothing of a tensor does not see to what it is tied.
    tied = {(c, name) for offer in offers for c, named in offer.aliases.items() for name in named}
    shapes = {
        (c, box.name): box.shape
        for offer in offers
        for c, own in offer.boxes.items()
        for box in own
        if covered[c, box.name] or (c, box.name) not in tied
    }
    problems = [
        f"{component}.{name}: the ranks have {covered[component, name]} of {math.prod(shape)} elements"
        for (component, name), shape in shapes.items()
        if covered[component, name] != math.prod(shape)
    ]
    _refuse(problems, "some tensors are not whole on all ranks together (or overlap): is a rank missing in the group?")


def _refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise StateMismatchError(f"{what}:" + "".join(f"\n  {problem}" for problem in problems[:_SHOWN]) + more)
