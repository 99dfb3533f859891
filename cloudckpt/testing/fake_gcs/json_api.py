"""The JSON API: metadata, listings, uploads in one request, copies."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, TypeAlias

from cloudckpt.testing.fake_gcs.answers import Answer, RefusedError, invalid
from cloudckpt.testing.fake_gcs.objects import (
    BINARY,
    OF_THE_UPLOADER,
    Bucket,
    Conditions,
    Object,
    Sum,
    claims,
    name_of,
    span,
)
from cloudckpt.testing.fake_gcs.requests import Asked, Operation, integer
from cloudckpt.testing.fake_gcs.store import Store

__all__ = ["JsonApi", "json_object"]

_BOUNDARY: Final = re.compile(r';\s*boundary=(?:"([^"]+)"|([^\s;"]+))', re.IGNORECASE)


class JsonApi:
    """Whatever is no upload in several requests. Whoever calls holds the lock of ``FakeGCS``."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.verbs: dict[Operation, Callable[[Asked], Answer]] = {
            "get": self._get,
            "media": self._media,
            "insert": self._insert,
            "list": self._list,
            "delete": self._delete,
            "bucket-get": self._bucket_get,
            "copy": self._copy,
            "patch": self._patch,
        }

    # -- reading ---------------------------------------------------------------------------------------------

    def _bucket_get(self, asked: Asked) -> Answer:
        bucket = self._store.bucket(asked.bucket)
        self._store.permit("storage.buckets.get")
        return Answer.json(bucket.described())

    def _found(self, asked: Asked) -> Object:
        bucket = self._store.bucket(asked.bucket)
        self._store.permit("storage.objects.get")
        found = bucket.find(asked.name, asked.query)
        Conditions.of(asked.query).check(found, reading=True)
        return found

    def _get(self, asked: Asked) -> Answer:
        found = self._found(asked)
        return Answer.json(found.described(), headers={"ETag": found.etag})

    def _media(self, asked: Asked) -> Answer:
        found = self._found(asked)
        view = memoryview(found.data)
        found_span = span(asked.headers.get("Range", ""), len(view))
        if found_span is None:
            return Answer(200, view, found.headers())
        start, end = found_span
        headers = {**found.headers(), "Content-Range": f"bytes {start}-{end - 1}/{len(view)}"}
        return Answer(206, view[start:end], headers)

    def _list(self, asked: Asked) -> Answer:
        bucket = self._store.bucket(asked.bucket)
        self._store.permit("storage.objects.list")
        query = asked.query
        most = integer(query, "maxResults") if query.get("maxResults") else self._store.page_size
        if most < 1:
            raise invalid(f"Invalid unsigned integer value: {most}.")
        most = min(most, self._store.page_size)
        # One more than the page holds tells whether another follows.
        found = [*itertools.islice(_rows(bucket, query), most + 1)]
        page = found[:most]
        answer: dict[str, object] = {"kind": "storage#objects"}
        items = [row.described() for _, row in page if isinstance(row, Object)]
        prefixes = [row for _, row in page if isinstance(row, str)]
        # An empty list is left out, as in every answer of Google's.
        if prefixes:
            answer["prefixes"] = prefixes
        if items:
            answer["items"] = items
        if len(found) > most:
            answer["nextPageToken"] = _token(page[-1][0])
        return Answer.json(answer)

    # -- writing ---------------------------------------------------------------------------------------------

    def _insert(self, asked: Asked) -> Answer:
        bucket = self._store.bucket(asked.bucket)
        kind = asked.query.get("uploadType")
        if kind == "media":
            metadata: Mapping[str, object] = {"contentType": asked.headers.get("Content-Type", BINARY)}
            data: bytes | bytearray = asked.body
        elif kind == "multipart":
            metadata, data = _parts(asked.headers.get("Content-Type", ""), asked.body)
        else:
            raise RefusedError(400, "invalidParameter", f"Invalid upload type: {kind}.")
        asked.name = name_of(asked.query, metadata)
        self._store.permit("storage.objects.create")
        conditions = Conditions.of(asked.query)
        sums = Sum(data)
        sums.check(claims(metadata, asked.headers))
        stored = self._store.write(bucket, asked.name, data, sums=sums, metadata=metadata, conditions=conditions)
        return Answer.json(stored.described(), headers={"ETag": stored.etag})

    def _delete(self, asked: Asked) -> Answer:
        bucket = self._store.bucket(asked.bucket)
        self._store.permit("storage.objects.delete")
        found = bucket.find(asked.name, asked.query)
        Conditions.of(asked.query).check(found)
        if "generation" not in asked.query:
            bucket.retire(asked.name)
        elif bucket.live.get(asked.name) is found:
            del bucket.live[asked.name]
        else:
            del bucket.kept[asked.name, found.generation]
        return Answer(204)

    def _patch(self, asked: Asked) -> Answer:
        bucket = self._store.bucket(asked.bucket)
        self._store.permit("storage.objects.update")
        found = bucket.find(asked.name, asked.query)
        Conditions.of(asked.query).check(found)
        about = _patched(found.about, json_object(asked.body))
        if bucket.live.get(asked.name) is found:
            self._store.space(bucket, asked.name)
        changed = replace(found, about=about, metageneration=found.metageneration + 1, updated_us=self._store.tick())
        if bucket.live.get(asked.name) is found:
            bucket.live[asked.name] = changed
        else:
            bucket.kept[asked.name, found.generation] = changed
        return Answer.json(changed.described(), headers={"ETag": changed.etag})

    def _copy(self, asked: Asked) -> Answer:
        source, target = self._store.bucket(asked.bucket), self._store.bucket(asked.place.target[0])
        self._store.permit("storage.objects.get")
        self._store.permit("storage.objects.create")
        chosen = {"generation": asked.query["sourceGeneration"]} if "sourceGeneration" in asked.query else {}
        found = source.find(asked.place.name, chosen)
        Conditions.of(asked.query, "ifSource").check(found)
        name = name_of({"name": asked.name}, {})
        about = {**found.about, **(json_object(asked.body) if asked.body.strip() else {})}
        conditions = Conditions.of(asked.query)
        stored = self._store.write(
            target, name, found.data, sums=Sum(found.data), metadata=about, conditions=conditions
        )
        size = str(len(stored.data))
        done = {"totalBytesRewritten": size, "objectSize": size, "done": True, "resource": stored.described()}
        rewriting = asked.place.verb == "rewriteTo"
        return Answer.json({"kind": "storage#rewriteResponse", **done} if rewriting else stored.described())


def _patched(about: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """What is known of an object after a patch; null takes a field away."""
    patched = {**about}
    for key in set(OF_THE_UPLOADER) & set(changes):
        older, newer = about.get(key), changes[key]
        if isinstance(older, dict) and isinstance(newer, dict):
            newer = {name: value for name, value in {**older, **newer}.items() if value is not None}
        patched[key] = newer
    return {key: value for key, value in patched.items() if value is not None}


#: Where a row stands: its name's bytes, and its generation (0 for a prefix).
_Rank: TypeAlias = tuple[bytes, int]


def _rows(bucket: Bucket, query: Mapping[str, str]) -> Iterator[tuple[_Rank, Object | str]]:
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
        raise RefusedError(400, "invalid", "Invalid page token.", location=("parameter", "pageToken")) from exc


def json_object(body: bytes | bytearray) -> dict[str, Any]:
    """A body that is one."""
    try:
        found = json.loads(body)
    except ValueError as exc:
        raise RefusedError(400, "parseError", "Parse Error") from exc
    if not isinstance(found, dict):
        raise RefusedError(400, "parseError", "Parse Error")
    return found


def _parts(content_type: str, body: bytearray) -> tuple[dict[str, Any], bytes]:
    """Metadata and bytes of a multipart/related body, whose lines may end in CRLF or, as from gcsfs, in LF."""
    found = _BOUNDARY.search(content_type)
    if found is None or not content_type.lower().startswith("multipart/related"):
        raise RefusedError(400, "badContent", "Unsupported content with type: " + content_type)
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
    return {"contentType": kind, **json_object(about)}, data


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


def _malformed() -> RefusedError:
    return RefusedError(400, "badRequest", "Malformed multipart body.")
