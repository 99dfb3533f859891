"""Buckets, objects, their checksums, and what must hold of them."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final
from urllib.parse import quote

import crc32c
from multidict import CIMultiDictProxy

from cloudckpt.testing.fake_gcs.answers import RefusedError, invalid, no_object
from cloudckpt.testing.fake_gcs.requests import condition_names, integer

__all__ = ["BINARY", "OF_THE_UPLOADER", "Bucket", "Conditions", "Object", "Sum", "claims", "name_of", "span", "stamp"]

_LONGEST_NAME: Final = 1024
#: What an uploader may say about an object, beside its bytes.
OF_THE_UPLOADER: Final = (
    "cacheControl",
    "contentDisposition",
    "contentEncoding",
    "contentLanguage",
    "contentType",
    "customTime",
    "kmsKeyName",
    "metadata",
    "storageClass",
)
BINARY: Final = "application/octet-stream"

_RANGE: Final = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What must hold of an object; a missing one has generation 0."""

    wanted: tuple[tuple[str, int], ...]

    @staticmethod
    def of(query: Mapping[str, str], prefix: str = "if") -> Conditions:
        """Those of a request."""
        names = sorted(condition_names(prefix) & set(query))
        return Conditions(tuple((name.removeprefix(prefix), integer(query, name)) for name in names))

    def check(self, found: Object | None, *, reading: bool = False) -> None:
        """Refuse if one does not hold."""
        facts = {
            "Generation": 0 if found is None else found.generation,
            "Metageneration": 0 if found is None else found.metageneration,
        }
        for name, value in self.wanted:
            negated = name.endswith("NotMatch")
            fact = facts[name.removesuffix("NotMatch").removesuffix("Match")]
            if (fact == value) == negated:
                if negated and reading:
                    raise RefusedError(304, "notModified", "Not Modified")
                raise RefusedError(
                    412,
                    "conditionNotMet",
                    "At least one of the pre-conditions you specified did not hold.",
                    location=("header", "If-None-Match" if negated else "If-Match"),
                )


class Sum:
    """Checksums of bytes, as they come."""

    def __init__(self, data: bytes | bytearray | memoryview = b"") -> None:
        self._crc32c = crc32c.crc32c(data)
        self._md5 = hashlib.md5(data, usedforsecurity=False)

    def add(self, data: bytes | bytearray | memoryview) -> None:
        """Further bytes."""
        self._crc32c = crc32c.crc32c(data, self._crc32c)
        self._md5.update(data)

    @property
    def crc32c(self) -> str:
        """As Google writes it: base64, big-endian."""
        return base64.b64encode(self._crc32c.to_bytes(4, "big")).decode()

    @property
    def md5(self) -> str:
        """The same of MD5."""
        return base64.b64encode(self._md5.digest()).decode()

    def check(self, claims: Iterable[tuple[str, str]]) -> None:
        """Refuse bytes that are not those which were announced."""
        for kind, value in claims:
            name, found = {"crc32c": ("CRC32C", self.crc32c), "md5": ("MD5 hash", self.md5)}[kind]
            if value != found:
                raise invalid(
                    f'Provided {name} "{value}" doesn\'t match calculated {name} "{found}".', code="BadDigest"
                )


def claims(metadata: Mapping[str, object], headers: CIMultiDictProxy[str]) -> list[tuple[str, str]]:
    """The checksums that an upload announces: in its metadata, and in its header."""
    fields = (("crc32c", "crc32c"), ("md5", "md5Hash"))
    found = [(kind, str(metadata[key])) for kind, key in fields if metadata.get(key)]
    for part in filter(None, (part.strip() for part in ",".join(headers.getall("X-Goog-Hash", [])).split(","))):
        kind, _, value = part.partition("=")
        if kind not in {"crc32c", "md5"}:
            raise invalid(f'Invalid value for X-Goog-Hash: "{part}".', code="InvalidDigest")
        found.append((kind, value))
    return found


@dataclass(frozen=True, slots=True)
class Object:
    """One generation of an object. Its data is never changed; an upload in parts leaves it without an MD5."""

    bucket: str
    name: str
    data: bytes | bytearray
    crc32c: str
    md5: str | None
    generation: int
    metageneration: int
    about: Mapping[str, object]
    updated_us: int

    @property
    def etag(self) -> str:
        """Of this generation and metageneration."""
        return base64.b64encode(f"{self.generation}/{self.metageneration}".encode()).decode()

    @property
    def content_type(self) -> str:
        """What the uploader said, or nothing in particular."""
        return str(self.about.get("contentType") or BINARY)

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
            **({} if self.md5 is None else {"md5Hash": self.md5}),
            "crc32c": self.crc32c,
            "etag": self.etag,
            "timeCreated": stamp(self.generation),
            "updated": stamp(self.updated_us),
        }

    def headers(self) -> dict[str, str]:
        """What comes with the bytes."""
        return {
            "Content-Type": self.content_type,
            "ETag": self.etag,
            "x-goog-generation": str(self.generation),
            "x-goog-metageneration": str(self.metageneration),
            "x-goog-hash": f"crc32c={self.crc32c}" + (f",md5={self.md5}" if self.md5 else ""),
            "x-goog-stored-content-length": str(len(self.data)),
            "x-goog-stored-content-encoding": str(self.about.get("contentEncoding") or "identity"),
            "x-goog-storage-class": str(self.about.get("storageClass") or "STANDARD"),
        }


def stamp(microseconds: int) -> str:
    """A moment as RFC 3339."""
    moment = datetime.fromtimestamp(microseconds / 1e6, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class Bucket:
    """A bucket and what is in it."""

    name: str
    versioning: bool
    created_us: int
    requester_pays: bool = False
    live: dict[str, Object] = field(default_factory=dict)
    #: Generations that are no longer live, by name and generation; only with versioning.
    kept: dict[tuple[str, int], Object] = field(default_factory=dict)
    #: When each name was last written, by the clock for the spacing.
    written: dict[str, float] = field(default_factory=dict)

    def find(self, name: str, query: Mapping[str, str]) -> Object:
        """The live object, or the generation that is asked for."""
        found = self.live.get(name)
        if "generation" in query:
            generation = integer(query, "generation")
            if found is None or found.generation != generation:
                found = self.kept.get((name, generation))
        if found is None:
            raise no_object(self.name, name)
        return found

    def retire(self, name: str) -> None:
        """Take the live object away."""
        found = self.live.pop(name, None)
        if found is not None and self.versioning:
            self.kept[name, found.generation] = found

    def described(self) -> dict[str, object]:
        """The resource that Google's API shows."""
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
            "timeCreated": stamp(self.created_us),
            "updated": stamp(self.created_us),
            "versioning": {"enabled": self.versioning},
            **({"billing": {"requesterPays": True}} if self.requester_pays else {}),
        }


def span(header: str, size: int) -> tuple[int, int] | None:
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
        raise RefusedError(
            416,
            "requestedRangeNotSatisfiable",
            "Request range not satisfiable",
            location=("header", "Range"),
            headers={"Content-Range": f"bytes */{size}"},
        )
    return start, end


def name_of(query: Mapping[str, str], metadata: Mapping[str, object]) -> str:
    """The name an upload gives its object, if it may be one."""
    # The query goes before the metadata, as the documentation of "Objects: insert" has it.
    name = query.get("name") or metadata.get("name")
    if not isinstance(name, str) or not name:
        raise RefusedError(400, "required", "Required object name.", location=("parameter", "name"))
    try:
        size = len(name.encode())
    except UnicodeEncodeError as exc:
        raise invalid("The object name is no valid UTF-8.") from exc
    if size > _LONGEST_NAME:
        raise invalid(
            f"The maximum object length is {_LONGEST_NAME} characters, but got a name with {size} characters.",
            code="KeyTooLong",
        )
    forbidden = name in {".", ".."} or name.startswith(".well-known/acme-challenge/")
    if forbidden or not {"\r", "\n"}.isdisjoint(name):
        raise invalid(f"Disallowed object name {name!r}.")
    return name
