"""Does a store keep its promises? Asked with a throw-away object, answered before a run depends on it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from cloudckpt.core import keys
from cloudckpt.errors import StorageError
from cloudckpt.storage.base import Landed, Outcome, Storage, Unknown

__all__ = ["ProbeStep", "probe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeStep:
    """One request of a probe: whether the store answered as it must, what it said otherwise, and how long it took."""

    name: str
    ok: bool
    detail: str
    seconds: float


def probe(storage: Storage) -> list[ProbeStep]:
    """Create, create again (must fail), replace a stale version (must fail) and the right one, read, delete.

    The object is deleted whatever happens. Raises nothing: every refusal is a step that is not ok.
    """
    key = f"{keys.PROBE_PREFIX}{secrets.token_hex(4)}"
    steps: list[ProbeStep] = []
    version = ""

    def step(name: str, ask: Callable[[], str | None]) -> bool:
        began = time.monotonic()
        try:
            problem = ask()
        except StorageError as exc:
            problem = str(exc)
        steps.append(ProbeStep(name=name, ok=problem is None, detail=problem or "", seconds=time.monotonic() - began))
        return problem is None

    def landed(outcome: Outcome) -> str | None:
        nonlocal version
        if isinstance(outcome, Landed):
            version = outcome.version
            return None
        return str(outcome.cause) if isinstance(outcome, Unknown) else f"refused: {outcome.detail}"

    def refused(outcome: Outcome) -> str | None:
        if isinstance(outcome, Landed):
            return "the store ignored the condition: two writers could destroy each other's work"
        return str(outcome.cause) if isinstance(outcome, Unknown) else None

    def same() -> str | None:
        return None if storage.read(key, limit_bytes=100).body == b"two" else "read back something else"

    def gone() -> str | None:
        return next((str(problem) for problem in storage.delete([key]).values()), None)

    if step("create", lambda: landed(storage.create(key, b"one"))):
        try:
            step("create again is refused", lambda: refused(storage.create(key, b"never")))
            step(
                "replace a stale version is refused",
                lambda: refused(storage.replace(key, b"never", expecting="0" * 64)),
            )
            step("replace", lambda: landed(storage.replace(key, b"two", expecting=version)))
            step("read back", same)
        finally:
            step("delete", gone)
    return steps
