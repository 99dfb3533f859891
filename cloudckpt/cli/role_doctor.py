"""``cloudckpt doctor --role``: asks a bucket for exactly the rights of a role, and leaves nothing behind.

Most of what is asked for does not exist, under a name that no save has: who may ask is told "not found", who may
not is told "forbidden". Of the manifest a version is replaced that it does not have. What is written is a probe's
object, to be deleted again, and an upload in parts that is aborted before its first part. (A bucket that keeps
versions keeps a version or a marker of what is deleted, as of every delete.)

That a role may *not* do something is not tried: a right too many would do the harm that the role is to prevent.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cloudckpt.core import keys
from cloudckpt.core.index_json import INDEX_LIMIT_BYTES
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES
from cloudckpt.core.rights import Need, Provider, Role, Scope, Verb, needs_of
from cloudckpt.errors import ConfigError, ObjectNotFoundError, StorageError
from cloudckpt.storage import Conditions, GCSStorage, Landed, Outcome, S3Storage, Storage, Unknown
from cloudckpt.storage.probe import probe

__all__ = ["Tried", "bucket_of", "try_role"]

#: A revision that no run reaches.
_NO_REVISION = 999_999_999_999
#: What must have been permitted before something else may be asked, or can be told from its answer.
_AFTER: dict[Verb, Verb] = {
    Verb.READ: Verb.LIST,  # without it S3 answers 403 for what does not exist
    Verb.READ_METADATA: Verb.LIST,
    Verb.WRITE_CHECKPOINT: Verb.ABORT_UPLOAD,  # else the upload would be left behind
    Verb.WRITE_MANIFEST: Verb.DELETE,  # else the probe's object would be
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One thing a role does, tried.

    Attributes:
        verb: what.
        rights: what the provider calls the rights to it, and what they reach.
        problem: what the store said instead; None if it is permitted.
        seconds: how long it took.
    """

    verb: Verb
    rights: str
    problem: str | None
    seconds: float


def try_role(storage: Storage, role: Role) -> Iterator[Tried]:
    """Try everything that a role does, one thing after the other; a refusal is a ``problem``.

    Args:
        storage: a bucket, without retries around it.

    Raises:
        ConfigError: the root is in no bucket.
    """
    bucket = bucket_of(storage)
    provider = Provider.AWS if isinstance(bucket, S3Storage) else Provider.GCP
    trials = _Trials(bucket)
    refused: set[Verb] = set()
    for need in sorted(needs_of(role), key=lambda need: need.verb in _AFTER):
        if not need.at(provider) or need.aws[0].scope is Scope.KEY:
            # A right to the bucket's key is asked for by every read and write; a refusal names it.
            continue
        before = _AFTER.get(need.verb)
        began = time.monotonic()
        problem = (
            f"not tried, since '{before}' is refused" if before in refused else _problem(trials.by_verb[need.verb])
        )
        if problem is not None:
            refused.add(need.verb)
        yield Tried(
            verb=need.verb,
            rights=_named(need, provider),
            problem=problem,
            seconds=time.monotonic() - began,
        )


def bucket_of(storage: Storage) -> S3Storage | GCSStorage:
    """The storage, if it is a bucket.

    Raises:
        ConfigError: it is none, so there are no roles.
    """
    if isinstance(storage, S3Storage | GCSStorage):
        return storage
    raise ConfigError(
        f"{storage.url}: --role asks for the rights of a role in a bucket (s3://…, gs://…), and this root is in none: "
        "leave --role out"
    )


def _named(need: Need, provider: Provider) -> str:
    return ", ".join(f"{grant.action} ({grant.scope})" for grant in need.at(provider))


def _problem(trial: Callable[[], object]) -> str | None:
    try:
        trial()
    except StorageError as exc:
        return str(exc)
    return None


class _Trials:
    """The requests, under names that no save has.

    Args:
        storage: an S3 or Google bucket.
    """

    def __init__(self, storage: S3Storage | GCSStorage) -> None:
        self._storage = storage
        token = secrets.token_hex(4)
        self._folder = keys.checkpoint_prefix(0, token)
        self._payload = keys.payload_key(0, token, keys.payload_name("probe", 0, 1))
        self._index = keys.index_key(0, token)
        self.by_verb: dict[Verb, Callable[[], object]] = {
            Verb.READ: self._read,
            Verb.READ_METADATA: self._read_metadata,
            Verb.LIST: lambda: [*storage.list(f"{self._folder}/")],
            Verb.WRITE_MANIFEST: self._write_manifest,
            Verb.WRITE_CHECKPOINT: lambda: storage.try_upload(self._payload),
            Verb.ABORT_UPLOAD: lambda: storage.try_abort(self._payload),
            Verb.LIST_UPLOADS: lambda: storage.abort_uploads(f"{self._folder}/"),
            Verb.DELETE: self._delete,
        }

    def _read(self) -> None:
        with contextlib.suppress(ObjectNotFoundError):
            self._storage.read_into(self._payload, 0, memoryview(bytearray(1)))
        self._read_metadata()

    def _read_metadata(self) -> None:
        for key, limit in ((keys.MANIFEST, MANIFEST_LIMIT_BYTES), (self._index, INDEX_LIMIT_BYTES)):
            with contextlib.suppress(ObjectNotFoundError):
                self._storage.read(key, limit_bytes=limit)

    def _delete(self) -> None:
        for key in (self._payload, self._index, keys.manifest_copy(_NO_REVISION), self._probe_key()):
            self._remove(key)

    def _remove(self, key: str) -> None:
        for problem in self._storage.delete([key]).values():
            raise problem

    def _write_manifest(self) -> None:
        found = probe(self._storage)
        if found.trouble is not None:
            raise found.trouble
        if found.conditions is not Conditions.HONOURED:
            # Never go on to the manifest itself.
            said = (step.detail for step in found.steps if not step.ok)
            raise StorageError(next(said, "the store does not honour conditions"))
        self._keep_and_read_back()
        _refused(self._storage.replace(keys.MANIFEST, b"never", expecting=self._no_version))

    def _keep_and_read_back(self) -> None:
        """A small object: what is encrypted in the writer's name is decrypted in the reader's."""
        key = self._probe_key()
        try:
            outcome = self._storage.create(key, b"one")
            if isinstance(outcome, Unknown):
                raise _cause(outcome)
            self._storage.read(key, limit_bytes=100)
        finally:
            self._remove(key)

    @staticmethod
    def _probe_key() -> str:
        return f"{keys.PROBE_PREFIX}{secrets.token_hex(4)}"

    @property
    def _no_version(self) -> str:
        """What could be a version of this store, and is none of any object."""
        return "1" if isinstance(self._storage, GCSStorage) else "1" * 32


def _refused(outcome: Outcome) -> None:
    """A write upon a version that does not exist must be lost; anything else says that it was not permitted."""
    if isinstance(outcome, Unknown):
        raise _cause(outcome)
    if isinstance(outcome, Landed):
        raise StorageError("the store wrote upon a version that does not exist, after it had refused that to a probe")


def _cause(outcome: Unknown) -> StorageError:
    return outcome.cause if isinstance(outcome.cause, StorageError) else StorageError(str(outcome.cause))
