"""How much a connection to a near store may have under way: no more than a processor keeps close.

The kernel lets the queue of a connection grow to megabytes, so that a line with much latency stays full. To a store
next door that only moves the queue's memory out of the processor's caches: every byte is then written to main memory
and fetched from there again. Measured on two cores, 2 GiB over loopback: with a queue of 256 KiB a fifth less time and
a sixth less CPU time for the whole save (docs/adr/0012).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys

__all__ = ["keep_queue_short", "round_trip_s"]

#: Asked of the kernel, which doubles it. One such queue per round trip of ``_NEAR_S`` is more than 1 GB/s.
_QUEUE_BYTES = 128 * 1024
#: Round trips up to this long, in seconds, are within a machine or a rack.
_NEAR_S = 200e-6
#: Where ``tcpi_min_rtt`` lies in ``struct tcp_info`` (linux/tcp.h, since Linux 4.6), in microseconds. The mean counts
#: what a busy server, or one that holds an acknowledgement back during a TLS handshake, adds to the way.
_SHORTEST_AT = 148
_INFO_BYTES = 152
#: What the kernel says before it has seen one.
_UNKNOWN = 2**32 - 1


def round_trip_s(sock: socket.socket) -> float | None:
    """The shortest round trip that a connected socket has seen, in seconds; None where the kernel does not tell."""
    if sys.platform != "linux":
        return None
    try:
        told = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        microseconds: int = struct.unpack_from("=I", told, _SHORTEST_AT)[0]
    except (OSError, struct.error):  # no TCP socket, or a kernel that knows less
        return None
    return microseconds / 1e6 if 0 < microseconds < _UNKNOWN else None


def keep_queue_short(sock: socket.socket) -> None:
    """Bound what a connected socket queues for sending, if its other end is near."""
    round_trip = round_trip_s(sock)
    if round_trip is not None and round_trip <= _NEAR_S:
        with contextlib.suppress(OSError):  # the connection is as good without
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE_BYTES)
