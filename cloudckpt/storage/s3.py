"""Objects in an S3 bucket, through s3fs.

s3fs gives the session: credentials and their renewal, endpoint, region, proxies, SSE-KMS, requester pays, whatever
``storage_options`` say. The requests are made with its client directly, because its own wrappers drop arguments they
do not know, turn lost answers into errors of another kind, and go on after a Ctrl-C.

Past 350 lines, because the verbs of one backend stand together.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import crc32c

from cloudckpt.errors import ConfigError, ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Attested, Landed, Listed, Lost, Outcome, Storage, Unknown, Versioned
from cloudckpt.storage.lifecycle import s3_dangers
from cloudckpt.storage.loop import Running
from cloudckpt.storage.multipart import Carried, UploadInParts
from cloudckpt.storage.remote import crc32c_b64, crc32c_of, each
from cloudckpt.storage.s3_copy import StoreCopies
from cloudckpt.storage.s3_errors import (
    AnsweredError,
    code_of,
    is_condition_failed,
    is_unsupported,
    status_of,
)
from cloudckpt.storage.s3_session import S3Session
from cloudckpt.storage.s3_upload import ClientParts, S3Uploads

__all__ = ["S3Storage"]

_DELETE_AT_ONCE = 1000  # the API's limit for DeleteObjects
_MAX_PARTS = 9_000  # of the API's 10,000
_MEBIBYTE = 1024 * 1024
_CHUNK = 256 * 1024


class S3Storage(S3Session):
    """A storage under one prefix of one bucket.

    Args:
        bucket: its name, or an access point's ARN.
        prefix: the keys' beginning, without slashes around it; may be empty.
        options: for ``s3fs.S3FileSystem``, as they are.
        settings: part sizes, time-outs and deadlines.
    """

    # -- small objects ---------------------------------------------------------------------------------------

    async def _read(self, key: str, limit_bytes: int) -> Versioned:
        """The version is the ETag without its quotes."""
        what = self._named("reading", key)
        answer = await self._ask("get_object", what, Key=self._key(key), ChecksumMode="ENABLED")
        body = answer["Body"]
        async with body:
            size = int(answer["ContentLength"])
            if size > limit_bytes:
                raise StorageError(f"{what}: it has {size} bytes, more than the {limit_bytes} expected")
            found = await self._received(what, body.read())
        if len(found) != size:
            raise StorageError(f"{what}: {len(found)} of {size} bytes came", retryable=True)
        checksum = crc32c_b64(crc32c.crc32c(found))
        if answer.get("ChecksumCRC32C", checksum) != checksum:
            raise StorageError(f"{what}: not the bytes that the store has a checksum of came", retryable=True)
        return Versioned(found, str(answer["ETag"]).strip('"'))

    async def _received(self, what: str, reading: Any) -> bytes:
        try:
            return bytes(await self._in_time(what, reading))
        except Exception as exc:  # noqa: BLE001 - chained, unless it would show a secret
            raise self._explained(exc, what) from self._secrets.clean(exc)

    def create(self, key: str, body: bytes) -> Outcome:
        """See ``Storage.create``: PutObject with ``If-None-Match: *``."""
        return self._write(self._named("creating", key), key, body, IfNoneMatch="*")

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``: PutObject with ``If-Match``."""
        _, quoted = self._known.get(self._place(), (None, False))
        version = f'"{expecting}"' if quoted else expecting
        return self._write(self._named("replacing", key), key, body, IfMatch=version)

    def _write(self, what: str, key: str, body: bytes, **condition: str) -> Outcome:
        async def send() -> Outcome:
            try:
                answer = await self._call(
                    "put_object",
                    what,
                    Key=self._key(key),
                    Body=body,
                    ContentType="application/json",
                    ChecksumAlgorithm="CRC32C",  # named as well: a bucket with object lock insists
                    ChecksumCRC32C=crc32c_b64(crc32c.crc32c(body)),
                    **condition,
                )
            except ConfigError:
                raise
            except Exception as exc:  # noqa: BLE001 - whatever it was, it is no proof that nothing landed
                if is_condition_failed(exc):
                    return Lost(self._secrets.hide(f"{what}: {status_of(exc)} {code_of(exc)}"))
                return Unknown(self._explained(exc, what))
            return Landed(str(answer["ETag"]).strip('"'))

        return self._run(send())

    # -- payload ---------------------------------------------------------------------------------------------

    def _uploads_of(self, key: str) -> S3Uploads:
        return S3Uploads(self, what=self._named("writing", key), key=self._key(key))

    def _check_stored(self, key: str, carried: Carried) -> None:
        """The store has compared the sum that came with the bytes, before it took them."""

    def _part_bytes(self, size_bytes: int) -> int:
        # Equal parts (R2 wants them), few enough, in whole mebibytes.
        least = -(-size_bytes // _MAX_PARTS)
        return max(self._settings.part_size_bytes, -(-least // _MEBIBYTE) * _MEBIBYTE)

    async def _send_whole(self, key: str, body: bytes) -> None:
        checksum = {"ChecksumAlgorithm": "CRC32C", "ChecksumCRC32C": crc32c_b64(crc32c.crc32c(body))}
        await self._with_or_without(checksum, "put_object", self._named("writing", key), Key=self._key(key), Body=body)

    async def _with_or_without(self, checksum: dict[str, str], method: str, what: str, **arguments: Any) -> Any:
        """Send a checksum where the server takes one; a server that refuses it is not asked again."""
        try:
            return await self._call(method, what, **arguments, **(checksum if self._checksums else {}))
        except Exception as exc:
            if isinstance(exc, ConfigError):
                raise
            if not (self._checksums and checksum and is_unsupported(exc)):
                raise self._explained(exc, what) from self._secrets.clean(exc)
        answer = await self._ask(method, what, **arguments)
        self._checksums = False
        return answer

    def _put_parts(
        self, key: str, parts: Iterator[bytearray], size_bytes: int, progress: Callable[[int], None]
    ) -> None:
        what, uploads = self._named("writing", key), self._uploads_of(key)
        sender = ClientParts(uploads, what=what, size_bytes=size_bytes, at_once=self._settings.parts_in_flight)
        UploadInParts(uploads, what=what).send_by(lambda upload_id: sender.send(upload_id, parts, progress))

    def request(
        self, method: str, what: str, *, checksum: dict[str, str], field: str = "", **arguments: Any
    ) -> Running[Any]:
        """See ``Requests.request``."""

        async def attempt() -> Any:
            running.attempts += 1
            answer = await self._with_or_without(checksum, method, what, **arguments)
            return answer[field] if field else answer

        running: Running[Any] = Running(self._running(), lambda: self._again(attempt))
        return running

    def abort_strays(self, key: str) -> None:
        """Abort every unfinished upload of a whole key."""

        async def attempt() -> None:
            found = await self._list_uploads(key)
            # Of this very key: one that only begins alike is somebody else's.
            await self._abort_each([upload for upload in found if upload["Key"] == key])

        self._run(self._again(attempt))

    def copy_from(self, source: Storage, source_key: str, key: str, *, size_bytes: int, checksum: int) -> bool:
        """See ``Copying.copy_from``: CopyObject, or UploadPartCopy where one request would take too long."""
        if not isinstance(source, S3Storage) or source.endpoint != self.endpoint:
            return False
        what = self._named("copying to", key)
        place = {"Bucket": source._bucket, "Key": source._key(source_key)}  # noqa: SLF001 - one of the same kind
        copies = StoreCopies(
            self,
            self._uploads_of(key),
            what=what,
            key=self._key(key),
            source=place,
            size_bytes=size_bytes,
            checksum=checksum,
        )
        try:
            copies.run()
            found = self.size(key)
        except StorageError as exc:
            if exc.retryable:
                raise
            # These credentials may not read the other bucket, or the server copies nothing: the bytes can be carried.
            return False
        if found != size_bytes:
            self.delete([key])
            raise StorageError(f"{what}: {found} bytes arrived, and {size_bytes} were to be copied")
        return True

    # -- reading payload -------------------------------------------------------------------------------------

    async def _read_into(self, key: str, start: int, targets: Sequence[memoryview]) -> None:
        what = self._named("reading", key)
        length = sum(map(len, targets))
        await self._in_time(what, self._receive(what, key, start, start + length, targets), size_bytes=length)

    async def _receive(self, what: str, key: str, start: int, end: int, targets: Sequence[memoryview]) -> None:
        try:
            answer = await self._call("get_object", what, Key=self._key(key), Range=f"bytes={start}-{end - 1}")
        except ConfigError:
            raise
        except Exception as exc:  # noqa: BLE001 - chained, unless it would show a secret
            if status_of(exc) == 416:
                raise self._no_such_range(key, start, end - start) from self._secrets.clean(exc)
            raise self._explained(exc, what) from self._secrets.clean(exc)
        body = answer["Body"]
        async with body:
            total = int(str(answer.get("ContentRange", "")).rpartition("/")[2] or answer["ContentLength"])
            if total < end:
                raise self._no_such_range(key, start, end - start)
            if int(answer["ContentLength"]) != end - start:
                raise StorageError(f"{what}: the server does not answer ranges ({answer['ContentLength']} bytes)")
            await self._fill(what, body, end - start, targets)

    async def _fill(self, what: str, body: Any, length: int, targets: Sequence[memoryview]) -> None:
        filled = 0
        try:
            for target in targets:
                at = 0
                while at < len(target) and (chunk := await body.read(min(len(target) - at, _CHUNK))):
                    target[at : at + len(chunk)] = chunk
                    at += len(chunk)
                filled += at
        except Exception as exc:  # noqa: BLE001 - chained, unless it would show a secret
            raise self._explained(exc, what) from self._secrets.clean(exc)
        if filled != length:
            raise StorageError(f"{what}: {filled} of {length} bytes came", retryable=True)

    def size(self, key: str) -> int:
        """See ``Storage.size``: HeadObject."""
        return int(self._head(key)["ContentLength"])

    def attest(self, key: str) -> Attested:
        """See ``Attesting.attest``: HeadObject, which tells the checksum that came with the object."""
        found = self._head(key, ChecksumMode="ENABLED")
        return Attested(int(found["ContentLength"]), crc32c_of(str(found.get("ChecksumCRC32C", ""))))

    def _head(self, key: str, **arguments: str) -> Mapping[str, Any]:
        what = self._named("looking at", key)

        async def ask() -> Mapping[str, Any]:
            found: Mapping[str, Any]
            try:
                found = await self._ask("head_object", what, Key=self._key(key), **arguments)
            except ObjectNotFoundError:
                # An answer to HEAD has no body, so a missing bucket looks like a missing object; a GET tells.
                found = await self._ask("get_object", what, Key=self._key(key))
                found["Body"].close()
            return found

        return self._run(ask())

    # -- list and delete -------------------------------------------------------------------------------------

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``: ListObjectsV2, page by page."""
        what = f"listing {self.url}"
        left = limit
        token: dict[str, str] = {}
        while left is None or left > 0:
            # One more than asked for: the prefix itself may be an object (a "folder" made in a console).
            most = {} if left is None or left >= 1000 else {"MaxKeys": left + 1}
            answer = self._run(self._ask("list_objects_v2", what, Prefix=self._prefix + prefix, **most, **token))
            for item in answer.get("Contents", ()):
                key = str(item["Key"])[len(self._prefix) :]
                # Some servers take two slashes in the prefix for one and list more than was asked for.
                if key and key.startswith(prefix) and (left is None or left > 0):
                    yield Listed(key, int(item["Size"]))
                    left = None if left is None else left - 1
            if not answer.get("IsTruncated"):
                return
            token = {"ContinuationToken": str(answer["NextContinuationToken"])}

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``: DeleteObjects with each key's error looked at; key by key where that is unknown."""
        going = {self._key(key): key for key in keys}
        names = [*going]
        failed: dict[str, StorageError] = {}
        for start in range(0, len(names), _DELETE_AT_ONCE):
            found = self._run(self._delete(names[start : start + _DELETE_AT_ONCE]))
            failed |= {going.get(name, name): problem for name, problem in found.items()}
        return failed

    async def _delete(self, names: Sequence[str]) -> dict[str, StorageError]:
        what = f"deleting in {self.url}"
        if self._bulk_delete and len(names) > 1:
            try:
                answer = await self._call(
                    "delete_objects", what, Delete={"Objects": [{"Key": name} for name in names], "Quiet": True}
                )
            except ConfigError:
                raise
            except Exception as exc:  # noqa: BLE001 - sorted below
                if not is_unsupported(exc):
                    problem = self._explained(exc, what)
                    return dict.fromkeys(names, problem)
                self._bulk_delete = False
            else:
                return {
                    str(error.get("Key", names[0])): self._explained(_as_error(error), f"{what}: {error.get('Key')}")
                    for error in answer.get("Errors", ())
                    if error.get("Code") not in {"NoSuchKey", "NoSuchVersion"}
                }
        return await each(
            names, lambda name: self._ask("delete_object", f"deleting s3://{self._bucket}/{name}", Key=name)
        )

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        """See ``Storage.abort_uploads``: ListMultipartUploads to its end, then abort each."""
        found = self._run(self._list_uploads(self._prefix + prefix))
        going = [upload for upload in found if not spare(upload["Key"][len(self._prefix) :])]
        return self._run(self._abort_each(going))

    def lifecycle_dangers(self) -> Sequence[str]:
        """See ``Governed.lifecycle_dangers``: GetBucketLifecycleConfiguration."""
        try:
            what = f"reading the lifecycle rules of s3://{self._bucket}"
            found = self._run(self._ask("get_bucket_lifecycle_configuration", what))
        except ObjectNotFoundError:
            return []  # the bucket has none
        return s3_dangers(found.get("Rules", ()), self._prefix)

    async def _list_uploads(self, prefix: str) -> Sequence[dict[str, str]]:
        what = f"listing unfinished uploads in {self.url}"
        marker: dict[str, str] = {}
        found: deque[dict[str, str]] = deque()
        while True:
            try:
                answer = await self._call("list_multipart_uploads", what, Prefix=prefix, **marker)
            except ConfigError:
                raise
            except Exception as exc:  # noqa: BLE001 - chained, unless it would show a secret
                problem = self._explained(exc, what)
                if is_unsupported(exc) or isinstance(problem, ObjectNotFoundError):
                    return found  # a server that does not know the request has nothing to be found
                raise problem from self._secrets.clean(exc)
            found.extend(
                {"Key": str(upload["Key"]), "UploadId": str(upload["UploadId"])}
                for upload in answer.get("Uploads", ())
                if str(upload["Key"]).startswith(prefix)  # some servers ignore the prefix
            )
            if not answer.get("IsTruncated") or not answer.get("NextKeyMarker"):
                return found
            marker = {
                "KeyMarker": str(answer.get("NextKeyMarker", "")),
                "UploadIdMarker": str(answer.get("NextUploadIdMarker", "")),
            }

    async def _abort_each(self, uploads: Sequence[dict[str, str]]) -> int:
        aborted = 0
        for upload in uploads:
            with contextlib.suppress(ObjectNotFoundError):  # it has ended meanwhile
                await self._ask("abort_multipart_upload", f"aborting {upload['Key']}", **upload)
                aborted += 1
        return aborted


def _as_error(error: Mapping[str, Any]) -> AnsweredError:
    """One line of an answer to DeleteObjects, as the error that a request of its own would have got."""
    status = _STATUS.get(str(error.get("Code")), 400)
    return AnsweredError({"Error": dict(error), "ResponseMetadata": {"HTTPStatusCode": status}})


#: DeleteObjects answers with codes only.
_STATUS = {"AccessDenied": 403, "InternalError": 500, "SlowDown": 503}
