"""The session behind ``GCSStorage``: gcsfs gives credentials and endpoint, the requests are sent once and in time."""

from __future__ import annotations

import asyncio
import io
import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import quote

from cloudckpt.config import Settings
from cloudckpt.errors import ConfigError, StorageError
from cloudckpt.storage.base import Buffer, Conditions
from cloudckpt.storage.gcs_errors import Answer, UnauthorizedError, explained, without_answer
from cloudckpt.storage.gcs_lane import GCSLane
from cloudckpt.storage.gcs_way import Way, location_of, way_of
from cloudckpt.storage.laned import LanedStorage

__all__ = ["GCSSession"]

_GOOGLE_HOST = re.compile(r"https://([^/]*\.)?googleapis\.com(:\d+)?(/|$)")
_MEBIBYTE = 1024 * 1024
_OK = (200, 201, 204)


class GCSSession(LanedStorage):
    """One bucket's session: credentials, endpoint, what is known of the store, and single requests.

    Args:
        bucket: its name.
        prefix: the keys' beginning, without slashes around it; may be empty.
        options: for ``gcsfs.GCSFileSystem``, as they are.
        settings: part sizes, time-outs and deadlines.
        spacing_s: least time between two conditional writes of one object; by default 1.1 s at Google and none at an
            emulator.
    """

    scheme: ClassVar[str] = "gs"
    #: What this process has found out, by endpoint and bucket.
    _known: ClassVar[dict[tuple[str, str], Conditions]] = {}

    def __init__(
        self,
        bucket: str,
        prefix: str,
        options: Mapping[str, object],
        settings: Settings,
        *,
        spacing_s: float | None = None,
    ) -> None:
        super().__init__(bucket, prefix, options, settings)
        self._spacing_s = spacing_s
        self._last_write: dict[str, float] = {}
        self._lane: GCSLane = GCSLane(self, bucket, settings, self._secrets)

    # -- the filesystem --------------------------------------------------------------------------------------

    def _make_filesystem(self, loop: asyncio.AbstractEventLoop) -> Any:
        from gcsfs.core import GCSFileSystem  # noqa: PLC0415 - an extra

        # An emulator asks for no credentials, and looking for some takes seconds where there are none.
        emulator = str(self._options.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST") or "https://")
        try:
            return GCSFileSystem(
                **{
                    **({} if emulator.startswith("https://") or emulator == "default" else {"token": "anon"}),
                    **self._options,
                    "asynchronous": True,
                    "loop": loop,
                    "use_listings_cache": False,
                    "skip_instance_cache": True,
                }
            )
        except TypeError as exc:
            said, cause = self._secrets.hide(str(exc)), self._secrets.clean(exc)
            raise ConfigError(f"{self.url}: storage_options that gcsfs does not take: {said}") from cause

    @staticmethod
    async def _close_filesystem(filesystem: Any) -> None:
        session = filesystem._session  # noqa: SLF001 - gcsfs closes it only with its own loop
        if session is not None:
            await session.close()

    async def _send(
        self,
        what: str,
        method: str,
        url: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        data: Buffer | None = None,
        reads_bytes: int = 0,
        query: str = "",
    ) -> Answer:
        """One request, once; every answer is given back, whatever its status.

        A request of the XML API has a ``query`` of its own spelling, and says in a header who pays.

        Raises:
            StorageError: there was no answer.
        """

        async def send() -> Answer:
            filesystem = await self._fs()
            await filesystem._set_session()  # noqa: SLF001 - the coroutine behind its synchronous twin
            full = url if url.startswith("http") else f"{location_of(filesystem)}{url}"
            asked = filesystem._get_params(dict(params or {}))  # noqa: SLF001 - adds userProject
            said = filesystem._get_headers(dict(headers or {}))  # noqa: SLF001 - adds a fresh token
            self._secrets.learn_headers(said)
            if query:
                full, payer, asked = f"{full}?{query}", asked.get("userProject"), {}
                said |= {"x-goog-user-project": payer} if payer else {}
            async with filesystem.session.request(
                method,
                _encoded(full),
                params=asked,
                headers=said,
                # As a file: aiohttp sends it piece by piece, and warns of large bytes.
                data=None if data is None else io.BytesIO(data),
                allow_redirects=False,
            ) as answer:
                return Answer(answer.status, answer.headers, await answer.read())

        try:
            size = memoryview(data).nbytes if data is not None else reads_bytes
            found = await self._in_time(what, send(), size_bytes=size)
        except ConfigError:
            raise
        except Exception as exc:  # noqa: BLE001 - chained below, unless it would show a secret
            raise self._without_answer(exc, what) from self._secrets.clean(exc)
        if found.status == 401:
            self._renew()
        elif found.status < 400:
            self._refused_at = None
        return found

    # -- what the direct lane asks for -----------------------------------------------------------------------

    def way(self) -> Way:
        """See ``LaneFacts.way``."""

        async def ask() -> Way:
            filesystem = await self._connected()
            await filesystem._set_session()  # noqa: SLF001 - the coroutine behind its synchronous twin
            way = way_of(filesystem)
            self._secrets.learn_url(way.location, way.proxy)
            return way

        return self._run(ask())

    def permission(self) -> Mapping[str, str]:
        """See ``LaneFacts.permission``."""

        async def ask() -> Mapping[str, str]:
            try:
                shown = dict((await self._fs())._get_headers({}))  # noqa: SLF001 - adds a fresh token
            except ConfigError:
                raise
            except Exception as exc:  # noqa: BLE001 - the same as for a request
                raise self._without_answer(exc, f"connecting to {self.url}") from self._secrets.clean(exc)
            self._secrets.learn_headers(shown)
            return shown

        return self._run(self._in_time(f"connecting to {self.url}", ask()))

    def renew_permission(self) -> None:
        """See ``LaneFacts.renew_permission``."""

        async def renew() -> None:
            self._renew()

        self._run(renew())

    def permission_was_taken(self) -> None:
        """See ``LaneFacts.permission_was_taken``."""
        self._refused_at = None

    def explain(self, answer: Answer, what: str) -> StorageError:
        """See ``LaneFacts.explain``."""
        return self._explained(answer, what)

    # -- answers ---------------------------------------------------------------------------------------------

    def _without_answer(self, exc: Exception, what: str) -> StorageError:
        problem = self._redacted(without_answer(exc, what, hide=self._secrets.hide))
        if isinstance(problem, UnauthorizedError):
            self._renew()
            problem.retryable = problem.retryable and not self._gave_up_on_credentials()
        return problem

    def _explained(self, answer: Answer, what: str) -> StorageError:
        problem = self._redacted(explained(answer, what, bucket=self._bucket, hide=self._secrets.hide))
        if isinstance(problem, UnauthorizedError) and self._gave_up_on_credentials():
            problem.retryable = False
        return problem

    async def _ask(self, what: str, method: str, url: str, **arguments: Any) -> Answer:
        """As ``_send``; an answer that is no success is raised."""
        answer = await self._send(what, method, url, **arguments)
        if answer.status not in {*_OK, 206}:
            raise self._explained(answer, what)
        return answer

    def _object(self, key: str) -> str:
        return f"/storage/v1/b/{quote(self._bucket, safe='')}/o/{quote(self._key(key), safe='')}"

    def _media(self, key: str) -> str:
        return "/download" + self._object(key)

    @property
    def _uploads(self) -> str:
        return f"/upload/storage/v1/b/{quote(self._bucket, safe='')}/o"

    # -- what the store is -----------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """The URL that requests are sent to. Sends nothing to the store."""

        async def ask() -> str:
            return location_of(await self._connected())

        return self._run(ask())

    async def _is_google(self) -> bool:
        return _GOOGLE_HOST.match(location_of(await self._connected())) is not None

    async def _connected(self) -> Any:
        try:
            return await self._fs()
        except ConfigError:
            raise
        except Exception as exc:  # noqa: BLE001 - the same
            problem = without_answer(exc, f"connecting to {self.url}", hide=self._secrets.hide)
            raise self._redacted(problem) from self._secrets.clean(exc)

    @property
    def conditions(self) -> Conditions:
        """Google documents generation preconditions; emulators are probed once per process."""
        endpoint = self.endpoint
        default = Conditions.HONOURED if _GOOGLE_HOST.match(endpoint) else Conditions.UNPROVEN
        return self._known.get((endpoint, self._bucket), default)

    @conditions.setter
    def conditions(self, found: Conditions) -> None:
        self._known[self.endpoint, self._bucket] = found

    def describe(self) -> dict[str, str]:
        """Facts for people: endpoint, identity, and the lane that payload takes. No secrets."""

        async def ask() -> dict[str, str]:
            filesystem = await self._connected()
            credentials = filesystem.credentials.credentials
            name = getattr(credentials, "service_account_email", None) or type(credentials).__name__
            return {
                "endpoint": self._secrets.hide(location_of(filesystem)),
                "identity": "anonymous" if credentials is None else str(name),
            }

        found = self._run(ask())
        import gcsfs  # noqa: PLC0415 - an extra

        part = self._settings.part_size_bytes // _MEBIBYTE
        otherwise = f"gcsfs {gcsfs.__version__}, resumable uploads in chunks of {part} MiB"
        return {**found, "lane": self._lane.describe(otherwise)}


def _encoded(url: str) -> Any:
    from yarl import URL  # noqa: PLC0415 - comes with aiohttp, which comes with gcsfs

    return URL(url, encoded=True)
