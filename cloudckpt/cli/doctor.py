"""Everything that can be known about a root before a run depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cloudckpt.core import keys
from cloudckpt.core.model import State
from cloudckpt.core.text import format_bytes
from cloudckpt.errors import CloudCkptError
from cloudckpt.storage import LocalStorage, ManifestStore, Storage
from cloudckpt.storage.probe import probe
from cloudckpt.tools import open_store

__all__ = ["Check", "Report", "examine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the doctor found; ``ok`` if a run can depend on the root."""

    root: str
    ok: bool
    checks: tuple[Check, ...]


def examine(root: str) -> Report:
    """Look at a root. Writes and deletes one probe object where the root already exists."""
    store = open_store(root)
    checks = (*_place(store.storage), *_run(store))
    return Report(root=store.storage.url, ok=all(check.ok for check in checks), checks=checks)


def _place(storage: Storage) -> Iterator[Check]:
    yield Check(name="root", ok=True, detail=storage.url)
    local = getattr(storage, "inner", storage)
    if isinstance(local, LocalStorage):
        try:
            local.check_writable()
        except CloudCkptError as exc:
            yield Check(name="writable", ok=False, detail=str(exc))
            return
        if not local.exists:
            yield Check(name="writable", ok=True, detail="the folder does not exist yet and can be made")
            return
    for step in probe(storage):
        yield Check(name=step.name, ok=step.ok, detail=step.detail or f"{step.seconds * 1000:.1f} ms")


def _run(store: ManifestStore) -> Iterator[Check]:
    try:
        manifest = store.read()
    except CloudCkptError as exc:
        yield Check(name="manifest", ok=False, detail=str(exc))
        return
    if manifest is None:
        yield Check(name="manifest", ok=True, detail="none yet: the first save makes it")
        return
    committed = manifest.committed
    size = format_bytes(sum(entry.size_bytes for entry in committed))
    detail = f"revision {manifest.revision}, {len(committed)} checkpoints, {size}; policy: {manifest.policy}"
    yield Check(name="manifest", ok=True, detail=detail)
    owner = manifest.owner
    if owner is not None:
        word = "closed by" if owner.closed else "held, not closed, by"
        yield Check(name="writer", ok=True, detail=f"epoch {manifest.writer_epoch}, {word} {owner}")
    for entry in manifest.in_state(State.PENDING):
        yield Check(name="upload in flight", ok=True, detail=f"{entry.name}, announced {entry.announced_at}")
    for entry in committed:
        if entry.damaged is not None:
            yield Check(name="damaged", ok=False, detail=f"{entry.name}: {entry.damaged}")
        if entry.held:
            yield Check(name="held", ok=True, detail=f"{entry.name}: admitted by repair, kept until released")
    foreign = [item.key for item in store.storage.list("") if keys.parse(item.key).kind is keys.Kind.FOREIGN]
    if foreign:
        yield Check(name="foreign objects", ok=True, detail=f"{len(foreign)} that are not ours, such as {foreign[0]!r}")
