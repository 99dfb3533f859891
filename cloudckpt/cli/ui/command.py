"""The command ``ui``: serve the page, tell where it is, open a browser."""

from __future__ import annotations

import os
import sys
import threading
from typing import Annotated

import typer

from cloudckpt.cli.common import Json, Place, Quiet, Root, root_of
from cloudckpt.cli.render import print_json
from cloudckpt.config import Settings
from cloudckpt.storage import ManifestStore, open_store

__all__ = ["ui"]

#: Somebody sits before the page: it says soon that a store does not answer, and asks again by itself.
_PATIENCE_S = 10.0


def ui(
    place: Place = None,
    root: Root = None,
    port: Annotated[int, typer.Option("--port", "-p", min=0, max=65_535, help="Of 127.0.0.1; 0 takes a free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only tell the address.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a run, or the runs below a prefix, as a page in the browser that keeps itself up to date. Ends with Ctrl-C.

    The page only reads: metrics over steps, why each checkpoint is kept, uploads in flight, what happened, and what
    other retention settings would delete. It is served on this machine alone. Examples: cloudckpt ui ./runs/demo;
    cloudckpt ui s3://bucket/runs/ --port 8765 --no-browser
    """
    # What no other command needs.
    import webbrowser  # noqa: PLC0415

    from cloudckpt.cli.ui.reading import Place as Looked  # noqa: PLC0415
    from cloudckpt.cli.ui.server import PageServer  # noqa: PLC0415
    from cloudckpt.cli.ui.site import Site  # noqa: PLC0415

    looked = Looked(root_of(place, root), _opened)
    with PageServer(Site(looked), port=port) as server:
        if json:
            print_json({"root": looked.url, "url": server.url})
        elif quiet:
            sys.stdout.write(f"{server.url}\n")
        else:
            sys.stdout.write(
                f"{looked.url} is shown at\n\n    {server.url}\n\n"
                "Whoever has this address can look on, on this machine. Ctrl-C ends it.\n"
            )
        sys.stdout.flush()
        if not no_browser and _has_a_screen():
            # Some browsers keep whoever starts them waiting, and the page is to be served meanwhile.
            threading.Thread(target=webbrowser.open, args=(server.opening_url,), daemon=True).start()
        server.serve_forever()


def _opened(root: str) -> ManifestStore:
    return open_store(root, settings=Settings(storage_deadline_s=_PATIENCE_S, request_timeout_s=_PATIENCE_S))


def _has_a_screen() -> bool:
    """Whether a browser with a window can be opened; one in the terminal would take it over, and shows no such page."""
    return sys.platform in {"darwin", "win32"} or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
