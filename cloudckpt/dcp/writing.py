"""What ``dcp.save`` writes with: one save, announced before its first byte and committed after its last.

DCP calls a writer on every rank. The coordinator's keeps the records; each writes its own payload objects, and says in
its ``WriteResult``s what is in them.

(Past 350 lines: the calls of one save are read in their order.)
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, SupportsFloat

from torch.distributed.checkpoint import storage as dcp_storage
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.futures import Future

from cloudckpt import claiming
from cloudckpt.config import Settings
from cloudckpt.core import keys
from cloudckpt.core.arguments import checked_labels, checked_metrics, checked_step
from cloudckpt.core.model import Checkpoint, State
from cloudckpt.core.policy import PolicyWords
from cloudckpt.core.values import Path
from cloudckpt.dcp.place import Place, Root
from cloudckpt.errors import CloudCkptError, ConfigError, ConflictError, SaveError, StorageError
from cloudckpt.events import Listener, Listeners, LoggingListener, Warned
from cloudckpt.saving.recording import Recorder
from cloudckpt.saving.uploading import put_all, tensor_sources
from cloudckpt.storage import GenericFsspecStorage, LocalStorage, ManifestStore
from cloudckpt.tensors.dcp_assembly import Assembled, assemble
from cloudckpt.tensors.dcp_portion import Portion
from cloudckpt.tensors.tree import check_components
from cloudckpt.view import placed

__all__ = ["StorageWriter"]

#: More tensors than this at the top of a state are a model's own: each would become a component with its own objects.
_TOP_LEVEL_TENSORS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Word:
    """What the coordinator tells each rank, within its plan.

    Attributes:
        entry: the save, as announced.
        rank: the rank's number among those that save together.
        paths: where each value of its plan belongs.
    """

    entry: Checkpoint
    rank: int
    paths: Mapping[str, Path]


class StorageWriter(dcp_storage.StorageWriter):
    """Writes one save of ``dcp.save`` or ``dcp.async_save`` into a run: make a new one for the next step.

    The coordinator claims the run as a ``CheckpointManager`` does, and gives it back after the commit. If any rank
    fails, DCP raises on all of them and nothing becomes visible; the next save settles what is left.

    What ``async_save`` stores is the copy that torch makes. Torch 2.6 makes none of what lies on the CPU, whatever the
    writer: don't change such tensors there before its future is done.

    Args:
        root: a folder, a URL, or a storage.
        step: training step, >= 0.
        metrics: what was measured at this step; decides what is best.
        tags: labels; ``tag:NAME`` selects the newest that carries one.
        pin: exempt it from every rule.
        component: a name for the state as a whole, where it is a model's own state dict (tensors at the top). By
            default the state's top-level keys are the components.
        allow_pickle: pickle what nothing else can store, and use planners that give values pickled only.
        single_writer: promise that only one process ever writes, for stores without conditional writes.
        storage_options: passed to the filesystem as they are, and never printed.
        settings: numbers such as deadlines.
        listeners: called with each event on the coordinator, after the log lines.

    Attributes:
        checkpoint: the save: as announced on every rank, as committed on the coordinator; None before.

    Raises:
        ConfigError: an argument cannot be used; says what to write instead.
    """

    def __init__(
        self,
        root: Root,
        *,
        step: int,
        metrics: Mapping[str, SupportsFloat] | None = None,
        tags: Iterable[str] = (),
        pin: bool = False,
        component: str | None = None,
        allow_pickle: bool = False,
        single_writer: bool = False,
        storage_options: Mapping[str, object] | None = None,
        settings: Settings | None = None,
        listeners: Iterable[Listener] = (),
    ) -> None:
        super().__init__()
        self._step = checked_step(step)
        self._metrics = checked_metrics(metrics)
        self._tags = checked_labels(tags, "a tag")
        self._pin = bool(pin)
        self._component = component
        if component is not None:
            check_components({component: None})
        self._allow_pickle = allow_pickle
        self._place = Place(root, storage_options, settings)
        self._single_writer = single_writer
        self._listeners = tuple(listeners)
        self._store: ManifestStore | None = None
        self._recorder: Recorder | None = None
        self._paths: dict[str, Path] = {}
        self._began = 0.0
        self._listener: Listener = Listeners()
        self.checkpoint: Checkpoint | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it spells a step."""
        return str(checkpoint_id).isdecimal()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """See DCP. ``checkpoint_id`` is the step, and can be left out.

        Raises:
            ConfigError: it is another one than this writer's.
        """
        if checkpoint_id is not None and str(checkpoint_id) != str(self._step):
            raise ConfigError(
                f"checkpoint_id={str(checkpoint_id)!r}: this StorageWriter saves step {self._step}. Make a new one for "
                "each step, StorageWriter(root, step=...), and leave checkpoint_id out"
            )

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001 - DCP's
        """See DCP.

        Raises:
            ConfigError: the root cannot be written, or the ranks are not to talk to each other.
        """
        del args
        if not kwargs.get("use_collectives", True):
            raise ConfigError(
                "use_collectives=False: each rank would commit a checkpoint of its own. Leave it out; a rank that "
                "saves alone passes no_dist=True"
            )
        self._began = time.monotonic()
        self._paths = {}
        self._listener = Listeners([LoggingListener(), *self._listeners]) if is_coordinator else Listeners()
        if self._store is None:
            self._store = self._place.open(
                self, single_writer=self._single_writer, tell=lambda text: self._listener(Warned(message=text))
            )
        storage = self._store.unretried
        if isinstance(storage, LocalStorage):
            storage.check_writable()
        if isinstance(storage, GenericFsspecStorage):
            self._listener(Warned(message=f"{storage.url}: {storage.limits}"))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """See DCP.

        Raises:
            ConfigError: the planner goes by a plan that it kept, or has data of its own kind.
        """
        if not getattr(plan, "usable", True):
            raise ConfigError(
                "enable_plan_caching=True: the plan that DCP keeps would write into the folder of an earlier save. "
                "Make the planner without it"
            )
        self._note_paths(plan)
        return plan

    def _note_paths(self, plan: SavePlan) -> None:
        said = plan.planner_data or {}
        if not isinstance(said, Mapping) or not all(map(_is_path, said.values())):
            raise ConfigError(
                f"the planner's planner_data, a {type(said).__qualname__}, is no mapping of names to paths: only that "
                "of DefaultSavePlanner can be stored without pickling it"
            )
        for fqn, path in said.items():
            self._paths.setdefault(fqn, self._below(tuple(path)))

    def _below(self, path: Path) -> Path:
        return path if self._component is None else (self._component, *path)

    def _path_of(self, fqn: str) -> Path:
        return self._paths.get(fqn) or self._below((fqn,))

    # -- the coordinator, before the first byte ----------------------------------------------------------------

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """See DCP. Claims the run and announces the save: when this returns, the manifest names it.

        Raises:
            ConfigError: a component's name cannot be used.
            ConflictError: a newer writer owns the run.
            StorageError: the store refused.
        """
        store = self._opened()
        for plan in plans:
            self._note_paths(plan)
        own = [{item.index.fqn: self._path_of(item.index.fqn) for item in plan.items} for plan in plans]
        check_components({str(path[0]): None for paths in own for path in paths.values()})
        self._warn_of_components(plans)
        if self._recorder is None:
            claim = claiming.claim_run(
                store, PolicyWords(), change_policy=False, takeover="last_wins", listener=self._listener
            )
            self._recorder = Recorder(store, claim, self._listener)
        elif self.checkpoint is not None:
            self._recorder.give_up(self.checkpoint, SaveError("a rank failed"))
        sizes = [_expected(plan, paths) for plan, paths in zip(plans, own, strict=True)]
        entry = Checkpoint(
            id=store.token(8),
            step=self._step,
            seq=0,
            state=State.PENDING,
            writer_epoch=self._recorder.writer_epoch,
            announced_at=store.clock(),
            metrics=self._metrics,
            size_bytes=sum(size for size, _ in sizes),
            object_count=sum(count for _, count in sizes) + 1,
            world_size=len(plans),
            tags=self._tags,
            pinned=self._pin,
        )
        self.checkpoint = placed(entry, store.storage.url)  # from here on there may be something to be settled
        announced = self._recorder.announce(self.checkpoint)
        self.checkpoint = placed(announced, store.storage.url)
        self._recorder.tell_started(announced)
        return [
            replace(plan, storage_data=_Word(entry=self.checkpoint, rank=rank, paths=own[rank]))
            for rank, plan in enumerate(plans)
        ]

    def _warn_of_components(self, plans: Sequence[SavePlan]) -> None:
        top = {i.index.fqn for p in plans for i in p.items if i.tensor_data and len(self._path_of(i.index.fqn)) == 1}
        if len(top) > _TOP_LEVEL_TENSORS:
            self._listener(
                Warned(
                    message=f"the state has {len(top)} tensors at its top, and each becomes a component with payload "
                    'objects of its own: pass StorageWriter(..., component="model"), and the same to StorageReader'
                )
            )

    # -- every rank's own bytes --------------------------------------------------------------------------------

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[dcp_storage.WriteResult]]:
        """See DCP. Returns once this rank's payload objects are in place.

        Raises:
            TypeError: a value cannot be stored; names its path.
            SaveError: a tensor changed meanwhile.
            StorageError: the store refused.
        """
        store, word = self._opened(), plan.storage_data
        if not isinstance(word, _Word):
            raise ConfigError(
                f"{type(planner).__qualname__} does not hand on what the coordinator told this rank in the plan's "
                "storage_data: keep it, as dataclasses.replace(plan, ...) does"
            )
        self._check_agreed(word.entry, store)
        entry = self.checkpoint = word.entry
        portion = Portion(word.rank, entry.world_size, allow_pickle=self._allow_pickle)
        portion.take(plan.items, word.paths, planner)
        payloads = portion.payloads()
        objects, sums = put_all(store.storage, entry, tensor_sources(payloads, store.settings))
        if self._recorder is None:
            self._close()
        future: Future[list[dcp_storage.WriteResult]] = Future()
        future.set_result(portion.results(payloads, objects, sums))
        return future

    def _check_agreed(self, entry: Checkpoint, store: ManifestStore) -> None:
        """Whether the coordinator means the same save as this rank.

        Raises:
            ConfigError: it has another step, or another root.
        """
        if entry.step != self._step:
            raise ConfigError(f"this rank saves step {self._step}, and the coordinator step {entry.step}")
        # A folder may be mounted elsewhere on another node; whether it is the same one is looked at in the end.
        if not isinstance(store.unretried, LocalStorage) and entry.root != store.storage.url:
            raise ConfigError(f"this rank saves to {store.storage.url}, and the coordinator to {entry.root}")

    # -- the coordinator, after the last byte ------------------------------------------------------------------

    def finish(self, metadata: Metadata, results: list[list[dcp_storage.WriteResult]]) -> None:
        """See DCP. When this returns, the save is committed.

        Raises:
            SaveError: it did not become visible.
            ConflictError: a newer writer owns the run.
        """
        recorder, entry = self._recorder, self.checkpoint
        if recorder is None or entry is None:
            raise SaveError("finish() was called on a StorageWriter that announced nothing")
        written = [result for own in results for result in own]
        try:
            _check_complete(metadata, written, entry)
            assembled = assemble(written, {r.index.fqn: self._path_of(r.index.fqn) for r in self._in_order(written)})
            self._check_shared(assembled, entry)
            sealed = recorder.seal(
                entry,
                objects=assembled.objects,
                tensors=assembled.tensors,
                structure=assembled.structure,
                pickled=assembled.pickled,
            )
            committed = recorder.commit(entry, sealed)
        except Exception as exc:
            recorder.give_up(entry, exc)
            if isinstance(exc, SaveError | ConflictError):
                raise
            raise SaveError(
                f"saving step {entry.step} to {entry.url} failed: {exc}. Earlier checkpoints are untouched; training "
                "may go on, and the next save cleans up after this one"
            ) from exc
        metadata.storage_data = {
            MetadataIndex(result.index.fqn, box.chunk.offsets): box.chunk
            for result in written
            if result.storage_data.node is None
            for box in result.storage_data.boxes
        }
        self.checkpoint = placed(committed, entry.root)
        self._end(recorder, committed)

    def _in_order(self, written: Sequence[dcp_storage.WriteResult]) -> Iterator[dcp_storage.WriteResult]:
        """In the order of the state, as far as it is known."""
        order = {fqn: number for number, fqn in enumerate(self._paths)}
        return iter(sorted(written, key=lambda result: order.get(result.index.fqn, len(order))))

    def _check_shared(self, assembled: Assembled, entry: Checkpoint) -> None:
        """On disk: whether what the other ranks wrote is here."""
        storage = self._opened().storage
        for item in assembled.objects if isinstance(self._opened().unretried, LocalStorage) else ():
            try:
                storage.size(keys.payload_key(entry.step, entry.id, item.name))
            except StorageError as exc:
                raise SaveError(
                    f"{entry.url}: {item.name} was written by another rank, and is not here: the ranks do not share "
                    "this disk (or have different working directories). Use a folder on a file system that all nodes "
                    "mount, or an object store (s3://..., gs://...)"
                ) from exc

    def _end(self, recorder: Recorder, committed: Checkpoint) -> None:
        """Whatever comes after a commit: a failure here does not fail the save."""
        # Whether training waits for all of it or goes on beside it is between the caller and DCP.
        recorder.tell_committed(committed, seconds=time.monotonic() - self._began, blocked_seconds=None)
        try:
            recorder.clean_up()
            recorder.close()
        except CloudCkptError as exc:
            self._listener(Warned(message=f"{committed.name} is committed; giving the run back failed: {exc}"))
        self._recorder = None
        self._close()

    def _opened(self) -> ManifestStore:
        if self._store is None:
            raise SaveError("this StorageWriter was not set up: it is for dcp.save(state, storage_writer=...)")
        return self._store

    def _close(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            self._place.close(store)


def _is_path(path: object) -> bool:
    if not isinstance(path, tuple | list) or not path or not isinstance(path[0], str):
        return False
    return all(type(part) in {str, int} for part in path)


def _expected(plan: SavePlan, paths: Mapping[str, Path]) -> tuple[int, int]:
    """Bytes of tensors, and payload objects, of one rank."""
    tensors = [(item.index.fqn, item.tensor_data) for item in plan.items if item.tensor_data is not None]
    size_bytes = sum(math.prod(data.chunk.sizes) * data.properties.dtype.itemsize for _, data in tensors)
    return size_bytes, len({paths[fqn][0] for fqn, _ in tensors})


def _check_complete(metadata: Metadata, written: Sequence[dcp_storage.WriteResult], entry: Checkpoint) -> None:
    """Compare what the ranks report with what was planned.

    Raises:
        SaveError: something is missing, or there is something else.
    """
    planned = set()
    for fqn, said in metadata.state_dict_metadata.items():
        if isinstance(said, TensorStorageMetadata):
            planned |= {MetadataIndex(fqn, chunk.offsets) for chunk in said.chunks}
        else:
            planned.add(MetadataIndex(fqn))
    reported = [result.index for result in written]
    if len(reported) != len(set(reported)) or set(reported) != planned:
        differing = sorted({index.fqn for index in planned ^ set(reported)})
        raise SaveError(
            f"{entry.url}: what the ranks report is not what was planned: {', '.join(differing[:5]) or 'some twice'}"
        )
