"""From what a user calls a root to a storage, or to an error that says what to write or install."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from collections.abc import Mapping

from cloudckpt.config import Settings, settings_of
from cloudckpt.errors import ConfigError
from cloudckpt.storage.base import Storage
from cloudckpt.storage.local import LocalStorage
from cloudckpt.storage.manifest_store import ManifestStore
from cloudckpt.storage.memory import MemoryStorage
from cloudckpt.storage.pulled import PulledFolder, is_pulled

__all__ = ["open_storage", "open_store"]

# Each kind of store is imported when a root is one of it: the command line starts sooner.
# ruff: noqa: PLC0415

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_MANGLED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_ARN = re.compile(r"(arn:[^/]+:accesspoint[:/][^/]+)(?:/(.*))?", re.DOTALL)
#: Wider than what new buckets may be called, as old ones and other servers allow more.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
#: Of the 1024 bytes that a key may have, our own names need the rest.
_PREFIX_BYTES = 800

#: scheme -> (extra, module)
_EXTRAS = {
    "s3": ("s3", "s3fs"),
    "s3a": ("s3", "s3fs"),
    "gs": ("gcs", "gcsfs"),
    "gcs": ("gcs", "gcsfs"),
}
#: Spellings that people try for stores that speak S3.
_S3_ALIASES = {"r2", "b2", "minio", "wasabi", "ceph", "do", "spaces"}


def open_storage(
    root: str | os.PathLike[str] | Storage,
    *,
    storage_options: Mapping[str, object] | None = None,
    settings: Settings | None = None,
) -> Storage:
    """The storage that ``root`` means: a path, a URL, or a ``Storage`` as it is. Opens no connection.

    Args:
        root: ``./runs/demo``, ``s3://bucket/run``, ``gs://bucket/run``, ``memory://run``, any other fsspec URL.
        storage_options: for the filesystem, as they are; they never appear in a message.
        settings: time-outs and part sizes.

    Raises:
        ConfigError: the URL cannot be used as given; says what to write or install.
    """
    numbers = settings_of(settings)
    if isinstance(root, Storage):
        return root
    text = os.fspath(root)
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{root!r} is no root: write a folder such as ./runs/demo or a URL such as s3://bucket/run")
    if "\0" in text:
        raise ConfigError(f"{_shown(text)!r}: neither a path nor a URL has a NUL in it")
    if "::" in text:
        raise ConfigError(f"{_shown(text)!r}: chained URLs cannot be written atomically: give the plain URL")
    match = _SCHEME.match(text)
    if match is None:
        return _local(_checked_path(text), numbers)
    scheme, rest = match[1].lower(), text[match.end() :]
    if scheme in {"file", "local"}:
        from fsspec.implementations.local import LocalFileSystem

        return _local(str(LocalFileSystem._strip_protocol(text)), numbers)  # noqa: SLF001 - fsspec's own spelling of a path
    if scheme == "memory":
        return MemoryStorage.named("memory://" + rest.strip("/"))
    return _remote(text, scheme, rest, dict(storage_options or {}), numbers)


def open_store(
    root: str | os.PathLike[str] | Storage,
    *,
    storage_options: Mapping[str, object] | None = None,
    settings: Settings | None = None,
    single_writer: bool = False,
) -> ManifestStore:
    """The manifest store of a root. Opens no connection.

    Args:
        single_writer: the promise that no other process writes to this run, for stores without conditional writes.

    Raises:
        ConfigError: the root cannot be used as given.
    """
    storage = open_storage(root, storage_options=storage_options, settings=settings)
    return ManifestStore(storage, settings, single_writer=single_writer)


def _local(path: str, settings: Settings) -> Storage:
    if is_pulled(os.path.expanduser(path)):  # noqa: PTH111 - as LocalStorage does it
        return PulledFolder(path)
    return LocalStorage(path, direct_io=settings.direct_io)


def _remote(text: str, scheme: str, rest: str, options: dict[str, object], settings: Settings) -> Storage:
    if scheme in _EXTRAS:
        _check_installed(text, scheme)
        bucket, prefix = _bucket_and_prefix(text, rest)
        if scheme in {"gs", "gcs"}:
            from cloudckpt.storage.gcs import GCSStorage

            return GCSStorage(bucket, prefix, options, settings)
        from cloudckpt.storage.s3 import S3Storage

        _warn_of_endpoint(text)
        return S3Storage(bucket, prefix, options, settings)
    if scheme in _S3_ALIASES:
        raise ConfigError(
            f"{_shown(text)!r}: {scheme}:// is not a URL scheme of its own; such a store speaks S3. Write "
            f"'s3://{_shown(rest)}' and set AWS_ENDPOINT_URL to the store's endpoint"
        )
    import fsspec

    if scheme in fsspec.available_protocols() or scheme in fsspec.registry:
        from cloudckpt.storage.generic import GenericFsspecStorage

        return GenericFsspecStorage(text, options)
    raise ConfigError(
        f"{_shown(text)!r}: nothing is known of {scheme}://. Write a folder such as ./runs/demo, or "
        "file:///absolute/path"
    )


def _shown(text: str) -> str:
    """The text without what may be user names and passwords; these can have slashes in them."""
    return re.sub(r"(^|//).*@", r"\1…@", text)


def _checked_path(text: str) -> str:
    if match := _MANGLED.match(text):
        fixed = f"{match[1]}://{text[match.end() :]}"
        raise ConfigError(
            f"{_shown(text)!r} looks like a URL that went through pathlib or os.path, which ate a slash: pass the "
            f"string {_shown(fixed)!r}. (For a folder of that name, put ./ before it)"
        )
    return text


def _check_installed(text: str, scheme: str) -> None:
    extra, module = _EXTRAS[scheme]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f'{_shown(text)!r} needs {module}, which is not installed: pip install "cloudckpt[{extra}]"')


def _bucket_and_prefix(text: str, rest: str) -> tuple[str, str]:
    if match := _ARN.fullmatch(rest):
        bucket, prefix = match[1], match[2] or ""
    else:
        bucket, _, prefix = rest.partition("/")
        if "@" in bucket or ":" in bucket:
            # A secret key may have a slash in it: nothing of this URL is shown.
            raise ConfigError(
                "a root with a user or a key before the bucket: credentials do not belong into the URL, which is "
                "printed and logged: set the usual environment variables or a profile, or pass storage_options"
            )
        if not _BUCKET.fullmatch(bucket):
            raise ConfigError(
                f"{text!r}: {bucket!r} cannot be a bucket's name: write s3://bucket/run or gs://bucket/run"
            )
    prefix = prefix.rstrip("/")
    bad = next((part for part in prefix.split("/") if part in {"", ".", ".."}), None) if prefix else None
    if bad is not None or any(ord(char) < 32 or ord(char) == 127 for char in prefix):
        raise ConfigError(
            f"{text!r}: empty parts, '.' and '..', and control characters are legal in a bucket and lost on the way by "
            "most tools: choose another prefix"
        )
    if len(prefix.encode()) > _PREFIX_BYTES:
        raise ConfigError(f"{text[:80]!r}…: the prefix is longer than {_PREFIX_BYTES} bytes; a key may have 1024")
    return bucket, prefix


def _warn_of_endpoint(text: str) -> None:
    if os.environ.get("S3_ENDPOINT_URL") and not (
        os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3")
    ):
        warnings.warn(
            f"{text}: S3_ENDPOINT_URL is set, but neither s3fs nor the AWS libraries read it, so requests go to AWS: "
            "set AWS_ENDPOINT_URL instead",
            UserWarning,
            stacklevel=3,
        )
