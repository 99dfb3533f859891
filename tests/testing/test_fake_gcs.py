"""FakeGCS, spoken to in plain HTTP: each condition, each refusal, and what a client does after a lost answer.

(Past 350 lines: every rule of the JSON API that the fake keeps is one list.)
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import crc32c
import pytest

from cloudckpt.testing.fake_gcs import FakeGCS, Seen

KIB = 1024
STEP = 256 * KIB
BODY = bytes(range(256)) * KIB * 3  # three steps of a resumable upload
OBJECTS = "/storage/v1/b/bkt/o"
UPLOAD = "/upload/storage/v1/b/bkt/o"
#: What a name may look like, and what it looks like in a URL.
NAMES = {
    "plain.json": "plain.json",
    "a folder/b c.bin": "a%20folder%2Fb%20c.bin",
    "50%/41": "50%25%2F41",
    "a%2Fb": "a%252Fb",
    "a+b&c=d?e#f": "a%2Bb%26c%3Dd%3Fe%23f",
    "größe/模型": "gr%C3%B6%C3%9Fe%2F%E6%A8%A1%E5%9E%8B",
    "o/b/rewriteTo": "o%2Fb%2FrewriteTo",
    "..a//b/": "..a%2F%2Fb%2F",
}


@dataclass(frozen=True)
class Reply:
    """An answer, read to its end."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str:
        error = self.json["error"]
        assert error["code"] == self.status
        assert error["errors"][0]["message"] == error["message"]
        return str(error["errors"][0]["reason"])

    @property
    def generation(self) -> int:
        return int(self.json["generation"])


@dataclass(frozen=True)
class Client:
    """Sends what it is told to, without any help or repetition."""

    gcs: FakeGCS

    def __call__(
        self,
        method: str,
        target: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        /,
        **query: str,
    ) -> Reply:
        if query:
            target += ("&" if "?" in target else "?") + urlencode(query)
        with contextlib.closing(http.client.HTTPConnection(urlsplit(self.gcs.url).netloc, timeout=60)) as connection:
            connection.request(method, target, body, dict(headers or {}))
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())

    def media(self, name: str, body: bytes = b"body", headers: Mapping[str, str] | None = None, **query: str) -> Reply:
        return self("POST", UPLOAD, body, headers, uploadType="media", name=name, **query)

    def multipart(
        self, name: str, body: bytes = b"body", headers: Mapping[str, str] | None = None, **query: str
    ) -> Reply:
        return self.multipart_with({"name": name}, body, headers, **query)

    def multipart_with(
        self,
        metadata: object,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        newline: str = "\r\n",
        **query: str,
    ) -> Reply:
        lines = [
            "--=b=",
            "Content-Type: application/json",
            "",
            json.dumps(metadata),
            "--=b=",
            "Content-Type: x/y",
            "",
            "",
        ]
        data = newline.join(lines).encode() + body + f"{newline}--=b=--".encode()
        kind = {"Content-Type": 'multipart/related; boundary="=b="', **(headers or {})}
        return self("POST", UPLOAD, data, kind, uploadType="multipart", **query)

    def resumable(
        self, name: str, body: bytes = b"body", headers: Mapping[str, str] | None = None, **query: str
    ) -> Reply:
        begun = self.begin(name, **query)
        return self.put(begun.headers["Location"], body, headers) if begun.status == 200 else begun

    def begin(
        self,
        name: str,
        headers: Mapping[str, str] | None = None,
        more: Mapping[str, str] | None = None,
        /,
        **query: str,
    ) -> Reply:
        body = json.dumps({"name": name, **(more or {})}).encode()
        return self("POST", UPLOAD, body, headers, uploadType="resumable", **query)

    def session(self, name: str = "name", **query: str) -> str:
        begun = self.begin(name, **query)
        assert begun.status == 200
        return begun.headers["Location"]

    def put(self, session: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Reply:
        return self("PUT", session.removeprefix(self.gcs.url), body, headers)

    def chunk(self, session: str, start: int, end: int, total: int | str = "*", body: bytes = BODY) -> Reply:
        return self.put(session, body[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{total}"})

    def ask(self, session: str, total: int | str = "*") -> Reply:
        return self.put(session, b"", {"Content-Range": f"bytes */{total}"})

    def read(self, name: str, headers: Mapping[str, str] | None = None, **query: str) -> Reply:
        return self("GET", f"/download{OBJECTS}/{quote(name, safe='')}", None, headers, alt="media", **query)

    def look(self, name: str, **query: str) -> Reply:
        return self("GET", f"{OBJECTS}/{quote(name, safe='')}", **query)

    def delete(self, name: str, **query: str) -> Reply:
        return self("DELETE", f"{OBJECTS}/{quote(name, safe='')}", **query)

    def list(self, **query: str) -> Reply:
        return self("GET", OBJECTS, **query)


@pytest.fixture
def client(gcs: FakeGCS) -> Client:
    """The way to it."""
    return Client(gcs)


def b64_crc32c(body: bytes) -> str:
    """As Google writes it."""
    return base64.b64encode(crc32c.crc32c(body).to_bytes(4, "big")).decode()


def b64_md5(body: bytes) -> str:
    """As Google writes it."""
    return base64.b64encode(hashlib.md5(body).digest()).decode()


KINDS = ["media", "multipart", "resumable"]


def insert(client: Client, kind: str) -> Callable[..., Reply]:
    """One of the three ways to write an object."""
    way: Callable[..., Reply] = getattr(client, kind)
    return way


# -- writing and reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("body", [b"", b"a", b"\r\n", b"ends in a newline\r\n", b"--=b", BODY], ids=len)
def test_what_was_written_is_read(client: Client, gcs: FakeGCS, kind: str, body: bytes) -> None:
    """Byte for byte, with everything that Google says about an object."""
    written = insert(client, kind)("a/b", body)

    assert written.status == 200
    assert gcs.objects("bkt") == {"a/b": body}
    found = written.json
    assert (found["bucket"], found["name"], found["size"]) == ("bkt", "a/b", str(len(body)))
    assert (found["crc32c"], found["md5Hash"]) == (b64_crc32c(body), b64_md5(body))
    assert (found["metageneration"], found["storageClass"]) == ("1", "STANDARD")
    assert found["etag"]
    assert found["timeCreated"] == found["updated"] > "2020"
    assert client.look("a/b").json == found

    read = client.read("a/b")
    assert (read.status, read.body) == (200, body)
    assert read.headers["x-goog-generation"] == found["generation"]
    assert read.headers["x-goog-metageneration"] == "1"
    assert read.headers.get_all("x-goog-hash") == [f"crc32c={b64_crc32c(body)}", f"md5={b64_md5(body)}"]
    assert read.headers["x-goog-stored-content-length"] == read.headers["Content-Length"] == str(len(body))
    assert read.headers["ETag"] == found["etag"]
    # The other way to ask for the bytes.
    assert client.look("a/b", alt="media").body == body


def test_the_checksum_is_google_s_own_example(client: Client) -> None:
    """The CRC-32C of "123456789" is 0xE3069283, written big-endian in base64."""
    assert client.media("x", b"123456789").json["crc32c"] == "4waSgw=="


def test_generations_only_grow(client: Client) -> None:
    """Over overwriting, deleting and other names."""
    seen = []
    for name in "abab":
        seen.append(client.media(name).generation)
        client.delete("a")
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("body", [b"", b"x\r", b"x\n", b"\r\n", b"\n--=c="])
def test_multipart_lines_end_in_either_way(client: Client, gcs: FakeGCS, newline: str, body: bytes) -> None:
    """Clients of gcsfs send LF; the object's own last bytes are not taken for a line's end."""
    assert client.multipart_with({"name": "x", "contentType": "t/u"}, body, newline=newline).status == 200
    assert gcs.objects("bkt") == {"x": body}
    assert client.look("x").json["contentType"] == "t/u"


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/related; boundary=b", b""),
        ("multipart/related; boundary=b", b"--b\r\n\r\n{}\r\n--b--"),
        ("multipart/related; boundary=b", b'--b\r\n\r\n{"name": "x"}\r\n--b\r\n\r\nbytes\r\n'),
        ("multipart/related; boundary=b", b'--b\r\n\r\n{"name": "x"}\r\n--b\r\n\r\none\r\n--b\r\n\r\ntwo\r\n--b--'),
        ("multipart/related; boundary=b", b'--b\r\nA: b\r\n{"name": "x"}\r\n--b\r\n\r\nbytes\r\n--b--'),
        ("multipart/related; boundary=b", b"--b\r\n\r\n{\r\n--b\r\n\r\nbytes\r\n--b--"),
        ("multipart/related; boundary=b", b"--b\r\n\r\n[]\r\n--b\r\n\r\nbytes\r\n--b--"),
        ("multipart/related; boundary=b", b"--b\r\n\r\n{}\r\n--b\r\n\r\nbytes\r\n--b--"),
        ("multipart/related", b'--b\r\n\r\n{"name": "x"}\r\n--b\r\n\r\nbytes\r\n--b--'),
        ("text/plain; boundary=b", b'--b\r\n\r\n{"name": "x"}\r\n--b\r\n\r\nbytes\r\n--b--'),
    ],
)
def test_malformed_multipart_bodies_are_refused(client: Client, gcs: FakeGCS, kind: str, body: bytes) -> None:
    """With 400, and nothing is stored."""
    assert client("POST", UPLOAD, body, {"Content-Type": kind}, uploadType="multipart").status == 400
    assert gcs.objects("bkt") == {}


def test_a_part_without_headers_is_a_part(client: Client, gcs: FakeGCS) -> None:
    """As in every multipart format."""
    body = b'--b\r\n\r\n{"name": "x"}\r\n--b\r\n\r\nbytes\r\n--b--\r\n'
    assert (
        client("POST", UPLOAD, body, {"Content-Type": "multipart/related; boundary=b"}, uploadType="multipart").status
        == 200
    )
    assert gcs.objects("bkt") == {"x": b"bytes"}


def test_the_name_in_the_query_goes_before_the_metadata(client: Client, gcs: FakeGCS) -> None:
    """As the documentation of the method has it."""
    client.multipart_with({"name": "metadata"}, b"", name="query")
    assert list(gcs.objects("bkt")) == ["query"]


@pytest.mark.parametrize("name", ["", ".", "..", "a\nb", "a\rb", "ä" * 513, ".well-known/acme-challenge/x"])
@pytest.mark.parametrize("kind", KINDS)
def test_names_that_google_refuses(client: Client, gcs: FakeGCS, name: str, kind: str) -> None:
    """Each with 400."""
    assert insert(client, kind)(name).status == 400
    assert gcs.objects("bkt") == {}


@pytest.mark.parametrize(("name", "encoded"), NAMES.items())
@pytest.mark.parametrize("kind", KINDS)
def test_names_are_decoded_once(client: Client, gcs: FakeGCS, name: str, encoded: str, kind: str) -> None:
    """Slashes, percent signs, plus signs and other scripts come back as they went."""
    assert insert(client, kind)(name, name.encode()).json["name"] == name
    assert gcs.objects("bkt") == {name: name.encode()}
    assert client("GET", f"{OBJECTS}/{encoded}").json["name"] == name
    assert client("GET", f"/download{OBJECTS}/{encoded}?alt=media").body == name.encode()
    assert [item["name"] for item in client.list(prefix=name).json["items"]] == [name]
    assert gcs.requests[-1] == Seen("GET", "list", name, 200)
    assert client("DELETE", f"{OBJECTS}/{encoded}").status == 204
    assert gcs.objects("bkt") == {}


def test_a_slash_that_is_not_encoded_is_no_part_of_a_name(client: Client) -> None:
    """It takes the request somewhere else, at Google as well."""
    client.media("a/b")
    assert client("GET", f"{OBJECTS}/a/b").status == 400
    assert client("GET", f"{OBJECTS}/%FF").status == 400


# -- what is missing -------------------------------------------------------------------------------------------


def test_what_is_not_there(client: Client) -> None:
    """404 says whether the object or its bucket is missing."""
    for reply in (client.look("a/b"), client.read("a/b"), client.delete("a/b")):
        assert (reply.status, reply.reason) == (404, "notFound")
        assert reply.json["error"]["message"] == "No such object: bkt/a/b"
    elsewhere = OBJECTS.replace("bkt", "nobody")
    for reply in (
        client("GET", "/storage/v1/b/nobody"),
        client("GET", elsewhere),
        client("GET", f"{elsewhere}/x"),
        client("DELETE", f"{elsewhere}/x"),
        client("POST", f"/upload{elsewhere}", b"", uploadType="media", name="x"),
        client("POST", f"/upload{elsewhere}", b"", uploadType="resumable", name="x"),
    ):
        assert (reply.status, reply.reason) == (404, "notFound")
        assert reply.json["error"]["message"] == "The specified bucket does not exist."


def test_a_bucket_is_described(client: Client, gcs: FakeGCS) -> None:
    """With its versioning."""
    gcs.create_bucket("kept", versioning=True)
    assert client("GET", "/storage/v1/b/kept").json["versioning"] == {"enabled": True}
    assert client("GET", "/storage/v1/b/bkt").json["versioning"] == {"enabled": False}
    with pytest.raises(ValueError, match="already"):
        gcs.create_bucket("bkt")
    with pytest.raises(KeyError):
        gcs.objects("nobody")


def test_a_bucket_may_be_called_o(client: Client, gcs: FakeGCS) -> None:
    """The last part of a path is not always what it looks like."""
    gcs.create_bucket("o")
    assert client("GET", "/storage/v1/b/o").json["kind"] == "storage#bucket"
    assert client("GET", "/storage/v1/b/o/o").json["kind"] == "storage#objects"


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/"),
        ("GET", "/storage/v1/b"),
        ("PUT", f"{OBJECTS}/x"),
        ("POST", f"{OBJECTS}/x/compose"),
        ("POST", "/batch/storage/v1"),
        ("GET", f"{UPLOAD}?upload_id=1"),
        ("GET", f"{OBJECTS}/x/rewriteTo/b/bkt/o/y"),
        ("POST", f"{UPLOAD}/x"),
    ],
)
def test_what_it_does_not_know_it_refuses(client: Client, gcs: FakeGCS, method: str, target: str) -> None:
    """Never a success, and no status that clients repeat."""
    reply = client(method, target, b"")
    assert (reply.status, reply.reason) == (400, "notImplemented")
    assert gcs.requests[-1].operation == "unknown"


# -- conditions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_upload_s_conditions(client: Client, gcs: FakeGCS, kind: str) -> None:
    """412 where one does not hold, and the object stays as it was."""
    write = insert(client, kind)
    assert write("x", b"1", ifGenerationMatch="7").status == 412
    first = write("x", b"1", ifGenerationMatch="0").generation

    def lost(**query: str) -> bool:
        reply = write("x", b"lost", **query)
        return (reply.status, reply.reason) == (412, "conditionNotMet")

    assert lost(ifGenerationMatch="0")
    assert lost(ifGenerationMatch=str(first + 1))
    assert lost(ifGenerationNotMatch=str(first))
    assert lost(ifMetagenerationMatch="2")
    assert lost(ifMetagenerationNotMatch="1")
    assert lost(ifGenerationMatch=str(first), ifMetagenerationMatch="2")
    assert gcs.objects("bkt") == {"x": b"1"}

    second = write("x", b"2", ifGenerationMatch=str(first), ifMetagenerationMatch="1").generation
    assert lost(ifGenerationMatch=str(first))
    assert write("x", b"3", ifGenerationNotMatch=str(first)).generation > second > first
    client.delete("x")
    assert lost(ifGenerationMatch=str(second))
    assert lost(ifGenerationNotMatch="0")
    assert write("x", b"4", ifGenerationMatch="0").status == 200


def test_a_resumable_upload_s_condition_is_checked_when_it_ends(client: Client, gcs: FakeGCS) -> None:
    """Two began, one won; the other's bytes are nowhere, and asking again does not help it."""
    one, two = (client.session("x", ifGenerationMatch="0") for _ in range(2))
    assert client.begin("x", ifGenerationMatch="1").reason == "conditionNotMet"
    assert client.chunk(two, 0, STEP).status == 308
    assert client.put(one, b"one").status == 200
    assert client.chunk(two, STEP, len(BODY), len(BODY)).reason == "conditionNotMet"
    assert client.ask(two, len(BODY)).status == client.put(two, BODY).status == 412
    assert gcs.objects("bkt") == {"x": b"one"}
    assert gcs.uploads() == []


@pytest.mark.parametrize("read", ["look", "read"])
def test_a_reader_s_conditions(client: Client, read: str) -> None:
    """304 where a "not" is not met, 412 where another is not."""
    ask = getattr(client, read)
    generation = client.media("x").generation
    assert ask("x", ifGenerationMatch=str(generation), ifMetagenerationMatch="1").status == 200
    assert ask("x", ifGenerationNotMatch=str(generation + 1)).status == 200
    assert ask("x", ifGenerationMatch=str(generation + 1)).reason == "conditionNotMet"
    unchanged = ask("x", ifGenerationNotMatch=str(generation))
    assert (unchanged.status, unchanged.body) == (304, b"")
    assert ask("y", ifGenerationMatch="0").status == 404


def test_a_delete_s_conditions(client: Client, gcs: FakeGCS) -> None:
    """Only that generation goes, and only once."""
    generation = client.media("x").generation
    assert client.delete("x", ifGenerationMatch=str(generation + 1)).reason == "conditionNotMet"
    assert client.delete("x", generation=str(generation + 1)).status == 404
    assert client.delete("x", ifGenerationNotMatch=str(generation)).status == 412
    assert list(gcs.objects("bkt")) == ["x"]
    gone = client.delete("x", ifGenerationMatch=str(generation))
    assert (gone.status, gone.body) == (204, b"")
    assert client.delete("x", ifGenerationMatch=str(generation)).status == 404
    client.media("x")
    assert client.delete("x", generation=str(generation)).status == 404


@pytest.mark.parametrize("value", ["", "abc", "1.0", "9223372036854775808", "\u0661"])
def test_a_generation_is_a_number(client: Client, value: str) -> None:
    """Of 64 bits with a sign."""
    client.media("x")
    assert client.media("x", ifGenerationMatch=value).reason == "invalid"
    assert client.look("x", generation=value).reason == "invalid"


def test_a_condition_it_does_not_know_is_refused_not_ignored(client: Client, gcs: FakeGCS) -> None:
    """An ignored condition is how emulators lose data."""
    client.media("x")
    assert client.media("x", b"new", ifSourceGenerationMatch="1").reason == "notImplemented"
    assert client.media("x", b"new", headers={"If-Match": "*"}).reason == "notImplemented"
    assert client.read("x", {"If-None-Match": "*"}).reason == "notImplemented"
    assert client.list(ifGenerationMatch="1").reason == "notImplemented"
    assert gcs.objects("bkt") == {"x": b"body"}


def test_sixteen_creators_and_one_winner(client: Client, gcs: FakeGCS) -> None:
    """All at once, for several names."""
    start = threading.Barrier(16)

    def create(writer: int) -> list[int]:
        start.wait()
        return [
            client.multipart(f"x{number}", str(writer).encode(), ifGenerationMatch="0").status for number in range(5)
        ]

    with ThreadPoolExecutor(16) as pool:
        rounds = [*zip(*pool.map(create, range(16)), strict=True)]
    assert [sorted(statuses) for statuses in rounds] == [[200] + [412] * 15] * 5
    for number, statuses in enumerate(rounds):
        assert gcs.objects("bkt")[f"x{number}"] == str(statuses.index(200)).encode()


def test_a_counter_loses_no_increment(client: Client, gcs: FakeGCS) -> None:
    """Eight threads add twenty each."""
    client.media("counter", b"0")

    def add(_: int) -> None:
        done = 0
        while done < 20:
            found = client.read("counter")
            value, generation = str(int(found.body) + 1).encode(), found.headers["x-goog-generation"]
            done += client.media("counter", value, ifGenerationMatch=generation).status == 200

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert gcs.objects("bkt") == {"counter": b"160"}


# -- checksums -------------------------------------------------------------------------------------------------

WRONG = b"other bytes"
CLAIMS: dict[str, Callable[[bytes], dict[str, dict[str, str]]]] = {
    "crc32c in the metadata": lambda body: {"more": {"crc32c": b64_crc32c(body)}},
    "md5 in the metadata": lambda body: {"more": {"md5Hash": b64_md5(body)}},
    "crc32c in the header": lambda body: {"headers": {"X-Goog-Hash": f"crc32c={b64_crc32c(body)}"}},
    "md5 in the header": lambda body: {"headers": {"X-Goog-Hash": f"md5={b64_md5(body)}"}},
    "both in the header": lambda body: {"headers": {"x-goog-hash": f"crc32c={b64_crc32c(BODY)}, md5={b64_md5(body)}"}},
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_bytes_that_are_not_those_of_the_checksum_are_refused(client: Client, gcs: FakeGCS, claim: str) -> None:
    """However they are sent; with the right checksum they are stored."""

    def send(sums_of: bytes) -> list[Reply]:
        given = CLAIMS[claim](sums_of)
        more, headers = given.get("more", {}), given.get("headers", {})
        chunked = client.begin("chunked", None, more).headers["Location"]
        assert client.chunk(chunked, 0, 2 * STEP).status == 308
        place = {"Content-Range": f"bytes {2 * STEP}-{len(BODY) - 1}/{len(BODY)}"}
        replies = [
            client.multipart_with({"name": "multipart", **more}, BODY, headers),
            client.put(client.begin("whole", None, more).headers["Location"], BODY, headers),
            client.put(chunked, BODY[2 * STEP :], {**place, **headers}),
        ]
        # A media upload has no metadata to say it in.
        return [*replies, client.media("media", BODY, headers)] if headers else replies

    for reply in send(WRONG):
        assert (reply.status, reply.reason) == (400, "invalid")
        assert "doesn't match calculated" in reply.json["error"]["message"]
    assert gcs.objects("bkt") == {}
    assert gcs.uploads() == []
    assert {reply.status for reply in send(BODY)} == {200}
    assert set(gcs.objects("bkt").values()) == {BODY}


def test_a_checksum_it_does_not_know_is_refused(client: Client) -> None:
    """So that nobody believes it was compared."""
    assert client.media("x", headers={"X-Goog-Hash": "sha256=AAAA"}).status == 400


# -- ranges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "status", "body", "place"),
    [
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
        ("bytes=3-5", 206, b"345", "bytes 3-5/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=7-99", 206, b"789", "bytes 7-9/10"),
        ("bytes=0-9", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=10-10", 416, None, "bytes */10"),
        ("bytes=-0", 416, None, "bytes */10"),
        ("bytes=5-3", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
        ("bytes=1-2,4-5", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
    ],
)
def test_ranges(client: Client, asked: str, status: int, body: bytes | None, place: str | None) -> None:
    """A range that cannot be is refused; one that is not understood is ignored, as RFC 9110 wants it."""
    client.media("x", b"0123456789")
    reply = client.read("x", {"Range": asked})
    assert (reply.status, reply.headers.get("Content-Range")) == (status, place)
    if body is None:
        assert reply.reason == "requestedRangeNotSatisfiable"
        return
    assert reply.body == body
    # Sums and sizes are those of the whole object.
    assert reply.headers["x-goog-hash"] == f"crc32c={b64_crc32c(b'0123456789')}"
    assert reply.headers["x-goog-stored-content-length"] == "10"


@pytest.mark.parametrize("asked", ["bytes=0-", "bytes=0-0", "bytes=-1", "bytes=5-9"])
def test_an_empty_object_has_no_range(client: Client, asked: str) -> None:
    """Not even an empty one."""
    client.media("x", b"")
    reply = client.read("x", {"Range": asked})
    assert (reply.status, reply.headers.get("Content-Range")) == (416, "bytes */0")


# -- listings --------------------------------------------------------------------------------------------------


def listed(client: Client, **query: str) -> tuple[list[str], list[list[str]]]:
    """Names and prefixes of all pages in the order in which they came, and by page."""
    pages: list[list[str]] = []
    token: dict[str, str] = {}
    while True:
        answer = client.list(**query, **token).json
        pages.append([*answer.get("prefixes", ()), *(item["name"] for item in answer.get("items", ()))])
        if "nextPageToken" not in answer:
            return [row for page in pages for row in page], pages
        token = {"pageToken": answer["nextPageToken"]}


def test_listings_are_in_order_and_in_pages(client: Client) -> None:
    """By the bytes of the names; a page is full, or the last."""
    names = ["a", "a/1", "a/2", "a/2/x", "a0", "b", "ä", "模", "\U0001f600"]
    for name in reversed(names):
        client.media(name)
    assert listed(client) == (names, [names])
    for most in range(1, 11):
        found, pages = listed(client, maxResults=str(most))
        assert found == names
        assert {len(page) for page in pages[:-1]} <= {most}
        assert pages[-1]
    assert listed(client, prefix="a/")[0] == ["a/1", "a/2", "a/2/x"]
    assert listed(client, startOffset="a/2", endOffset="b")[0] == ["a/2", "a/2/x", "a0"]
    assert client.list(prefix="zzz").json == {"kind": "storage#objects"}


def test_folders_of_a_listing(client: Client) -> None:
    """Each once, even where a page ends at it, and counted like an object."""
    for name in ("a", "a/", "a/1", "a/2", "b/c/1", "b/c/2", "b/d", "c"):
        client.media(name)
    assert client.list(delimiter="/").json["prefixes"] == ["a/", "b/"]
    for most in range(1, 6):
        found, _ = listed(client, delimiter="/", maxResults=str(most))
        assert sorted(found) == ["a", "a/", "b/", "c"]
    assert listed(client, delimiter="/", prefix="a/")[0] == ["a/", "a/1", "a/2"]
    assert listed(client, delimiter="/", prefix="b/", maxResults="1")[0] == ["b/c/", "b/d"]
    assert listed(client, delimiter="/c")[0] == ["b/c", "a", "a/", "a/1", "a/2", "b/d", "c"]


def test_a_page_is_no_larger_than_the_server_wants() -> None:
    """Whatever the client asks for; a listing goes on where it was, whatever changed meanwhile."""
    with FakeGCS(page_size=2) as gcs:
        gcs.create_bucket("bkt")
        client = Client(gcs)
        for name in "abcde":
            client.media(name)
        assert listed(client, maxResults="100")[1] == [["a", "b"], ["c", "d"], ["e"]]
        token = client.list().json["nextPageToken"]
        client.delete("b")
        client.delete("c")
        client.media("bb")
        assert [item["name"] for item in client.list(pageToken=token).json["items"]] == ["bb", "d"]
        assert client.list(pageToken="!").reason == client.list(maxResults="0").reason == "invalid"
        assert client.list(maxResults="x").reason == client.list(pageToken="bnVsbA==").reason == "invalid"
    with pytest.raises(ValueError, match="page_size"):
        FakeGCS(page_size=0)


# -- generations that are no longer live -----------------------------------------------------------------------


def test_versioning_keeps_what_was_overwritten(client: Client, gcs: FakeGCS) -> None:
    """Readable by its generation until that is deleted; without versioning it is gone at once."""
    gcs.create_bucket("kept", versioning=True)

    def at(bucket: str, method: str = "GET", **query: str) -> Reply:
        return client(method, f"/storage/v1/b/{bucket}/o/x", **query)

    for bucket in ("bkt", "kept"):
        upload = UPLOAD.replace("bkt", bucket)
        first, second = (
            client("POST", upload, b, uploadType="media", name="x").json["generation"] for b in (b"1", b"22")
        )
        assert at(bucket, generation=second).json["size"] == "2"
        kept = bucket == "kept"
        assert at(bucket, generation=first).status == (200 if kept else 404)
        listing = client("GET", f"/storage/v1/b/{bucket}/o", versions="true").json["items"]
        assert [item["generation"] for item in listing] == ([first, second] if kept else [second])
        assert at(bucket, "DELETE").status == 204
        assert at(bucket).status == 404
        assert at(bucket, alt="media", generation=second).body == (
            b"22" if kept else at(bucket, generation=second).body
        )
        assert at(bucket, "DELETE", generation=second).status == (204 if kept else 404)
        assert at(bucket, generation=second).status == 404
        assert gcs.objects(bucket) == {}


# -- resumable uploads -----------------------------------------------------------------------------------------


def test_a_resumable_upload_step_by_step(client: Client, gcs: FakeGCS) -> None:
    """Nothing can be seen before its last byte; then it can be seen whole."""
    begun = client.begin("a/b", {"X-Upload-Content-Type": "t/u"})
    session = begun.headers["Location"]
    assert session.startswith(f"{gcs.url}/upload/storage/v1/b/bkt/o?")
    assert gcs.uploads() == ["a/b"]

    nothing = client.ask(session)
    assert (nothing.status, nothing.headers.get("Range")) == (308, None)
    first = client.chunk(session, 0, STEP)
    assert (first.status, first.headers.get("Range")) == (308, f"bytes=0-{STEP - 1}")
    second = client.chunk(session, STEP, 2 * STEP, len(BODY))
    assert (second.status, second.headers.get("Range")) == (308, f"bytes=0-{2 * STEP - 1}")
    assert client.ask(session, len(BODY)).headers.get("Range") == second.headers.get("Range")
    assert client.look("a/b").status == 404
    last = client.chunk(session, 2 * STEP, len(BODY), len(BODY))

    assert (last.status, last.json["size"], last.json["contentType"]) == (200, str(len(BODY)), "t/u")
    assert gcs.objects("bkt") == {"a/b": BODY}
    assert gcs.uploads() == []
    operations = [seen.operation for seen in gcs.requests if seen.name == "a/b" and seen.operation != "get"]
    assert operations == [
        "resumable-start",
        "resumable-query",
        *["resumable-chunk"] * 2,
        "resumable-query",
        "resumable-chunk",
    ]


def test_no_byte_is_stored_twice_after_a_lost_answer(client: Client, gcs: FakeGCS) -> None:
    """Every chunk is sent again as if its answer had never come, and so is the last."""
    session = client.session("x")
    for start in range(0, len(BODY), STEP):
        replies = [client.chunk(session, start, start + STEP, len(BODY)) for _ in range(3)]
        assert len({(reply.status, reply.headers.get("Range")) for reply in replies}) == 1
    assert gcs.objects("bkt") == {"x": BODY}
    # One object was made, and everybody who asks is told of it.
    replies += [
        client.ask(session),
        client.ask(session, len(BODY)),
        client.put(session, BODY),
        client.chunk(session, 0, STEP),
    ]
    assert {(reply.status, reply.body) for reply in replies} == {(200, client.look("x").body)}


def test_a_chunk_may_begin_with_bytes_that_are_there(client: Client, gcs: FakeGCS) -> None:
    """They are skipped; a gap is not filled, and changes nothing."""
    session = client.session("x")
    assert client.chunk(session, STEP, 2 * STEP).status == 503
    assert client.chunk(session, 2 * STEP, len(BODY), len(BODY)).status == 503
    assert client.chunk(session, 0, 2 * STEP).headers.get("Range") == f"bytes=0-{2 * STEP - 1}"
    assert client.chunk(session, 0, STEP).headers.get("Range") == f"bytes=0-{2 * STEP - 1}"
    assert client.chunk(session, STEP, len(BODY), len(BODY)).status == 200
    assert gcs.objects("bkt") == {"x": BODY}


def test_a_chunk_s_first_bytes_stay_when_its_connection_breaks(client: Client, gcs: FakeGCS) -> None:
    """In whole steps: the client asks, and goes on from there."""
    session = urlsplit(client.session("x"))
    with socket.create_connection((session.hostname, session.port)) as connection:
        head = f"PUT {session.path}?{session.query} HTTP/1.1\r\nHost: h\r\nContent-Length: {len(BODY)}\r\n"
        head += f"Content-Range: bytes 0-{len(BODY) - 1}/{len(BODY)}\r\n\r\n"
        connection.sendall(head.encode() + BODY[: STEP + STEP // 2])
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(KIB):
            pass
    asked = client.ask(session.geturl())
    assert (asked.status, asked.headers.get("Range")) == (308, f"bytes=0-{STEP - 1}")
    assert Seen("PUT", "resumable-chunk", "x", 0) in gcs.requests
    assert client.chunk(session.geturl(), STEP, len(BODY), len(BODY)).status == 200
    assert gcs.objects("bkt") == {"x": BODY}


def test_a_broken_upload_in_one_request_stores_nothing(client: Client, gcs: FakeGCS) -> None:
    """Whatever its first bytes were."""
    place = urlsplit(gcs.url)
    with socket.create_connection((place.hostname, place.port)) as connection:
        head = f"POST {UPLOAD}?uploadType=media&name=x HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\n"
        connection.sendall(head.encode() + b"only these")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(KIB):
            pass
    assert client.look("x").status == 404
    assert gcs.objects("bkt") == {}


@pytest.mark.parametrize(
    "sent",
    [
        f"bytes 0-{STEP - 2}/*",  # no multiple
        f"bytes 0-{STEP - 2}/{STEP}",  # nor is this the last
        f"bytes 0-{STEP - 1}/{STEP - 1}",
        "bytes 5-4/9",
        "bytes 0-/9",
        "bytes=0-3/4",
        "chunks 0-3/4",
        "bytes */x",
        "",
    ],
)
def test_chunks_that_google_refuses(client: Client, gcs: FakeGCS, sent: str) -> None:
    """With 400, and the upload goes on as if they had not come."""
    session = client.session("x")
    size = int(sent.partition("-")[2].partition("/")[0] or 3) + 1 if "-" in sent else 0
    assert client.put(session, bytes(size), {"Content-Range": sent}).status == 400
    assert client.ask(session).headers.get("Range") is None
    assert client.put(session, BODY).status == 200
    assert gcs.objects("bkt") == {"x": BODY}


def test_a_chunk_has_as_many_bytes_as_it_says(client: Client) -> None:
    """Neither fewer nor more."""
    session = client.session("x")
    for size in (STEP - 1, STEP + 1):
        assert client.put(session, bytes(size), {"Content-Range": f"bytes 0-{STEP - 1}/{STEP}"}).status == 400
    assert client.ask(session).headers.get("Range") is None


def test_an_announced_size_does_not_change(client: Client, gcs: FakeGCS) -> None:
    """Whether it was said at the beginning, with a chunk or in a question."""
    session = client.begin("x", {"X-Upload-Content-Length": str(len(BODY))}).headers["Location"]
    assert (
        client.chunk(session, 0, STEP, STEP).status
        == client.ask(session, 5).status
        == client.put(session, b"5").status
        == 400
    )
    assert client.put(session, BODY).status == 200

    session = client.session("y")
    assert client.chunk(session, 0, STEP, len(BODY)).status == 308
    assert client.chunk(session, STEP, 2 * STEP, 2 * STEP).status == 400
    assert client.chunk(session, STEP, len(BODY), len(BODY)).status == 200
    assert gcs.objects("bkt") == {"x": BODY, "y": BODY}
    assert client.begin("z", {"X-Upload-Content-Length": "many"}).status == 400


def test_an_upload_without_a_size_ends_when_it_is_told_one(client: Client, gcs: FakeGCS) -> None:
    """As gcsfs does when the last write filled a chunk; an empty object ends in the same way."""
    session = client.session("x")
    assert client.chunk(session, 0, STEP).status == 308
    assert client.ask(session, STEP + 1).status == 308
    assert client.ask(session, STEP).status == 400
    session = client.session("y")
    assert client.chunk(session, 0, STEP).status == 308
    assert client.ask(session, STEP - 1).status == 400
    assert client.ask(session, STEP).status == 200
    assert client.ask(client.session("empty"), 0).status == 200
    assert gcs.objects("bkt") == {"y": BODY[:STEP], "empty": b""}


def test_a_cancelled_upload_is_over(client: Client, gcs: FakeGCS) -> None:
    """And one that nobody began was never there."""
    session = client.session("x")
    client.chunk(session, 0, STEP)
    cancelled = client("DELETE", session.removeprefix(gcs.url))
    assert (cancelled.status, cancelled.body) == (499, b"")
    assert gcs.uploads() == []
    for reply in (client.ask(session), client.put(session, BODY), client("DELETE", session.removeprefix(gcs.url))):
        assert (reply.status, reply.reason) == (410, "gone")
    for method in ("PUT", "DELETE"):
        assert client(method, f"{UPLOAD}?uploadType=resumable&upload_id=never", b"").status == 404
    finished = client.session("y")
    client.put(finished, b"y")
    assert client("DELETE", finished.removeprefix(gcs.url)).status == 410
    assert gcs.objects("bkt") == {"y": b"y"}


def test_a_session_s_address_is_the_one_the_client_used(client: Client) -> None:
    """So that a proxy in between stays in between."""
    begun = client.begin("x", {"Host": "proxy.example:8080", "X-Forwarded-Proto": "https"})
    assert begun.headers["Location"].startswith("https://proxy.example:8080/upload/storage/v1/b/bkt/o?")


# -- limits and permissions ------------------------------------------------------------------------------------


def test_an_object_is_written_once_in_a_while() -> None:
    """429 to whoever is too early; neither refused writes nor other objects count."""
    clock = [100.0]
    with FakeGCS(write_spacing_s=1.0, now=lambda: clock[0]) as gcs:
        gcs.create_bucket("bkt")
        client = Client(gcs)
        assert client.media("x", b"1").status == client.media("y").status == 200
        clock[0] += 0.9
        for kind in KINDS:
            early = insert(client, kind)("x", b"2")
            assert (early.status, early.reason) == (429, "rateLimitExceeded")
            assert early.json["error"]["errors"][0]["domain"] == "usageLimits"
        assert client.media("x", ifGenerationMatch="0").status == 412
        assert gcs.objects("bkt")["x"] == b"1"
        clock[0] += 0.1
        assert client.media("x", b"2").status == 200
        assert client.media("x", b"3").status == 429
        assert client.delete("x").status == 204
        assert client.media("x", b"3").status == 429

        # The early resumable uploads above wait to be ended.
        assert gcs.uploads() == ["x"]
        session = client.session("x")
        assert client.put(session, BODY).status == 429
        assert client.ask(session, len(BODY)).status == 429
        clock[0] += 1
        assert client.ask(session, len(BODY)).status == 200
        assert gcs.objects("bkt")["x"] == BODY


def test_only_the_right_token_is_accepted() -> None:
    """401 to others; a session's URI is a credential of its own."""
    with FakeGCS(required_token="right") as gcs:
        gcs.create_bucket("bkt")
        client = Client(gcs)
        right, wrong = ({"Authorization": f"Bearer {token}"} for token in ("right", "wrong"))
        refused = client.media("x", headers=wrong)
        assert (refused.status, refused.reason) == (401, "authError")
        assert client.media("x").reason == "required"
        assert client.begin("x").status == client.list().status == client.read("x").status == 401
        assert gcs.objects("bkt") == {}
        assert client.media("x", headers=right).status == 200
        session = client.begin("y", right).headers["Location"]
        assert client.put(session, b"y", wrong).status == 401
        assert client.put(session, b"y").status == 200


@pytest.mark.parametrize(
    ("permission", "asked"),
    [
        ("storage.buckets.get", lambda client: client("GET", "/storage/v1/b/bkt")),
        ("storage.objects.list", lambda client: client.list()),
        ("storage.objects.get", lambda client: client.look("x")),
        ("storage.objects.get", lambda client: client.read("x")),
        ("storage.objects.create", lambda client: client.media("new")),
        ("storage.objects.create", lambda client: client.multipart("new")),
        ("storage.objects.create", lambda client: client.begin("new")),
        ("storage.objects.delete", lambda client: client.delete("x")),
        # "Required for uploads that overwrite an existing object."
        ("storage.objects.delete", lambda client: client.media("x")),
        ("storage.objects.delete", lambda client: client.begin("x")),
        ("storage.objects.update", lambda client: client("PATCH", f"{OBJECTS}/x", b"{}")),
        ("storage.objects.create", lambda client: client("POST", f"{OBJECTS}/x/copyTo/b/bkt/o/y", b"")),
    ],
)
def test_a_denied_permission(client: Client, gcs: FakeGCS, permission: str, asked: Callable[[Client], Reply]) -> None:
    """403 names it; given back, the same request is carried out."""
    client.media("x", b"old")
    gcs.denied.add(permission)
    refused = asked(client)
    assert (refused.status, refused.reason) == (403, "forbidden")
    assert f"does not have {permission} access" in refused.json["error"]["message"]
    assert gcs.objects("bkt") == {"x": b"old"}
    gcs.denied.clear()
    assert asked(client).status in {200, 204}


def test_creating_needs_no_right_to_delete(client: Client, gcs: FakeGCS) -> None:
    """A role that may only add can add."""
    gcs.denied = {"storage.objects.delete"}
    assert [insert(client, kind)(kind).status for kind in KINDS] == [200] * 3
    # Somebody else's object came in between.
    session = client.session("x")
    client.media("x")
    assert client.put(session, BODY).status == 403


# -- copies and patches ----------------------------------------------------------------------------------------


def test_a_copy_has_conditions_at_both_ends(client: Client, gcs: FakeGCS) -> None:
    """And is written like any other object."""
    source = client.multipart_with({"name": "a/x", "metadata": {"k": "v"}}, BODY).generation

    def copy(verb: str = "rewriteTo", **query: str) -> Reply:
        return client("POST", f"{OBJECTS}/a%2Fx/{verb}/b/bkt/o/b%2Fy", b"", **query)

    done = copy(ifGenerationMatch="0", ifSourceGenerationMatch=str(source))
    assert (done.status, done.json["done"], done.json["resource"]["metadata"]) == (200, True, {"k": "v"})
    assert gcs.requests[-1] == Seen("POST", "copy", "b/y", 200)
    assert copy(ifGenerationMatch="0").status == copy(ifSourceGenerationMatch="1").status == 412
    assert copy(sourceGeneration="1").status == 404
    assert copy("copyTo").json["name"] == "b/y"
    assert gcs.objects("bkt") == {"a/x": BODY, "b/y": BODY}


def test_a_patch_makes_a_new_metageneration(client: Client) -> None:
    """Not a new generation; null takes a field away."""
    client.multipart_with({"name": "x", "contentType": "t/u", "metadata": {"a": "1", "b": "2"}}, BODY)
    older = client.look("x").json

    def patch(changes: object, **query: str) -> Reply:
        return client("PATCH", f"{OBJECTS}/x", json.dumps(changes).encode(), **query)

    newer = patch({"contentType": None, "metadata": {"a": None, "c": "3"}}, ifMetagenerationMatch="1").json
    assert (newer["generation"], newer["metageneration"]) == (older["generation"], "2")
    assert newer["metadata"] == {"b": "2", "c": "3"}
    assert "contentType" not in newer
    assert newer["updated"] >= older["updated"]
    assert newer["etag"] != older["etag"]
    assert client.look("x").json == newer
    assert patch({}, ifMetagenerationMatch="1").status == 412
    assert patch([]).status == 400
    assert client.media("x", ifMetagenerationMatch="2").json["metageneration"] == "1"


# -- the server itself -----------------------------------------------------------------------------------------


def test_every_request_is_seen(client: Client, gcs: FakeGCS) -> None:
    """Once, before its answer, with what it asked for."""
    client.media("x")
    client.multipart("x", ifGenerationMatch="0")
    session = client.session("y")
    client.ask(session)
    client("DELETE", session.removeprefix(gcs.url))
    client.look("x")
    client.read("z")
    client.list(prefix="p/")
    client.delete("x")
    client("GET", "/storage/v1/b/bkt")
    assert gcs.requests == [
        Seen("POST", "insert", "x", 200),
        Seen("POST", "insert", "x", 412),
        Seen("POST", "resumable-start", "y", 200),
        Seen("PUT", "resumable-query", "y", 308),
        Seen("DELETE", "resumable-cancel", "y", 499),
        Seen("GET", "get", "x", 200),
        Seen("GET", "media", "z", 404),
        Seen("GET", "list", "p/", 200),
        Seen("DELETE", "delete", "x", 204),
        Seen("GET", "bucket-get", "", 200),
    ]


def test_it_is_gone_when_it_is_left() -> None:
    """Its thread and its port are; what was stored can be looked at."""
    before = set(threading.enumerate())
    with FakeGCS() as gcs:
        gcs.create_bucket("bkt")
        Client(gcs).media("x", b"stored")
        place = urlsplit(gcs.url)
    assert set(threading.enumerate()) <= before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((place.hostname, place.port), timeout=60)
    assert gcs.objects("bkt") == {"x": b"stored"}
    with pytest.raises(RuntimeError, match="once"), gcs:
        pass


@pytest.mark.parametrize("turns", range(6))
def test_it_closes_every_connection(turns: int) -> None:
    """However far a connection was when it had to stop: not accepted yet, just now, or known for long."""
    opened: list[socket.socket] = []
    with FakeGCS() as gcs, contextlib.ExitStack() as stack:
        loop, stop = gcs._loop, gcs._stop
        assert loop is not None
        assert stop is not None
        place = (urlsplit(gcs.url).hostname, urlsplit(gcs.url).port)

        def connect() -> None:
            opened.extend(stack.enter_context(socket.create_connection(place, timeout=60)) for _ in range(3))
            stop_in(turns)

        def stop_in(turns: int) -> None:
            if turns:
                loop.call_soon(stop_in, turns - 1)
            else:
                stop.set()

        # In the loop's own thread, so that it does nothing else meanwhile.
        loop.call_soon_threadsafe(connect)
        assert gcs._thread is not None
        gcs._thread.join()
        left = stack.pop_all()
    with left:
        for connection in opened:
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""


def test_it_does_not_wait_for_a_request_that_never_ends() -> None:
    """Its client is at fault, and must not hold up the suite."""
    with FakeGCS() as gcs:
        gcs.create_bucket("bkt")
        place = urlsplit(gcs.url)
        connection = socket.create_connection((place.hostname, place.port), timeout=60)
        connection.sendall(f"POST {UPLOAD} HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nhalf".encode())
    with connection, contextlib.suppress(ConnectionResetError):
        while connection.recv(KIB):
            pass
    assert gcs.objects("bkt") == {}


def test_it_has_no_url_before_it_runs() -> None:
    """An early ``url`` is a mistake of the test, and is told so."""
    with pytest.raises(RuntimeError, match="before it is entered"):
        _ = FakeGCS().url


def test_large_objects_pass(client: Client, gcs: FakeGCS) -> None:
    """Far more than the usual limit of a web server."""
    body = os.urandom(64 * KIB * KIB)
    assert client.media("x", body).json["md5Hash"] == b64_md5(body)
    assert client.read("x").body == body
    assert client.read("x", {"Range": f"bytes=5-{len(body) - 5}"}).body == body[5:-4]


def test_a_client_may_leave_early(caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of an answer: nobody is told."""
    with FakeGCS() as gcs:
        gcs.create_bucket("bkt")
        client = Client(gcs)
        client.media("x", bytes(32 * KIB * KIB))
        place = urlsplit(gcs.url)
        with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
            connection.sendall(f"GET {OBJECTS}/x?alt=media HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            assert connection.recv(4) == b"HTTP"
        assert client.look("x").status == 200
    assert caplog.records == []


#: In a process of its own, since gcsfs reads the environment when it is first imported.
GCSFS = """
import os, sys
import gcsfs

fs = gcsfs.GCSFileSystem(endpoint_url=sys.argv[1], token="anon", skip_instance_cache=True, use_listings_cache=False)
bodies = {"bkt/a/small + 100%.bin": b"ends in CR\\r", "bkt/a/b/empty": b"", "bkt/a/large": os.urandom(6 * 2**20 + 7)}
for path, body in bodies.items():
    fs.pipe_file(path, body)
with fs.open("bkt/a/streamed", "wb", block_size=2**18) as file:
    file.write(bodies["bkt/a/large"][: 5 * 2**20 + 2**18])
bodies["bkt/a/streamed"] = bodies["bkt/a/large"][: 5 * 2**20 + 2**18]
for path, body in bodies.items():
    assert fs.cat_file(path) == body, path
    assert fs.info(path)["size"] == len(body), path
assert fs.cat_file("bkt/a/large", start=10, end=20) == bodies["bkt/a/large"][10:20]
assert sorted(fs.find("bkt")) == sorted(bodies)
assert sorted(fs.ls("bkt/a", detail=False)) == ["bkt/a/b", "bkt/a/large", "bkt/a/small + 100%.bin", "bkt/a/streamed"]
try:
    fs.pipe_file("bkt/a/large", b"", mode="create")
except FileExistsError:
    pass
else:
    raise AssertionError("created twice")
fs.cp_file("bkt/a/large", "bkt/copy")
assert fs.cat_file("bkt/copy") == bodies["bkt/a/large"]
fs.rm(["bkt/a/large", "bkt/copy"])
fs.rm("bkt/a/b", recursive=True)
assert not fs.exists("bkt/a/large") and not fs.exists("bkt/a/b/empty")
print("done")
"""


def test_gcsfs_is_served(gcs: FakeGCS) -> None:
    """Small and large objects, in one request and in chunks, written, listed, read and deleted."""
    environment = {**os.environ, **gcs.environment(), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", GCSFS, gcs.storage_options()["endpoint_url"]]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert list(gcs.objects("bkt")) == ["a/small + 100%.bin", "a/streamed"]
    assert len(gcs.objects("bkt")["a/streamed"]) == 5 * KIB * KIB + STEP
    assert gcs.uploads() == []
    assert "unknown" not in {seen.operation for seen in gcs.requests}
