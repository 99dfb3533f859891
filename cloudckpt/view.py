"""Reading a run without claiming it, and without torch: what laptops, evaluators and the command line see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from html import escape
from typing import Any

from cloudckpt.core import keys
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES, decode_index, index_digest
from cloudckpt.core.markup import run_html
from cloudckpt.core.model import Checkpoint, Index, JournalEvent, Manifest, State
from cloudckpt.core.retention import PrunePlan, metric_value, plan_prune
from cloudckpt.core.selection import parse_selector, select, select_best
from cloudckpt.core.summary import summary_lines
from cloudckpt.errors import (
    CheckpointNotFoundError,
    CloudCkptError,
    CorruptCheckpointError,
    FormatError,
    ObjectNotFoundError,
)
from cloudckpt.extras import extra
from cloudckpt.storage import ManifestStore, Storage

__all__ = ["RunView", "placed", "read_index", "read_index_body", "read_proven"]


def placed(checkpoint: Checkpoint, root: str) -> Checkpoint:
    """The checkpoint with the URL of the run it was read from."""
    return replace(checkpoint, root=root)


def read_index_body(storage: Storage, checkpoint: Checkpoint) -> bytes:
    """The bytes of a checkpoint's index, as they are.

    Raises:
        ObjectNotFoundError: there is none.
    """
    key = keys.index_key(checkpoint.step, checkpoint.id)
    return storage.read(key, limit_bytes=INDEX_LIMIT_BYTES).body


def read_index(storage: Storage, checkpoint: Checkpoint) -> Index:
    """The index of a committed checkpoint. See ``read_proven``."""
    return read_proven(storage, checkpoint)[0]


def read_proven(storage: Storage, checkpoint: Checkpoint) -> tuple[Index, bytes]:
    """The index of a committed checkpoint and its bytes, proven to be those that were committed.

    Raises:
        CorruptCheckpointError: it is missing, changed, or belongs to another save.
        FormatError: it has a newer format.
        StorageError: the store refused.
    """
    key = keys.index_key(checkpoint.step, checkpoint.id)
    url = f"{storage.url}/{key}"
    try:
        body = read_index_body(storage, checkpoint)
        if checkpoint.index_digest not in {None, index_digest(body)}:
            # Bytes can change on the way as well; what lies in the store like that is found like that again.
            body = read_index_body(storage, checkpoint)
    except ObjectNotFoundError as exc:
        raise CorruptCheckpointError(f"{url} is missing", checkpoint_id=checkpoint.id, key=key) from exc
    if checkpoint.index_digest is not None and index_digest(body) != checkpoint.index_digest:
        raise CorruptCheckpointError(
            f"{url} is not the index that was committed: its digest is {index_digest(body)} and the manifest says "
            f"{checkpoint.index_digest}",
            checkpoint_id=checkpoint.id,
            key=key,
        )
    try:
        index = decode_index(body, what=url)
    except FormatError as exc:
        if "upgrade cloudckpt" in str(exc):
            raise
        raise CorruptCheckpointError(str(exc), checkpoint_id=checkpoint.id, key=key) from exc
    if (index.id, index.step) != (checkpoint.id, checkpoint.step):
        raise CorruptCheckpointError(
            f"{url} describes checkpoint-{index.step}.{index.id}", checkpoint_id=checkpoint.id, key=key
        )
    return index, body


class RunView:
    """What a run holds, read afresh at every question: one GET of the manifest, never a LIST."""

    def __init__(self, store: ManifestStore) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"

    def _repr_html_(self) -> str:
        """For notebooks: the run as it is now. A run that cannot be read is shown as the reason why."""
        try:
            found = self._manifest_or_none()
        except CloudCkptError as exc:
            return f"<p>{escape(self.url)}: {escape(str(exc))}</p>"
        if found is None:
            return f"<p>{escape(self.url)}: nothing was ever saved there</p>"
        return run_html(found, self.url)

    @property
    def url(self) -> str:
        """The root's URL in canonical form."""
        return self._store.storage.url

    def manifest(self) -> Manifest:
        """The manifest as it is now.

        Raises:
            CheckpointNotFoundError: nothing was ever saved here.
            FormatError: the root holds something else, or a manifest that cannot be read.
        """
        found = self._store.read()
        if found is None:
            raise CheckpointNotFoundError(f"{self.url} holds no run: nothing was ever saved there")
        return found

    def _manifest_or_none(self) -> Manifest | None:
        return self._store.read()

    def checkpoints(self, *, state: State | None = State.COMMITTED) -> tuple[Checkpoint, ...]:
        """The checkpoints in one state, oldest first; every entry for ``state=None``. Empty for a new run."""
        found = self._manifest_or_none()
        entries = found.entries if found else ()
        return tuple(placed(e, self.url) for e in entries if state is None or e.state is state)

    def select(self, selector: str | int) -> Checkpoint:
        """The committed checkpoint that ``latest``, ``best``, ``1500``, ``tag:NAME`` or a save id means.

        Raises:
            CheckpointNotFoundError: none does.
            ConfigError: the selector is none of the spellings.
        """
        parsed = parse_selector(selector)
        return placed(select(self.manifest(), parsed), self.url)

    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint that is neither marked nor damaged; None if there is none."""
        return self._or_none(lambda manifest: select(manifest, parse_selector("latest")))

    def best(self, metric: str | None = None, mode: str | None = None) -> Checkpoint | None:
        """The best usable checkpoint by ``metric``, or by the run's monitor; None if none has the metric.

        Raises:
            ConfigError: no metric is monitored and none was given, or without a direction.
        """
        return self._or_none(lambda manifest: select_best(manifest, metric, mode))

    def _or_none(self, choose: Callable[[Manifest], Checkpoint]) -> Checkpoint | None:
        found = self._manifest_or_none()
        try:
            return placed(choose(found), self.url) if found else None
        except CheckpointNotFoundError:
            return None

    def index(self, selector: str | int) -> Index:
        """What a checkpoint contains.

        Raises:
            CheckpointNotFoundError: the selector means nothing.
            CorruptCheckpointError: its index is missing or was changed.
        """
        return read_index(self._store.storage, self.select(selector))

    def plan(self) -> PrunePlan:
        """What the stored policy decides about every committed checkpoint, and why. Changes nothing."""
        found = self.manifest()
        entries = tuple(placed(entry, self.url) for entry in found.entries)
        return plan_prune(entries, found.policy, resumed_from=found.resumed_from)

    def journal(self) -> tuple[JournalEvent, ...]:
        """The last events of the run, oldest first."""
        return self.manifest().journal

    def best_list(self, metric_key: str | None = None) -> tuple[str | None, list[float], list[Checkpoint]]:
        """The metric, its values and the checkpoints kept for it, best first."""
        found = self._manifest_or_none()
        lists = [b for b in (found.best if found else ()) if metric_key in {None, b.metric}]
        if found is None or not lists:
            return metric_key, [], []
        metric = lists[0].metric
        kept = [placed(e, self.url) for e in map(found.find, lists[0].ids) if e is not None]
        return metric, [value for c in kept if (value := metric_value(c.metrics, metric)) is not None], kept

    def get_best_checkpoints_summary(self, metric_key: str | None = None) -> str:
        """The kept best checkpoints as text, in the form of the summary at the end of training."""
        return "\n".join(summary_lines(*self.best_list(metric_key)))

    def to_pandas(self, *, state: State | None = State.COMMITTED) -> Any:
        """The checkpoints in one state as a ``pandas.DataFrame``, oldest first; every entry for ``state=None``.

        A metric called ``loss`` is the column ``metrics.loss``; where a checkpoint lacks it, it is NaN. Times are UTC.

        Raises:
            ConfigError: pandas is not installed.
        """
        pandas = extra("pandas", "pandas", "to_pandas()")
        found = self.checkpoints(state=state)
        metrics = sorted({name for c in found for name in c.metrics})
        times = [c.committed_at for c in found]
        columns: dict[str, Any] = {
            "step": [c.step for c in found],
            "id": [c.id for c in found],
            "state": [str(c.state) for c in found],
            "committed_at": pandas.to_datetime(pandas.Series(times, dtype="object"), utc=True),
            "size_bytes": [c.size_bytes for c in found],
            "world_size": [c.world_size for c in found],
            "pinned": [c.pinned for c in found],
            "tags": [list(c.tags) for c in found],
            "marks": [list(c.marks) for c in found],
            "kept_because": [list(c.kept_because) for c in found],
            "url": [c.url for c in found],
        }
        return pandas.DataFrame(
            columns | {f"metrics.{name}": [c.metrics.get(name, float("nan")) for c in found] for name in metrics}
        )
