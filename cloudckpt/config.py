"""Settings: numbers with a reason each, checked all at once."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, fields

from cloudckpt.errors import ConfigError

__all__ = ["Settings", "settings_of"]


#: The settings that are words.
_WORDS = {
    "on_busy": ("wait", "skip"),
    "stage": ("copy", "overlap"),
    "check_replicas": ("sample", "full", "off"),
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
        max_read_bytes: larger ranged reads are split, so that several run at once. Beside a near store each
            request costs about a millisecond; a far one gets smaller ones, as many as there are connections.
        io_threads: how many payload reads run at once. 16 connections of 85 MB/s each, what a far store gives one, fill
            a 10 Gbit/s line.
        read_in_place: whether ``restore()`` reads straight into the tensors it was given: no second copy in memory and
            no second pass, but a restore that fails half-way leaves them partly overwritten, and says so. False: read
            everything into fresh memory, prove it, and only then touch the tensors.
        request_timeout_s: seconds one request to an object store may take, over everything the client does; on the
            direct lane, seconds without an answer or further bytes of it.
        part_size_bytes: payload is sent to object stores in parts of at least this size; larger ones where an object
            is so large that they cost less, or that it would need more than 9,000 of them.
        parts_in_flight: how many parts of one object the filesystem's own client has under way at once. Memory: this
            many parts, twice.
        direct_lane: whether payload may leave the filesystem's client aside and go over our own connections.
        connections: how many requests of payload are under way at once on the direct lane. A store gives each
            connection 85 to 90 MB a second or so; the lane lowers the number where the store says that it is too much.
        max_bandwidth: bytes a second that uploads over the direct lane may take; None for no cap.
        direct_io: write payload to local disk past the page cache where file system and memory allow: less CPU, and
            no dirty pages that crowd the training's own out. False where a benchmark of the disk says so
            (``benchmarks/disk.py``), or where checkpoints are read back at once.
        stage: how ``save()`` takes the state into host memory before it returns: "copy" (blocks for one copy) or
            "overlap" (the copy goes on beside the next forward and backward, and the optimizer's step waits for it).
            ``save(block=True)`` sends tensors from where they are.
        staging_limit_bytes: the most host memory that staging may take; a larger state is sent from where it is, and
            ``save()`` blocks until it is uploaded. None: what the host has.
        overlap_device_bytes: CUDA memory that ``stage="overlap"`` may borrow while it copies. So much of the state is
            first copied within the device, which is many times faster, and no step waits for it: for steps that are
            shorter than the copy to the host. None: none.
        coordination_timeout_s: seconds that the ranks of a job wait for each other at the start of a collective call,
            and the silence after which one counts as gone. One that is killed is known at once. Ten minutes, as NCCL.
        check_replicas: whether what several ranks have in common is compared before one copy of it is stored: "sample"
            (64 elements of 16 tensors, other ones at each save), "full" (all bytes), or "off". What differs fails the
            save, and names tensor and rank.
        progress_every_s: seconds between two log lines on a save or a load that takes long.
        stall_after_s: seconds without a byte after which a save or a load is said to stall, by rank and object.
        max_fallbacks: how many damaged checkpoints a restore steps over before it gives up.
    """

    on_busy: str = "wait"
    manifest_deadline_s: float = 120.0
    storage_deadline_s: float = 120.0
    retry_base_s: float = 0.1
    retry_cap_s: float = 5.0
    copy_every_revisions: int = 20
    read_gap_bytes: int = 256 * 1024
    max_read_bytes: int = 32 * 1024 * 1024
    io_threads: int = 16
    read_in_place: bool = True
    request_timeout_s: float = 60.0
    part_size_bytes: int = 16 * 1024 * 1024
    parts_in_flight: int = 4
    direct_lane: bool = True
    connections: int = 32
    max_bandwidth: float | None = None
    direct_io: bool = True
    stage: str = "copy"
    staging_limit_bytes: int | None = None
    overlap_device_bytes: int | None = None
    coordination_timeout_s: float = 600.0
    check_replicas: str = "sample"
    progress_every_s: float = 60.0
    stall_after_s: float = 60.0
    max_fallbacks: int = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if _is_whole(field) and isinstance(value, float) and value.is_integer():
                object.__setattr__(self, field.name, int(value))  # 8e9 bytes, say
        found = (self._problem(field.name, field.default, whole=_is_whole(field)) for field in fields(self))
        if problems := [problem for problem in found if problem is not None]:
            raise ConfigError("these settings cannot be used: " + "; ".join(problems))

    def _problem(self, name: str, default: object, *, whole: bool) -> str | None:
        value = getattr(self, name)
        if name in _WORDS:
            asked = " or ".join(map(_quoted, _WORDS[name]))
            return None if value in _WORDS[name] else f"{name}={value!r}: write {asked}"
        if isinstance(default, bool):
            return None if isinstance(value, bool) else f"{name}={value!r}: write True or False"
        if default is None and value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_fine = is_number and math.isfinite(value) and value > 0
        if whole and not isinstance(value, int):
            return f"{name}={value!r}: write a positive whole number"
        return None if is_fine else f"{name}={value!r}: write a positive number"


def settings_of(given: Settings | None) -> Settings:
    """The settings that a caller gave, or the usual ones.

    Raises:
        ConfigError: what was given are no settings.
    """
    if given is None:
        return Settings()
    if not isinstance(given, Settings):
        # Not its value: these may be storage options, with a secret among them, in the wrong place.
        raise ConfigError(
            f"settings= was given a {type(given).__qualname__}: write settings=cloudckpt.Settings(...), with the names "
            "and numbers in it, such as Settings(storage_deadline_s=30)"
        )
    return given


def _is_whole(field: Field[object]) -> bool:
    return str(field.type) in {"int", "int | None"}


def _quoted(word: str) -> str:
    return f'"{word}"'
