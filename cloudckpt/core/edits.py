"""The transitions an editor may make beside a running writer: labels, late metrics, and letting go by hand.

None of them bumps the writer epoch or settles a pending save, so a hundred pins disturb no training run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from cloudckpt.core.manifest import change_entry, note, recompute, retire_one
from cloudckpt.core.model import Checkpoint, Manifest, State

__all__ = ["damage", "hold", "mark", "pin", "report_metrics", "retire", "tag"]


def _labelled(
    manifest: Manifest, save_id: str, event: str, *, at: str, detail: str | None = None, **fields: object
) -> Manifest:
    entry = manifest.find(save_id)
    if entry is None or entry.state is State.RETIRED:
        return manifest
    changed = change_entry(manifest, save_id, lambda e: replace(e, **fields))  # type: ignore[arg-type]  # names are literal below
    if changed is manifest:
        return manifest
    return recompute(note(changed, event, at=at, entry=entry, detail=detail))


def pin(manifest: Manifest, save_id: str, *, pinned: bool, at: str) -> Manifest:
    """The manifest in which a checkpoint is pinned (no rule retires it) or no longer is."""
    return _labelled(manifest, save_id, "pin" if pinned else "unpin", at=at, pinned=pinned)


def hold(manifest: Manifest, save_id: str, *, held: bool, at: str) -> Manifest:
    """The manifest in which a repaired entry is held, or released by a person."""
    return _labelled(manifest, save_id, "hold" if held else "release", at=at, held=held)


def tag(
    manifest: Manifest, save_id: str, *, add: Collection[str] = (), remove: Collection[str] = (), at: str
) -> Manifest:
    """The manifest in which a checkpoint carries further tags, or fewer."""
    entry = manifest.find(save_id)
    before: tuple[str, ...] = entry.tags if entry else ()
    kept = [name for name in before if name not in remove]
    tags = (*kept, *(name for name in dict.fromkeys(add) if name not in kept))
    detail = ", ".join([*add, *(f"-{name}" for name in remove)])
    return _labelled(manifest, save_id, "tag", at=at, detail=detail, tags=tags)


def mark(manifest: Manifest, save_id: str, label: str | None, *, at: str) -> Manifest:
    """The manifest in which a checkpoint has a mark such as "diverged"; None takes all marks away.

    A marked one counts in no rule but pinned, and is only loaded by name.
    """
    entry = manifest.find(save_id)
    before: tuple[str, ...] = entry.marks if entry else ()
    marks = () if label is None else tuple(dict.fromkeys([*before, label]))
    return _labelled(manifest, save_id, "unmark" if label is None else "mark", at=at, detail=label, marks=marks)


def damage(manifest: Manifest, save_id: str, reason: str | None, *, at: str) -> Manifest:
    """The manifest in which a checkpoint's bytes are known to be unusable; None takes that back.

    It counts in no rule from now on and is deleted only by a person.
    """
    return _labelled(
        manifest, save_id, "undamaged" if reason is None else "damaged", at=at, detail=reason, damaged=reason
    )


def report_metrics(manifest: Manifest, save_id: str, metrics: Mapping[str, float], *, at: str) -> Manifest:
    """The manifest in which a save has further metrics: pending, they count at its commit; committed, at once."""
    entry = manifest.find(save_id)
    before: Mapping[str, float] = entry.metrics if entry else {}
    detail = ", ".join(f"{name}={value:g}" for name, value in metrics.items())
    return _labelled(manifest, save_id, "metrics", at=at, detail=detail, metrics={**before, **metrics})


def retire(manifest: Manifest, save_ids: Iterable[str], reason: str, *, at: str) -> Manifest:
    """The manifest in which a person let these committed checkpoints go, whatever the rules say."""
    found = [manifest.find(save_id) for save_id in dict.fromkeys(save_ids)]
    going: list[Checkpoint] = [e for e in found if e is not None and e.state is State.COMMITTED]
    changed = manifest
    for entry in going:
        changed = retire_one(changed, entry, reason, event="retire", at=at)
    return recompute(changed) if going else manifest
