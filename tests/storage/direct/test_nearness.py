"""What a connection queues for sending, by how far its other end is."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest

from cloudckpt.storage.direct import nearness
from cloudckpt.storage.direct.nearness import keep_queue_short, round_trip_s

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a socket's round trip")


@pytest.fixture
def near() -> Iterator[socket.socket]:
    """A connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()[:2]) as sock, server.accept()[0]:
            yield sock


def _queue_bytes(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)


def test_a_near_end_gets_a_short_queue(near: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel queues twice what was asked for, and no more from now on."""
    monkeypatch.setattr(nearness, "_NEAR_S", 1.0)  # also while this machine is busy
    assert _queue_bytes(near) != 2 * 128 * 1024
    keep_queue_short(near)
    assert _queue_bytes(near) == 2 * 128 * 1024


def test_a_far_end_keeps_the_kernels_own_queue(near: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the round trip is longer than near, nothing is set: the queue may grow to what the line holds."""
    before = _queue_bytes(near)
    monkeypatch.setattr(nearness, "_NEAR_S", 0.0)
    keep_queue_short(near)
    assert _queue_bytes(near) == before


def test_a_round_trip_is_told_in_seconds(near: socket.socket) -> None:
    """Over loopback it is longer than nothing and shorter than a second."""
    told = round_trip_s(near)
    assert told is not None
    assert 0 < told < 1


def test_what_has_no_round_trip_is_left_alone() -> None:
    """A socket that is no TCP connection tells none, and keeps its queue."""
    one, other = socket.socketpair()
    with one, other:
        before = _queue_bytes(one)
        assert round_trip_s(one) is None
        keep_queue_short(one)
        assert _queue_bytes(one) == before
