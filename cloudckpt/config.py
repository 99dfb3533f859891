"""Settings: numbers with a reason each, checked all at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from cloudckpt.errors import ConfigError

__all__ = ["Settings"]


#: The settings that are words.
_WORDS = {
    "on_busy": ("wait", "skip"),
    "stage": ("copy", "overlap"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Numbers that most runs never touch.

    Attributes:
        on_busy: what a second ``save()`` does while one is in flight: "wait" for it (the default: a save that
            was asked for is made) or "skip" this one with a warning.
        manifest_deadline_s: seconds after which a manifest write whose outcome the store never told becomes a
            ``CommitUnknownError``. Two minutes outlast a fail-over of the large stores.
        storage_deadline_s: seconds over all retries of one read, put, list or delete.
        retry_base_s: upper bound of the first pause between tries; it doubles from there (full jitter).
        retry_cap_s: upper bound of any pause between tries.
        copy_every_revisions: how often an immutable copy of the manifest is written for ``repair``.
        read_gap_bytes: ranged reads closer than this are merged: reading past a gap is cheaper than a request.
        max_read_bytes: larger ranged reads are split, so that several run at once.
        io_threads: how many payload reads run at once.
        request_timeout_s: seconds one request to an object store may take, over everything the client does.
        part_size_bytes: payload is sent to object stores in parts of this size; larger ones where an object would
            need more than 9,000 of them.
        parts_in_flight: how many parts of one object are under way at once. Memory: this many parts, twice.
        max_fallbacks: how many damaged checkpoints a restore steps over before it gives up.
        stage: how ``save()`` takes the state into host memory before it returns: "copy" (blocks for one copy) or
            "overlap" (a GPU copies beside the next step). ``save(block=True)`` sends tensors from where they are.
        staging_limit_bytes: the most host memory that staging may take; a larger state is sent from where it is, and
            ``save()`` blocks until it is uploaded. None: what the host has.
    """

    on_busy: str = "wait"
    manifest_deadline_s: float = 120.0
    storage_deadline_s: float = 120.0
    retry_base_s: float = 0.1
    retry_cap_s: float = 5.0
    copy_every_revisions: int = 20
    read_gap_bytes: int = 256 * 1024
    max_read_bytes: int = 64 * 1024 * 1024
    io_threads: int = 4
    request_timeout_s: float = 60.0
    part_size_bytes: int = 16 * 1024 * 1024
    parts_in_flight: int = 4
    max_fallbacks: int = 10
    stage: str = "copy"
    staging_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        problems = []
        for field in fields(self):
            value = getattr(self, field.name)
            words = _WORDS.get(field.name)
            if words is not None:
                if value not in words:
                    problems.append(f"{field.name}={value!r}: write {' or '.join(map(_quoted, words))}")
                continue
            if value is None and field.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                problems.append(f"{field.name}={value!r}: write a positive number")
        if problems:
            raise ConfigError("these settings cannot be used: " + "; ".join(problems))


def _quoted(word: str) -> str:
    return f'"{word}"'
