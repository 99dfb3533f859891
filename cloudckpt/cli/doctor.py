"""Everything that can be known about a root before a run depends on it."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cloudckpt.cli.role_doctor import bucket_of, try_role
from cloudckpt.core import keys
from cloudckpt.core.model import State
from cloudckpt.core.rights import Role
from cloudckpt.core.text import format_bytes
from cloudckpt.errors import CloudCkptError, StorageError
from cloudckpt.storage import (
    Conditions,
    Described,
    Governed,
    LocalStorage,
    ManifestStore,
    PulledFolder,
    RetryingStorage,
    Storage,
    open_store,
)
from cloudckpt.storage.mounts import doubt_about, mount_of, promises
from cloudckpt.storage.probe import probe

__all__ = ["Check", "Report", "examine"]


_ONE_WRITER = "none: only safe with single_writer=True, if no second process ever writes (docs/providers.md)"


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


def examine(root: str, role: Role | None = None) -> Report:
    """Look at a root. Writes and deletes one probe object where the root already exists.

    Args:
        root: the run's folder or URL.
        role: ask for exactly the rights of this role, and for nothing else of the run; only in a bucket.

    Raises:
        ConfigError: the root cannot be used as given, or a role was named and the root is in no bucket.
    """
    store = open_store(root)
    try:
        # How the run is does not matter to a role: a job that may go on must not be kept from it by an old damage.
        checks = (*_place(store.storage, role), *(_run(store) if role is None else ()))
    finally:
        store.storage.close()
    return Report(root=store.storage.url, ok=all(check.ok for check in checks), checks=checks)


def _place(storage: Storage, role: Role | None) -> Iterator[Check]:
    yield Check(name="root", ok=True, detail=storage.url)
    inner = storage.inner if isinstance(storage, RetryingStorage) else storage
    if role is not None:
        bucket_of(inner)  # before anything else is said of it
    if isinstance(inner, LocalStorage):
        yield from (found := tuple(_folder(inner)))
        if not inner.exists or not all(check.ok for check in found if check.name == "writable"):
            return
    if isinstance(inner, PulledFolder):
        yield Check(name="pulled", ok=True, detail="one checkpoint, to be read; nothing is written into it")
        return
    if isinstance(inner, Described):
        try:
            facts = inner.describe()
        except CloudCkptError as exc:
            yield Check(name="connection", ok=False, detail=str(exc))
            return
        for name, detail in facts.items():
            yield Check(name=name, ok=True, detail=detail)
    if role is not None:
        yield from _role(inner, role)
        return
    yield from _rights(inner)
    yield from _rules(inner)


def _folder(storage: LocalStorage) -> Iterator[Check]:
    try:
        storage.check_writable()
    except CloudCkptError as exc:
        yield Check(name="writable", ok=False, detail=str(exc))
        return
    mount = mount_of(Path(storage.url))
    if mount is not None:
        usable, detail = promises(mount.kind)
        if usable and (doubt := doubt_about(mount)) is not None:
            usable, detail = False, doubt
        yield Check(name="file system", ok=usable, detail=detail)
    if not storage.exists:
        yield Check(name="writable", ok=True, detail="the folder does not exist yet and can be made")


def _role(storage: Storage, role: Role) -> Iterator[Check]:
    yield Check(name="role", ok=True, detail=str(role))
    for tried in try_role(storage, role):
        said = _milliseconds(tried.seconds) if tried.problem is None else f"refused: {tried.problem}"
        yield Check(name=tried.verb.value, ok=tried.problem is None, detail=f"{tried.rights}: {said}")


def _rights(storage: Storage) -> Iterator[Check]:
    if storage.conditions is Conditions.ABSENT:
        # What would be probed is our own emulation of them.
        yield Check(name="conditional writes", ok=False, detail=_ONE_WRITER)
        yield from _payload_rights(storage)
        return
    found = probe(storage)
    for step in found.steps:
        yield Check(name=step.name, ok=step.ok, detail=step.detail or _milliseconds(step.seconds))
    if found.conditions is Conditions.UNPROVEN:
        if found.trouble is not None and not found.trouble.retryable:
            return  # whatever else is asked, the answer is the same
        yield Check(name="conditional writes", ok=False, detail="could not be told: a request failed, see above")
    elif found.conditions is Conditions.ABSENT:
        yield Check(name="conditional writes", ok=False, detail=_ONE_WRITER)
    else:
        yield Check(name="conditional writes", ok=True, detail="honoured")
    yield from _payload_rights(storage)


def _payload_rights(storage: Storage) -> Iterator[Check]:
    key = f"{keys.PROBE_PREFIX}{secrets.token_hex(4)}"

    def read() -> None:
        target = bytearray(4)
        storage.read_into(key, 2, memoryview(target))
        if bytes(target) != b"cdef":
            raise StorageError("another range came than was asked for")

    def listed() -> None:
        if [item.size_bytes for item in storage.list(key)] != [8]:
            raise StorageError("the object written last is not in the listing")

    def delete() -> None:
        for problem in storage.delete([key]).values():
            raise problem

    steps: list[tuple[str, Callable[[], object]]] = [
        ("write payload", lambda: storage.put(key, [b"abcdefgh"], size_bytes=8)),
        ("read a range", read),
        ("size", lambda: storage.size(key)),
        ("list", listed),
        (
            "begin and abort a large upload",
            lambda: _large_upload(storage, f"{keys.PROBE_PREFIX}{secrets.token_hex(4)}"),
        ),
        ("list unfinished uploads", lambda: storage.abort_uploads(key)),
        ("delete", delete),
    ]
    for name, ask in steps:
        began = time.monotonic()
        try:
            ask()
        except StorageError as exc:
            yield Check(name=name, ok=False, detail=str(exc))
        else:
            yield Check(name=name, ok=True, detail=_milliseconds(time.monotonic() - began))


def _rules(storage: Storage) -> Iterator[Check]:
    if not isinstance(storage, Governed):
        return
    name = "lifecycle rules"
    try:
        dangers = storage.lifecycle_dangers()
    except CloudCkptError as exc:
        # Whoever trains needs no right to look at them.
        yield Check(name=name, ok=True, detail=f"could not be looked at: {exc}")
        return
    for danger in dangers:
        yield Check(name=name, ok=False, detail=danger)
    if not dangers:
        yield Check(name=name, ok=True, detail="none that would delete a live checkpoint")


class _BrokenOff(Exception):  # noqa: N818 - nothing is wrong
    """Ends an upload before its first byte."""


def _large_upload(storage: Storage, key: str) -> None:
    def buffers() -> Iterator[bytes]:
        yield b""
        raise _BrokenOff

    with contextlib.suppress(_BrokenOff):
        storage.put(key, buffers(), size_bytes=1 << 40)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


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
