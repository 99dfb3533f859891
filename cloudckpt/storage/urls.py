"""From what a user calls a root to a storage, or to an error that says what to write or install."""

from __future__ import annotations

import importlib.util
import os
import re

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cloudckpt.errors import ConfigError
from cloudckpt.storage.base import Storage
from cloudckpt.storage.local import LocalStorage
from cloudckpt.storage.memory import MemoryStorage

__all__ = ["open_storage"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_MANGLED = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")

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
    root: str | os.PathLike[str] | Storage, *, storage_options: dict[str, object] | None = None
) -> Storage:
    """The storage that ``root`` means: a path, a URL, or a ``Storage`` as it is. Opens no connection.

    Raises:
        ConfigError: the URL cannot be used as given; says what to write or install.
    """
    if isinstance(root, Storage):
        return root
    text = os.fspath(root)
    if not isinstance(text, str) or not text:
        raise ConfigError(f"{root!r} is no root: write a folder such as ./runs/demo or a URL such as s3://bucket/run")
    if "::" in text:
        raise ConfigError(f"{text!r}: chained URLs cannot be written atomically: give the plain URL")
    match = _SCHEME.match(text)
    if match is None:
        return LocalStorage(_checked_path(text))
    scheme = match[1].lower()
    if scheme in {"file", "local"}:
        return LocalStorage(str(LocalFileSystem._strip_protocol(text)))  # noqa: SLF001 - fsspec's own spelling of a path
    if scheme == "memory":
        return MemoryStorage.named("memory://" + text[match.end() :].strip("/"))
    raise ConfigError(_no_storage(text, scheme, storage_options))


def _checked_path(text: str) -> str:
    if match := _MANGLED.match(text):
        fixed = f"{match[1]}://{text[match.end() :]}"
        raise ConfigError(
            f"{text!r} looks like a URL that went through pathlib or os.path, which ate a slash: pass the string "
            f"{fixed!r}. (For a folder of that name, write {'./' + text!r})"
        )
    return text


def _no_storage(text: str, scheme: str, storage_options: dict[str, object] | None) -> str:
    rest = text.partition("://")[2]
    if scheme in _S3_ALIASES:
        return (
            f"{text!r}: {scheme}:// is not a URL scheme of its own; such a store speaks S3. Write 's3://{rest}' and "
            "set AWS_ENDPOINT_URL to the store's endpoint"
        )
    if scheme in _EXTRAS:
        extra, module = _EXTRAS[scheme]
        if importlib.util.find_spec(module) is None:
            return f'{text!r} needs {module}, which is not installed: pip install "cloudckpt[{extra}]"'
    options = f" (with {len(storage_options)} storage_options)" if storage_options else ""
    if scheme in fsspec.available_protocols():
        return (
            f"{text!r}{options}: this version of cloudckpt keeps runs in local folders and in memory:// only; "
            f"{scheme}:// is planned. Nothing was written"
        )
    return f"{text!r}: nothing is known of {scheme}://. Write a folder such as ./runs/demo, or file:///absolute/path"
