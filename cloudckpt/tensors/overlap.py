"""Staging beside training: tensors are copied to host memory while the next forward and backward run.

Weights and optimizer state change in ``optimizer.step()`` and, in a well-behaved loop, nowhere else. So their copy
may go on after ``save()`` has returned, if the next step waits for it. PyTorch calls a hook before every step of
every optimizer of the process; it makes the step's stream wait for the copy (CUDA: the host goes on) or the step
itself (host memory). What changes otherwise shows in the tensors' version counters, and fails the save by name.

The hook is installed once and stays: PyTorch walks its table of hooks without a lock, so taking one out while
another thread steps, or sits in that very hook, breaks the step. Between saves it costs a look at an empty tuple.

What cannot be seen: writes through ``.data`` (it has a version counter of its own), by collectives of
``torch.distributed`` (they move none), through NumPy, by replayed CUDA graphs, and by kernels that get a bare address,
before the first step after the save. ``why_not`` declines what can be recognised.

(Past 350 lines: the hook, the snapshot and the copies hold one protocol between three threads, and are read together.)
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from cloudckpt.errors import SaveError
from cloudckpt.tensors.memory import copy_bits
from cloudckpt.tensors.owners import captured_steps, covered, is_capturing, storages, why_not

__all__ = ["Copying", "Snapshot", "begin", "covered", "watch", "why_not"]

#: Host tensors up to this size are copied at once: starting a thread for an optimizer's step counts costs more.
AT_ONCE_BYTES = 64 * 1024
#: So many names stand in an error.
_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Copying:
    """One copy to make.

    Attributes:
        path: what errors call it: component and name.
        source: the tensor, on the CPU or a CUDA device.
        target: host memory of the same dtype and shape. A CUDA source overlaps well only if it is pinned.
    """

    path: str
    source: torch.Tensor
    target: torch.Tensor


@dataclass(slots=True, eq=False)
class _Watched:
    """The version counters of one tensor that is being copied, as they were when the copy began.

    A state dict's ``detach()`` shares the counter of its parameter; a DTensor's local part does not, and only the
    counter of the DTensor moves. So both are compared: the source, and whatever the optimizer holds of its memory.
    """

    path: str
    source: torch.Tensor | None
    version: int
    storages: Sequence[int]
    owners: list[tuple[weakref.ref[torch.Tensor], int]]
    on_host: bool

    def changed(self) -> bool:
        if self.source is not None and self.source._version != self.version:  # noqa: SLF001 - its only name
            return True
        alive = ((owner(), version) for owner, version in self.owners)
        return any(owner is not None and owner._version != version for owner, version in alive)  # noqa: SLF001 - its name


@dataclass(slots=True)
class _Plan:
    """What ``begin`` does with each copy."""

    now: list[Copying] = field(default_factory=list)
    on_stream: list[Copying] = field(default_factory=list)
    through_device: list[Copying] = field(default_factory=list)
    in_thread: list[Copying] = field(default_factory=list)


class Snapshot:
    """A staging copy on its way.

    Two threads look at it. The one that trains calls ``wait`` or ``done``: from then on it may change anything. The
    one that saves calls ``wait_copied``, sends the bytes, and calls ``confirm`` before it seals.
    """

    def __init__(
        self,
        copies: Sequence[Copying],
        watched: list[_Watched],
        gates: Mapping[torch.device, torch.cuda.Event],
        ends: Mapping[torch.device, torch.cuda.Event],
    ) -> None:
        self._copies = list(copies)
        self._watched = watched
        self._gates = dict(gates)
        self._ends = dict(ends)
        self._lock = threading.Lock()
        self._carried = False
        self._on_host = threading.Event()
        self._over = threading.Event()
        self._ended = False
        self._changed: list[str] = []
        self._failure: BaseException | None = None

    def done(self) -> bool:
        """Whether the copy is over, well or not. True is also the leave to change anything."""
        if not self._over.is_set():
            return False
        self._stop_looking()
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until every byte is in the targets: the state may change from now on, in whatever way.

        For the thread that trains, which has no write of its own in the middle while it is here.

        Raises:
            SaveError: the copy failed, or tensors changed under it; names them.
            TimeoutError: it is not over after ``timeout_s`` seconds.
        """
        self._join(timeout_s)
        self._stop_looking()
        self._raise()

    def wait_copied(self, timeout_s: float | None = None) -> None:
        """Wait until every byte is in the targets. For the thread that saves: it gives nobody leave to change them.

        Raises:
            SaveError: the copy failed, or tensors changed under it; names them.
            TimeoutError: it is not over after ``timeout_s`` seconds.
        """
        self._join(timeout_s)
        self._raise()

    def confirm(self) -> None:
        """Look once more, before the seal, at what no step has announced yet.

        A version counter moves when a write is *finished*. One that was in the middle when the copy ended is seen
        here at the latest, or before, by the hook of the next step.

        Raises:
            SaveError: the copy failed, or tensors changed under it; names them.
        """
        with self._lock:
            self._look()
        self._raise()

    # -- the thread that steps -------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer, *, capturing: bool) -> None:
        """Let the step begin only when it can no longer be seen in the copy."""
        if capturing:
            # Waiting for an event from outside would break the capture, and a replay calls no hook.
            with self._lock:
                if not self._ended and self._watched and self._failure is None:
                    self._failure = SaveError(
                        f"{type(optimizer).__name__}.step was captured in a CUDA graph while the state was being "
                        'copied, and replays announce nothing: save with stage="copy"'
                    )
            return
        self._on_host.wait()
        for device, event in self._gates.items():
            torch.cuda.current_stream(device).wait_event(event)
        with self._lock:
            self._look()
            if self._ended or not self._gates:
                self._watched = []
            else:
                # Those of other optimizers may still be written to by whoever does not wait.
                own = covered([optimizer])
                self._watched = [w for w in self._watched if not w.on_host and own.keys().isdisjoint(w.storages)]

    # -- the thread that copies ------------------------------------------------------------------------------

    def carry(self, copy: Callable[[Copying], None], in_thread: Sequence[Copying]) -> None:
        """Make the copies that need a thread, wait for those that the devices make, and look for changes.

        Whoever comes second waits until the first is through.
        """
        with self._lock:
            second, self._carried = self._carried, True
        if second:
            self._over.wait()
            return
        failures: list[BaseException] = []
        try:
            for copying in in_thread:
                _copy_here(copy, copying)
        except BaseException as exc:  # noqa: BLE001 - told to whoever waits; the step must not hang
            failures.append(exc)
        self._on_host.set()
        for event in self._ends.values():
            try:
                event.synchronize()
            except BaseException as exc:  # noqa: BLE001 - the same
                failures.append(exc)
        with self._lock:
            self._look()
            self._failure = self._failure or (failures[0] if failures else None)
            # The sources' memory may go back to its allocator: nothing reads it any more.
            self._copies = []
            for watched in self._watched:
                watched.source = None
            self._ended = True
        _drop_settled()
        self._over.set()

    # -- inside ----------------------------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether no step needs to tell it anything."""
        return self._ended and not self._watched

    def _join(self, timeout_s: float | None) -> None:
        if not self._over.wait(timeout_s):
            raise TimeoutError(f"the state is still being copied after {timeout_s} s")

    def _stop_looking(self) -> None:
        with self._lock:
            self._look()
            self._watched = []
        _drop_settled()

    def _look(self) -> None:
        changed = [w for w in self._watched if w.changed()]
        if changed:
            self._changed += [w.path for w in changed]
            self._watched = [w for w in self._watched if w not in changed]

    def _raise(self) -> None:
        if self._failure is not None:
            if isinstance(self._failure, SaveError):
                raise SaveError(str(self._failure)) from self._failure.__cause__
            raise SaveError(
                f"copying the state beside training failed: {self._failure}. Training may go on; save again"
            ) from self._failure
        if self._changed:
            names = ", ".join(self._changed[:_NAMED])
            more = f" and {len(self._changed) - _NAMED} more" if len(self._changed) > _NAMED else ""
            raise SaveError(
                f"{names}{more}: changed while being copied, and not by a step of a torch optimizer. Nothing of this "
                "save became visible. Call wait_staged() on the pending save before you change weights yourself (an "
                'EMA swap, load_state_dict, a clamp), or save with stage="copy"'
            )


#: The snapshots that steps must know of. Replaced as a whole, so that a step can walk it without a lock. The thread
#: that copies keeps its snapshot alive; afterwards only who may still ask it does.
_live: tuple[weakref.ref[Snapshot], ...] = ()
_registry = threading.Lock()
_installed = False


def watch() -> None:
    """See every optimizer step of this process from now on; without it, from the first ``begin`` on.

    Called early it costs nothing, knows the steps that are captured in CUDA graphs later, and spares a compiled
    step its second compilation.
    """
    global _installed  # noqa: PLW0603 - PyTorch's table of hooks is one per process as well
    with _registry:
        if not _installed:
            # Compiled code must call the hook, not run what it once saw of it.
            register_optimizer_step_pre_hook(torch.compiler.disable(_before_step))  # type: ignore[no-untyped-call]  # no types
            _installed = True


def begin(
    copies: Sequence[Copying],
    optimizers: Sequence[Optimizer],
    *,
    copy: Callable[[Copying], None] | None = None,
    borrow_bytes: int = 0,
    tell: Callable[[Snapshot], None] = lambda _: None,
) -> Snapshot:
    """Start to copy. What no optimizer covers (buffers, EMA, RNG, small host tensors) is copied on return.

    The tensors in the param_groups and the state of ``optimizers`` are copied after the return, as they are now:
    steps wait. Ask ``why_not`` first.

    Args:
        copies: what to copy, and where to.
        optimizers: torch optimizers found in the state.
        copy: makes one copy of a host tensor, in whichever thread; a bit for bit copy by default.
        borrow_bytes: CUDA memory that may be used while the copy lasts. So much of the state is first copied within
            the device, far faster than to the host, and no step waits for it. 0: a step that comes before the copy
            is over waits for the rest of it.
        tell: told of the snapshot before anything goes on in the background.

    Raises:
        BaseException: whatever a copy that is made at once raises. Nothing is under way then.
    """
    watch()
    make = copy or _plain_copy
    owners = covered(optimizers)
    plan = _plan(copies, owners, borrow_bytes)
    counters = {id(c): _watched(c, owners) for c in (*plan.on_stream, *plan.through_device, *plan.in_thread)}
    here = {c.source.device: torch.cuda.current_stream(c.source.device) for c in copies if c.source.is_cuda}
    aside = {device: _side_stream(device) for device in here}
    snapshot: Snapshot | None = None
    try:
        for device, side in aside.items():
            side.wait_stream(here[device])
        first = _enqueue([c for c in plan.now if c.source.is_cuda], here)
        twins = _twins(plan.through_device)
        plan.on_stream += plan.through_device[len(twins) :]
        gates = _enqueue(plan.on_stream, aside)
        for device in {twin.source.device for twin in twins}:
            aside[device].wait_stream(here[device])
        ends = gates | _enqueue(twins, aside)
        for copying in plan.now:
            if not copying.source.is_cuda:
                make(copying)
        for event in first.values():
            event.synchronize()
        read_later = [*plan.on_stream, *plan.in_thread]
        snapshot = Snapshot([*read_later, *twins], [counters[id(c)] for c in read_later], gates, ends)
        _follow(snapshot)
        tell(snapshot)
    except BaseException:
        for device, side in aside.items():
            here[device].synchronize()
            side.synchronize()
        if snapshot is not None:
            snapshot.carry(make, ())  # nobody waits for it any more, no step either
        raise
    if read_later or twins:
        _carry_in_background(snapshot, make, plan.in_thread)
    else:
        snapshot.carry(make, ())
    return snapshot


def _carry_in_background(snapshot: Snapshot, make: Callable[[Copying], None], in_thread: Sequence[Copying]) -> None:
    # No daemon: a process that exits waits for the copy, instead of taking the memory away under it.
    thread = threading.Thread(target=snapshot.carry, args=(make, in_thread), name="cloudckpt-copy", daemon=False)
    try:
        thread.start()
    except RuntimeError:
        # No thread is to be had (the interpreter is on its way out): then the caller waits for the copy.
        snapshot.carry(make, in_thread)
    except BaseException:
        # Interrupted, and the thread may run or not: if it does, the memory is not free before it is through.
        snapshot.carry(make, ())
        raise


def _plan(copies: Sequence[Copying], owners: Mapping[int, Any], borrow_bytes: int) -> _Plan:
    plan = _Plan()
    for copying in copies:
        source = copying.source
        if not source.numel():
            continue
        if source.is_inference() or owners.keys().isdisjoint(storages(source)):
            plan.now.append(copying)
        elif source.is_cuda:
            # The driver makes the host wait for a copy to memory that is not pinned: then a thread had better wait.
            (plan.on_stream if copying.target.is_pinned() else plan.in_thread).append(copying)
        else:
            (plan.now if source.nbytes <= AT_ONCE_BYTES else plan.in_thread).append(copying)
    # The last ones: the first are on the host soon enough, and the next step comes upon the rest.
    while plan.on_stream and plan.on_stream[-1].source.nbytes <= borrow_bytes:
        borrow_bytes -= plan.on_stream[-1].source.nbytes
        plan.through_device.append(plan.on_stream.pop())
    return plan


def _watched(copying: Copying, owners: Mapping[int, Sequence[torch.Tensor]]) -> _Watched:
    source = copying.source
    own = storages(source)
    held = [(weakref.ref(o), o._version) for key in own for o in owners.get(key, ())]  # noqa: SLF001 - its only name
    return _Watched(copying.path, source, source._version, own, held, not source.is_cuda)  # noqa: SLF001 - its name


def _plain_copy(copying: Copying) -> None:
    copy_bits(copying.target, copying.source)


def _copy_here(copy: Callable[[Copying], None], copying: Copying) -> None:
    """One copy of the thread's. A CUDA source is read by the side stream, which waits for what came before."""
    if not copying.source.is_cuda:
        copy(copying)
        return
    with torch.cuda.stream(_side_stream(copying.source.device)):
        copy_bits(copying.target, copying.source)


def _twins(copies: Sequence[Copying]) -> list[Copying]:
    """The same copies from memory that nobody else knows, filled on the stream that training runs on.

    As many as there is memory for: a save never takes from training what it cannot give.
    """
    twins: list[Copying] = []
    for copying in copies:
        source = copying.source
        try:
            twin = torch.empty(source.shape, dtype=source.dtype, device=source.device)
        except torch.OutOfMemoryError:
            break
        copy_bits(twin, source)
        twins.append(Copying(path=copying.path, source=twin, target=copying.target))
    return twins


def _enqueue(
    copies: Sequence[Copying], streams: Mapping[torch.device, torch.cuda.Stream]
) -> dict[torch.device, torch.cuda.Event]:
    """Queue copies on these streams; the event on each of them that says they are done."""
    events: dict[torch.device, torch.cuda.Event] = {}
    with ExitStack() as stack:
        for device in {c.source.device for c in copies}:
            stack.enter_context(torch.cuda.stream(streams[device]))
            events[device] = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch's own
        for copying in copies:
            copy_bits(copying.target, copying.source, non_blocking=True)
        for device, event in events.items():
            event.record(streams[device])
    return events


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's own


def _before_step(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    capturing = is_capturing()
    if capturing:
        captured_steps.add(optimizer)
    live = _live
    for reference in live:
        snapshot = reference()
        if snapshot is not None and not snapshot.settled:
            snapshot.before_step(optimizer, capturing=capturing)
    if live:
        _drop_settled()


def _follow(snapshot: Snapshot) -> None:
    global _live  # noqa: PLW0603 - one per process, as the hook
    with _registry:
        _live = (*_live, weakref.ref(snapshot))


def _drop_settled() -> None:
    global _live  # noqa: PLW0603 - the same
    with _registry:
        found = [(reference, reference()) for reference in _live]
        _live = tuple(reference for reference, s in found if s is not None and not s.settled)


def _forget_in_child() -> None:
    """A forked child has no thread that copies: it must neither wait for one nor for a lock one held."""
    global _live, _registry
    _live, _registry = (), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
