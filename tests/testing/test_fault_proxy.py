"""The proxy does to a request what it was told, and to the others nothing."""

from __future__ import annotations

import http.client
import http.server
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from cloudckpt.testing import FaultProxy
from cloudckpt.testing.servers import MotoServer, SeaweedFS


class _Objects(http.server.BaseHTTPRequestHandler):
    """Keeps what is PUT, and gives it back."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}

    def _answer(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body or b"")

    def do_GET(self) -> None:
        self._answer(self.objects.get(self.path.partition("?")[0]))

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def do_PUT(self) -> None:
        self.objects[self.path.partition("?")[0]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def proxy() -> Iterator[FaultProxy]:
    """A proxy before a small server, with one object behind it."""
    _Objects.objects = {"/proxied/object": b"0123456789"}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Objects) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with FaultProxy(f"http://127.0.0.1:{server.server_port}") as found:
            yield found
        server.shutdown()
        thread.join(10)


def ask(proxy: FaultProxy, method: str = "GET", path: str = "/proxied/object", body: bytes | None = None) -> Any:
    """One request on a connection of its own: status, headers, body."""
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path, body=body)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read()
    finally:
        connection.close()


def test_without_a_fault_it_changes_nothing(proxy: FaultProxy) -> None:
    """GET, HEAD and PUT go through; each is recorded with its answer."""
    assert ask(proxy)[::2] == (200, b"0123456789")
    status, headers, body = ask(proxy, "HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", "10")
    assert ask(proxy, "PUT", "/proxied/a%20b%2Bc?x=%25", b"body")[0] == 200
    assert [(r.method, r.path, r.query, r.status, r.fault) for r in proxy.requests] == [
        ("GET", "/proxied/object", "", 200, None),
        ("HEAD", "/proxied/object", "", 200, None),
        ("PUT", "/proxied/a%20b%2Bc", "x=%25", 200, None),
    ]
    proxy.clear()
    assert proxy.requests == []


@pytest.mark.parametrize("action", ["drop_before", "drop_after"])
def test_a_dropped_connection(proxy: FaultProxy, action: Any) -> None:
    """The client gets no answer; the server got the request, or not."""
    proxy.inject(action, method="PUT")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        ask(proxy, "PUT", f"/proxied/{action}", b"body")
    assert (f"/proxied/{action}" in _Objects.objects) == (action == "drop_after")
    assert proxy.requests[0].status is None


@pytest.mark.parametrize(
    ("status", "code"),
    [(403, b"AccessDenied"), (409, b"Conflict"), (429, b"TooMany"), (500, b"Internal"), (503, b"SlowDown")],
)
def test_an_answer_of_its_own(proxy: FaultProxy, status: int, code: bytes) -> None:
    """The status comes with the error that S3 would send, and the server is not asked."""
    proxy.inject("status", status=status)
    found, _, body = ask(proxy)
    assert found == status
    assert code in body
    assert ask(proxy)[0] == 200


def test_googles_errors_are_json(proxy: FaultProxy) -> None:
    """On a path of Google's API the error has Google's shape."""
    proxy.inject("status", status=429)
    assert b'"code": 429' in ask(proxy, path="/storage/v1/b/x/o")[2]


def test_a_truncated_and_a_flipped_body(proxy: FaultProxy) -> None:
    """Half of the body under the full length; one bit of it turned, either way."""
    proxy.inject("truncate")
    with pytest.raises(http.client.IncompleteRead) as cut:
        ask(proxy)
    assert cut.value.partial == b"01234"
    proxy.inject("flip")
    body = ask(proxy)[2]
    assert len(body) == 10
    assert sum((a ^ b).bit_count() for a, b in zip(body, b"0123456789", strict=True)) == 1
    proxy.inject("flip_request", method="PUT")
    ask(proxy, "PUT", "/proxied/flipped", b"\0\0\0")
    assert ask(proxy, path="/proxied/flipped")[2] == b"\0\1\0"


@pytest.mark.parametrize("action", ["hold_after", "hang"])
def test_what_is_held_goes_on_when_it_is_released(proxy: FaultProxy, action: Any) -> None:
    """A held answer comes when it is released; a hanging request ends without one."""
    held = proxy.inject(action)
    ended: list[Any] = []

    def work() -> None:
        try:
            ended.append(ask(proxy)[0])
        except (http.client.HTTPException, ConnectionError) as exc:
            ended.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    assert held.wait()
    assert ended == []
    held.release()
    thread.join(30)
    assert ended == [200] if action == "hold_after" else isinstance(ended[0], Exception)


def test_what_is_late_lands_though_the_client_has_gone(proxy: FaultProxy) -> None:
    """The server gets it when it is released, whole, after whatever has been sent since."""
    late = proxy.inject("late", method="PUT")
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=10)
    connection.request("PUT", "/proxied/late", body=b"first")
    assert late.wait()
    connection.close()
    assert ask(proxy, "PUT", "/proxied/late", b"second")[0] == 200
    assert _Objects.objects["/proxied/late"] == b"second"
    assert late.land()
    assert _Objects.objects["/proxied/late"] == b"first"


def test_which_requests_are_broken(proxy: FaultProxy) -> None:
    """Method, pattern, predicate, skip and times choose; a removed fault breaks nothing."""
    some = proxy.inject("status", method="GET", match="object$|object\\?$", skip=1, times=2)
    assert [ask(proxy)[0] for _ in range(5)] == [200, 503, 503, 200, 200]
    assert some.hits == 2
    every = proxy.inject("status", when=lambda request: request.query == "mine", times=None)
    assert ask(proxy, path="/proxied/object?mine")[0] == 503
    assert ask(proxy, path="/proxied/object")[0] == 200
    every.remove()
    assert ask(proxy, path="/proxied/object?mine")[0] == 200


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["moto", "seaweedfs"])
def test_signed_requests_of_every_kind_pass(kind: str, request: pytest.FixtureRequest) -> None:
    """A client's signature covers the host it spoke to; put, parts, ranges and bulk deletes pass a strict server."""
    server: MotoServer | SeaweedFS = request.getfixturevalue({"moto": "s3_server", "seaweedfs": "seaweedfs"}[kind])
    server.create_bucket("signed")
    with FaultProxy(server.url) as proxy:
        url, server.url = server.url, proxy.url
        try:
            client = server.client()
        finally:
            server.url = url
        client.put_object(Bucket="signed", Key="a b+c/ü", Body=b"1")
        upload = client.create_multipart_upload(Bucket="signed", Key="large")["UploadId"]
        part = client.upload_part(Bucket="signed", Key="large", UploadId=upload, PartNumber=1, Body=bytes(6 << 20))
        client.complete_multipart_upload(
            Bucket="signed",
            Key="large",
            UploadId=upload,
            MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]},
        )
        assert len(client.get_object(Bucket="signed", Key="large", Range="bytes=5-9")["Body"].read()) == 5
        gone = client.delete_objects(Bucket="signed", Delete={"Objects": [{"Key": "a b+c/ü"}, {"Key": "large"}]})
        assert len(gone["Deleted"]) == 2
        client.close()
        assert len(proxy.requests) == 6
