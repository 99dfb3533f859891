"""FakeGCS's XML API, spoken to in plain HTTP: uploads in parts, and everything that is refused.

(Past 350 lines: every rule of the XML API that the fake keeps is one list.)
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit
from xml.etree import ElementTree as ET

import crc32c
import pytest

from cloudckpt.testing.fake_gcs import FakeGCS, Seen

MIB = 1024 * 1024
FIRST = bytes(range(256)) * 4 * 1024 * 5  # the least a part may have that is not the last
SECOND = b"the rest"
NAMESPACE = "{http://s3.amazonaws.com/doc/2006-03-01/}"


def hash_of(body: bytes) -> dict[str, str]:
    """The header that announces a body's sum."""
    return {"x-goog-hash": f"crc32c={b64(crc32c.crc32c(body).to_bytes(4, 'big'))}"}


def b64(value: bytes) -> str:
    """As Google writes it."""
    return base64.b64encode(value).decode()


@dataclass(frozen=True)
class Reply:
    """An answer, read to its end."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def text(self, name: str) -> str:
        """The text of an element at the top of a document."""
        return ET.fromstring(self.body).findtext(NAMESPACE + name) or ""

    @property
    def code(self) -> str:
        """What the error is called."""
        assert self.headers["Content-Type"] == "application/xml; charset=UTF-8"
        root = ET.fromstring(self.body)
        assert root.tag == "Error"
        assert root.findtext("Message")
        return root.findtext("Code") or ""


@dataclass(frozen=True)
class Client:
    """Sends what it is told to, without any help or repetition."""

    gcs: FakeGCS
    bucket: str = "bkt"

    def __call__(
        self, method: str, name: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, **query: str
    ) -> Reply:
        subresource = query.pop("sub", "")
        asked = "&".join(filter(None, [subresource, urlencode({k.replace("_", "-"): v for k, v in query.items()})]))
        target = f"/{self.bucket}" + (f"/{quote(name)}" if name else "") + (f"?{asked}" if asked else "")
        return self.raw(method, target, body, headers)

    def raw(
        self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> Reply:
        with contextlib.closing(http.client.HTTPConnection(urlsplit(self.gcs.url).netloc, timeout=60)) as connection:
            connection.request(method, target, body, dict(headers or {}))
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read())

    def begin(self, name: str = "name", headers: Mapping[str, str] | None = None) -> str:
        begun = self("POST", name, b"", headers, sub="uploads")
        assert begun.status == 200, begun
        assert (begun.text("Bucket"), begun.text("Key")) == (self.bucket, name)
        return begun.text("UploadId")

    def part(
        self, upload: str, number: int | str, body: bytes, headers: Mapping[str, str] | None = None, name: str = "name"
    ) -> Reply:
        said = hash_of(body) if headers is None else headers
        return self("PUT", name, body, said, sub=f"partNumber={number}&uploadId={upload}")

    def complete(
        self, upload: str, *parts: tuple[int, str], headers: Mapping[str, str] | None = None, name: str = "name"
    ) -> Reply:
        return self("POST", name, completion(*parts), headers, sub=f"uploadId={upload}")

    def abort(self, upload: str, name: str = "name") -> Reply:
        return self("DELETE", name, None, None, sub=f"uploadId={upload}")

    def uploads(self, **query: str) -> Reply:
        return self("GET", "", None, None, sub="uploads", **query)

    def listed(self, **query: str) -> list[tuple[str, str]]:
        """Names and ids of a listing."""
        found = self.uploads(**query)
        assert found.status == 200, found
        rows = ET.fromstring(found.body).findall(f"{NAMESPACE}Upload")
        return [(row.findtext(f"{NAMESPACE}Key") or "", row.findtext(f"{NAMESPACE}UploadId") or "") for row in rows]

    def metadata(self, name: str) -> Any:
        return json.loads(self.raw("GET", f"/storage/v1/b/{self.bucket}/o/{quote(name, safe='')}").body)


def completion(*parts: tuple[int, str]) -> bytes:
    """The document that ends an upload."""
    rows = "".join(f"<Part><PartNumber>{n}</PartNumber><ETag>{etag}</ETag></Part>" for n, etag in parts)
    return f"<CompleteMultipartUpload>{rows}</CompleteMultipartUpload>".encode()


@pytest.fixture
def client(gcs: FakeGCS) -> Client:
    """The way to it."""
    return Client(gcs)


# -- whole objects ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "a folder/b c.bin", "50%/41", "a%2Fb", "größe/模型", "..a//b/", "o/b?c"])
def test_a_whole_object_goes_there_and_back(client: Client, gcs: FakeGCS, name: str) -> None:
    """Whatever its name; the answer has its sums, and the JSON API knows it too."""
    put = client("PUT", name, SECOND, {**hash_of(SECOND), "Content-MD5": b64(hashlib.md5(SECOND).digest())})
    assert put.status == 200
    assert hash_of(SECOND)["x-goog-hash"] in put.headers["x-goog-hash"]
    assert gcs.objects("bkt") == {name: SECOND}
    got = client("GET", name)
    assert (got.status, got.body, got.headers["x-goog-hash"]) == (200, SECOND, put.headers["x-goog-hash"])
    assert got.headers["x-goog-generation"] == put.headers["x-goog-generation"] == client.metadata(name)["generation"]
    assert got.headers["ETag"] == put.headers["ETag"] == f'"{hashlib.md5(SECOND).hexdigest()}"'
    assert gcs.requests[:2] == [Seen("PUT", "xml-put", name, 200), Seen("GET", "xml-get", name, 200)]


def test_slashes_of_a_key_may_be_escaped_or_not(client: Client, gcs: FakeGCS) -> None:
    """Both name the same object."""
    assert client.raw("PUT", "/bkt/a%2Fb%2Fc", SECOND).status == 200
    assert client.raw("GET", "/bkt/a/b/c").body == SECOND
    assert list(gcs.objects("bkt")) == ["a/b/c"]


@pytest.mark.parametrize(
    ("asked", "status", "body", "told"),
    [
        ("bytes=0-2", 206, b"the", "bytes 0-2/8"),
        ("bytes=4-100", 206, b"rest", "bytes 4-7/8"),
        ("bytes=-4", 206, b"rest", "bytes 4-7/8"),
        ("bytes=8-9", 416, None, "bytes */8"),
        ("items=1-2", 200, b"the rest", None),
    ],
)
def test_a_range(client: Client, asked: str, status: int, body: bytes | None, told: str | None) -> None:
    """As RFC 9110 has it, and the answer names the size of the whole."""
    client("PUT", "name", SECOND)
    got = client("GET", "name", None, {"Range": asked})
    assert (got.status, got.headers["Content-Range"]) == (status, told)
    if body is None:
        assert got.code == "InvalidRange"
    else:
        assert got.body == body


def test_what_is_not_there(client: Client) -> None:
    """An object, a bucket and an upload have names of their own when they are missing."""
    nobody = Client(client.gcs, "nobody")
    assert (client("GET", "name").status, client("GET", "name").code) == (404, "NoSuchKey")
    for reply in (
        nobody("GET", "x"),
        nobody("PUT", "x", b""),
        nobody("POST", "x", b"", sub="uploads"),
        nobody.uploads(),
    ):
        assert (reply.status, reply.code) == (404, "NoSuchBucket")
    for reply in (client.part("no", 1, b""), client.complete("no", (1, "x")), client.abort("no")):
        assert (reply.status, reply.code) == (404, "NoSuchUpload")


# -- uploads in parts ------------------------------------------------------------------------------------------


def test_parts_become_an_object(client: Client, gcs: FakeGCS) -> None:
    """In the order of their numbers, whatever the order they came in; it has a CRC-32C, and no MD5."""
    upload = client.begin("a/b", {"Content-Type": "t/u"})
    second = client.part(upload, 7, SECOND, name="a/b")
    first = client.part(upload, 2, FIRST, name="a/b")
    assert first.headers["ETag"] == f'"{hashlib.md5(FIRST).hexdigest()}"'
    assert hash_of(FIRST)["x-goog-hash"] in first.headers["x-goog-hash"]
    assert gcs.objects("bkt") == {}
    assert gcs.uploads() == ["a/b"]

    done = client.complete(upload, (2, first.headers["ETag"]), (7, second.headers["ETag"]), name="a/b")

    assert done.status == 200
    assert (done.text("Bucket"), done.text("Key")) == ("bkt", "a/b")
    assert done.headers["x-goog-hash"] == hash_of(FIRST + SECOND)["x-goog-hash"]
    assert gcs.objects("bkt") == {"a/b": FIRST + SECOND}
    assert gcs.uploads() == []
    found = client.metadata("a/b")
    assert (found["size"], found["contentType"]) == (str(len(FIRST + SECOND)), "t/u")
    assert f"crc32c={found['crc32c']}" == done.headers["x-goog-hash"]
    assert "md5Hash" not in found
    assert done.headers["x-goog-generation"] == found["generation"]
    assert [seen.operation for seen in gcs.requests[:4]] == [
        "xml-upload-start",
        "xml-upload-part",
        "xml-upload-part",
        "xml-upload-complete",
    ]


def test_a_part_that_comes_again_replaces_the_first(client: Client, gcs: FakeGCS) -> None:
    """As after a lost answer; the older ETag is no longer good."""
    upload = client.begin()
    older = client.part(upload, 1, b"older").headers["ETag"]
    newer = client.part(upload, 1, b"newer").headers["ETag"]
    refused = client.complete(upload, (1, older))
    assert (refused.status, refused.code) == (400, "InvalidPart")
    assert client.complete(upload, (1, newer)).status == 200
    assert gcs.objects("bkt") == {"name": b"newer"}


def test_parts_that_are_not_named_are_dropped(client: Client, gcs: FakeGCS) -> None:
    """With the upload itself: a second completion finds none."""
    upload = client.begin()
    etags = [client.part(upload, n, FIRST).headers["ETag"] for n in (1, 2, 3)]
    assert client.complete(upload, (1, etags[0]), (3, etags[2])).status == 200
    assert len(gcs.objects("bkt")["name"]) == 2 * len(FIRST)
    again = client.complete(upload, (1, etags[0]), (3, etags[2]))
    assert (again.status, again.code) == (404, "NoSuchUpload")
    assert client.part(upload, 4, b"").status == client.abort(upload).status == 404


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ([(1, "etag"), (2, "etag"), (2, "etag")], "InvalidPartOrder"),
        ([(2, "etag"), (1, "etag")], "InvalidPartOrder"),
        ([(1, "etag"), (3, "etag")], "InvalidPart"),
        ([(1, '"0123"')], "InvalidPart"),
        ([(2, "etag"), (4, "etag")], "EntityTooSmall"),
        ([], "MalformedXML"),
    ],
)
def test_a_completion_that_does_not_fit(client: Client, gcs: FakeGCS, parts: list[tuple[int, str]], code: str) -> None:
    """400 each time, nothing is visible, and the upload goes on."""
    upload = client.begin()
    etags = {n: client.part(upload, n, body).headers["ETag"] for n, body in ((1, FIRST), (2, SECOND), (4, SECOND))}
    refused = client.complete(upload, *((n, etags.get(n, "x") if etag == "etag" else etag) for n, etag in parts))
    assert (refused.status, refused.code) == (400, code)
    assert gcs.objects("bkt") == {}
    assert client.complete(upload, (1, etags[1]), (2, etags[2])).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<Complete",
        b"<Other/>",
        b"<CompleteMultipartUpload><Part><PartNumber>1</PartNumber></Part></CompleteMultipartUpload>",
        b"<CompleteMultipartUpload><Part><PartNumber>x</PartNumber><ETag>y</ETag></Part></CompleteMultipartUpload>",
        b"<CompleteMultipartUpload><Etag>y</Etag></CompleteMultipartUpload>",
    ],
)
def test_a_completion_that_is_no_document(client: Client, body: bytes) -> None:
    """400."""
    upload = client.begin()
    refused = client("POST", "name", body, sub=f"uploadId={upload}")
    assert (refused.status, refused.code) == (400, "MalformedXML")


@pytest.mark.parametrize("number", ["0", "10001", "-1", "x", ""])
def test_part_numbers_that_cannot_be(client: Client, number: str) -> None:
    """From 1 to 10,000 and nothing else."""
    upload = client.begin()
    refused = client.part(upload, number, b"x")
    assert (refused.status, refused.code) == (400, "InvalidArgument")
    assert client.part(upload, "10000", b"x").status == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        (hash_of(b"other"), "BadDigest"),
        ({"x-goog-hash": "md5=" + b64(hashlib.md5(b"other").digest())}, "BadDigest"),
        ({"Content-MD5": b64(hashlib.md5(b"other").digest())}, "BadDigest"),
        ({"x-goog-hash": "crc32c=nonsense"}, "InvalidDigest"),
        ({"x-goog-hash": "crc32c=AAAA"}, "InvalidDigest"),
        ({"x-goog-hash": "sha1=AAAA"}, "InvalidDigest"),
    ],
)
def test_a_body_that_is_not_what_its_sum_says(client: Client, gcs: FakeGCS, headers: dict[str, str], code: str) -> None:
    """Nothing of it is kept: neither an object, nor a part, nor a completion, whose sum is that of its document."""
    upload = client.begin()
    etag = client.part(upload, 1, SECOND).headers["ETag"]
    replies = (
        client("PUT", "whole", SECOND, headers),
        client.part(upload, 1, b"damaged", headers),
        client.complete(upload, (1, etag), headers=headers),
    )
    for refused in replies:
        assert (refused.status, refused.code) == (400, code)
    assert gcs.objects("bkt") == {}
    assert client.complete(upload, (1, etag), headers=hash_of(SECOND)).code == "BadDigest"
    assert client.complete(upload, (1, etag), headers=hash_of(completion((1, etag)))).status == 200
    assert gcs.objects("bkt") == {"name": SECOND}


def test_a_part_that_broke_off_is_not_kept(client: Client, gcs: FakeGCS) -> None:
    """Half a body is no part, and no object."""
    upload = client.begin()
    for target in ("/bkt/whole", f"/bkt/name?partNumber=1&uploadId={upload}"):
        with socket.create_connection(("127.0.0.1", urlsplit(gcs.url).port or 0)) as line:
            line.sendall(f"PUT {target} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf".encode())
            line.shutdown(socket.SHUT_WR)
            line.recv(65536)
    assert gcs.objects("bkt") == {}
    assert client.complete(upload, (1, "x")).code == "InvalidPart"


def test_an_upload_belongs_to_its_name(client: Client, gcs: FakeGCS) -> None:
    """With another one, or in another bucket, its id is unknown."""
    gcs.create_bucket("other")
    upload = client.begin()
    assert client.part(upload, 1, b"x", name="another").code == "NoSuchUpload"
    assert Client(gcs, "other").part(upload, 1, b"x").code == "NoSuchUpload"
    assert client.abort(upload, "another").code == "NoSuchUpload"
    assert client.abort(upload).status == 204
    assert gcs.uploads() == []


@pytest.mark.parametrize("name", [".", "..", "a\nb", "ä" * 513, ".well-known/acme-challenge/x"])
def test_names_that_google_refuses(client: Client, gcs: FakeGCS, name: str) -> None:
    """400 for an object and for an upload."""
    assert client("PUT", name, b"x").status == client("POST", name, b"", sub="uploads").status == 400
    assert gcs.objects("bkt") == {}
    assert gcs.uploads() == []


# -- listings --------------------------------------------------------------------------------------------------


def test_unfinished_uploads_are_listed(client: Client) -> None:
    """By name, below a prefix, with the id that ends them; several of one name are several."""
    ids = {name: client.begin(name) for name in ("b/2", "a/1", "b/1")}
    second = client.begin("b/1")
    assert [name for name, _ in client.listed()] == ["a/1", "b/1", "b/1", "b/2"]
    assert client.listed(prefix="b/") == [
        *sorted([("b/1", ids["b/1"]), ("b/1", second)]),
        ("b/2", ids["b/2"]),
    ]
    assert client.listed(prefix="c") == []
    client.abort(ids["a/1"], "a/1")
    assert client.listed(prefix="a") == []


def test_a_listing_comes_in_pages(client: Client) -> None:
    """Each names where the next begins, inside one name's uploads too."""
    every = sorted((name, client.begin(name)) for name in ("a", "b", "b", "b", "c"))
    found: list[tuple[str, str]] = []
    markers: dict[str, str] = {}
    for _ in range(10):
        page = client.uploads(max_uploads="2", **markers)
        found += client.listed(max_uploads="2", **markers)
        if page.text("IsTruncated") == "false":
            break
        markers = {"key_marker": page.text("NextKeyMarker"), "upload_id_marker": page.text("NextUploadIdMarker")}
    assert found == every
    # Without the key's marker, the id's is ignored; without the id's, the whole name is stepped over.
    assert client.listed(upload_id_marker=every[2][1]) == every
    assert [name for name, _ in client.listed(key_marker="b")] == ["c"]


def test_names_that_xml_cannot_hold_are_asked_for_encoded(client: Client) -> None:
    """``encoding-type=url``."""
    client.begin("größe & <b>/50%")
    page = client.uploads(encoding_type="url", prefix="größe")
    assert page.text("EncodingType") == "url"
    assert client.listed(encoding_type="url")[0][0] == quote("größe & <b>/50%")
    assert client.listed()[0][0] == "größe & <b>/50%"


@pytest.mark.parametrize("query", [{"max_uploads": "0"}, {"max_uploads": "x"}, {"encoding_type": "base64"}])
def test_listings_that_cannot_be(client: Client, query: dict[str, str]) -> None:
    """400."""
    assert client.uploads(**query).code == "InvalidArgument"


# -- who asks, and how -----------------------------------------------------------------------------------------


def test_only_the_right_token_is_accepted() -> None:
    """401 to others, at every step: here no id stands for a token."""
    with FakeGCS(required_token="right") as gcs:
        gcs.create_bucket("bkt")
        client = Client(gcs)
        right, wrong = ({"Authorization": f"Bearer {token}"} for token in ("right", "wrong"))
        upload = client.begin(headers=right)
        for headers in (wrong, {}):
            for reply in (
                client("POST", "name", b"", headers, sub="uploads"),
                client.part(upload, 1, b"x", headers),
                client.complete(upload, (1, "x"), headers=headers),
                client("PUT", "x", b"", headers),
                client("GET", "x", None, headers),
            ):
                assert (reply.status, reply.code) == (401, "AuthenticationRequired")
        etag = client.part(upload, 1, b"x", right).headers["ETag"]
        assert client.complete(upload, (1, etag), headers=right).status == 200


@pytest.mark.parametrize(
    ("permission", "asked"),
    [
        ("storage.objects.get", lambda client, upload: client("GET", "there")),
        ("storage.objects.create", lambda client, upload: client("PUT", "new", b"")),
        ("storage.objects.delete", lambda client, upload: client("PUT", "there", b"")),
        ("storage.multipartUploads.create", lambda client, upload: client("POST", "new", b"", sub="uploads")),
        ("storage.objects.create", lambda client, upload: client("POST", "new", b"", sub="uploads")),
        ("storage.multipartUploads.create", lambda client, upload: client.part(upload, 1, b"", name="there")),
        ("storage.objects.create", lambda client, upload: client.part(upload, 1, b"", name="there")),
        ("storage.multipartUploads.abort", lambda client, upload: client.abort(upload, "there")),
        ("storage.multipartUploads.list", lambda client, upload: client.uploads()),
        ("storage.multipartUploads.create", lambda client, upload: complete_there(client, upload)),
        ("storage.objects.delete", lambda client, upload: complete_there(client, upload)),
    ],
)
def test_a_denied_permission(
    client: Client, gcs: FakeGCS, permission: str, asked: Callable[[Client, str], Reply]
) -> None:
    """403 names it ("IAM permissions for XML requests"); given back, the same request is carried out."""
    client("PUT", "there", b"x")
    upload = client.begin("there")
    client.part(upload, 1, b"y", name="there")
    gcs.denied.add(permission)
    refused = asked(client, upload)
    assert (refused.status, refused.code) == (403, "AccessDenied")
    assert f"does not have {permission} access".encode() in refused.body
    gcs.denied.clear()
    assert asked(client, upload).status in {200, 204}


def complete_there(client: Client, upload: str) -> Reply:
    """An upload over an object that is there."""
    return client.complete(upload, (1, hashlib.md5(b"y").hexdigest()), name="there")


def test_a_bucket_whose_requester_pays_wants_to_know_who(gcs: FakeGCS) -> None:
    """The project may stand in the header or in the query; without one, 400 in either API."""
    gcs.create_bucket("paid", requester_pays=True)
    client = Client(gcs, "paid")
    assert client("PUT", "x", b"").code == "UserProjectMissing"
    refused = client.raw("GET", "/storage/v1/b/paid/o")
    assert refused.status == 400
    assert "requester pays" in json.loads(refused.body)["error"]["message"]
    assert client("PUT", "x", b"", {"x-goog-user-project": "p"}).status == 200
    assert client("GET", "x", userProject="p").status == 200
    assert client.raw("GET", "/storage/v1/b/paid/o?userProject=p").status == 200


def test_a_key_of_the_customer_is_remembered(client: Client) -> None:
    """The name of the key, for a whole object and for an upload."""
    key = {"x-goog-encryption-kms-key-name": "projects/p/locations/l/keyRings/r/cryptoKeys/k"}
    assert client("PUT", "whole", b"x", key).status == 200
    upload = client.begin("parts", key)
    etag = client.part(upload, 1, b"x", name="parts").headers["ETag"]
    client.complete(upload, (1, etag), name="parts")
    for name in ("whole", "parts"):
        assert client.metadata(name)["kmsKeyName"] == key["x-goog-encryption-kms-key-name"]


@pytest.mark.parametrize(
    "asked",
    [
        lambda client: client("PUT", "x", b"", {"x-goog-if-generation-match": "0"}),
        lambda client: client("PUT", "x", b"", {"x-amz-meta-a": "b"}),
        lambda client: client("PUT", "x", b"", {"If-None-Match": "*"}),
        lambda client: client("PUT", "x", b"", partNumber="1"),
        lambda client: client("GET", "x", acl=""),
        lambda client: client("HEAD", "x"),
        lambda client: client("DELETE", "x"),
        lambda client: client("GET", ""),
        lambda client: client("PUT", ""),
        lambda client: client("GET", "x", sub="uploadId=y"),
        lambda client: client("POST", "x", b"", {"x-goog-hash": "crc32c=AAAAAA=="}, sub="uploads"),
        lambda client: client("POST", "x", b"", sub="uploads&uploadId=y"),
        lambda client: client.uploads(delimiter="/"),
    ],
)
def test_what_it_does_not_know_it_refuses(client: Client, gcs: FakeGCS, asked: Callable[[Client], Reply]) -> None:
    """A header, a parameter or a verb that is ignored would be worse."""
    refused = asked(client)
    assert refused.status == 400
    assert gcs.objects("bkt") == {}
    assert gcs.uploads() == []


def test_a_beginning_has_no_body(client: Client, gcs: FakeGCS) -> None:
    """400."""
    assert client("POST", "x", b"body", sub="uploads").code == "InvalidArgument"
    assert gcs.uploads() == []


def test_a_body_without_a_length_is_refused(gcs: FakeGCS) -> None:
    """411: the documentation asks for a Content-Length."""
    with contextlib.closing(http.client.HTTPConnection(urlsplit(gcs.url).netloc, timeout=60)) as connection:
        connection.request("PUT", "/bkt/x", iter([b"a"]), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, b"MissingContentLength" in answer.read()) == (411, True)
    assert gcs.objects("bkt") == {}
