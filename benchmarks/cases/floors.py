"""The limits: what the machine needs to move the same bytes when nothing is done about them."""

from __future__ import annotations

import mmap
import os
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.cases.base import Case, Handle, Place, StallCase, case
from benchmarks.state import State, tensors, view

__all__ = ["Done", "copy_all", "joined", "split"]

_SMALL_BYTES = 64 << 10
_DIRECT_BYTES = 16 << 20


def joined(views: Sequence[memoryview]) -> list[memoryview]:
    """The same bytes with runs of small views joined: one write each, not one a bias vector."""
    found: list[memoryview] = []
    run: list[memoryview] = []
    for each in views:
        if len(each) < _SMALL_BYTES:
            run.append(each)
            continue
        if run:
            found.append(memoryview(b"".join(run)))
            run = []
        found.append(each)
    return [*found, memoryview(b"".join(run))] if run else found


def split(views: Sequence[memoryview], part_bytes: int) -> list[list[memoryview]]:
    """Parts of exactly ``part_bytes`` (the last one may be shorter), as lists of views; no copy."""
    parts: list[list[memoryview]] = [[]]
    room = part_bytes
    for each in views:
        at = 0
        while at < len(each):
            took = min(room, len(each) - at)
            parts[-1].append(each[at : at + took])
            at, room = at + took, room - took
            if not room:
                parts.append([])
                room = part_bytes
    return parts if parts[-1] else parts[:-1]


# -- memory ------------------------------------------------------------------------------------------------------


def copy_all(state: State, into: dict[str, torch.Tensor]) -> None:
    """One copy of every tensor into memory that is there already."""
    for name, tensor in tensors(state).items():
        into[name].copy_(tensor)


@case("save-local", "floor")
class memcpy(Case):  # noqa: N801 - named as the row is
    """A warm copy of every tensor."""

    def prepare(self, state: State) -> None:
        self._into = {name: torch.ones_like(tensor) for name, tensor in tensors(state).items()}

    def run(self, state: State, repetition: int) -> None:
        copy_all(state, self._into)


@case("save-local", "floor")
def memcpy_fresh(state: State, place: Place) -> None:
    """The same into new memory: page faults included."""
    for tensor in tensors(state).values():
        tensor.clone()


class Done:
    """A save that was over when it returned."""

    def done(self) -> bool:
        return True

    def result(self) -> None:
        return None


@case("stall-s3", "floor", name="memcpy")
@case("stall-local", "floor", name="memcpy")
class StallMemcpy(StallCase):
    """The least a correct save can block a trainer on CPU."""

    def prepare(self, state: State) -> None:
        self._into = {name: torch.ones_like(tensor) for name, tensor in tensors(state).items()}

    def save(self, state: State, repetition: int) -> Handle:
        copy_all(state, self._into)
        return Done()


# -- disk --------------------------------------------------------------------------------------------------------


def _write_all(state: State, path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for tensor in tensors(state).values():
            left = view(tensor)
            while left:
                left = left[file.write(left) :]


def _sync(path: Path) -> None:
    for each in (path, path.parent):
        descriptor = os.open(each, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _file_of(place: Place) -> Path:
    folder = Path(place.path)
    folder.mkdir()
    return folder / "file"


@case("save-local", "floor")
def write(state: State, place: Place) -> None:
    """Plain writes of the tensors' own bytes, into the page cache."""
    _write_all(state, _file_of(place))


@case("save-local", "floor")
def write_fsync(state: State, place: Place) -> None:
    """The same, then fsync() on file and folder."""
    path = _file_of(place)
    _write_all(state, path)
    _sync(path)


@case("save-local", "floor")
def write_o_direct(state: State, place: Place) -> None:
    """O_DIRECT from one aligned buffer of 16 MiB, then fsync: no page cache."""
    path = _file_of(place)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    buffer = mmap.mmap(-1, _DIRECT_BYTES)
    at = 0
    total = 0
    for part in split([view(tensor) for tensor in tensors(state).values()], _DIRECT_BYTES):
        filled = 0
        for each in part:
            buffer[filled : filled + len(each)] = each
            filled += len(each)
        at += os.pwrite(descriptor, buffer, at)  # the last block whole; cut to its size below
        total += filled
    os.ftruncate(descriptor, total)
    os.close(descriptor)
    _sync(path)


@case("load-local", "floor")
def read(state: State, place: Place) -> None:
    """readinto() of the tensors' own memory, from the page cache."""
    with open(f"{place.path}/raw", "rb", buffering=0) as file:  # noqa: PTH123 - unbuffered is the point
        for tensor in tensors(state).values():
            left = view(tensor)
            while left:
                left = left[file.readinto(left) :]


# -- network -----------------------------------------------------------------------------------------------------


def _host() -> str:
    return urllib.parse.urlsplit(os.environ["AWS_ENDPOINT_URL"]).netloc


def _connected() -> socket.socket:
    url = urllib.parse.urlsplit(os.environ["AWS_ENDPOINT_URL"])
    sock = socket.create_connection((url.hostname or "", url.port or 0))
    if url.scheme == "https":
        context = ssl.create_default_context(cafile=os.environ["BENCH_CERTIFICATE"])
        return context.wrap_socket(sock, server_hostname=url.hostname)
    return sock


def _target(method: str, place: Place, name: str) -> str:
    """The path to ask for; a real server wants it signed."""
    if os.environ.get("BENCH_COUNTS"):
        return f"/{place.path}{name}"
    from benchmarks.cases.s3_clients import boto3_client

    operation = "put_object" if method == "PUT" else "get_object"
    signed = boto3_client().generate_presigned_url(
        operation, {"Bucket": place.bucket, "Key": f"{place.key}{name}"}, 3600
    )
    url = urllib.parse.urlsplit(signed)
    return f"{url.path}?{url.query}"


def _in_threads(work: Callable[[int], None], count: int) -> None:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as exc:  # raised again below, in the thread that waits
            failures.append(exc)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure


def _push(state: State, place: Place, streams: int) -> None:
    views = joined([view(tensor) for tensor in tensors(state).values()])
    shares = split(views, -(-sum(map(len, views)) // streams))

    def push(number: int) -> None:
        length = sum(map(len, shares[number]))
        with _connected() as sock:
            target = _target("PUT", place, f"-{number}")
            first = f"PUT {target} HTTP/1.1\r\nHost: {_host()}\r\nContent-Length: {length}\r\n\r\n"
            sock.sendall(first.encode())
            for each in shares[number]:
                sock.sendall(each)
            if b" 200 " not in sock.recv(4096):
                raise OSError("the server refused the bytes")

    _in_threads(push, len(shares))


def _pull(state: State, place: Place, streams: int) -> None:
    views = [view(tensor) for tensor in tensors(state).values()]
    share_bytes = -(-sum(map(len, views)) // streams)
    shares = split(views, share_bytes)

    def pull(number: int) -> None:
        start, length = number * share_bytes, sum(map(len, shares[number]))
        with _connected() as sock:
            wanted = f"Range: bytes={start}-{start + length - 1}"
            target = _target("GET", place, "/raw")
            sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {_host()}\r\n{wanted}\r\n\r\n".encode())
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += sock.recv(1)
            for each in shares[number]:
                left = each
                while left:
                    left = left[sock.recv_into(left) :]

    _in_threads(pull, len(shares))


def _enter_sockets(streams: int) -> None:
    def save(state: State, place: Place) -> None:
        _push(state, place, streams)

    def load(state: State, place: Place) -> None:
        _pull(state, place, streams)

    for group in ("save-s3", "save-lanes"):
        case(group, "floor", name=f"socket_{streams}")(save)
    for group in ("load-s3", "load-lanes"):
        case(group, "floor", name=f"socket_{streams}")(load)


for _streams in (1, 4, 16):
    _enter_sockets(_streams)
