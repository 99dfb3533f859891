"""The sink as a process: prints its port, serves until its standard input closes.

python -m benchmarks.sink [--discard] [--delay-ms 20] [--connection-mb-per-s 85] [--tls CERT KEY]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import ssl
import sys
import threading

from benchmarks.sink.answers import Answers
from benchmarks.sink.objects import Objects
from benchmarks.sink.wire import Connection, Gone


def main() -> None:
    """Listen on a free port of 127.0.0.1, with one thread a connection."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--discard", action="store_true", help="drop payload of 1 MiB and more")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="to the first byte of every answer")
    parser.add_argument("--connection-mb-per-s", type=float, default=0.0, help="body rate of each connection")
    parser.add_argument("--tls", nargs=2, metavar=("CERT", "KEY"))
    given = parser.parse_args()
    context = None
    if given.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*given.tls)
    answers = Answers(Objects(), discard=given.discard, delay_s=given.delay_ms / 1000)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            client, _ = listener.accept()
            rate = given.connection_mb_per_s * 1e6
            threading.Thread(target=_serve, args=(client, context, answers, rate), daemon=True).start()


def _serve(client: socket.socket, context: ssl.SSLContext | None, answers: Answers, rate: float) -> None:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A client that goes, however it goes, is no concern of the server's.
    with contextlib.suppress(Gone, OSError), client:
        sock = context.wrap_socket(client, server_side=True) if context else client
        with sock:
            answers.serve(Connection(sock, bytes_per_s=rate))


def _end_with_stdin() -> None:
    while sys.stdin.buffer.read(4096):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
