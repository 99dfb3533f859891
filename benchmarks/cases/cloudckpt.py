"""cloudckpt, through its public interface, with the settings it comes with."""

from __future__ import annotations

from typing import Any

import cloudckpt
from cloudckpt import CheckpointManager, PendingSave

from benchmarks.cases.base import Case, Place, StallCase, case, s3_options
from benchmarks.meter import wait_until_still
from benchmarks.state import State

__all__: list[str] = []

_PREPARED_WITHIN_S = 30.0


def _url(place: Place) -> str:
    return place.path if place.path.startswith("/") else f"s3://{place.path}"


def _manager(place: Place) -> CheckpointManager:
    # Everything is kept: the peers delete nothing either.
    return CheckpointManager(_url(place), keep_last=None, storage_options=None if _is_local(place) else s3_options())


def _is_local(place: Place) -> bool:
    return place.path.startswith("/")


class _Saved(Case):
    """A save that returns when it is committed: durable, checksummed, named by the manifest."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._manager = _manager(place / "run")

    def run(self, state: State, repetition: int) -> None:
        self._manager.save(repetition, state, block=True)

    def close(self) -> None:
        self._manager.close()


@case("save-local", "ours", name="cloudckpt")
class SaveLocal(_Saved):
    """To local disk."""


@case("save-s3", "ours", name="cloudckpt")
class SaveS3(_Saved):
    """To S3."""


class _Restored(Case):
    """Into the caller's own tensors."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._manager = _manager(place / "cloudckpt")

    def run(self, state: State, repetition: int) -> None:
        if self._manager.restore(state) is None:
            raise RuntimeError("there is nothing to restore")

    def settle(self) -> None:
        # A restore makes the memory for the first save beside training; the next repetition is no training.
        self._manager.wait()

    def close(self) -> None:
        self._manager.close()


@case("load-local", "ours", name="cloudckpt_restore")
class RestoreLocal(_Restored):
    """From local disk."""


@case("load-s3", "ours", name="cloudckpt_restore")
class RestoreS3(_Restored):
    """From S3."""


@case("load-local", "ours", name="cloudckpt_load")
@case("load-s3", "ours", name="cloudckpt_load")
def _loaded(state: State, place: Place) -> State:
    """Into new tensors, by a reader that claims nothing."""
    options = None if _is_local(place) else s3_options()
    found: dict[str, Any] = cloudckpt.open(_url(place / "cloudckpt"), storage_options=options).load()
    return found


class _Handle:
    def __init__(self, pending: PendingSave) -> None:
        self._pending = pending
        self.done = pending.done
        self.result = pending.wait


class _Stalled(StallCase):
    """``prepare(state)`` first, and training begins when what it makes in the background is there (30 s at most)."""

    children = True

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._manager = _manager(place / "run")

    def prepare(self, state: State) -> None:
        self._manager.prepare(state)
        wait_until_still(most_s=_PREPARED_WITHIN_S)

    def save(self, state: State, repetition: int) -> _Handle:
        return _Handle(self._manager.save(repetition, state))

    def close(self) -> None:
        self._manager.close()


@case("stall-s3", "ours", name="cloudckpt")
class StallS3(_Stalled):
    """To S3."""


@case("stall-local", "ours", name="cloudckpt")
class StallLocal(_Stalled):
    """To local disk."""
