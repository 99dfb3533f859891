"""The XML API: single objects, and uploads in parts.

What is refused here is what the pages "XML API multipart uploads", "Initiate/Complete/Abort a multipart upload",
"Upload part", "List multipart uploads" and "HTTP status and error codes for XML" say is refused. ``x-goog-hash`` is
the sum of the request's own body, in a completion too: there it is the sum of the XML document, not of the object.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote
from xml.etree import ElementTree as ET

from cloudckpt.testing.fake_gcs.answers import Answer, RefusedError, document, invalid, unknown
from cloudckpt.testing.fake_gcs.objects import BINARY, Bucket, Conditions, Object, Sum, claims, name_of, span, stamp
from cloudckpt.testing.fake_gcs.requests import Asked, Operation
from cloudckpt.testing.fake_gcs.store import Store

__all__ = ["XmlApi"]

_NAMESPACE: Final = "http://s3.amazonaws.com/doc/2006-03-01/"
_LEAST_PART: Final = 5 * 1024 * 1024
_MOST_PARTS: Final = 10_000
#: "The XML API does not return lists longer than 1000 uploads."
_LONGEST_LIST: Final = 1000
#: What every request may have; whatever else begins with x-goog- or x-amz- is refused unless it is named below.
_EVERYWHERE: Final = frozenset({"x-goog-user-project", "x-goog-api-client"})
_HASHES: Final = frozenset({"x-goog-hash"})
_KEY: Final = "x-goog-encryption-kms-key-name"
#: operation -> the headers it may have beside those, and its parameters.
_KNOWN: Final[dict[Operation, tuple[frozenset[str], frozenset[str]]]] = {
    "xml-get": (frozenset(), frozenset({"generation"})),
    "xml-put": (_HASHES | {_KEY}, frozenset()),
    "xml-upload-start": (frozenset({_KEY}), frozenset({"uploads"})),
    "xml-upload-part": (_HASHES, frozenset({"partNumber", "uploadId"})),
    "xml-upload-complete": (_HASHES, frozenset({"uploadId"})),
    "xml-upload-abort": (frozenset(), frozenset({"uploadId"})),
    "xml-upload-list": (
        frozenset(),
        frozenset({"uploads", "prefix", "key-marker", "upload-id-marker", "max-uploads", "encoding-type"}),
    ),
}


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes under a number."""

    data: bytearray
    sums: Sum

    @property
    def etag(self) -> str:
        return f'"{base64.b64decode(self.sums.md5).hex()}"'


@dataclass(slots=True)
class _Upload:
    """An upload in parts; gone with its completion or abort."""

    bucket: str
    name: str
    metadata: Mapping[str, object]
    started_us: int
    parts: dict[int, _Part] = field(default_factory=dict)


class XmlApi:
    """Whoever calls holds the lock of ``FakeGCS``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.uploads: dict[str, _Upload] = {}
        verbs: dict[Operation, Callable[[Asked], Answer]] = {
            "xml-get": self._get,
            "xml-put": self._put,
            "xml-upload-start": self._start,
            "xml-upload-part": self._part,
            "xml-upload-complete": self._complete,
            "xml-upload-abort": self._abort,
            "xml-upload-list": self._list,
        }
        self.verbs = {operation: _strictly(verb) for operation, verb in verbs.items()}

    # -- whole objects ---------------------------------------------------------------------------------------

    def _get(self, asked: Asked) -> Answer:
        bucket = self._store.bucket(asked.bucket)
        self._store.permit("storage.objects.get")
        found = bucket.find(asked.name, asked.query)
        view = memoryview(found.data)
        wanted = span(asked.headers.get("Range", ""), len(view))
        if wanted is None:
            return Answer(200, view, _about(found))
        start, end = wanted
        return Answer(206, view[start:end], {**_about(found), "Content-Range": f"bytes {start}-{end - 1}/{len(view)}"})

    def _put(self, asked: Asked) -> Answer:
        bucket = self._store.bucket(asked.bucket)
        self._store.permit("storage.objects.create")
        name = name_of({"name": asked.name}, {})
        sums = _checked(asked)
        found = self._store.write(
            bucket, name, asked.body, sums=sums, metadata=_metadata(asked), conditions=Conditions(())
        )
        return Answer(200, headers=_about(found))

    # -- uploads in parts ------------------------------------------------------------------------------------

    def _start(self, asked: Asked) -> Answer:
        bucket = self._store.bucket(asked.bucket)
        self._permit_upload()
        if asked.body:
            raise invalid("The request that begins an upload has no body.")
        name = name_of({"name": asked.name}, {})
        upload_id = secrets.token_urlsafe(48)
        self.uploads[upload_id] = _Upload(bucket.name, name, _metadata(asked), self._store.tick())
        content = {"Bucket": bucket.name, "Key": name, "UploadId": upload_id}
        return Answer.xml(document("InitiateMultipartUploadResult", content, namespace=_NAMESPACE))

    def _part(self, asked: Asked) -> Answer:
        upload = self._upload(asked)
        self._permit_upload()
        number = asked.query.get("partNumber", "")
        if not (number.isascii() and number.isdecimal() and 1 <= int(number) <= _MOST_PARTS):
            raise invalid(f"Part number must be an integer between 1 and {_MOST_PARTS}, inclusive.")
        part = _Part(asked.body, _checked(asked))
        upload.parts[int(number)] = part
        sums = f"crc32c={part.sums.crc32c},md5={part.sums.md5}"
        return Answer(200, headers={"ETag": part.etag, "x-goog-hash": sums})

    def _complete(self, asked: Asked) -> Answer:
        upload = self._upload(asked)
        self._permit_upload()
        _checked(asked)
        data, sums = bytearray(), Sum()
        for part in _chosen(upload, _wanted(asked.body)):
            data += part.data
            sums.add(part.data)
        bucket = self._store.bucket(upload.bucket)
        stored = self._store.write(
            bucket,
            upload.name,
            data,
            sums=sums,
            metadata=upload.metadata,
            conditions=Conditions(()),
            with_md5=False,
        )
        del self.uploads[asked.query["uploadId"]]
        content = {
            "Location": f"{asked.base}/{quote(bucket.name)}/{quote(upload.name)}",
            "Bucket": bucket.name,
            "Key": upload.name,
            "ETag": f'"{stored.etag}"',
        }
        told = {"x-goog-hash": f"crc32c={stored.crc32c}", "x-goog-generation": str(stored.generation)}
        return Answer.xml(
            document("CompleteMultipartUploadResult", content, namespace=_NAMESPACE),
            headers={**told, "x-goog-metageneration": str(stored.metageneration)},
        )

    def _abort(self, asked: Asked) -> Answer:
        # Whoever may not abort is told so, and not whether there is such an upload.
        self._store.permit("storage.multipartUploads.abort")
        self._upload(asked)
        del self.uploads[asked.query["uploadId"]]
        return Answer(204)

    def _list(self, asked: Asked) -> Answer:
        bucket = self._store.bucket(asked.bucket)
        self._store.permit("storage.multipartUploads.list")
        query = asked.query
        encoding = query.get("encoding-type", "")
        most = query.get("max-uploads", str(_LONGEST_LIST))
        if encoding not in {"", "url"} or not (most.isascii() and most.isdecimal() and int(most) >= 1):
            raise invalid(f"encoding-type={encoding!r} or max-uploads={most!r} cannot be.")
        limit = min(int(most), _LONGEST_LIST, self._store.page_size)
        rows = self._listed(bucket, query)
        page = rows[:limit]

        def shown(name: str) -> str:
            return quote(name) if encoding else name

        last = page[-1] if len(rows) > limit else None
        content: dict[str, object] = {
            "Bucket": bucket.name,
            "KeyMarker": shown(query.get("key-marker", "")),
            "UploadIdMarker": query.get("upload-id-marker", ""),
            "NextKeyMarker": shown(last[0]) if last else "",
            "NextUploadIdMarker": last[1] if last else "",
            **({"EncodingType": encoding} if encoding else {}),
            "MaxUploads": str(limit),
            "IsTruncated": "true" if last else "false",
            "Prefix": shown(query.get("prefix", "")),
            "Upload": [
                {
                    "Key": shown(name),
                    "UploadId": upload_id,
                    "StorageClass": "STANDARD",
                    "Initiated": stamp(self.uploads[upload_id].started_us),
                }
                for name, upload_id in page
            ],
        }
        return Answer.xml(document("ListMultipartUploadsResult", content, namespace=_NAMESPACE))

    def _listed(self, bucket: Bucket, query: Mapping[str, str]) -> list[tuple[str, str]]:
        """Names and ids, in order, after the markers. Without a key marker, the id marker is ignored."""
        after = query.get("key-marker")
        after_id = query.get("upload-id-marker") if after is not None else None
        rows = sorted(
            ((upload.name, upload_id) for upload_id, upload in self.uploads.items() if upload.bucket == bucket.name),
            key=lambda row: (row[0].encode(), row[1]),
        )
        return [
            (name, upload_id)
            for name, upload_id in rows
            if name.startswith(query.get("prefix", ""))
            and (
                after is None
                or name.encode() > after.encode()
                or (name == after and after_id is not None and upload_id > after_id)
            )
        ]

    def _permit_upload(self) -> None:
        self._store.permit("storage.multipartUploads.create")
        self._store.permit("storage.objects.create")

    def _upload(self, asked: Asked) -> _Upload:
        self._store.bucket(asked.bucket)
        found = self.uploads.get(asked.query["uploadId"])
        if found is None or (found.bucket, found.name) != (asked.bucket, asked.name):
            raise RefusedError(404, "notFound", "The requested upload was not found.", code="NoSuchUpload")
        return found


def _strictly(verb: Callable[[Asked], Answer]) -> Callable[[Asked], Answer]:
    """A verb behind a check of everything the request says."""

    def checked(asked: Asked) -> Answer:
        headers, parameters = _KNOWN[asked.operation]
        strange = (
            {name.lower() for name in asked.headers if name.lower().startswith(("x-goog-", "x-amz-"))}
            - headers
            - _EVERYWHERE
        )
        strange |= set(asked.query) - parameters - {"userProject"}
        if strange:
            raise unknown(f"{', '.join(sorted(strange))} on {asked.operation}")
        if asked.method in {"PUT", "POST"} and "Content-Length" not in asked.headers:
            raise RefusedError(
                411, "required", "You must provide the Content-Length HTTP header.", code="MissingContentLength"
            )
        return verb(asked)

    return checked


def _checked(asked: Asked) -> Sum:
    """The sums of a request's body, which are those it says."""
    sums = Sum(asked.body)
    said = [*claims({}, asked.headers), *(("md5", value) for value in asked.headers.getall("Content-MD5", []))]
    for kind, value in said:
        try:
            length = len(base64.b64decode(value, validate=True))
        except ValueError:
            length = -1
        if length != {"crc32c": 4, "md5": 16}[kind]:
            raise invalid(f"The {kind} you specified is not valid: {value!r}.", code="InvalidDigest")
    sums.check(said)
    return sums


def _metadata(asked: Asked) -> dict[str, object]:
    return {"contentType": asked.headers.get("Content-Type", BINARY), "kmsKeyName": asked.headers.get(_KEY, "")}


def _about(found: Object) -> dict[str, str]:
    key = str(found.about.get("kmsKeyName", ""))
    etag = f'"{base64.b64decode(found.md5).hex()}"' if found.md5 else f'"{found.etag}"'
    return {**found.headers(), "ETag": etag, **({_KEY: key} if key else {})}


def _wanted(body: bytearray) -> list[tuple[int, str]]:
    """Numbers and ETags of a completion, as they stand there."""
    malformed = invalid("The XML you provided was not well-formed or did not validate.", code="MalformedXML")
    try:
        root = ET.fromstring(bytes(body))  # noqa: S314 - in a test, from its own client
    except ET.ParseError:
        raise malformed from None
    if _plain(root.tag) != "CompleteMultipartUpload" or not len(root):
        raise malformed
    found = []
    for part in root:
        row = {_plain(item.tag): item.text or "" for item in part}
        if _plain(part.tag) != "Part" or set(row) != {"PartNumber", "ETag"} or not row["PartNumber"].isdecimal():
            raise malformed
        found.append((int(row["PartNumber"]), row["ETag"]))
    return found


def _plain(tag: str) -> str:
    return tag.rpartition("}")[2]


def _chosen(upload: _Upload, wanted: list[tuple[int, str]]) -> list[_Part]:
    """The parts that a completion names."""
    numbers = [number for number, _ in wanted]
    if numbers != sorted(set(numbers)):
        raise invalid("The list of parts was not in ascending order.", code="InvalidPartOrder")
    for number, etag in wanted:
        part = upload.parts.get(number)
        if part is None or etag.strip('"') != part.etag.strip('"'):
            raise invalid(f"Part {number} was not found, or its entity tag is another one.", code="InvalidPart")
    parts = [upload.parts[number] for number in numbers]
    for number, part in zip(numbers[:-1], parts[:-1], strict=True):
        if len(part.data) < _LEAST_PART:
            raise invalid(f"Part {number} is smaller than the minimum allowed size.", code="EntityTooSmall")
    return parts
