"""The session behind ``S3Storage``: s3fs gives credentials and endpoint, the requests are sent once and in time."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from cloudckpt.config import Settings
from cloudckpt.errors import ConfigError, StorageError
from cloudckpt.storage.base import Conditions
from cloudckpt.storage.direct import Declined
from cloudckpt.storage.direct.sigv4 import Credentials
from cloudckpt.storage.laned import LanedStorage
from cloudckpt.storage.redacting import Redactor
from cloudckpt.storage.s3_errors import ExpiredCredentialsError, explained
from cloudckpt.storage.s3_lane import S3Lane
from cloudckpt.storage.s3_way import Way, header_names

__all__ = ["S3Session"]

_MEBIBYTE = 1024 * 1024
_AWS_HOST = re.compile(r"https?://[^/]*\.amazonaws\.com(\.cn)?(:\d+)?(/|$)")
#: Without these members in the installed botocore, conditions and checksums would be dropped without a word.
_NEEDED = {"put_object": {"IfMatch", "IfNoneMatch", "ChecksumCRC32C"}, "complete_multipart_upload": {"ChecksumType"}}


class _Shown:
    """The last request that was sent to the bucket: what the direct lane finds its way by.

    It does not refer to the storage: a client refers to it, and the loop's thread to the client.
    """

    def __init__(self, secrets: Redactor) -> None:
        self._secrets = secrets
        self.last: tuple[str, Mapping[str, Any]] | None = None

    def note(self, request: Any, **_: Any) -> None:
        self.last = (str(request.url), dict(request.headers))
        self._secrets.learn_headers(self.last[1])


class S3Session(LanedStorage):
    """One bucket's client: credentials, endpoint, what is known of the store, and single requests.

    Args:
        bucket: its name, or an access point's ARN.
        prefix: the keys' beginning, without slashes around it; may be empty.
        options: for ``s3fs.S3FileSystem``, as they are.
        settings: part sizes, time-outs and deadlines.
    """

    #: What this process has found out, by endpoint and bucket: conditions, and whether ETags are sent in quotes.
    _known: ClassVar[dict[tuple[str, str], tuple[Conditions, bool]]] = {}

    scheme: ClassVar[str] = "s3"

    def __init__(self, bucket: str, prefix: str, options: Mapping[str, object], settings: Settings) -> None:
        super().__init__(bucket, prefix, options, settings)
        self._refuse_mock()
        self._lane: S3Lane = S3Lane(self, bucket, settings, self._secrets)
        # Whether the server takes a whole-object checksum; servers that do not are remembered.
        self._checksums = True
        self._bulk_delete = True
        self._shown = _Shown(self._secrets)

    # -- the filesystem --------------------------------------------------------------------------------------

    def _make_filesystem(self, loop: asyncio.AbstractEventLoop) -> Any:
        import s3fs  # noqa: PLC0415 - an extra

        options = dict(self._options)
        given: Any = options.pop("config_kwargs", None) or {}
        config = {
            "connect_timeout": 10,
            "read_timeout": self._settings.request_timeout_s,
            "max_pool_connections": 32,
            # One try each: what may be repeated, and under which deadline, is decided here.
            "retries": {"mode": "standard", "total_max_attempts": 1},
            # Checksums are sent as plain headers by us; the trailing ones of newer clients break older servers.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            **given,
        }
        return s3fs.S3FileSystem(
            **{
                **options,
                "config_kwargs": config,
                "asynchronous": True,
                "loop": loop,
                "use_listings_cache": False,
                "skip_instance_cache": True,
            }
        )

    @staticmethod
    async def _close_filesystem(filesystem: Any) -> None:
        creator = getattr(filesystem, "_s3creator", None)
        if creator is not None:
            await creator.__aexit__(None, None, None)

    async def _client(self) -> tuple[Any, Any]:
        try:
            filesystem = await self._fs()
            async with self._filesystems.opening:
                await filesystem.set_session()
        except (TypeError, ValueError) as exc:
            said = self._secrets.hide(str(exc))
            cause = self._secrets.clean(exc)
            raise ConfigError(f"{self.url}: storage_options that s3fs does not take: {said}") from cause
        client = await filesystem.get_s3(self._bucket)
        self._secrets.watch(getattr(client._request_signer, "_credentials", None))  # noqa: SLF001 - read from wherever
        client.meta.events.register("before-send.s3", self._shown.note, unique_id="cloudckpt")
        for method, needed in _NEEDED.items():
            operation = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[method])
            if missing := needed - operation.input_shape.members.keys():
                raise ConfigError(
                    f"the installed botocore does not know {', '.join(sorted(missing))}, so writes would not be "
                    'conditional: pip install --upgrade "cloudckpt[s3]"'
                )
        return filesystem, client

    def way(self) -> Way | None:
        """See ``LaneFacts.way``."""
        return None if self._shown.last is None else self._run(self._way(*self._shown.last))

    async def _way(self, url: str, headers: Mapping[str, Any]) -> Way:
        filesystem, client = await self._client()
        http = client._endpoint.http_session  # noqa: SLF001 - nothing public tells what was made of all the options
        verify, proxies = getattr(http, "_verify", None), getattr(http, "_proxy_config", None)
        if verify is None or proxies is None or client.meta.config.proxies_config:
            raise Declined("how the session verifies certificates and finds proxies cannot be seen, or is special")

        def added(method: str) -> dict[str, str]:
            operation = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[method])
            found = self._with_options(filesystem, getattr(client, method))
            return header_names(operation, {name: value for name, value in found.items() if name != "Bucket"})

        self._secrets.learn_url(str(client.meta.endpoint_url), *map(str, (proxies._proxies or {}).values()))  # noqa: SLF001 - the same
        shown = {name.lower(): value for name, value in headers.items()}
        authorization = shown.get("authorization", b"")
        return Way(
            url=url,
            authorization=authorization.decode() if isinstance(authorization, bytes) else str(authorization),
            is_session_bound="x-amz-s3session-token" in shown,
            endpoint=str(client.meta.endpoint_url),
            verify=verify,
            client_certificate=client.meta.config.client_cert,
            proxies={scheme: str(proxy) for scheme, proxy in (proxies._proxies or {}).items()},  # noqa: SLF001 - the same
            headers={method: added(method) for method in ("put_object", "upload_part", "get_object")},
        )

    def credentials(self) -> Credentials | None:
        """See ``LaneFacts.credentials``."""

        async def ask() -> Credentials | None:
            _, client = await self._client()
            found = client._request_signer._credentials  # noqa: SLF001 - they are the client's, refreshed by it
            if found is None:
                return None
            frozen = await found.get_frozen_credentials()
            return Credentials(frozen.access_key, frozen.secret_key, frozen.token)

        found: Credentials | None = self._run(self._resolved(ask))
        return found

    def renew_credentials(self) -> None:
        """See ``LaneFacts.renew_credentials``."""

        async def renew() -> None:
            self._renew()

        self._run(renew())

    def credentials_were_taken(self) -> None:
        """See ``LaneFacts.credentials_were_taken``."""
        self._refused_at = None

    def explain(self, exc: BaseException, what: str) -> StorageError:
        """See ``LaneFacts.explain``."""
        return self._explained(exc, what)

    @property
    def sends_checksums(self) -> bool:
        """See ``LaneFacts.sends_checksums``."""
        return self._checksums

    @sends_checksums.setter
    def sends_checksums(self, value: bool) -> None:
        self._checksums = value

    def _with_options(self, filesystem: Any, verb: Any, **arguments: Any) -> Mapping[str, Any]:
        """Arguments with s3_additional_kwargs (SSE-KMS and the like) and RequestPayer, where the verb takes them."""
        merge = filesystem._get_s3_method_kwargs  # noqa: SLF001 - nothing public merges them
        found: Mapping[str, Any] = merge(verb, filesystem.req_kw, Bucket=self._bucket, **arguments)
        return found

    async def _call(self, method: str, what: str, **arguments: Any) -> Any:
        """One request, once, with the options of the filesystem; errors as they come."""

        async def send() -> Any:
            filesystem, client = await self._client()
            verb = getattr(client, method)
            return await verb(**self._with_options(filesystem, verb, **arguments))

        body = arguments.get("Body", b"")
        try:
            answer = await self._in_time(what, send(), size_bytes=len(body))
        except Exception as exc:
            if isinstance(explained(exc, what, bucket=self._bucket), ExpiredCredentialsError):
                self._renew()
            # Whoever gets it sorts it, and shows it as the cause of what is told.
            self._secrets.clean(exc)
            raise
        self._refused_at = None
        return answer

    def _explained(self, exc: BaseException, what: str) -> StorageError:
        problem = self._redacted(explained(exc, what, bucket=self._bucket), exc)
        if isinstance(problem, ExpiredCredentialsError) and self._gave_up_on_credentials():
            problem.retryable = False
        return problem

    async def _ask(self, method: str, what: str, **arguments: Any) -> Any:
        """As ``_call``, with errors of ours."""
        try:
            return await self._call(method, what, **arguments)
        except Exception as exc:
            if isinstance(exc, ConfigError):
                raise
            raise self._explained(exc, what) from self._secrets.clean(exc)

    def _refuse_mock(self) -> None:
        # moto's in-process mock answers botocore with objects that its asynchronous sibling cannot await.
        stubber = getattr(sys.modules.get("moto.core.botocore_stubber"), "BotocoreStubber", None) and getattr(
            sys.modules.get("moto.core.models"), "botocore_stubber", None
        )
        if getattr(stubber, "enabled", False) and not self._endpoint_given():
            raise ConfigError(
                f"{self.url}: moto's mock_aws is active, and it cannot answer the asynchronous client that s3fs uses. "
                "Take the pytest fixture `s3_root` of cloudckpt.testing (a moto server on loopback) instead, or start "
                "moto.server.ThreadedMotoServer and set AWS_ENDPOINT_URL to it"
            )

    def _endpoint_given(self) -> bool:
        client: Any = self._options.get("client_kwargs") or {}
        return bool(
            self._options.get("endpoint_url")
            or client.get("endpoint_url")
            or os.environ.get("AWS_ENDPOINT_URL_S3")
            or os.environ.get("AWS_ENDPOINT_URL")
        )

    # -- what the store is -----------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """The URL that requests are sent to, as the session resolves it. Sends nothing to the store."""

        async def ask() -> str:
            _, client = await self._client()
            return str(client.meta.endpoint_url)

        return str(self._run(self._resolved(ask)))

    async def _resolved(self, ask: Callable[[], Any]) -> Any:
        try:
            return await ask()
        except ConfigError:
            raise
        except Exception as exc:  # noqa: BLE001 - chained, unless it would show a secret
            problem = explained(exc, f"connecting to {self.url}", bucket=self._bucket)
            raise self._redacted(problem, exc) from self._secrets.clean(exc)

    def _place(self) -> tuple[str, str]:
        return self.endpoint, self._bucket

    @property
    def conditions(self) -> Conditions:
        """AWS documents them; every other endpoint is probed once per process."""
        place = self._place()
        default = Conditions.HONOURED if _AWS_HOST.match(place[0]) else Conditions.UNPROVEN
        return self._known.get(place, (default, False))[0]

    @conditions.setter
    def conditions(self, found: Conditions) -> None:
        place = self._place()
        self._known[place] = (found, self._known.get(place, (found, False))[1])

    def respell(self) -> None:
        """Send ETags in quotes from now on, or without again. Ceph wants none, others insist on them."""
        place = self._place()
        conditions, quoted = self._known.get(place, (self.conditions, False))
        self._known[place] = (conditions, not quoted)

    def describe(self) -> dict[str, str]:
        """Facts for people: endpoint, region, identity, and the lane that payload takes. No secrets."""

        async def ask() -> dict[str, str]:
            filesystem, client = await self._client()
            found = {
                "endpoint": self._secrets.hide(str(client.meta.endpoint_url)),
                "region": str(client.meta.region_name),
            }
            credentials = None if filesystem.anon else await filesystem.session.get_credentials()
            if filesystem.key:
                found["identity"] = f"access key {_masked(filesystem.key)} (from storage_options)"
            elif credentials is None:
                found["identity"] = "anonymous" if filesystem.anon else "no credentials found"
            else:
                frozen = await credentials.get_frozen_credentials()
                found["identity"] = f"access key {_masked(frozen.access_key)} (from {credentials.method})"
            return found

        found = dict(self._run(self._resolved(ask)))
        import s3fs  # noqa: PLC0415 - an extra

        part = self._part_bytes(0) // _MEBIBYTE
        return {**found, "lane": self._lane.describe(f"s3fs {s3fs.__version__}, parts of {part} MiB")}


def _masked(access_key: str) -> str:
    return f"{access_key[:4]}…{access_key[-4:]}" if len(access_key) > 12 else "…"
