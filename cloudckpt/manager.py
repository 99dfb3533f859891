"""The façade: what a training loop holds. It wires the parts and has no ideas of its own.

(Past 350 lines: half of it is the public surface's own description.)
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, SupportsFloat

from cloudckpt import claiming, editing, pruning, sweeping
from cloudckpt.config import Settings
from cloudckpt.coordination import Ballot, Coordinator, ManyRanks, SingleProcess, Verdict, find_group
from cloudckpt.core import edits
from cloudckpt.core import manifest as transitions
from cloudckpt.core.arguments import checked_deadline, checked_labels, checked_metrics, checked_step
from cloudckpt.core.folder import COMPONENT
from cloudckpt.core.model import Checkpoint, Manifest
from cloudckpt.core.policy import INHERIT, Inherit, KeepBest, PolicyWords, resolve
from cloudckpt.core.retention import PrunePlan, metric_value
from cloudckpt.core.selection import Selector, parse_selector, select
from cloudckpt.errors import (
    CheckpointNotFoundError,
    CloudCkptError,
    ConfigError,
    CorruptCheckpointError,
    FencedError,
    RankError,
    SaveError,
    StateMismatchError,
)
from cloudckpt.events import (
    Event,
    Listener,
    Listeners,
    LoggingListener,
    NothingToResume,
    Resumed,
    RunClosed,
    SaveDeclined,
    SaveSkipped,
    Warned,
)
from cloudckpt.filing import FolderState, checked_folder, give_back, staging_folder
from cloudckpt.joining import claim_together
from cloudckpt.loading import Loaded, LoadRequest, load_chosen, restore_chosen
from cloudckpt.pending import PendingSave
from cloudckpt.run import Run
from cloudckpt.saving import Saver, SaveRequest
from cloudckpt.saving.following import Following
from cloudckpt.saving.hurrying import see_through
from cloudckpt.saving.leading import Leading
from cloudckpt.storage import GenericFsspecStorage, LocalStorage, ManifestStore, Storage, open_storage
from cloudckpt.tensors.arena import Arena, positions
from cloudckpt.tensors.forecast import expected_share, optimizer_growth_bytes
from cloudckpt.tensors.overlap import watch
from cloudckpt.tensors.per_rank import PerRankLeaf
from cloudckpt.tensors.planning import Planner
from cloudckpt.view import placed
from cloudckpt.vocabulary import unknown_keyword

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["CheckpointManager"]

_TAKEOVERS = ("last_wins", "refuse", "force")
#: However short the time is, the others are on their way into the same call.
_LEAST_VOTE_S = 5.0


def _warn_unclosed(url: str) -> None:
    warnings.warn(
        f"a CheckpointManager of {url} was never closed: use it in a with statement, or call close()",
        ResourceWarning,
        stacklevel=2,
    )


class CheckpointManager(Run):
    """Keeps the checkpoints of one training run.

    It reads like a ``Run`` and becomes the run's *writer* at its first ``restore()`` or ``save()``: from then on
    an older process on the same root is fenced.

    Args:
        root: a folder such as ``./runs/demo``, a URL, or a ``Storage``.
        monitor: the metric that "best" means; a run remembers it.
        mode: "min" or "max"; needed with ``monitor`` on a new run, never guessed.
        keep_last: keep the newest N by commit order; None keeps all. New runs start with 3.
        keep_best: keep the best K by ``monitor``, on top of the last N; None keeps all; or a list of
            ``KeepBest`` rules. New runs with a monitor start with 1.
        keep_every: keep every checkpoint whose step is a multiple of N.
        keep_within: keep what was committed within this many seconds of the newest.
        keep_unscored: under a monitor, keep the newest N that lack the metric (2).
        change_policy: allow another metric or direction than the run was started with.
        takeover: what to do about an earlier writer that has not closed: "last_wins", "refuse", or "force",
            which also overrules the refusal of a duel.
        single_writer: promise that only one process ever writes, for stores without conditional writes, and for
            takeover="refuse" on disks whose locks do not keep other machines out.
        allow_pickle: pickle leaves that nothing else can store, and load them again.
        storage_options: passed to the filesystem as they are, and never printed.
        process_group: the ranks that save together; all ranks of the job where ``torch.distributed`` is initialised.
            False: this process saves alone, whatever other ranks there are.
        settings: numbers such as deadlines.
        listeners: called with each event, after the log lines.

    Policy words that are left out inherit the run's stored policy.

    Raises:
        TypeError: an unknown keyword, with its translation.
        ConfigError: a setting cannot be used; says what to write instead.
        StorageError: the root can never be written.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Storage,
        *,
        monitor: str | Inherit | None = INHERIT,
        mode: str | Inherit | None = INHERIT,
        keep_last: int | Inherit | None = INHERIT,
        keep_best: int | Sequence[KeepBest] | Inherit | None = INHERIT,
        keep_every: int | Inherit | None = INHERIT,
        keep_within: float | Inherit | None = INHERIT,
        keep_unscored: int | Inherit = INHERIT,
        change_policy: bool = False,
        takeover: str = "last_wins",
        single_writer: bool = False,
        allow_pickle: bool = False,
        storage_options: Mapping[str, object] | None = None,
        process_group: ProcessGroup | Literal[False] | None = None,
        settings: Settings | None = None,
        listeners: Iterable[Listener] = (),
        **unknown: object,
    ) -> None:
        for word in unknown:
            raise unknown_keyword("CheckpointManager", word, _keywords(CheckpointManager.__init__))
        if takeover not in _TAKEOVERS:
            raise ConfigError(f"takeover={takeover!r}: write one of {', '.join(_TAKEOVERS)}")
        group = find_group(process_group)
        self._words = PolicyWords(
            monitor=monitor,
            mode=mode,
            keep_last=keep_last,
            keep_best=keep_best,
            keep_every=keep_every,
            keep_within_s=keep_within,
            keep_unscored=keep_unscored,
        )
        self._check_words()
        storage = open_storage(root, storage_options=storage_options, settings=settings)
        if isinstance(storage, LocalStorage):
            storage.check_writable()
        listener = Listeners([LoggingListener(group.rank if group else 0), *listeners])
        store = ManifestStore(
            storage, settings, single_writer=single_writer, tell=lambda text: listener(Warned(message=text))
        )
        super().__init__(store, listener, allow_pickle=allow_pickle)
        if isinstance(storage, GenericFsspecStorage):
            listener(Warned(message=f"{storage.url}: {storage.limits}"))
        self._change_policy = change_policy
        self._takeover = takeover
        timeout_s = store.settings.coordination_timeout_s
        self._coordinator: Coordinator = ManyRanks(group, timeout_s=timeout_s) if group else SingleProcess()
        if store.settings.stage == "overlap":
            watch()  # early: steps that are compiled or captured from here on are seen
        self._planner = Planner(self._coordinator.rank, self._coordinator.world_size)
        self._arena = Arena(store.settings.staging_limit_bytes, tell=lambda text: listener(Warned(message=text)))
        self._saver: Saver | None = None
        self._claim: claiming.Claim | None = None
        self._closed = False
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._inside: int | None = None
        self._warned: set[str] = set()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def _check_words(self) -> None:
        # As far as can be known without the stored policy: a wrong word fails here, not at the first save.
        direction_may_be_stored = isinstance(self._words.monitor, str) and isinstance(self._words.mode, Inherit)
        monitor_may_be_stored = isinstance(self._words.monitor, Inherit)
        if not direction_may_be_stored and not (
            monitor_may_be_stored and not isinstance(self._words.keep_best, Sequence)
        ):
            resolve(self._words, None, has_entries=False)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process is rank zero of those that save together: what is done once for all, it does."""
        return self._coordinator.rank == 0

    # -- becoming the writer ---------------------------------------------------------------------------------

    def _check_usable(self) -> None:
        if self._closed:
            raise ConfigError(f"this manager of {self.url} is closed: make a new one")

    def _check_process(self) -> None:
        if self._forked:
            raise ConfigError(
                f"this manager of {self.url} came into this process by a fork: its threads and its memory did not, and "
                "the run belongs to the process that made it. Save there; to read here, use cloudckpt.open()"
            )

    @property
    def _forked(self) -> bool:
        return self._pid != os.getpid()

    def _writer(self) -> Saver:
        self._check_usable()
        if self._saver is None:
            self._claim, writer_epoch = claim_together(self._store, self._coordinator, self._claimed)
            side: Leading | Following
            if self._claim is not None:
                side = Leading(self._store, self._claim, self._coordinator, self._listener)
            else:
                side = Following(self._coordinator)
            self._saver = Saver(
                self._store,
                side,
                self._coordinator,
                self._listener,
                writer_epoch=writer_epoch,
                planner=self._planner,
                arena=self._arena,
            )
            self._saver.hurry(hurried=self._store.hurry_until is not None)  # before anything can be deleted
            if isinstance(side, Leading):
                self._saver.submit(side.clean_up_after_others)
            self._finalizer = weakref.finalize(self, _warn_unclosed, self.url)
            self._finalizer.atexit = False
        return self._saver

    def _claimed(self) -> claiming.Claim:
        return claiming.claim_run(
            self._store,
            self._words,
            change_policy=self._change_policy,
            takeover=self._takeover,
            listener=self._listener,
        )

    def _vote(self, ballot: Ballot) -> Verdict:
        return self._coordinator.vote(replace(ballot, root=self.url if self._shares_url else ""))

    @property
    def _shares_url(self) -> bool:
        # A folder may be mounted elsewhere on another node; whether it is the same one is looked at.
        return not isinstance(self._store.unretried, LocalStorage)

    @contextlib.contextmanager
    def _refusals_told(self, call: str) -> Iterator[None]:
        """Bad arguments on one rank: the others are waiting for its vote."""
        try:
            yield
        except (TypeError, ValueError) as exc:
            if self._coordinator.world_size > 1 and not self._forked:
                with contextlib.suppress(RankError):
                    self._vote(Ballot(call=call, problem=str(exc)))
            raise

    # -- saving ----------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        state: Mapping[str, object],
        *,
        metrics: Mapping[str, SupportsFloat] | None = None,
        tags: Iterable[str] = (),
        pin: bool = False,
        block: bool = False,
        deadline_s: float | None = None,
        **unknown: object,
    ) -> PendingSave:
        """Save ``state`` as of ``step``. Returns once the state may change again; the upload goes on in the background.

        Args:
            step: training step, >= 0. Saving a step again makes another checkpoint.
            state: component -> module, optimizer, anything with a state dict, tensor, or plain values.
            metrics: what was measured at this step; decides what is best.
            tags: labels; ``tag:NAME`` selects the newest that carries one.
            pin: exempt it from every rule.
            block: return only once it is committed. The tensors are sent from where they are, without a copy: nothing,
                in no thread, may change them meanwhile. A change that torch counts fails the save and names the tensor.
            deadline_s: how long there is, in seconds, in a process that is about to be ended: what
                ``PreemptionGuard.left_s`` says. The save in flight is finished first. This one is begun only if the
                slowest of the last three would fit into 70 % of what is left, or if none was measured yet; otherwise a
                warning says why not, and ``wait()`` on what is returned raises. It blocks like ``block``, until the
                commit or the deadline, and no bytes are deleted: what the rules let go waits for the next start. None:
                there is no hurry.

        Returns:
            the save on its way. If nobody waits for it, what goes wrong is raised by the next call or ``close()``.

        Raises:
            TypeError: something in the state cannot be stored (names its path), or an unknown keyword.
            ConfigError: a bad step, metric, tag or state. Nothing was announced.
            SaveError: an earlier save failed and nobody was told yet (with a deadline this one is tried first, and the
                earlier failure is raised by the call after it, unless this one is committed); or, with ``block=True``
                or a deadline, this one failed.
            ConflictError: a newer writer owns the run, or it was changed under this process.
        """
        for word in unknown:
            raise unknown_keyword("save", word, _keywords(CheckpointManager.save))
        with self._refusals_told("save"):
            within_s = checked_deadline(deadline_s)
            request = self._request(step, state, metrics, tags, pin=pin, block=bool(block) or deadline_s is not None)
            components = tuple(map(str, state))
        return self._save(request, components, within_s=within_s)

    def _request(
        self,
        step: int,
        state: Mapping[str, object],
        metrics: Mapping[str, SupportsFloat] | None,
        tags: Iterable[str],
        *,
        pin: bool,
        block: bool,
    ) -> SaveRequest:
        return SaveRequest(
            step=checked_step(step),
            state=state,
            metrics=checked_metrics(metrics),
            tags=checked_labels(tags, "a tag"),
            pin=bool(pin),
            block=bool(block),
            allow_pickle=self._allow_pickle,
        )

    def _save(self, request: SaveRequest, components: tuple[str, ...], *, within_s: float | None = None) -> PendingSave:
        began = time.monotonic()
        until = None if within_s is None else began + within_s
        with self._one_at_a_time("save"):
            self._check_usable()
            # Whoever waits for this save does not want another one's outcome.
            may_skip = self._store.settings.on_busy == "skip" and not request.block
            last = self._saver.last if self._saver is not None and may_skip else None
            busy = last is not None and not last.done()
            ballot = Ballot(
                call="save",
                step=request.step,
                components=components,
                options=f"block={request.block}" + (", deadline_s" if until is not None else ""),
                busy=busy,
                within_s=None if within_s is None else max(_LEAST_VOTE_S, round(within_s, 1)),
            )
            self._store.hurry_until = until
            if self._vote(ballot) is Verdict.SKIP and last is not None:
                if self._coordinator.rank == 0:
                    self._listener(SaveSkipped(step=request.step, busy_with=last.checkpoint.name))
                return last
            saver = self._writer()
            saver.hurry(hurried=until is not None)
            if until is not None and not (judgement := saver.judge(request, until)).go:
                return self._decline(saver, request, judgement.reason)

            def ready() -> None:
                if until is None:  # otherwise that was done, and what failed earlier is told after this one
                    self._wait_for_save()
                if self._coordinator.rank == 0:
                    self._warn_about_metrics(request)

            pending = saver.start(request, began, ready=ready)
        if until is not None:
            return see_through(pending, until)
        pending.wait_for_state()
        if request.block:
            pending.wait()
        return pending

    def save_folder(
        self,
        step: int,
        folder: str | os.PathLike[str],
        *,
        metrics: Mapping[str, SupportsFloat] | None = None,
        tags: Iterable[str] = (),
        pin: bool = False,
        block: bool = False,
        **unknown: object,
    ) -> PendingSave:
        """Save the files of a folder as of ``step``: what a host library has written there, whatever it is.

        A save like any other, with the same rules; ``restore_folder`` gives the files back. Of several ranks each calls
        it; the files of one machine are stored once, those of several machines make one folder, and where rank zero is
        there must be some. When it returns, the folder may be changed or removed. A file that is written to before that
        fails the save, and one that is cut short ends the process, as its pages are mapped. With ``block=True`` the
        files are sent from where they are, and take no memory here.

        Kept are the bytes of all files and their paths in the folder; not their times, owners and modes, and no empty
        folders.

        Args:
            step: training step, >= 0.
            folder: a folder of this machine with at least one file.
            metrics: what was measured at this step; decides what is best.
            tags: labels; ``tag:NAME`` selects the newest that carries one.
            pin: exempt it from every rule.
            block: return only once it is committed.

        Raises:
            ConfigError: the folder is empty, or holds something that is no file; or a bad step, metric or tag.
            SaveError: a file was written to while it was being saved; names it.
            CloudCkptError: as ``save``.
        """
        for word in unknown:
            raise unknown_keyword("save_folder", word, _keywords(CheckpointManager.save_folder))
        with self._refusals_told("save"):
            taken = FolderState(checked_folder(folder), needed=self.is_rank_zero)
            request = self._request(step, {COMPONENT: taken}, metrics, tags, pin=pin, block=block)
        return self._save(replace(request, confirm=taken.confirm), (COMPONENT,))

    @contextlib.contextmanager
    def staging(
        self,
        step: int,
        *,
        metrics: Mapping[str, SupportsFloat] | None = None,
        tags: Iterable[str] = (),
        pin: bool = False,
        block: bool = False,
        within: str | os.PathLike[str] | None = None,
    ) -> Iterator[Path]:
        """An empty folder for a host library to write into; what is in it at the end is saved as of ``step``.

        ``with ckpts.staging(step) as folder: accelerator.save_state(folder)``. All ranks enter it, those of one machine
        get the same folder, and each may write some of the files. It is removed once the save has ended. If the body
        raises, on any rank, nothing is saved. See ``save_folder``.

        Args:
            step: training step, >= 0.
            metrics: what was measured at this step; looked at when the body has ended.
            tags: labels; ``tag:NAME`` selects the newest that carries one.
            pin: exempt it from every rule.
            block: return only once it is committed.
            within: where the folder is made; the system's place for temporary files by default. It needs room for the
                whole checkpoint.

        Raises:
            RankError: the body raised on another rank.
            StorageError: the folder cannot be made.
            CloudCkptError: as ``save_folder``.
        """
        with self._refusals_told("staging"):
            step, labels = checked_step(step), checked_labels(tags, "a tag")
            parent = checked_folder(within if within is not None else tempfile.gettempdir())
        self._check_process()
        self._check_usable()
        self._vote(Ballot(call="staging", step=step))
        folder = staging_folder(self._coordinator, parent)
        pending: PendingSave | None = None
        try:
            try:
                yield folder.path
            except Exception as exc:
                # The others are done writing, and wait for this rank in save().
                if self._coordinator.world_size > 1:
                    with contextlib.suppress(RankError):
                        self._vote(Ballot(call="save", step=step, problem=f"{type(exc).__name__}: {exc}"))
                raise
            pending = self.save_folder(step, folder.path, metrics=metrics, tags=labels, pin=pin, block=block)
        finally:
            if pending is None:
                folder.remove()
            else:
                pending.when_done(folder.remove)

    def _decline(self, saver: Saver, request: SaveRequest, reason: str) -> PendingSave:
        newest = self._newest()
        last = None if newest is None else placed(newest, self.url)
        self._tell_once(SaveDeclined(step=request.step, reason=reason, last=last))
        return saver.declined(request, reason)

    def _newest(self) -> Checkpoint | None:
        """What a restore would choose, as far as this process knows without asking."""
        manifest = self._store.last_seen
        try:
            return select(manifest, parse_selector("latest")) if manifest else None
        except CheckpointNotFoundError:
            return None

    @contextlib.contextmanager
    def _one_at_a_time(self, call: str) -> Iterator[None]:
        """Threads queue up: there is one arena, and one writer to become. A signal handler cannot queue up."""
        self._check_process()  # first: a lock may have been held when the process forked
        me = threading.get_ident()
        if self._inside == me:
            raise SaveError(
                f"{call}() was called while this very thread was saving, from a signal handler perhaps: set a flag "
                "there, and save when the training loop sees it"
            )
        with self._mutex:
            self._inside = me
            try:
                yield
            finally:
                self._inside = None

    def _warn_about_metrics(self, request: SaveRequest) -> None:
        manifest = self._store.last_seen
        for rule in manifest.policy.keep_best if manifest else ():
            if rule.metric not in request.metrics:
                stand_in = f"eval_{rule.metric}"
                if stand_in in request.metrics:
                    self._warn_once(
                        f"stand-in:{rule.metric}", f"{rule.metric!r} is not among the metrics; {stand_in!r} stands in"
                    )
                else:
                    given = ", ".join(sorted(request.metrics)) or "none"
                    self._warn_once(
                        f"missing:{rule.metric}",
                        f"the run keeps its best by {rule.metric!r}, and step {request.step} has no such metric (given "
                        f"{given}): pass save(..., metrics={{{rule.metric!r}: value}}), or report_metrics() later",
                    )
            elif metric_value(request.metrics, rule.metric) is None:
                self._listener(
                    Warned(
                        message=f"step {request.step}: {rule.metric}={request.metrics[rule.metric]} is never best; the "
                        "checkpoint is kept as recent only"
                    )
                )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._listener(Warned(message=message))

    def prepare(self, state: Mapping[str, object]) -> None:
        """Begin to make the host memory for saves of this state: the first save then blocks no longer than later ones.

        Returns at once; ``wait()`` waits until it is made, and a save that comes earlier waits for no more than it
        needs. What an optimizer will hold after its first step is counted in. A connection to the store is opened as
        well. Nothing is announced or written. ``restore(state)`` does all of this by itself.

        Raises:
            TypeError: something in the state cannot be stored; names its path.
            ConfigError: the manager is closed, or came into this process by a fork.
        """
        with self._one_at_a_time("prepare"):
            self._check_usable()
            self._wait_for_save()
            self._prepare(state, 0)
            if self._saver is None and self._coordinator.rank == 0:
                self._store.connect()

    def _prepare(self, state: Mapping[str, object], at_least_bytes: int) -> None:
        ranks = self._coordinator.world_size
        if ranks == 1:
            plan = self._planner.plan(state, allow_pickle=self._allow_pickle)
            _, now_bytes = positions([payload.size_bytes for payload in plan.payloads])
            on_gpu = any(tensor.is_cuda for payload in plan.payloads for tensor in payload.tensors)
        else:
            now_bytes, on_gpu = expected_share(self._planner.look(state, allow_pickle=self._allow_pickle), ranks)
        size_bytes = max(now_bytes + optimizer_growth_bytes(state) // ranks, at_least_bytes // ranks)
        try:
            self._arena.prepare(size_bytes, pinned=on_gpu)
        except MemoryError as exc:
            self._warn_once("memory", f"{exc}. Saves will send the tensors from where they are, and block until then")

    def _prepare_quietly(self, state: Mapping[str, object], at_least_bytes: int = 0) -> None:
        # Whatever is wrong with the state is the save's to refuse: whoever restores may never save.
        with self._one_at_a_time("restore"), contextlib.suppress(Exception):
            self._prepare(state, at_least_bytes)

    def wait(self) -> None:
        """Wait for the save in flight, and raise what it or an earlier one failed with. Waits for ``prepare`` as well.

        Raises:
            SaveError: it did not become visible.
            ConflictError: a newer writer owns the run.
        """
        self._check_process()
        self._wait_for_save()
        self._arena.wait_prepared()

    def _wait_for_save(self) -> None:
        if self._saver is not None:
            if (in_flight := self._saver.busy_with) is not None:
                in_flight.wait_quietly()
            self._saver.raise_failure()

    # -- restoring -------------------------------------------------------------------------------------------

    def restore(
        self,
        state: Mapping[str, object],
        select: str | int = "latest",
        *,
        strict: bool = True,
        components: Collection[str] | None = None,
        strict_world_size: bool = True,
        **unknown: object,
    ) -> Checkpoint | None:
        """Fill the objects of ``state`` in place from a checkpoint; None if the run has never committed any.

        Names, shapes and dtypes are compared before any byte moves. Then the bytes are read straight into the tensors
        of ``state`` where these can take them, and proven on the way: no second copy in memory. Only proven damage
        makes it try an earlier checkpoint; a fault of the network is raised. An error that comes while bytes are being
        read leaves the tensors partly overwritten, and says so; ``Settings(read_in_place=False)`` reads and proves
        everything before it touches them.

        Args:
            state: what ``save()`` was given, as fresh objects. Plain values are replaced in the mapping.
            select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.
            strict: whether names and shapes must match exactly; otherwise what does not fit is warned about.
            components: restore only these top-level keys of the state.
            strict_world_size: whether state declared ``PerRank`` must have been saved by as many ranks as there are;
                otherwise each rank gets its own where there is one.

        Raises:
            StateMismatchError: the state does not fit, or has tensors without memory of their own; lists the names.
                Nothing was changed.
            CheckpointNotFoundError: checkpoints exist, and none matches.
            CorruptCheckpointError: the named checkpoint is damaged, or none is left that is not.
            ConflictError: another job holds the run and ``takeover="refuse"``, or two jobs fight over it.
            StorageError: the store refused; training is never silently started from the beginning.
        """
        for word in unknown:
            raise unknown_keyword("restore", word, _keywords(CheckpointManager.restore))
        with self._refusals_told("restore"):
            selector = parse_selector(select)
            chosen_state = self._part(state, components)
        began = time.monotonic()
        options = f"select={select!r}, strict={strict}, strict_world_size={strict_world_size}"
        manifest, is_new = self._begin_restore(selector, tuple(chosen_state), options)
        if is_new:
            self._prepare_quietly(state)
            self._tell_once(NothingToResume(url=self.url))
            return None
        request = LoadRequest(
            selector=selector,
            allow_pickle=self._allow_pickle,
            optional=tuple(chosen_state),
            per_rank=PerRankLeaf(self._coordinator.rank, self._coordinator.world_size if strict_world_size else None),
            listener=self._listener,
            rank=self._coordinator.rank,
        )
        loaded = restore_chosen(
            self._store,
            manifest,
            request,
            chosen_state,
            coordinator=self._coordinator,
            strict=strict,
            on_damage=self._record_damage,
            on_problem=lambda problem: self._listener(Warned(message=f"restore(strict=False): {problem}")),
        )
        if components is not None and isinstance(state, dict):
            state.update(chosen_state)
        self._protect(loaded)
        _, saved_bytes = positions([item.size_bytes for item in loaded.index.objects])
        self._prepare_quietly(state, saved_bytes if components is None else 0)
        self._tell_once(
            Resumed(
                checkpoint=loaded.checkpoint,
                seconds=time.monotonic() - began,
                components=tuple(name for name in chosen_state if name in loaded.values),
                not_restored=tuple(
                    name for name in loaded.index.structure if name not in chosen_state and components is None
                ),
            )
        )
        return loaded.checkpoint

    def restore_folder(
        self, into: str | os.PathLike[str], select: str | int = "latest", **unknown: object
    ) -> Path | None:
        """Give the files of a checkpoint back that was saved from a folder; None if the run has never committed any.

        As ``restore``, for host libraries that read a folder themselves: the run is claimed, only proven damage leads
        to an earlier checkpoint, and what is gone on with is protected. Of several ranks each calls it, and one of each
        machine reads. See ``load_folder``.

        Args:
            into: a folder of this machine, made if need be.
            select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.

        Returns:
            ``<into>/checkpoint-<step>``, on every rank.

        Raises:
            CheckpointNotFoundError: checkpoints exist, and none matches.
            CorruptCheckpointError: the named checkpoint is damaged, or none is left that is not.
            FormatError: it was not saved from a folder.
            ConfigError: ``into`` is no folder of this machine.
            ConflictError: another job holds the run and ``takeover="refuse"``, or two jobs fight over it.
            StorageError: the store or the disk refused; training is never silently started from the beginning.
        """
        for word in unknown:
            raise unknown_keyword("restore_folder", word, _keywords(CheckpointManager.restore_folder))
        with self._refusals_told("restore"):
            selector, folder = parse_selector(select), checked_folder(into)
        began = time.monotonic()
        manifest, is_new = self._begin_restore(selector, (COMPONENT,), f"select={select!r}")
        if is_new:
            self._tell_once(NothingToResume(url=self.url))
            return None
        loaded, target = give_back(
            self._store,
            manifest,
            selector,
            folder,
            coordinator=self._coordinator,
            on_damage=self._record_damage,
            listener=self._listener,
        )
        self._go_on_from(loaded, began)
        return target

    def restore_values(self, select: str | int = "latest", **unknown: object) -> dict[str, Any] | None:
        """The values of a checkpoint to go on from, by component; None if the run has never committed any.

        As ``restore``, for host libraries that fill their objects themselves: the run is claimed, only proven damage
        leads to an earlier checkpoint, and what is gone on with is protected. The values are as from ``load``, but of
        what each rank has for itself (``PerRank``) a rank gets its own.

        Args:
            select: ``latest``, ``best``, a step, ``tag:NAME`` or a save id.

        Raises:
            CheckpointNotFoundError: checkpoints exist, and none matches.
            CorruptCheckpointError: the named checkpoint is damaged, or none is left that is not.
            StateMismatchError: another number of ranks saved state of their own.
            ConflictError: another job holds the run and ``takeover="refuse"``, or two jobs fight over it.
            StorageError: the store refused; training is never silently started from the beginning.
        """
        for word in unknown:
            raise unknown_keyword("restore_values", word, _keywords(CheckpointManager.restore_values))
        with self._refusals_told("restore"):
            selector = parse_selector(select)
        began = time.monotonic()
        manifest, is_new = self._begin_restore(selector, (), f"select={select!r}")
        if is_new:
            self._tell_once(NothingToResume(url=self.url))
            return None
        own = PerRankLeaf(self._coordinator.rank, self._coordinator.world_size)
        request = LoadRequest(
            selector=selector,
            allow_pickle=self._allow_pickle,
            per_rank=own,
            listener=self._listener,
            rank=self._coordinator.rank,
        )
        loaded = load_chosen(
            self._store, manifest, request, coordinator=self._coordinator, on_damage=self._record_damage
        )
        self._go_on_from(loaded, began)
        return loaded.values

    def _go_on_from(self, loaded: Loaded, began: float) -> None:
        """Protect it, and say so."""
        self._protect(loaded)
        self._tell_once(
            Resumed(
                checkpoint=loaded.checkpoint,
                seconds=time.monotonic() - began,
                components=tuple(loaded.values),
                not_restored=tuple(name for name in loaded.index.structure if name not in loaded.values),
            )
        )

    def _begin_restore(
        self, selector: Selector, components: tuple[str, ...], options: str
    ) -> tuple[Manifest | None, bool]:
        """Become the writer with no save in flight; what there is to choose from, and whether there is nothing."""
        with self._one_at_a_time("restore"):
            self._check_usable()
            self._vote(Ballot(call="restore", components=components, options=options))
            claimed_before = self._saver is not None
            self._writer()
            self._agree_ready()
        return self._manifest_to_restore(claimed_before=claimed_before, named=selector.named)

    def _manifest_to_load(self, asked: str) -> Manifest | None:
        if self._coordinator.world_size == 1:
            return self.manifest()
        self._check_process()
        self._vote(Ballot(call="load", options=asked))
        read: list[Manifest] = []

        def current(words: Sequence[bytes]) -> list[bytes]:
            read.append(self.manifest())
            return [b""] * len(words)

        self._coordinator.exchange("manifest", b"", current, patient=True)
        return read[0] if read else None

    def _agree_ready(self) -> None:
        """Wait for the save in flight; what it failed with on any rank is raised on all."""
        word: bytes | BaseException = b""
        try:
            self._wait_for_save()
        except BaseException as exc:  # noqa: BLE001 - raised by the exchange
            word = exc
        self._coordinator.exchange("ready", word, lambda words: words, patient=True)

    def _manifest_to_restore(self, *, claimed_before: bool, named: bool) -> tuple[Manifest | None, bool]:
        """What rank zero chooses from, the others choose nothing; and whether there is nothing to resume."""
        read: list[Manifest] = []

        def current(words: Sequence[bytes]) -> list[bytes]:
            assert self._claim is not None
            # A claim has just read it. Later, others may have reported metrics, tagged or marked since.
            found = (self._store.read() if claimed_before else self._store.last_seen) or self._claim.manifest
            read.append(found)
            is_new = found.commits == 0 and not found.committed and not named
            return [b"new" if is_new else b"go on"] * len(words)

        is_new = self._coordinator.exchange("start", b"", current, patient=True) == b"new"
        return (read[0] if read else None), is_new

    def _tell_once(self, event: Event) -> None:
        if self._coordinator.rank == 0:
            self._listener(event)

    @staticmethod
    def _part(state: Mapping[str, object], components: Collection[str] | None) -> Mapping[str, object]:
        if not isinstance(state, Mapping) or not state:
            raise ConfigError('the state must be a mapping such as {"model": model, "optimizer": optimizer}')
        if components is None:
            return state
        if isinstance(components, str):
            raise ConfigError(f"components={components!r}: expected a list, write [{components!r}]")
        if unknown := [name for name in components if name not in state]:
            raise StateMismatchError(f"the state has no component {', '.join(map(repr, unknown))}")
        return {name: state[name] for name in components}

    def _record_damage(self, checkpoint: Checkpoint, error: CorruptCheckpointError) -> None:
        self._on_damage(checkpoint, error)
        self._store.transact(
            lambda m, _: edits.damage(m, checkpoint.id, str(error)[:500], at=self._store.clock()),
            prepare=lambda _: None,
        )

    def _protect(self, loaded: Loaded) -> None:
        """Keep what is gone on with until the first commit; on every rank it is known whether that was written."""

        def protected(words: Sequence[bytes]) -> list[bytes]:
            held, newest = self._claim, self._newest()
            if held is not None and (newest is None or loaded.checkpoint.id != newest.id):
                self._store.transact(
                    lambda m, _: transitions.resume_from(
                        m, loaded.checkpoint.id, writer_epoch=held.writer_epoch, at=self._store.clock()
                    ),
                    prepare=lambda _: None,
                )
            return [b""] * len(words)

        self._coordinator.exchange("protect", b"", protected, patient=True)

    # -- labels, metrics, retention --------------------------------------------------------------------------

    def _announced(self) -> ManifestStore:
        # Right after save() the announce may still be under way, and what is meant is not in the manifest yet.
        if self._saver is not None and not self._forked and (in_flight := self._saver.busy_with) is not None:
            in_flight.wait_announced()
        return self._store

    def pin(self, select: str | int) -> Checkpoint:
        """Exempt a checkpoint from every rule. See ``editing.pin``."""
        return editing.pin(self._announced(), select)

    def unpin(self, select: str | int) -> Checkpoint:
        """Give a pinned checkpoint back to the rules. See ``editing.pin``."""
        return editing.pin(self._announced(), select, pinned=False)

    def tag(self, select: str | int, *tags: str, remove: Iterable[str] = ()) -> Checkpoint:
        """Give a checkpoint further tags, or take some away. See ``editing.tag``."""
        return editing.tag(self._announced(), select, add=tags, remove=remove)

    def mark(self, select: str | int, label: str | None) -> Checkpoint:
        """Mark a checkpoint, such as "diverged": nothing selects it unless named. See ``editing.mark``."""
        return editing.mark(self._announced(), select, label)

    def release(self, select: str | int) -> Checkpoint:
        """Give a checkpoint that ``repair`` holds back to the rules. See ``editing.release``."""
        return editing.release(self._announced(), select)

    def report_metrics(self, select: str | int, metrics: Mapping[str, SupportsFloat]) -> bool:
        """Add metrics to an earlier save; False, with a warning, if it was already retired.

        Raises:
            ConfigError: a metric is not a number.
        """
        landed = editing.report_metrics(self._announced(), select, metrics)
        if not landed:
            self._listener(Warned(message=f"report_metrics: {select} is not a checkpoint of {self.url} (any more)"))
        return landed

    def prune(self, *, dry_run: bool = False) -> PrunePlan:
        """Retire by the stored policy and delete what was retired; ``dry_run`` only says what would be done.

        Raises:
            CheckpointNotFoundError: nothing was ever saved here.
        """
        if self._saver is not None and self._saver.fenced and not dry_run:
            raise FencedError(f"this process was replaced as the writer of {self.url}: it deletes nothing any more")
        plan = pruning.prune(self._store, dry_run=dry_run)
        if not dry_run and plan.retired:
            sweeping.sweep_run(self._store, dry_run=False)
        return plan

    # -- the end ---------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The error that ends the training must not be hidden by another one from the clean-up.
        try:
            self._finish(told=error)
        except Exception as exc:  # noqa: BLE001 - told as a warning, beside the error that is on its way
            self._listener(Warned(message=f"while closing {self.url}: {exc}"))

    def close(self) -> None:
        """Wait for the save in flight, clean up, mark the run as closed, and log the summary. Idempotent.

        Raises:
            SaveError: the last save failed and nobody was told yet.
            ConflictError: a newer writer owns the run.
        """
        if not self._closed:
            wrote = self._claim is not None and not self._forked
            self._finish(told=None)
            if wrote and self._store.hurry_until is None:  # what was stopped is not complete
                metric, values, best = self._last_best()
                self._listener(RunClosed(metric=metric, values=tuple(values), best=tuple(best)))

    def _last_best(self) -> tuple[str | None, list[float], list[Checkpoint]]:
        manifest: Manifest | None = self._store.last_seen
        if manifest is None or not manifest.best:
            return None, [], []
        first = manifest.best[0]
        kept = [placed(e, self.url) for e in map(manifest.find, first.ids) if e is not None]
        return first.metric, [v for c in kept if (v := metric_value(c.metrics, first.metric)) is not None], kept

    def _finish(self, told: BaseException | None) -> None:
        """End everything; ``told``: the error that ends the training on this rank, so that no other rank is awaited."""
        if self._closed:
            return
        self._closed = True
        if self._finalizer is not None:
            self._finalizer.detach()
        saver = self._saver
        if self._forked:
            return  # the run goes on, in the process that it belongs to
        if saver is None:
            self._coordinator.leave("it closed its manager")
            self._arena.close()
            self._store.storage.close()
            return
        try:
            apart = self._close_together(told)
            saver.shut_down()
            # The clean-up comes first, so that a failed save is settled even though its error is raised.
            settling: CloudCkptError | None = None
            try:
                with contextlib.suppress(FencedError) if saver.fenced else contextlib.nullcontext():
                    saver.close()
            except CloudCkptError as exc:
                settling = exc
            settling = settling or apart
            try:
                saver.raise_failure()
            except CloudCkptError as failure:
                if settling is not None:
                    failure.add_note(f"closing the run failed as well: {settling}")
                raise
            if settling is not None:
                raise settling
        finally:
            saver.shut_down()
            reason = f"its training ended with {type(told).__name__}: {told}" if told else "it closed its manager"
            self._coordinator.leave(reason[:500])
            self._arena.close()
            self._store.storage.close()

    def _close_together(self, told: BaseException | None) -> CloudCkptError | None:
        """Wait for the other ranks to close as well; what is wrong with that, if anything is."""
        if told is not None:
            return None
        try:
            self._vote(Ballot(call="close"))
        except RankError as exc:
            return exc
        return None


def _keywords(function: Any) -> list[str]:
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return [name for name in names if name != "self"]
