"""What a listing tells besides the manifest: the runs under a prefix, and how far uploads in flight have come."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cloudckpt.core import keys
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES, decode_manifest
from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.retention import metric_value
from cloudckpt.core.selection import parse_selector, select
from cloudckpt.errors import CheckpointNotFoundError, FormatError, ObjectNotFoundError, StorageError
from cloudckpt.storage import ManifestStore, Storage
from cloudckpt.view import placed

__all__ = ["RunSummary", "arrived_bytes", "find_runs"]

_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run among several.

    Attributes:
        name: its place below the prefix that was listed.
        url: its root.
        run_id: its id; empty if its manifest cannot be read.
        checkpoints: how many are committed.
        size_bytes: all of these together.
        latest: the newest usable one.
        best: the best one by the run's monitor.
        metric: the monitor.
        best_value: the value of ``best``.
        uploading: how many are on their way.
        closed: whether its last writer has closed it.
        updated_at: when the manifest was written last.
        problem: why the manifest cannot be read, or None.
    """

    name: str
    url: str
    run_id: str = ""
    checkpoints: int = 0
    size_bytes: int = 0
    latest: Checkpoint | None = None
    best: Checkpoint | None = None
    metric: str | None = None
    best_value: float | None = None
    uploading: int = 0
    closed: bool = True
    updated_at: str = ""
    problem: str | None = None


def find_runs(storage: Storage) -> tuple[RunSummary, ...]:
    """The runs below a storage's root, by name. Lists everything below it, and reads each manifest.

    Raises:
        StorageError: the store refused to list, or did not answer.
    """
    suffix = f"/{keys.MANIFEST}"
    names = [item.key.removesuffix(suffix) for item in storage.list("") if item.key.endswith(suffix)]
    if not names:
        return ()
    with ThreadPoolExecutor(min(_AT_ONCE, len(names)), thread_name_prefix="cloudckpt-runs") as pool:
        found = pool.map(lambda name: _summary(storage, name), sorted(names))
        return tuple(summary for summary in found if summary is not None)


def _summary(storage: Storage, name: str) -> RunSummary | None:
    url = f"{storage.url}/{name}"
    try:
        body = storage.read(f"{name}/{keys.MANIFEST}", limit_bytes=MANIFEST_LIMIT_BYTES).body
        manifest = decode_manifest(body, what=f"{url}/{keys.MANIFEST}")
    except ObjectNotFoundError:
        return None  # deleted since it was listed
    except (FormatError, StorageError) as exc:
        if isinstance(exc, StorageError) and exc.retryable:
            raise  # the store is in trouble, not this run
        # The first line: one run that is broken, or not for this user, must not hide the others.
        return RunSummary(name=name, url=url, problem=str(exc).partition("\n")[0])
    committed = manifest.committed
    best = _best(manifest, url)
    rule = manifest.policy.monitor
    return RunSummary(
        name=name,
        url=url,
        run_id=manifest.run_id,
        checkpoints=len(committed),
        size_bytes=sum(entry.size_bytes for entry in committed),
        latest=_latest(manifest, url),
        best=best,
        metric=rule.metric if rule else None,
        best_value=metric_value(best.metrics, rule.metric) if best is not None and rule is not None else None,
        uploading=len(manifest.in_state(State.PENDING)),
        closed=manifest.owner is None or manifest.owner.closed,
        updated_at=manifest.updated_at,
    )


def _latest(manifest: Manifest, url: str) -> Checkpoint | None:
    try:
        return placed(select(manifest, parse_selector("latest")), url)
    except CheckpointNotFoundError:
        return None


def _best(manifest: Manifest, url: str) -> Checkpoint | None:
    if manifest.policy.monitor is None:
        return None
    try:
        return placed(select(manifest, parse_selector("best")), url)
    except CheckpointNotFoundError:
        return None


def arrived_bytes(store: ManifestStore, entries: Iterable[Checkpoint]) -> dict[str, int]:
    """How many bytes of each upload in flight are in place, by save id: one listing each.

    An object that is sent in parts is not there before its last part is: the number grows in steps.

    Raises:
        StorageError: the store refused.
    """
    return {
        entry.id: sum(
            item.size_bytes
            for item in store.storage.list(f"{entry.name}/")
            if keys.parse(item.key).kind in {keys.Kind.PAYLOAD, keys.Kind.INDEX}
        )
        for entry in entries
        if entry.state is State.PENDING
    }
