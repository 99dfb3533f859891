"""How the servers of this package listen: on loopback, and so that no connection is lost when they stop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from aiohttp import web

__all__ = ["serve_until"]

_BACKLOG: Final = 128
#: Turns of the event loop in which a connection that was accepted is surely known: CPython takes about three.
_TURNS_TO_ACCEPT: Final = 10


async def serve_until(
    end: asyncio.Event, runner: web.BaseRunner, *, started: Callable[[str], None], port: int = 0
) -> None:
    """Serve on 127.0.0.1 until ``end`` is set, and clean the runner up.

    Args:
        started: called with the server's URL once it listens.
        port: to listen on; 0 for a free one.
    """
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", port), backlog=_BACKLOG)
    try:
        await web.SockSite(runner, listener).start()
        started(f"http://127.0.0.1:{listener.getsockname()[1]}")
        await end.wait()
        # A connection that is accepted while asyncio closes its server is never closed: none may be on its way.
        asyncio.get_running_loop().remove_reader(listener)
        for _ in range(_TURNS_TO_ACCEPT):
            await asyncio.sleep(0)
    finally:
        await runner.cleanup()
        listener.close()
