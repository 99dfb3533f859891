"""Which keys nobody can need. Plans only; the shell deletes (I7, I8, I12).

The order makes it safe, not an age: LIST first, *then* write the manifest by compare-and-swap, then plan with
what that write holds. A listed key was named in some manifest before the listing; if a manifest written
after the listing names its folder no more, nobody ever will again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cloudckpt.core import keys
from cloudckpt.core.model import Manifest, State

__all__ = ["COPIES_KEPT", "GarbagePlan", "Orphan", "plan_garbage"]

#: How many immutable manifest copies stay.
COPIES_KEPT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A key to delete and why nobody can need it."""

    key: str
    size_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GarbagePlan:
    """What a listing holds beside the run.

    Attributes:
        orphans: keys of ours that no entry names: to delete.
        foreign: keys outside our grammar: reported, never touched (I12).
        empty_of: ids of retired entries of which nothing is left: to forget.
    """

    orphans: tuple[Orphan, ...]
    foreign: tuple[str, ...]
    empty_of: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """How many bytes carrying it out would free."""
        return sum(orphan.size_bytes for orphan in self.orphans)


def plan_garbage(manifest: Manifest, listing: Iterable[tuple[str, int]]) -> GarbagePlan:
    """What of ``listing`` (key, size in bytes) nobody can need, by a manifest written after the listing.

    Retired entries' bytes are garbage; so are folders no entry names, manifest copies that are no longer
    among the kept ones, and probes. Pending entries keep everything in their folder; committed ones, to which
    nobody writes any more, everything but the temporary files of puts that never ended.
    """
    entries = {entry.id: entry for entry in manifest.entries}
    parsed = [(keys.parse(key), size) for key, size in listing]
    listed = [key.revision for key, _ in parsed if key.revision is not None]
    # The very write that this plan is made from may have left one, after the listing.
    own = {manifest.revision} & ({*manifest.copies} - {*listed})
    newest_copies = {*sorted([*listed, *own])[-COPIES_KEPT:]}
    orphans: list[Orphan] = []
    for key, size_bytes in parsed:
        reason = None
        if key.id is not None:
            entry = entries.get(key.id)
            if entry is None or entry.step != key.step:
                reason = "no entry of the manifest names its folder"
            elif entry.state is State.RETIRED:
                reason = f"retired: {entry.retired_because}"
            elif entry.state is State.COMMITTED and key.kind is keys.Kind.TEMPORARY:
                reason = "left by a put that never ended"
        elif key.kind is keys.Kind.COPY and key.revision not in newest_copies:
            reason = f"an older copy of the manifest; the newest {COPIES_KEPT} are kept"
        elif key.kind is keys.Kind.PROBE:
            reason = "left by a probe of the store"
        if reason is not None:
            orphans.append(Orphan(key=key.text, size_bytes=size_bytes, reason=reason))
    present = {key.id for key, _ in parsed}
    return GarbagePlan(
        orphans=tuple(orphans),
        foreign=tuple(key.text for key, _ in parsed if key.kind is keys.Kind.FOREIGN),
        empty_of=tuple(e.id for e in manifest.in_state(State.RETIRED) if e.id not in present),
    )
