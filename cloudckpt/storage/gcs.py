"""Objects in a Google Cloud Storage bucket, through gcsfs.

gcsfs gives the session: credentials and their renewal, endpoint or emulator, requester pays. The requests of the JSON
API are sent over that session directly, because gcsfs turns a lost answer into "the file exists", repeats requests for
half a minute by itself, and compares neither sizes nor checksums. Its core class is used, not the extended one, which
asks another API over gRPC about every bucket first.

Past 350 lines, because the verbs of one backend stand together.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

import crc32c

from cloudckpt.errors import ObjectNotFoundError, StorageError
from cloudckpt.storage.base import Attested, Buffer, Landed, Listed, Lost, Outcome, Storage, Unknown, Versioned, scatter
from cloudckpt.storage.direct import Declined
from cloudckpt.storage.gcs_errors import Answer
from cloudckpt.storage.gcs_session import GCSSession
from cloudckpt.storage.gcs_upload import ResumableUpload
from cloudckpt.storage.gcs_upload import Session as ResumableSession
from cloudckpt.storage.gcs_xml import Session, XmlUploads
from cloudckpt.storage.lifecycle import google_dangers
from cloudckpt.storage.loop import Running
from cloudckpt.storage.multipart import Carried
from cloudckpt.storage.remote import crc32c_b64, crc32c_of, each

__all__ = ["GCSStorage"]

#: Resumable uploads go in multiples of this ("Resumable uploads", Cloud Storage documentation).
_CHUNK = 256 * 1024
#: "There is a limit of one write per second to the same object name" (Cloud Storage, "Quotas & limits").
_GOOGLE_SPACING_S = 1.1
_OK = (200, 201, 204)


class GCSStorage(GCSSession):
    """A storage under one prefix of one bucket.

    Args:
        bucket: its name.
        prefix: the keys' beginning, without slashes around it; may be empty.
        options: for ``gcsfs.GCSFileSystem``, as they are.
        settings: part sizes, time-outs and deadlines.
        spacing_s: least time between two conditional writes of one object; by default 1.1 s at Google and none at an
            emulator.
    """

    # -- small objects ---------------------------------------------------------------------------------------

    async def _read(self, key: str, limit_bytes: int) -> Versioned:
        """The version is the generation, from the same answer as the bytes."""
        what = self._named("reading", key)
        # One byte more than allowed, so that an object that is too large is not downloaded to find out.
        wanted = {"Range": f"bytes=0-{limit_bytes}"}
        answer = await self._send(what, "GET", self._media(key), params={"alt": "media"}, headers=wanted)
        if answer.status == 416:  # an empty object has no first byte
            answer = await self._send(what, "GET", self._media(key), params={"alt": "media"})
        if answer.status not in {200, 206}:
            raise self._explained(answer, what)
        total = _total(answer)
        if total > limit_bytes:
            raise StorageError(f"{what}: it has {total} bytes, more than the {limit_bytes} expected")
        if len(answer.body) != total:
            raise StorageError(f"{what}: {len(answer.body)} of {total} bytes came", retryable=True)
        _check_sum(answer, what)
        return Versioned(answer.body, answer.headers.get("x-goog-generation", ""))

    def create(self, key: str, body: bytes) -> Outcome:
        """See ``Storage.create``: an upload with ``ifGenerationMatch=0``."""
        return self._write(self._named("creating", key), key, body, "0")

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``: an upload with ``ifGenerationMatch``."""
        if not expecting.isdecimal() or int(expecting) == 0:
            return Lost(f"{key}: {expecting!r} is no generation")
        # A generation is a 64-bit number; one that cannot be is refused here, as the store would answer 400.
        if int(expecting) >= 1 << 63:
            return Lost(f"{key}: {expecting!r} is no generation")
        return self._write(self._named("replacing", key), key, body, expecting)

    def _write(self, what: str, key: str, body: bytes, generation: str) -> Outcome:
        async def send() -> Outcome:
            await self._spaced(key)
            try:
                answer = await self._upload_whole(what, key, body, {"ifGenerationMatch": generation})
            except StorageError as exc:
                return Unknown(exc)
            if answer.status == 412:
                return Lost(f"{what}: 412 {answer.message(self._secrets.hide)}")
            if answer.status not in _OK:
                return Unknown(self._explained(answer, what))
            return Landed(str(answer.json.get("generation", "")))

        return self._run(send())

    async def _spaced(self, key: str) -> None:
        """Wait until this object may be written again: the store answers 429 to whoever does not."""
        spacing = self._spacing_s
        if spacing is None:
            on_google = await self._is_google()
            spacing = _GOOGLE_SPACING_S if on_google else 0.0
        now = time.monotonic()
        at = max(now, self._last_write.get(key, -spacing) + spacing)
        self._last_write[key] = at
        await asyncio.sleep(at - now)

    async def _upload_whole(self, what: str, key: str, body: Buffer, params: Mapping[str, str]) -> Answer:
        """One request with metadata and bytes; the store compares our checksum before it keeps anything."""
        boundary = secrets.token_hex(16)
        metadata = {"name": self._key(key), "crc32c": crc32c_b64(crc32c.crc32c(body)), "contentType": _type_of(key)}
        head = (
            f"--{boundary}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(metadata)}\r\n"
            f"--{boundary}\r\nContent-Type: {metadata['contentType']}\r\n\r\n"
        )
        data = b"".join((head.encode(), body, f"\r\n--{boundary}--\r\n".encode()))
        return await self._send(
            what,
            "POST",
            self._uploads,
            params={"uploadType": "multipart", **params},
            headers={"Content-Type": f"multipart/related; boundary={boundary}"},
            data=data,
        )

    # -- payload ---------------------------------------------------------------------------------------------

    def _uploads_of(self, key: str) -> _ObjectUploads:
        what = self._named("writing", key)
        return _ObjectUploads(self._parts, partial(self._look, what, key), what, self._key(key), _type_of(key))

    def _check_stored(self, key: str, carried: Carried) -> None:
        # If the store did not say, or says something else, the object tells.
        if carried.told != crc32c_b64(carried.crc32c):
            what = self._named("writing", key)
            self._run(self._compare(what, key, self._look(what, key), carried.size_bytes, carried.crc32c))

    def _look(self, what: str, key: str) -> Answer:
        return self._run(self._again(partial(self._metadata, what, key)))

    async def _metadata(self, what: str, key: str) -> Answer:
        return await self._ask(what, "GET", self._object(key))

    @property
    def _parts(self) -> XmlUploads:
        session = Session(self._running, self._run, self._again, self._send, self._explained)
        return XmlUploads(session, self._bucket)

    def _part_bytes(self, size_bytes: int) -> int:  # noqa: ARG002 - there is no limit to the number of chunks
        return max(self._settings.part_size_bytes // _CHUNK, 1) * _CHUNK

    async def _send_whole(self, key: str, body: bytes) -> None:
        what = self._named("writing", key)
        answer = await self._upload_whole(what, key, body, {})
        if answer.status not in _OK:
            raise self._explained(answer, what)
        await self._compare(what, key, answer, len(body), crc32c.crc32c(body))

    def _put_parts(
        self, key: str, parts: Iterator[bytearray], size_bytes: int, progress: Callable[[int], None]
    ) -> None:
        what = self._named("writing", key)
        session = ResumableSession(
            run=self._run,
            again=self._again,
            begin=partial(self._begin_upload, what, key),
            send=lambda method, url, headers, data: self._send(what, method, url, headers=headers, data=data),
            stored=partial(self._metadata, what, key),
            compare=partial(self._compare, what, key),
            explained=self._explained,
        )
        ResumableUpload(session, what=what, size_bytes=size_bytes).send(parts, progress)

    async def _begin_upload(self, what: str, key: str) -> str:
        answer = await self._ask(
            what,
            "POST",
            self._uploads,
            params={"uploadType": "resumable"},
            headers={"Content-Type": "application/json; charset=UTF-8", "X-Upload-Content-Type": _type_of(key)},
            data=json.dumps({"name": self._key(key)}).encode(),
        )
        if "Location" not in answer.headers:
            raise StorageError(f"{what}: the store opened no upload session: {answer.status} without a Location")
        return str(answer.headers["Location"])

    async def _compare(self, what: str, key: str, answer: Answer, size_bytes: int, value: int) -> None:
        """Hold what the store says it has against what was sent; take a damaged object away again."""
        found = answer.json
        if _fits(answer, size_bytes, value):
            return
        generation = str(found.get("generation", ""))
        with contextlib.suppress(StorageError):
            await self._ask(what, "DELETE", self._object(key), params={"ifGenerationMatch": generation})
        raise StorageError(
            f"{what}: {found.get('size')} bytes with crc32c {found.get('crc32c')} arrived, {size_bytes} with "
            f"{crc32c_b64(value)} were sent: damaged on the way, and taken away again"
        )

    def copy_from(self, source: Storage, source_key: str, key: str, *, size_bytes: int, checksum: int) -> bool:
        """See ``Copying.copy_from``: a rewrite, in as many requests as the store asks for."""
        if not isinstance(source, GCSStorage) or source.endpoint != self.endpoint:
            return False
        what = self._named("copying to", key)
        target = self._object(key).removeprefix("/storage/v1")
        url = f"{source._object(source_key)}/rewriteTo{target}"  # noqa: SLF001 - one of the same kind
        try:
            found = self._run(self._rewritten(what, url))
        except StorageError as exc:
            if exc.retryable:
                raise
            return False  # this identity may not read the other bucket, say: the bytes can be carried
        ours = crc32c_b64(checksum)
        if str(found.get("size")) != str(size_bytes) or found.get("crc32c", ours) != ours:
            self.delete([key])
            raise StorageError(
                f"{what}: {found.get('size')} bytes with crc32c {found.get('crc32c')} arrived, {size_bytes} with "
                f"{ours} were to be copied"
            )
        return True

    async def _rewritten(self, what: str, url: str) -> Mapping[str, Any]:
        token: dict[str, str] = {}
        while True:
            answer = await self._again(partial(self._ask, what, "POST", url, params=token))
            said: Any = answer.json
            if said.get("done"):
                resource: Mapping[str, Any] = said["resource"]
                return resource
            if "rewriteToken" not in said:
                raise StorageError(f"{what}: the store answered neither that it is done nor how to go on")
            token = {"rewriteToken": str(said["rewriteToken"])}

    # -- reading payload -------------------------------------------------------------------------------------

    async def _read_into(self, key: str, start: int, targets: Sequence[memoryview]) -> None:
        what = self._named("reading", key)
        length = sum(map(len, targets))
        end = start + length
        answer = await self._send(
            what,
            "GET",
            self._media(key),
            params={"alt": "media"},
            headers={"Range": f"bytes={start}-{end - 1}"},
            reads_bytes=length,
        )
        if answer.status == 416 or (answer.status in {200, 206} and _total(answer) < end):
            raise self._no_such_range(key, start, end - start)
        if answer.status not in {200, 206}:
            raise self._explained(answer, what)
        # A server without ranges answers 200 with everything.
        body = memoryview(answer.body)[start:end] if answer.status == 200 else memoryview(answer.body)
        if len(body) != length:
            raise StorageError(f"{what}: {len(body)} of {length} bytes came", retryable=True)
        scatter(body, targets)

    def size(self, key: str) -> int:
        """See ``Storage.size``: the object's metadata."""
        return self.attest(key).size_bytes

    def attest(self, key: str) -> Attested:
        """See ``Attesting.attest``: the object's metadata."""
        found = self._run(self._ask(self._named("looking at", key), "GET", self._object(key))).json
        return Attested(int(str(found["size"])), crc32c_of(str(found.get("crc32c", ""))))

    # -- list and delete -------------------------------------------------------------------------------------

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        """See ``Storage.list``: page by page."""
        what = f"listing {self.url}"
        url = f"/storage/v1/b/{quote(self._bucket, safe='')}/o"
        left = limit
        token: dict[str, str] = {}
        while left is None or left > 0:
            most = {} if left is None or left >= 1000 else {"maxResults": str(left + 1)}
            params = {"prefix": self._prefix + prefix, **most, **token}
            try:
                answer = self._run(self._ask(what, "GET", url, params=params)).json
            except ObjectNotFoundError as exc:
                raise StorageError(
                    f"{what}: 404: bucket {self._bucket!r} does not exist: create it, or fix the URL"
                ) from exc
            items: Any = answer.get("items", ())
            for item in items:
                key = str(item["name"])[len(self._prefix) :]
                # Some servers take two slashes in the prefix for one and list more than was asked for.
                if key and key.startswith(prefix) and (left is None or left > 0):
                    yield Listed(key, int(item["size"]))
                    left = None if left is None else left - 1
            if not answer.get("nextPageToken"):
                return
            token = {"pageToken": str(answer["nextPageToken"])}

    def delete(self, keys: Iterable[str]) -> dict[str, StorageError]:
        """See ``Storage.delete``: one request each, several at once; the batch endpoint is not everywhere."""
        return self._run(
            each(
                dict.fromkeys(keys),
                lambda key: self._ask(self._named("deleting", key), "DELETE", self._object(key)),
            )
        )

    def lifecycle_dangers(self) -> Sequence[str]:
        """See ``Governed.lifecycle_dangers``: the bucket's own metadata."""
        what = f"reading the lifecycle rules of gs://{self._bucket}"
        url = f"/storage/v1/b/{quote(self._bucket, safe='')}"
        found: Any = self._run(self._ask(what, "GET", url, params={"fields": "lifecycle"})).json
        return google_dangers((found.get("lifecycle") or {}).get("rule") or (), self._prefix)

    def abort_uploads(self, prefix: str, *, spare: Callable[[str], bool] = lambda _: False) -> int:
        """See ``Storage.abort_uploads``: those in parts. Resumable ones cannot be listed; they cost nothing."""
        if self._lane.knows_no_uploads():
            return 0
        try:
            found = self._parts.find(f"listing unfinished uploads in {self.url}", self._prefix + prefix)
        except Declined as exc:
            self._lane.decline_uploads(exc)
            return 0
        return self._parts.abort_each([upload for upload in found if not spare(upload[0][len(self._prefix) :])])


def _total(answer: Answer) -> int:
    """The whole object's size in bytes, as an answer to a download tells it."""
    if answer.status == 206:
        return int(answer.headers.get("Content-Range", "").rpartition("/")[2])
    return int(answer.headers.get("Content-Length", len(answer.body)))


def _check_sum(answer: Answer, what: str) -> None:
    for part in ",".join(answer.headers.getall("x-goog-hash", [])).split(","):
        name, _, value = part.strip().partition("=")
        if name == "crc32c" and value != crc32c_b64(crc32c.crc32c(answer.body)):
            raise StorageError(f"{what}: the bytes that came do not have the checksum the store has", retryable=True)


def _type_of(key: str) -> str:
    return "application/json" if key.endswith(".json") else "application/octet-stream"


def _fits(answer: Answer, size_bytes: int, value: int) -> bool:
    found, ours = answer.json, crc32c_b64(value)
    return str(found.get("size")) == str(size_bytes) and found.get("crc32c", ours) == ours


@dataclass(frozen=True, slots=True)
class _ObjectUploads:
    """The uploads of one object by the XML API. See ``Uploads``."""

    parts: XmlUploads
    look: Callable[[], Answer]
    what: str
    key: str
    content_type: str

    def begin(self) -> Running[str]:
        return self.parts.begin(self.what, self.key, self.content_type)

    def complete(self, upload_id: str, parts: Sequence[Carried]) -> str:
        return self.parts.complete(self.what, self.key, upload_id, [part.etag for part in parts]).told_crc32c

    def has_become(self, whole: Carried) -> bool:
        return _fits(self.look(), whole.size_bytes, whole.crc32c)

    def abort(self, upload_id: str) -> None:
        self.parts.abort(f"aborting: {self.what}", self.key, upload_id)

    def abort_strays(self) -> None:
        self.parts.abort_strays(self.key)
