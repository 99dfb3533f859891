"""Runs to look at, and their page, served for real over loopback."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch

from cloudckpt import CheckpointManager
from cloudckpt.cli.ui.reading import Place
from cloudckpt.cli.ui.server import PageServer
from cloudckpt.cli.ui.site import Site
from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.storage import ManifestStore, Storage
from cloudckpt.testing.scripted import ScriptedStorage
from cloudckpt.tools import open_store

#: step -> loss of the run that most tests look at.
LOSSES = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.4, 5: 0.6}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed run that keeps all: steps 1 to 5, best 2, which has a tag; 3 is pinned."""
    place = tmp_path_factory.mktemp("ui") / "run"
    with CheckpointManager(place, monitor="loss", mode="min", keep_best=1, keep_last=None) as ckpts:
        for step, loss in LOSSES.items():
            ckpts.save(step, {"model": {"w": torch.full((9,), float(step))}}, metrics={"loss": loss, "acc": step / 10})
        ckpts.wait()
        ckpts.tag(2, "release")
        ckpts.pin(3)
    return place


@pytest.fixture
def run(made: Path, tmp_path: Path) -> str:
    """A copy of that run, to be changed."""
    return str(shutil.copytree(made, tmp_path / "run"))


@dataclass(frozen=True)
class Response:
    """What the server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as a document."""
        return json.loads(self.body)


class Page:
    """A page that is served, and the log of what its stores were asked."""

    def __init__(self, root: str, storage: Storage | None = None) -> None:
        self._storage = storage
        self.stores: list[ScriptedStorage] = []
        self.site = Site(Place(root, self._open))
        self.server = PageServer(self.site)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()

    def _open(self, root: str) -> ManifestStore:
        self.stores.append(ScriptedStorage(self._storage or open_store(root).unretried))
        return ManifestStore(self.stores[-1])

    @property
    def url(self) -> str:
        """Where it is."""
        return self.server.url

    def asked(self) -> list[str]:
        """The verbs of all requests to the stores since the last call."""
        verbs = [call.verb for store in self.stores for call in store.calls]
        for store in self.stores:
            store.forget()
        return verbs

    def send(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> Response:
        """One request for any path of the server."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.server_port, timeout=60)
        try:
            connection.request(method, path, headers=dict(headers or {}))
            answer = connection.getresponse()
            return Response(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str = "", **headers: str) -> Response:
        """GET a path below the page's own."""
        return self.send("GET", self.site.path + path, headers)

    def api(self, name: str, **words: str) -> Response:
        """GET a document."""
        return self.get(f"api/{name}?{urlencode(words)}")

    def stop(self) -> None:
        """Stop serving, so that the next connection is refused. Idempotent."""
        self.server.shutdown()
        self.thread.join(30)
        self.server.server_close()


@pytest.fixture
def page_of() -> Iterator[Callable[..., Page]]:
    """Serves the page of a root, or of a storage, as often as it is called."""
    with contextlib.ExitStack() as stack:

        def serve(root: str, storage: Storage | None = None) -> Page:
            page = Page(root, storage)
            stack.callback(page.stop)
            return page

        yield serve


@pytest.fixture
def announce() -> Callable[..., str]:
    """Puts a save in flight into a run, as a laptop sees it, with some of its bytes in place; gives its name."""

    def act(run: str, step: int, *, size_bytes: int, arrived: int) -> str:
        store = open_store(run)
        entry = Checkpoint(
            id=store.token(8),
            step=step,
            seq=0,
            state=State.PENDING,
            writer_epoch=1,
            announced_at=store.clock(),
            size_bytes=size_bytes,
            object_count=2,
        )

        def change(current: Manifest, _: None) -> Manifest:
            epoch = current.writer_epoch
            mine = replace(entry, writer_epoch=epoch)
            return transitions.announce(current, mine, writer_epoch=epoch, settlements={}, gone=(), at=store.clock())

        store.transact(change, prepare=lambda _: None)
        key = keys.payload_key(step, entry.id, keys.payload_name("model", 0, 1))
        store.storage.put(key, [bytes(arrived)], size_bytes=arrived)
        return entry.name

    return act
