"""A strict fake of Google Cloud Storage's JSON API, over HTTP, in this process.

Emulators store what real Google Cloud Storage refuses: writes whose condition does not hold, bytes that are not those
of the checksum, a chunk that was sent twice. This one refuses what the documentation says is refused, and what it does
not know it answers with an error, never with a success.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import itertools
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal, Self, TypeAlias
from urllib.parse import quote, unquote

import crc32c
from aiohttp import ClientError, web
from multidict import CIMultiDictProxy

__all__ = ["FakeGCS", "Operation", "Seen"]

#: What a request asked for; "unknown" is no endpoint of this server.
Operation: TypeAlias = Literal[
    "get",
    "media",
    "insert",
    "resumable-start",
    "resumable-chunk",
    "resumable-query",
    "resumable-cancel",
    "list",
    "delete",
    "bucket-get",
    "copy",
    "patch",
    "unknown",
]

#: "The chunk size must be a multiple of 256 KiB, unless it's the last chunk" ("Resumable uploads").
_CHUNK: Final = 256 * 1024
#: An answer goes out in pieces of this size, so that others are served in between.
_PIECE: Final = 1024 * 1024
#: How long a request that is under way when the server stops may take to end by itself.
_PATIENCE_S: Final = 1.0
#: Turns of the event loop in which a connection that was accepted is surely known: CPython takes about three.
_TURNS_TO_ACCEPT: Final = 10
_BACKLOG: Final = 128
_LONGEST_NAME: Final = 1024
#: Generations and their like are signed 64-bit numbers.
_MOST: Final = 1 << 63

#: What an uploader may say about an object, beside its bytes.
_OF_THE_UPLOADER: Final = (
    "cacheControl",
    "contentDisposition",
    "contentEncoding",
    "contentLanguage",
    "contentType",
    "customTime",
    "metadata",
    "storageClass",
)
_BINARY: Final = "application/octet-stream"
_HTTP_CONDITIONS: Final = ("If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since", "If-Range")

_CONTENT_RANGE: Final = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)", re.ASCII)
_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
_BOUNDARY: Final = re.compile(r';\s*boundary=(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)
_PATH: Final = re.compile(r"/(?:(upload|download)/)?storage/v1/b/([^/]+)(/o(?:/([^/]+)(/.*)?)?)?")
_COPY: Final = re.compile(r"/(copyTo|rewriteTo)/b/([^/]+)/o/([^/]+)")
_INTEGER: Final = re.compile(r"[+-]?\d{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request that was answered.

    Attributes:
        method: of HTTP.
        operation: what it asked for.
        name: the object's, decoded; of a copy the written one's; of a listing its prefix; empty for a bucket, and
            where an upload was refused before it was read.
        status: the answer's; 0 where the connection broke before the body was there, so that nothing was answered.
    """

    method: str
    operation: Operation
    name: str
    status: int


class FakeGCS:
    """A context manager that serves Google Cloud Storage's JSON API on a free port of 127.0.0.1.

    Everything is in memory, and what was stored can be looked at after the server has stopped.

    Honoured: ``ifGenerationMatch``, ``ifGenerationNotMatch`` and their metageneration twins on every request that
    Google documents them for, at the moment of the write; ``crc32c`` and ``md5Hash`` of an upload and its
    ``X-Goog-Hash``; ranges; the rules of resumable uploads. A condition it does not know is refused with 400.

    Args:
        write_spacing_s: a write of an object within this time after its last one is answered with 429, as Google
            allows one a second for each object. Failed writes do not count, and neither do deletes.
        page_size: most entries of one page of a listing.
        required_token: the only access token that is accepted; None accepts every token and none at all.
        denied: names of permissions that nobody has, such as "storage.objects.delete". May change while it runs.
        now: the clock for ``write_spacing_s``, in seconds.

    Attributes:
        requests: what was answered, in order. Can be read, copied and cleared from any thread.
        denied: see above.
    """

    def __init__(
        self,
        *,
        write_spacing_s: float = 0.0,
        page_size: int = 1000,
        required_token: str | None = None,
        denied: Iterable[str] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        if page_size < 1:
            raise ValueError("page_size must be at least 1")
        self.requests: list[Seen] = []
        self.denied: set[str] = set(denied)
        self._required_token = required_token
        self._store = _Store(
            lambda permission: permission in self.denied, spacing_s=write_spacing_s, page_size=page_size, now=now
        )
        self._mutex = threading.Lock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._url = ""
        self._ready = threading.Event()
        self._failure: BaseException | None = None

    def __repr__(self) -> str:
        return f"<FakeGCS {self._url or 'not started'}: {len(self.requests)} requests>"

    # -- for tests -------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """Where it listens: ``http://127.0.0.1:PORT``, without a slash at the end."""
        if not self._url:
            raise RuntimeError("the server has no URL before it is entered: with FakeGCS() as gcs: …")
        return self._url

    def storage_options(self) -> dict[str, Any]:
        """What gcsfs needs to speak to it."""
        return {"endpoint_url": self.url, "token": "anon"}

    def environment(self) -> dict[str, str]:
        """Variables for a child process that speaks to it."""
        return {"STORAGE_EMULATOR_HOST": self.url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}

    def create_bucket(self, name: str, *, versioning: bool = False) -> None:
        """Make an empty bucket.

        Args:
            name: of the bucket.
            versioning: whether it keeps the generations that were overwritten or deleted.

        Raises:
            ValueError: there is one of this name.
        """
        with self._mutex:
            self._store.create_bucket(name, versioning=versioning)

    def objects(self, bucket: str) -> dict[str, bytes]:
        """The live objects' bytes, by name in order.

        Raises:
            KeyError: there is no such bucket.
        """
        with self._mutex:
            live = self._store.buckets[bucket].live
            return {name: bytes(live[name].data) for name in sorted(live, key=str.encode)}

    def uploads(self) -> list[str]:
        """The names of objects whose resumable upload was begun, and neither ended nor cancelled."""
        with self._mutex:
            return [upload.name for upload in self._store.uploads.values() if upload.ended is None]

    # -- start and stop --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self._thread is not None:
            raise RuntimeError("a FakeGCS is started once")
        self._thread = threading.Thread(target=self._run, name="FakeGCS", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._stop is not None and self._thread is not None:
            with contextlib.suppress(RuntimeError):  # it has stopped already
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as exc:  # noqa: BLE001 - handed to the thread that waits
            self._failure = exc
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        # Bytes are stored as they come: a gzipped body is no business of a store's.
        runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=_PATIENCE_S)
        await runner.setup()
        listener = socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
        try:
            await web.SockSite(runner, listener).start()
            self._url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            self._ready.set()
            await self._stop.wait()
            # A connection that is accepted while asyncio closes its server is never closed: none may be on its way.
            self._loop.remove_reader(listener)
            for _ in range(_TURNS_TO_ACCEPT):
                await asyncio.sleep(0)
        finally:
            await runner.cleanup()
            listener.close()

    # -- one request -----------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        # The whole body first: the store is changed between two awaits or not at all.
        body, whole = await _body_of(request)
        with self._mutex:
            asked = _Asked.of(request, body, whole=whole)
            answer = self._answer(asked)
            self.requests.append(Seen(asked.method, asked.operation, asked.name, answer.status if whole else 0))
        return await answer.send(request)

    def _answer(self, asked: _Asked) -> _Answer:
        try:
            self._check_token(asked)
            if not asked.whole and asked.operation != "resumable-chunk":
                raise _RefusedError(400, "badRequest", "The body broke off.")
            asked.check_conditions_are_known()
            return self._store.do(asked)
        except _RefusedError as exc:
            return exc.answer()

    def _check_token(self, asked: _Asked) -> None:
        given = asked.headers.get("Authorization")
        if self._required_token is None or given == f"Bearer {self._required_token}":
            return
        # "The session URI acts as an authentication token" ("Resumable uploads"); a wrong one is wrong even there.
        if given is None and asked.upload_id is not None:
            return
        reason, message = ("required", "Login Required") if given is None else ("authError", "Invalid Credentials")
        raise _RefusedError(
            401,
            reason,
            message,
            location=("header", "Authorization"),
            headers={"WWW-Authenticate": 'Bearer realm="https://accounts.google.com/"'},
        )


async def _body_of(request: web.Request) -> tuple[bytearray, bool]:
    """The bytes that came, and whether they are all."""
    body = bytearray()
    try:
        async for piece in request.content.iter_any():
            body += piece
    except (ClientError, OSError):
        return body, False
    return body, True


# -- what is asked and what is answered ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes | memoryview = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def json(content: Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None) -> _Answer:
        body = json.dumps(content, indent=2).encode()
        return _Answer(status, body, {"Content-Type": "application/json; charset=UTF-8", **(headers or {})})

    async def send(self, request: web.Request) -> web.StreamResponse:
        if len(self.body) <= _PIECE:
            return web.Response(status=self.status, headers=self.headers, body=bytes(self.body))
        response = web.StreamResponse(status=self.status, headers=self.headers)
        response.content_length = len(self.body)
        with contextlib.suppress(ConnectionError):  # the client has left
            await response.prepare(request)
            view = memoryview(self.body)
            for start in range(0, len(view), _PIECE):
                await response.write(view[start : start + _PIECE])
            await response.write_eof()
        return response


class _RefusedError(Exception):
    """A request that is not carried out, as Google says it."""

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        *,
        domain: str = "global",
        location: tuple[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})
        self.detail: dict[str, object] = {"message": message, "domain": domain, "reason": reason}
        if location is not None:
            self.detail |= {"locationType": location[0], "location": location[1]}

    def answer(self) -> _Answer:
        if self.status == 304:
            return _Answer(304, headers=self.headers)
        error = {"code": self.status, "message": self.detail["message"], "errors": [self.detail]}
        return _Answer.json({"error": error}, self.status, self.headers)


def _invalid(message: str) -> _RefusedError:
    return _RefusedError(400, "invalid", message)


def _no_bucket() -> _RefusedError:
    return _RefusedError(404, "notFound", "The specified bucket does not exist.")


def _no_object(bucket: str, name: str) -> _RefusedError:
    return _RefusedError(404, "notFound", f"No such object: {bucket}/{name}")


def _no_permission(permission: str) -> _RefusedError:
    on_bucket = permission.startswith("storage.buckets.") or permission == "storage.objects.list"
    message = (
        f"tester@fake.iam.gserviceaccount.com does not have {permission} access to the Google Cloud Storage "
        f"{'bucket' if on_bucket else 'object'}. Permission '{permission}' denied on resource (or it may not exist)."
    )
    return _RefusedError(403, "forbidden", message)


@dataclass(slots=True)
class _Asked:
    """A request, taken apart.

    Attributes:
        name: the object's, as soon as it is known; an upload has it in its body.
        whole: whether the body came to its end.
        base: the server's URL as the client knows it.
    """

    method: str
    operation: Operation
    place: _Place
    name: str
    query: Mapping[str, str]
    headers: CIMultiDictProxy[str]
    body: bytearray
    whole: bool
    base: str

    @staticmethod
    def of(request: web.Request, body: bytearray, *, whole: bool) -> _Asked:
        place = _Place.of(request.raw_path)
        query, headers = request.query, request.headers
        operation = _operation(request.method, place, query, headers)
        name = query.get("prefix", "") if operation == "list" else place.target[1] or place.name
        base = f"{headers.get('X-Forwarded-Proto', 'http')}://{request.host}"
        return _Asked(request.method, operation, place, name, query, headers, body, whole, base)

    @property
    def bucket(self) -> str:
        return self.place.bucket

    @property
    def upload_id(self) -> str | None:
        return self.query.get("upload_id") if self.operation.startswith("resumable") else None

    def check_conditions_are_known(self) -> None:
        """A condition that is ignored is worse than one that is refused."""
        if self.upload_id is not None:
            return
        known: set[str] = set()
        if self.operation in {"get", "media", "insert", "resumable-start", "delete", "patch", "copy"}:
            known |= _names("if")
        if self.operation == "copy":
            known |= _names("ifSource")
        asked = {key for key in self.query if key.startswith("if")} - known
        asked |= {key for key in _HTTP_CONDITIONS if key in self.headers}
        if asked:
            raise _unknown(f"the condition {', '.join(sorted(asked))} on {self.operation}")


def _unknown(what: str) -> _RefusedError:
    # Not 501, which clients take for a passing trouble and repeat.
    return _RefusedError(400, "notImplemented", f"FakeGCS does not know {what}.")


@dataclass(frozen=True, slots=True)
class _Place:
    """What a path names.

    Attributes:
        service: "buckets", "objects", "upload" or "download"; empty where the path is none of ours.
        bucket: its name.
        name: the object's; empty where the path names none.
        verb: "copyTo", "rewriteTo", or empty.
        target: what a copy writes, as bucket and name.
    """

    service: str = ""
    bucket: str = ""
    name: str = ""
    verb: str = ""
    target: tuple[str, str] = ("", "")

    @staticmethod
    def of(raw_path: str) -> _Place:
        """Take a path apart before it is decoded, since names may hold slashes and percent signs."""
        found = _PATH.fullmatch(raw_path.partition("?")[0])
        copy = _COPY.fullmatch(found[5]) if found and found[5] else None
        if found is None or (found[5] and copy is None):
            return _Place()
        parts = [found[2], found[4] or "", *((copy[2], copy[3]) if copy else ("", ""))]
        try:
            bucket, name, *target = (unquote(part, errors="strict") for part in parts)
        except UnicodeDecodeError:
            return _Place()
        service = found[1] or ("objects" if found[3] else "buckets")
        return _Place(service, bucket, name, copy[1] if copy else "", (target[0], target[1]))


#: (service, whether the path names an object, method) -> operation.
_OPERATIONS: Final[dict[tuple[str, bool, str], Operation]] = {
    ("buckets", False, "GET"): "bucket-get",
    ("objects", False, "GET"): "list",
    ("objects", True, "GET"): "get",
    ("objects", True, "DELETE"): "delete",
    ("objects", True, "PATCH"): "patch",
    ("download", True, "GET"): "media",
}


def _operation(method: str, place: _Place, query: Mapping[str, str], headers: Mapping[str, str]) -> Operation:
    if place.verb:
        return "copy" if (place.service, method) == ("objects", "POST") else "unknown"
    if place.service == "upload" and not place.name:
        return _upload_operation(method, query, headers)
    found = _OPERATIONS.get((place.service, bool(place.name), method), "unknown")
    return "media" if found == "get" and query.get("alt") == "media" else found


def _upload_operation(method: str, query: Mapping[str, str], headers: Mapping[str, str]) -> Operation:
    if "upload_id" in query:
        if method == "DELETE":
            return "resumable-cancel"
        # Google takes POST for PUT here, and gcsfs sends it.
        if method not in {"PUT", "POST"}:
            return "unknown"
        return "resumable-query" if headers.get("Content-Range", "").startswith("bytes */") else "resumable-chunk"
    if method != "POST":
        return "unknown"
    return "resumable-start" if query.get("uploadType") == "resumable" else "insert"


# -- conditions ------------------------------------------------------------------------------------------------


def _names(prefix: str) -> set[str]:
    return {
        f"{prefix}{subject}{test}" for subject in ("Generation", "Metageneration") for test in ("Match", "NotMatch")
    }


@dataclass(frozen=True, slots=True)
class _Conditions:
    """What must hold of an object; a missing one has generation 0."""

    wanted: tuple[tuple[str, int], ...]

    @staticmethod
    def of(query: Mapping[str, str], prefix: str = "if") -> _Conditions:
        names = sorted(_names(prefix) & set(query))
        return _Conditions(tuple((name.removeprefix(prefix), _integer(query, name)) for name in names))

    def check(self, found: _Object | None, *, reading: bool = False) -> None:
        facts = {
            "Generation": 0 if found is None else found.generation,
            "Metageneration": 0 if found is None else found.metageneration,
        }
        for name, value in self.wanted:
            negated = name.endswith("NotMatch")
            fact = facts[name.removesuffix("NotMatch").removesuffix("Match")]
            if (fact == value) == negated:
                if negated and reading:
                    raise _RefusedError(304, "notModified", "Not Modified")
                raise _RefusedError(
                    412,
                    "conditionNotMet",
                    "At least one of the pre-conditions you specified did not hold.",
                    location=("header", "If-None-Match" if negated else "If-Match"),
                )


def _integer(query: Mapping[str, str], name: str) -> int:
    text = query[name]
    if _INTEGER.fullmatch(text) is None or not -_MOST <= int(text) < _MOST:
        raise _RefusedError(400, "invalid", f'Invalid long value: "{text}".', location=("parameter", name))
    return int(text)


# -- bytes and what is known of them ---------------------------------------------------------------------------


class _Sum:
    """Checksums of bytes, as they come."""

    def __init__(self, data: bytes | bytearray | memoryview = b"") -> None:
        self._crc32c = crc32c.crc32c(data)
        self._md5 = hashlib.md5(data, usedforsecurity=False)

    def add(self, data: memoryview) -> None:
        self._crc32c = crc32c.crc32c(data, self._crc32c)
        self._md5.update(data)

    @property
    def crc32c(self) -> str:
        return base64.b64encode(self._crc32c.to_bytes(4, "big")).decode()

    @property
    def md5(self) -> str:
        return base64.b64encode(self._md5.digest()).decode()

    def check(self, claims: Iterable[tuple[str, str]]) -> None:
        """Refuse bytes that are not those which were announced."""
        for kind, value in claims:
            name, found = {"crc32c": ("CRC32C", self.crc32c), "md5": ("MD5 hash", self.md5)}[kind]
            if value != found:
                raise _invalid(f'Provided {name} "{value}" doesn\'t match calculated {name} "{found}".')


def _claims(metadata: Mapping[str, object], headers: CIMultiDictProxy[str]) -> list[tuple[str, str]]:
    """The checksums that an upload announces: in its metadata, and in its header."""
    fields = (("crc32c", "crc32c"), ("md5", "md5Hash"))
    found = [(kind, str(metadata[key])) for kind, key in fields if metadata.get(key)]
    for part in filter(None, (part.strip() for part in ",".join(headers.getall("X-Goog-Hash", [])).split(","))):
        kind, _, value = part.partition("=")
        if kind not in {"crc32c", "md5"}:
            raise _invalid(f'Invalid value for X-Goog-Hash: "{part}".')
        found.append((kind, value))
    return found


@dataclass(frozen=True, slots=True)
class _Object:
    """One generation of an object. Its data is never changed."""

    bucket: str
    name: str
    data: bytes | bytearray
    crc32c: str
    md5: str
    generation: int
    metageneration: int
    about: Mapping[str, object]
    updated_us: int

    @property
    def etag(self) -> str:
        return base64.b64encode(f"{self.generation}/{self.metageneration}".encode()).decode()

    @property
    def content_type(self) -> str:
        return str(self.about.get("contentType") or _BINARY)

    def described(self) -> dict[str, object]:
        """The resource that Google's API shows."""
        where = f"/storage/v1/b/{quote(self.bucket, safe='')}/o/{quote(self.name, safe='')}"
        return {
            "kind": "storage#object",
            "id": f"{self.bucket}/{self.name}/{self.generation}",
            "selfLink": f"https://www.googleapis.com{where}",
            "mediaLink": f"https://storage.googleapis.com/download{where}?generation={self.generation}&alt=media",
            "storageClass": "STANDARD",
            **self.about,
            "name": self.name,
            "bucket": self.bucket,
            "generation": str(self.generation),
            "metageneration": str(self.metageneration),
            "size": str(len(self.data)),
            "md5Hash": self.md5,
            "crc32c": self.crc32c,
            "etag": self.etag,
            "timeCreated": _stamp(self.generation),
            "updated": _stamp(self.updated_us),
        }

    def headers(self) -> dict[str, str]:
        """What comes with the bytes."""
        return {
            "Content-Type": self.content_type,
            "ETag": self.etag,
            "x-goog-generation": str(self.generation),
            "x-goog-metageneration": str(self.metageneration),
            "x-goog-hash": f"crc32c={self.crc32c},md5={self.md5}",
            "x-goog-stored-content-length": str(len(self.data)),
            "x-goog-stored-content-encoding": str(self.about.get("contentEncoding") or "identity"),
            "x-goog-storage-class": str(self.about.get("storageClass") or "STANDARD"),
        }


def _stamp(microseconds: int) -> str:
    moment = datetime.fromtimestamp(microseconds / 1e6, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class _Bucket:
    name: str
    versioning: bool
    created_us: int
    live: dict[str, _Object] = field(default_factory=dict)
    #: Generations that are no longer live, by name and generation; only with versioning.
    kept: dict[tuple[str, int], _Object] = field(default_factory=dict)
    #: When each name was last written, by the clock for the spacing.
    written: dict[str, float] = field(default_factory=dict)

    def find(self, name: str, query: Mapping[str, str]) -> _Object:
        """The live object, or the generation that is asked for."""
        found = self.live.get(name)
        if "generation" in query:
            generation = _integer(query, "generation")
            if found is None or found.generation != generation:
                found = self.kept.get((name, generation))
        if found is None:
            raise _no_object(self.name, name)
        return found

    def retire(self, name: str) -> None:
        """Take the live object away."""
        found = self.live.pop(name, None)
        if found is not None and self.versioning:
            self.kept[name, found.generation] = found

    def described(self) -> dict[str, object]:
        return {
            "kind": "storage#bucket",
            "id": self.name,
            "name": self.name,
            "selfLink": f"https://www.googleapis.com/storage/v1/b/{self.name}",
            "projectNumber": "0",
            "location": "US",
            "locationType": "multi-region",
            "storageClass": "STANDARD",
            "metageneration": "1",
            "etag": "CAE=",
            "timeCreated": _stamp(self.created_us),
            "updated": _stamp(self.created_us),
            "versioning": {"enabled": self.versioning},
        }


@dataclass(slots=True)
class _Upload:
    """A resumable upload.

    ``ended`` is how it ended; every later request gets the same answer.
    """

    bucket: str
    name: str
    metadata: Mapping[str, object]
    conditions: _Conditions
    total: int | None
    data: bytearray = field(default_factory=bytearray)
    sums: _Sum = field(default_factory=_Sum)
    ended: _Answer | None = None

    def agreed(self, announced: str) -> int | None:
        """How large the object will be. It may be said late, but not changed."""
        if announced == "*":
            return self.total
        total = int(announced)
        if self.total not in {None, total} or total < len(self.data):
            raise _invalid(f"{len(self.data)} of {self.total} bytes are stored, and now it shall be {total}.")
        return total

    def persisted(self) -> _Answer:
        """How much has arrived, in the words of "Resume Incomplete"."""
        known = {"Range": f"bytes=0-{len(self.data) - 1}"} if self.data else {}
        return _Answer(308, headers=known)

    def end(self, answer: _Answer) -> None:
        self.ended = answer
        self.data = bytearray()  # not cleared: it may have become an object's


# -- the store -------------------------------------------------------------------------------------------------


class _Store:
    """Buckets, objects and uploads. Whoever calls holds the lock of ``FakeGCS``."""

    def __init__(
        self, denied: Callable[[str], bool], *, spacing_s: float, page_size: int, now: Callable[[], float]
    ) -> None:
        self.buckets: dict[str, _Bucket] = {}
        self.uploads: dict[str, _Upload] = {}
        self._denied = denied
        self._spacing_s = spacing_s
        self._page_size = page_size
        self._now = now
        self._last_us = 0
        self._verbs: dict[Operation, Callable[[_Asked], _Answer]] = {
            "get": self._get,
            "media": self._media,
            "insert": self._insert,
            "resumable-start": self._start,
            "resumable-chunk": self._chunk,
            "resumable-query": self._query,
            "resumable-cancel": self._cancel,
            "list": self._list,
            "delete": self._delete,
            "bucket-get": self._bucket_get,
            "copy": self._copy,
            "patch": self._patch,
        }

    def do(self, asked: _Asked) -> _Answer:
        """Carry a request out."""
        verb = self._verbs.get(asked.operation)
        if verb is None:
            raise _unknown(f"{asked.method} on this path")
        return verb(asked)

    def create_bucket(self, name: str, *, versioning: bool) -> None:
        if name in self.buckets:
            raise ValueError(f"there is a bucket {name!r} already")
        self.buckets[name] = _Bucket(name, versioning, self._tick())

    def _tick(self) -> int:
        """Microseconds since 1970 that never come twice: generations are made of them."""
        self._last_us = max(self._last_us + 1, time.time_ns() // 1000)
        return self._last_us

    def _bucket(self, name: str) -> _Bucket:
        if name not in self.buckets:
            raise _no_bucket()
        return self.buckets[name]

    def _permit(self, permission: str) -> None:
        if self._denied(permission):
            raise _no_permission(permission)

    # -- reading ---------------------------------------------------------------------------------------------

    def _bucket_get(self, asked: _Asked) -> _Answer:
        bucket = self._bucket(asked.bucket)
        self._permit("storage.buckets.get")
        return _Answer.json(bucket.described())

    def _found(self, asked: _Asked) -> _Object:
        bucket = self._bucket(asked.bucket)
        self._permit("storage.objects.get")
        found = bucket.find(asked.name, asked.query)
        _Conditions.of(asked.query).check(found, reading=True)
        return found

    def _get(self, asked: _Asked) -> _Answer:
        found = self._found(asked)
        return _Answer.json(found.described(), headers={"ETag": found.etag})

    def _media(self, asked: _Asked) -> _Answer:
        found = self._found(asked)
        view = memoryview(found.data)
        span = _span(asked.headers.get("Range", ""), len(view))
        if span is None:
            return _Answer(200, view, found.headers())
        start, end = span
        headers = {**found.headers(), "Content-Range": f"bytes {start}-{end - 1}/{len(view)}"}
        return _Answer(206, view[start:end], headers)

    def _list(self, asked: _Asked) -> _Answer:
        bucket = self._bucket(asked.bucket)
        self._permit("storage.objects.list")
        query = asked.query
        most = _integer(query, "maxResults") if query.get("maxResults") else self._page_size
        if most < 1:
            raise _invalid(f"Invalid unsigned integer value: {most}.")
        most = min(most, self._page_size)
        # One more than the page holds tells whether another follows.
        rows = [*itertools.islice(_rows(bucket, query), most + 1)]
        page = rows[:most]
        answer: dict[str, object] = {"kind": "storage#objects"}
        items = [row.described() for _, row in page if isinstance(row, _Object)]
        prefixes = [row for _, row in page if isinstance(row, str)]
        # An empty list is left out, as in every answer of Google's.
        if prefixes:
            answer["prefixes"] = prefixes
        if items:
            answer["items"] = items
        if len(rows) > most:
            answer["nextPageToken"] = _token(page[-1][0])
        return _Answer.json(answer)

    # -- writing ---------------------------------------------------------------------------------------------

    def _insert(self, asked: _Asked) -> _Answer:
        bucket = self._bucket(asked.bucket)
        kind = asked.query.get("uploadType")
        if kind == "media":
            metadata: Mapping[str, object] = {"contentType": asked.headers.get("Content-Type", _BINARY)}
            data: bytes | bytearray = asked.body
        elif kind == "multipart":
            metadata, data = _parts(asked.headers.get("Content-Type", ""), asked.body)
        else:
            raise _RefusedError(400, "invalidParameter", f"Invalid upload type: {kind}.")
        asked.name = _name_of(asked.query, metadata)
        self._permit("storage.objects.create")
        conditions = _Conditions.of(asked.query)
        sums = _Sum(data)
        sums.check(_claims(metadata, asked.headers))
        stored = self._write(bucket, asked.name, data, sums=sums, metadata=metadata, conditions=conditions)
        return _Answer.json(stored.described(), headers={"ETag": stored.etag})

    def _write(
        self,
        bucket: _Bucket,
        name: str,
        data: bytes | bytearray,
        *,
        sums: _Sum,
        metadata: Mapping[str, object],
        conditions: _Conditions,
    ) -> _Object:
        """Store an object if everything holds: the one place where a name gets a new generation."""
        found = bucket.live.get(name)
        conditions.check(found)
        if found is not None:
            self._permit("storage.objects.delete")
        self._space(bucket, name)
        about = {key: metadata[key] for key in _OF_THE_UPLOADER if metadata.get(key)}
        generation = self._tick()
        bucket.retire(name)
        bucket.live[name] = stored = _Object(
            bucket.name, name, data, sums.crc32c, sums.md5, generation, 1, about, updated_us=generation
        )
        return stored

    def _space(self, bucket: _Bucket, name: str) -> None:
        moment = self._now()
        last = bucket.written.get(name)
        if last is not None and moment - last < self._spacing_s:
            raise _RefusedError(
                429,
                "rateLimitExceeded",
                f"The object {bucket.name}/{name} exceeded the rate limit for object mutation operations (create, "
                "update, and delete). Please reduce your request rate. See "
                "https://cloud.google.com/storage/docs/gcs429.",
                domain="usageLimits",
            )
        bucket.written[name] = moment

    def _delete(self, asked: _Asked) -> _Answer:
        bucket = self._bucket(asked.bucket)
        self._permit("storage.objects.delete")
        found = bucket.find(asked.name, asked.query)
        _Conditions.of(asked.query).check(found)
        if "generation" not in asked.query:
            bucket.retire(asked.name)
        elif bucket.live.get(asked.name) is found:
            del bucket.live[asked.name]
        else:
            del bucket.kept[asked.name, found.generation]
        return _Answer(204)

    def _patch(self, asked: _Asked) -> _Answer:
        bucket = self._bucket(asked.bucket)
        self._permit("storage.objects.update")
        found = bucket.find(asked.name, asked.query)
        _Conditions.of(asked.query).check(found)
        about = _patched(found.about, _json_object(asked.body))
        if bucket.live.get(asked.name) is found:
            self._space(bucket, asked.name)
        changed = replace(found, about=about, metageneration=found.metageneration + 1, updated_us=self._tick())
        if bucket.live.get(asked.name) is found:
            bucket.live[asked.name] = changed
        else:
            bucket.kept[asked.name, found.generation] = changed
        return _Answer.json(changed.described(), headers={"ETag": changed.etag})

    def _copy(self, asked: _Asked) -> _Answer:
        source, target = self._bucket(asked.bucket), self._bucket(asked.place.target[0])
        self._permit("storage.objects.get")
        self._permit("storage.objects.create")
        chosen = {"generation": asked.query["sourceGeneration"]} if "sourceGeneration" in asked.query else {}
        found = source.find(asked.place.name, chosen)
        _Conditions.of(asked.query, "ifSource").check(found)
        name = _name_of({"name": asked.name}, {})
        about = {**found.about, **(_json_object(asked.body) if asked.body.strip() else {})}
        conditions = _Conditions.of(asked.query)
        stored = self._write(target, name, found.data, sums=_Sum(found.data), metadata=about, conditions=conditions)
        size = str(len(stored.data))
        done = {"totalBytesRewritten": size, "objectSize": size, "done": True, "resource": stored.described()}
        rewriting = asked.place.verb == "rewriteTo"
        return _Answer.json({"kind": "storage#rewriteResponse", **done} if rewriting else stored.described())

    # -- resumable uploads -----------------------------------------------------------------------------------

    def _start(self, asked: _Asked) -> _Answer:
        bucket = self._bucket(asked.bucket)
        metadata = _json_object(asked.body) if asked.body.strip() else {}
        asked.name = name = _name_of(asked.query, metadata)
        self._permit("storage.objects.create")
        conditions = _Conditions.of(asked.query)
        found = bucket.live.get(name)
        conditions.check(found)
        if found is not None:
            self._permit("storage.objects.delete")
        metadata = {"contentType": asked.headers.get("X-Upload-Content-Type"), **metadata}
        size = asked.headers.get("X-Upload-Content-Length", "*")
        if size != "*" and not (size.isascii() and size.isdecimal()):
            raise _invalid(f"Invalid value for X-Upload-Content-Length: {size}.")
        upload_id = secrets.token_urlsafe(48)
        self.uploads[upload_id] = _Upload(
            bucket.name, name, metadata, conditions, total=None if size == "*" else int(size)
        )
        where = f"{asked.base}/upload/storage/v1/b/{quote(bucket.name, safe='')}/o"
        location = f"{where}?uploadType=resumable&upload_id={upload_id}"
        return _Answer(200, headers={"Location": location, "X-GUploader-UploadID": upload_id})

    def _upload(self, asked: _Asked) -> _Upload:
        found = self.uploads.get(asked.upload_id or "")
        if found is None:
            raise _RefusedError(404, "notFound", "The upload session does not exist.")
        asked.name = found.name
        return found

    def _chunk(self, asked: _Asked) -> _Answer:
        upload = self._upload(asked)
        if upload.ended is not None:
            return upload.ended
        given = asked.headers.get("Content-Range")
        if given is None:  # the whole object in one request
            return self._take(asked, upload, 0, upload.agreed(str(len(asked.body)) if asked.whole else "*"))
        found = _CONTENT_RANGE.fullmatch(given)
        if found is None:
            raise _invalid(f'Failed to parse Content-Range header "{given}".')
        start, end, total = int(found[1]), int(found[2]) + 1, upload.agreed(found[3])
        if end <= start or (asked.whole and len(asked.body) != end - start):
            raise _invalid(f"Content-Range is {given}, and {len(asked.body)} bytes came.")
        if total is not None and end > total:
            raise _invalid(f"Content-Range is {given}, beyond the {total} bytes of the object.")
        if end != total and (end - start) % _CHUNK:
            raise _invalid(f"Only the last chunk may have a size that is no multiple of {_CHUNK} bytes.")
        return self._take(asked, upload, start, total)

    def _take(self, asked: _Asked, upload: _Upload, start: int, total: int | None) -> _Answer:
        stored = len(upload.data)
        if start > stored:
            raise _RefusedError(503, "backendError", f"Bytes from {start} on came, and {stored} are stored.")
        view = memoryview(asked.body)
        if not asked.whole:
            # What came before the connection broke is kept, in whole steps.
            view = view[: max((start + len(view)) // _CHUNK * _CHUNK - start, 0)]
        # "Cloud Storage ignores any bytes you send at an offset that Cloud Storage has already persisted."
        fresh = view[stored - start :]
        upload.data += fresh
        upload.sums.add(fresh)
        upload.total = total
        complete = asked.whole and len(upload.data) == total
        return self._finish(asked, upload) if complete else upload.persisted()

    def _query(self, asked: _Asked) -> _Answer:
        upload = self._upload(asked)
        if upload.ended is not None:
            return upload.ended
        given = asked.headers["Content-Range"]
        found = _CONTENT_RANGE.fullmatch(given)
        if found is None or asked.body:
            raise _invalid(f'Failed to parse Content-Range header "{given}" of {len(asked.body)} bytes.')
        upload.total = upload.agreed(found[3])
        return self._finish(asked, upload) if len(upload.data) == upload.total else upload.persisted()

    def _finish(self, asked: _Asked, upload: _Upload) -> _Answer:
        """Make the object of an upload that has every byte."""
        try:
            bucket = self._bucket(upload.bucket)
            upload.sums.check(_claims(upload.metadata, asked.headers))
            stored = self._write(
                bucket,
                upload.name,
                upload.data,
                sums=upload.sums,
                metadata=upload.metadata,
                conditions=upload.conditions,
            )
        except _RefusedError as exc:
            if exc.status in {400, 412}:  # no repetition can help
                upload.end(exc.answer())
            raise
        answer = _Answer.json(stored.described(), headers={"ETag": stored.etag})
        upload.end(answer)
        return answer

    def _cancel(self, asked: _Asked) -> _Answer:
        upload = self._upload(asked)
        if upload.ended is not None:
            raise _gone()
        upload.end(_gone().answer())
        return _Answer(499)


def _gone() -> _RefusedError:
    return _RefusedError(410, "gone", "The upload session is over.")


def _span(header: str, size: int) -> tuple[int, int] | None:
    """First and one after the last byte of a range; None for everything."""
    found = _RANGE.fullmatch(header)
    # A header that is not understood, several ranges among them, is to be ignored (RFC 9110, 14.2).
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, end = max(size - int(found[2]), 0), size
    else:
        start, end = int(found[1]), min(int(found[2]) + 1, size) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    if start >= size:
        raise _RefusedError(
            416,
            "requestedRangeNotSatisfiable",
            "Request range not satisfiable",
            location=("header", "Range"),
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


def _patched(about: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """What is known of an object after a patch; null takes a field away."""
    patched = {**about}
    for key in set(_OF_THE_UPLOADER) & set(changes):
        older, newer = about.get(key), changes[key]
        if isinstance(older, dict) and isinstance(newer, dict):
            newer = {name: value for name, value in {**older, **newer}.items() if value is not None}
        patched[key] = newer
    return {key: value for key, value in patched.items() if value is not None}


# -- listings --------------------------------------------------------------------------------------------------

#: Where a row stands: its name's bytes, and its generation (0 for a prefix).
_Rank: TypeAlias = tuple[bytes, int]


def _rows(bucket: _Bucket, query: Mapping[str, str]) -> Iterator[tuple[_Rank, _Object | str]]:
    """The objects and prefixes of a listing from its token on, in order."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    start, end = query.get("startOffset", "").encode(), query.get("endOffset", "").encode()
    after = _rank(query["pageToken"]) if query.get("pageToken") else None
    found = [*bucket.live.values(), *(bucket.kept.values() if query.get("versions") == "true" else ())]
    shown = ""
    for rank, item in sorted((((item.name.encode(), item.generation), item) for item in found), key=lambda row: row[0]):
        if not item.name.startswith(prefix) or rank[0] < start or (end and rank[0] >= end):
            continue
        head, cut, _ = item.name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
        if not cut:
            if after is None or rank > after:
                yield rank, item
        elif shown != prefix + head + cut:
            shown = prefix + head + cut
            if after is None or (shown.encode(), 0) > after:
                yield (shown.encode(), 0), shown


def _token(rank: _Rank) -> str:
    return base64.urlsafe_b64encode(json.dumps([rank[0].decode(), rank[1]]).encode()).decode()


def _rank(token: str) -> _Rank:
    try:
        name, generation = json.loads(base64.urlsafe_b64decode(token))
        return str(name).encode(), int(generation)
    except (ValueError, TypeError, binascii.Error) as exc:
        raise _RefusedError(400, "invalid", "Invalid page token.", location=("parameter", "pageToken")) from exc


# -- what uploaders send ---------------------------------------------------------------------------------------


def _name_of(query: Mapping[str, str], metadata: Mapping[str, object]) -> str:
    # The query goes before the metadata, as the documentation of "Objects: insert" has it.
    name = query.get("name") or metadata.get("name")
    if not isinstance(name, str) or not name:
        raise _RefusedError(400, "required", "Required object name.", location=("parameter", "name"))
    try:
        size = len(name.encode())
    except UnicodeEncodeError as exc:
        raise _invalid("The object name is no valid UTF-8.") from exc
    if size > _LONGEST_NAME:
        raise _invalid(
            f"The maximum object length is {_LONGEST_NAME} characters, but got a name with {size} characters."
        )
    forbidden = name in {".", ".."} or name.startswith(".well-known/acme-challenge/")
    if forbidden or not {"\r", "\n"}.isdisjoint(name):
        raise _invalid(f"Disallowed object name {name!r}.")
    return name


def _json_object(body: bytes | bytearray) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError as exc:
        raise _RefusedError(400, "parseError", "Parse Error") from exc
    if not isinstance(found, dict):
        raise _RefusedError(400, "parseError", "Parse Error")
    return found


def _parts(content_type: str, body: bytearray) -> tuple[dict[str, Any], bytes]:
    """Metadata and bytes of a multipart/related body, whose lines may end in CRLF or, as from gcsfs, in LF."""
    found = _BOUNDARY.search(content_type)
    if found is None or not content_type.lower().startswith("multipart/related"):
        raise _RefusedError(400, "badContent", "Unsupported content with type: " + content_type)
    mark = b"--" + (found[1] or found[2]).encode()
    first = body.find(mark)
    # The first line tells what ends a line: in a body with LF, a CR before a boundary is the object's last byte.
    newline = b"\r\n" if body.startswith(b"\r\n", first + len(mark)) else b"\n"
    second = body.find(newline + mark, first)
    third = body.find(newline + mark, second + 1)
    end = third + len(newline + mark)
    # What stands before the first boundary and after the last is for people, but these are machines.
    if first < 0 or body[:first].strip() or second < 0 or third < 0 or not body.startswith(b"--", end):
        raise _malformed()
    about, _ = _part(body[first + len(mark) : second], newline)
    data, kind = _part(body[second + len(newline + mark) : third], newline)
    return {"contentType": kind, **_json_object(about)}, data


def _part(piece: bytearray, newline: bytes) -> tuple[bytes, str | None]:
    """Body and content type of one part, given from the end of its boundary on."""
    head, blank, data = piece.partition(newline * 2)
    # Without any header, the line that ends the boundary is followed by the empty one.
    if not blank or (head and not head.startswith(newline)):
        raise _malformed()
    kind = None
    for line in head.decode(errors="replace").splitlines():
        name, _, value = line.partition(":")
        kind = value.strip() if name.strip().lower() == "content-type" else kind
    return bytes(data), kind


def _malformed() -> _RefusedError:
    return _RefusedError(400, "badRequest", "Malformed multipart body.")
