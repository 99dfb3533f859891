"""Does a store keep its promises? Asked with a throw-away object, answered before a run depends on it.

Many servers that speak S3 ignore conditions and answer 200 (an older MinIO, gateways, emulators); some take an ETag
only without its quotes, some only with them. Nothing but trying tells.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from cloudckpt.core import keys
from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Conditions, Landed, Outcome, Storage, Unknown

__all__ = ["Findings", "ProbeStep", "Respelling", "probe"]


@runtime_checkable
class Respelling(Protocol):
    """A storage that knows another way to write a version into a condition."""

    def respell(self) -> None:
        """Use the other spelling from now on; twice, and the first one is in use again."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeStep:
    """One request of a probe: whether the store answered as it must, what it said otherwise, and how long it took."""

    name: str
    ok: bool
    detail: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a probe found.

    Attributes:
        steps: the requests, in order.
        conditions: HONOURED, ABSENT, or UNPROVEN where a request failed for another reason.
        trouble: that reason.
    """

    steps: tuple[ProbeStep, ...]
    conditions: Conditions
    trouble: StorageError | None = None

    @property
    def ok(self) -> bool:
        """Whether every step was answered as it must be."""
        return all(step.ok for step in self.steps)


class _Stop(Exception):  # noqa: N818 - ends the probe early; nothing is wrong with the program
    """There is nothing more to ask."""


class _Probe:
    """One object's short life."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._key = f"{keys.PROBE_PREFIX}{secrets.token_hex(4)}"
        self.steps: list[ProbeStep] = []
        self.conditions = Conditions.UNPROVEN
        self.trouble: StorageError | None = None

    def run(self) -> None:
        try:
            version = self._create()
            self._refused("create again is refused", lambda: self._storage.create(self._key, b"never"))
            # One that could be a version of this store, so that the request is really sent.
            stale = next(digit * len(version) for digit in "12" if digit * len(version) != version)
            self._refused(
                "replace a stale version is refused",
                lambda: self._storage.replace(self._key, b"never", expecting=stale),
            )
            self._replace(version)
        finally:
            self._step("delete", self._delete)
        self.conditions = Conditions.HONOURED

    def _step(self, name: str, ask: Callable[[], str | None]) -> None:
        began = time.monotonic()
        try:
            problem = ask()
        except StorageError as exc:
            self.trouble = self.trouble or exc
            problem = str(exc)
        seconds = time.monotonic() - began
        self.steps.append(ProbeStep(name=name, ok=problem is None, detail=problem or "", seconds=seconds))

    def _create(self) -> str:
        versions: list[str] = []

        def ask() -> str | None:
            return self._landed(self._storage.create(self._key, b"one"), versions)

        self._step("create", ask)
        if not versions:
            raise _Stop
        return versions[0]

    def _landed(self, outcome: Outcome, versions: list[str]) -> str | None:
        if isinstance(outcome, Landed):
            versions.append(outcome.version)
            return None
        if isinstance(outcome, Unknown):
            raise outcome.cause if isinstance(outcome.cause, StorageError) else StorageError(str(outcome.cause))
        return f"refused: {outcome.detail}"

    def _refused(self, name: str, write: Callable[[], Outcome]) -> None:
        def ask() -> str | None:
            outcome = write()
            if isinstance(outcome, Landed):
                self.conditions = Conditions.ABSENT
                return "the store ignored the condition: two writers could destroy each other's work"
            if isinstance(outcome, Unknown):
                raise outcome.cause if isinstance(outcome.cause, StorageError) else StorageError(str(outcome.cause))
            return None

        self._step(name, ask)
        if not self.steps[-1].ok:
            raise _Stop

    def _replace(self, version: str) -> None:
        def ask() -> str | None:
            versions: list[str] = []
            problem = self._landed(self._storage.replace(self._key, b"two", expecting=version), versions)
            if problem is None:
                return None
            found = self._storage.read(self._key, limit_bytes=100)
            if found.body == b"two":
                return None  # our own write, whose first answer was lost
            if isinstance(self._storage, Respelling):
                # The other spelling, and the first one once more: what was refused may have been a conflict.
                for _ in range(2):
                    self._storage.respell()
                    problem = self._landed(self._storage.replace(self._key, b"two", expecting=version), versions)
                    if problem is None:
                        return None
            self.conditions = Conditions.ABSENT
            return f"the store refuses every condition ({problem})"

        self._step("replace", ask)
        if not self.steps[-1].ok:
            raise _Stop

    def _delete(self) -> str | None:
        return next((str(problem) for problem in self._storage.delete([self._key]).values()), None)


def probe(storage: Storage) -> Findings:
    """Create, create again (must fail), replace a stale version (must fail) and the right one, delete.

    Five requests in the good case. The object is deleted whatever happens. Raises nothing: every refusal is a step
    that is not ok. A probe whose object somebody's ``gc`` took away meanwhile is begun again under a fresh name.
    """
    attempt = _Probe(storage)
    ignored = False
    for attempt in (_Probe(storage), _Probe(storage), _Probe(storage)):
        try:
            attempt.run()
        except _Stop:
            if isinstance(attempt.trouble, ObjectNotFoundError):
                continue
            if attempt.conditions is Conditions.ABSENT and not ignored:
                # Once, it may be a gc that took the object away in between; twice under two names, it is the store.
                ignored = True
                continue
        break
    return Findings(steps=tuple(attempt.steps), conditions=attempt.conditions, trouble=attempt.trouble)
