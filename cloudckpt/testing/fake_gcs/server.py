"""The server: HTTP in a thread, and one request after the other."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, Self

from aiohttp import ClientError, web

from cloudckpt.testing.fake_gcs.answers import Answer, RefusedError, unknown
from cloudckpt.testing.fake_gcs.json_api import JsonApi
from cloudckpt.testing.fake_gcs.requests import Asked, Operation, Seen
from cloudckpt.testing.fake_gcs.resumable import ResumableUploads
from cloudckpt.testing.fake_gcs.store import Store
from cloudckpt.testing.fake_gcs.xml_api import XmlApi
from cloudckpt.testing.listening import serve_until

__all__ = ["FakeGCS"]

#: How long a request that is under way when the server stops may take to end by itself.
_PATIENCE_S: Final = 1.0


class FakeGCS:
    """A context manager that serves Google Cloud Storage's JSON and XML APIs on a free port of 127.0.0.1.

    Everything is in memory, and what was stored can be looked at after the server has stopped.

    Honoured: ``ifGenerationMatch``, ``ifGenerationNotMatch`` and their metageneration twins on every request that
    Google documents them for, at the moment of the write; ``crc32c`` and ``md5Hash`` of an upload and its
    ``X-Goog-Hash``; ranges; the rules of resumable uploads; of the XML API single objects and uploads in parts, with
    the checksum of every part. A condition, an XML header or parameter that it does not know is refused with 400.

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
        self._store = Store(
            lambda permission: permission in self.denied, spacing_s=write_spacing_s, page_size=page_size, now=now
        )
        self._resumable = ResumableUploads(self._store)
        self._xml = XmlApi(self._store)
        self._verbs: dict[Operation, Callable[[Asked], Answer]] = {
            **JsonApi(self._store).verbs,
            **self._resumable.verbs,
            **self._xml.verbs,
        }
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

    def create_bucket(self, name: str, *, versioning: bool = False, requester_pays: bool = False) -> None:
        """Make an empty bucket.

        Args:
            name: of the bucket.
            versioning: whether it keeps the generations that were overwritten or deleted.
            requester_pays: whether a request must name the project that pays for it.

        Raises:
            ValueError: there is one of this name.
        """
        with self._mutex:
            self._store.create_bucket(name, versioning=versioning, requester_pays=requester_pays)

    def objects(self, bucket: str) -> dict[str, bytes]:
        """The live objects' bytes, by name in order.

        Raises:
            KeyError: there is no such bucket.
        """
        with self._mutex:
            live = self._store.buckets[bucket].live
            return {name: bytes(live[name].data) for name in sorted(live, key=str.encode)}

    def uploads(self) -> list[str]:
        """The names of objects whose upload was begun, resumable or in parts, and neither ended nor given up."""
        with self._mutex:
            sessions = [upload.name for upload in self._resumable.uploads.values() if upload.ended is None]
            return sessions + [upload.name for upload in self._xml.uploads.values()]

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
        app.router.add_route("*", r"/{path:[\s\S]*}", self._handle)
        # Bytes are stored as they come: a gzipped body is no business of a store's.
        runner = web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=_PATIENCE_S)
        await serve_until(self._stop, runner, started=self._listens)

    def _listens(self, url: str) -> None:
        self._url = url
        self._ready.set()

    # -- one request -----------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        # The whole body first: the store is changed between two awaits or not at all.
        body, whole = await _body_of(request)
        with self._mutex:
            asked = Asked.of(request, body, whole=whole)
            answer = self._answer(asked)
            self.requests.append(Seen(asked.method, asked.operation, asked.name, answer.status if whole else 0))
        return await answer.send(request)

    def _answer(self, asked: Asked) -> Answer:
        try:
            self._check_token(asked)
            if not asked.whole and asked.operation != "resumable-chunk":
                raise RefusedError(400, "badRequest", "The body broke off.")
            asked.check_conditions_are_known()
            self._store.check_payer(asked)
            if (verb := self._verbs.get(asked.operation)) is None:
                raise unknown(f"{asked.method} on this path")
            return verb(asked)
        except RefusedError as exc:
            return exc.answer(xml=asked.is_xml)

    def _check_token(self, asked: Asked) -> None:
        given = asked.headers.get("Authorization")
        if self._required_token is None or given == f"Bearer {self._required_token}":
            return
        # "The session URI acts as an authentication token" ("Resumable uploads"); a wrong one is wrong even there.
        if given is None and asked.upload_id is not None:
            return
        reason, message = ("required", "Login Required") if given is None else ("authError", "Invalid Credentials")
        raise RefusedError(
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
