"""No byte of a store is ever unpickled unless the caller allows it, wherever it lies and whatever it says it is."""

from __future__ import annotations

import base64
import functools
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, ConfigError
from tests.security.hostile import Hostile, looked_at, state_of


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.fuse),)


class Watch:
    """Counts what any unpickler of this interpreter looks up, by Python's own audit events."""

    def __init__(self) -> None:
        self.on = False
        self.found: list[str] = []
        sys.addaudithook(self._hear)  # there is no way to remove one

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event == "pickle.find_class":
            self.found.append(".".join(map(str, arguments)))


@functools.cache
def watch() -> Watch:
    """The one of this process, from its first use on."""
    return Watch()


@pytest.fixture
def nothing_unpickled() -> Iterator[None]:
    """Fails the test if anything is looked up by an unpickler in it."""
    watch().found.clear()
    watch().on = True
    try:
        yield
    finally:
        watch().on = False
    assert watch().found == []


@pytest.fixture
def run(tmp_path: Path) -> Hostile:
    """A run to be made hostile."""
    return Hostile(tmp_path / "run")


@pytest.fixture
def fuse(tmp_path: Path) -> Path:
    """What must not be there at the end."""
    return tmp_path / "fuse"


def armed(fuse: Path) -> bytes:
    """A pickle that makes the fuse."""
    return pickle.dumps(Bomb(fuse), protocol=2)


def in_base64(fuse: Path) -> str:
    """The same as text."""
    return base64.b64encode(armed(fuse)).decode()


#: Every place inside a state's structure, around a leaf.
AROUND: dict[str, Callable[[Any], Any]] = {
    "a value": lambda leaf: leaf,
    "in a list": lambda leaf: [1, [leaf]],
    "in a dict": lambda leaf: {"deep": {"deeper": leaf}},
    "a key": lambda leaf: {"$dict": [[leaf, 1]]},
    "in a tuple": lambda leaf: {"$tuple": [leaf]},
    "in a set": lambda leaf: {"$set": [leaf]},
    "in a deque": lambda leaf: {"$deque": {"items": [leaf], "maxlen": None}},
    "an item of an ordered dict": lambda leaf: {"$ordered": {"items": [["a", leaf]]}},
    "an attribute of an ordered dict": lambda leaf: {"$ordered": {"items": [], "attributes": {"_metadata": leaf}}},
    "in a default dict": lambda leaf: {"$defaultdict": {"factory": "list", "items": [["a", leaf]]}},
    "in a counter": lambda leaf: {"$counter": [[leaf, 1]]},
    "in the state of an object": lambda leaf: {"$state": {"inner": leaf}},
    "the value of an enum": lambda leaf: {"$enum": {"class": "os:system", "value": leaf}},
    "the name of a zone": lambda leaf: {"$datetime": ["2026-01-01T00:00:00+00:00", 0, leaf]},
    "of each rank": lambda leaf: {"$per_rank": {"0": leaf}},
}


@pytest.mark.usefixtures("nothing_unpickled")
@pytest.mark.parametrize("around", AROUND)
def test_a_pickled_leaf_is_never_loaded_unasked(run: Hostile, fuse: Path, around: str) -> None:
    """Wherever in the structure it is, and whether or not the index admits that something is pickled."""
    leaf = {"$pickle": in_base64(fuse)}
    for admits in (False, True):
        index = run.index
        index["structure"]["extra"] = AROUND[around](leaf)
        index["pickled"] = admits
        run.put_index(index)
        given = dict(looked_at(run.root, also_write=False))
        for name in ("load", "load one component"):
            assert isinstance(given[name], CloudCkptError), f"{name}: {given[name]!r}"
        with CheckpointManager(run.root) as ckpts, pytest.raises(CloudCkptError):
            ckpts.restore(state_of(0), 2)
    assert not fuse.exists()


#: Names that a decoder which imports or calls something would run.
CALLS: dict[str, Any] = {
    "an enum of a function": {"$enum": {"class": "os:system", "value": "true"}},
    "an enum of a builtin": {"$enum": {"class": "builtins:eval", "value": "1"}},
    "an enum of the enums themselves": {"$enum": {"class": "enum:Enum", "value": "X"}},
    "an enum of a module that is not imported": {"$enum": {"class": "antigravity:Flight", "value": 1}},
    "an enum of a module that ends the process": {"$enum": {"class": "torch.utils.model_dump.__main__:X", "value": 1}},
    "an enum of a module that sets variables": {
        "$enum": {"class": "torch._inductor.fx_passes.numeric_utils:X", "value": 1}
    },
    "an enum of a module that torch does not have": {"$enum": {"class": "torch.no..such", "value": 1}},
    "an enum with a long path": {"$enum": {"class": "os:path.os.system", "value": "true"}},
    "a factory that is no type": {"$defaultdict": {"factory": "eval", "items": []}},
    "a constant of torch that is a function": {"$torch": {"constant": "load"}},
    "a constant of torch that is a module": {"$torch": {"constant": "hub"}},
    "an array of objects": {"$numpy": {"dtype": "O", "bytes": "AAAAAAAAAAA="}},
    "an array of structures with objects": {"$numpy": {"dtype": [["a", "O"]], "bytes": "AAAAAAAAAAA="}},
    "an unknown tag": {"$eval": "1"},
    "a call": {"$call": ["os.system", ["true"]]},
}


@pytest.mark.usefixtures("nothing_unpickled")
@pytest.mark.parametrize("what", CALLS)
def test_no_name_in_a_store_is_called_or_imported(run: Hostile, what: str) -> None:
    """What names a function, a module or a type of objects gives a plain value or an error, and is not imported."""
    index = run.index
    index["structure"]["extra"] = {"leaf": CALLS[what]}
    run.put_index(index)
    before = set(sys.modules)
    for name, given in looked_at(run.root):
        if name in {"load", "load one component"} and not isinstance(given, CloudCkptError):
            assert isinstance(given, dict)
            assert type(given["extra"]["leaf"]) in {str, int}, given
    new = set(sys.modules) - before
    assert not {"antigravity", "torch.utils.model_dump.__main__", "torch._inductor.fx_passes.numeric_utils"} & new


def as_torch_saves(fuse: Path) -> bytes:
    """What ``torch.save`` writes of it."""
    file = io.BytesIO()
    torch.save({"w": Bomb(fuse)}, file)
    return file.getvalue()


def as_numpy_saves(fuse: Path) -> bytes:
    """What ``numpy.save`` writes of it."""
    file = io.BytesIO()
    np.save(file, np.array([Bomb(fuse)], dtype=object), allow_pickle=True)
    return file.getvalue()


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "a pickle": armed,
    "a file of torch.save": as_torch_saves,
    "a file of numpy.save": as_numpy_saves,
}


def at_the_front(payload: bytes, bomb: bytes) -> bytes:
    """A payload object that begins with it."""
    return (bomb + payload)[: len(payload)] if len(bomb) < len(payload) else bomb[: len(payload)]


@pytest.mark.usefixtures("nothing_unpickled")
@pytest.mark.parametrize("kind", PICKLES)
def test_a_payload_object_that_is_a_pickle_is_only_bytes(run: Hostile, fuse: Path, kind: str) -> None:
    """Sealed with the right sums, it is tensors of strange numbers, or damage; nothing runs."""
    bomb = PICKLES[kind](fuse)
    run.put_payload("model", lambda payload: at_the_front(payload, bomb))
    given = dict(looked_at(run.root))
    loaded = given["load"]
    assert isinstance(loaded, dict | CloudCkptError)
    if isinstance(loaded, dict):
        assert loaded["model"]["w"].shape == (300,)
    assert not fuse.exists()


@pytest.mark.usefixtures("nothing_unpickled")
@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("place", ["manifest.json", "a copy of it", "checkpoint.json", "both"])
def test_a_document_that_is_a_pickle_is_refused(run: Hostile, fuse: Path, kind: str, place: str) -> None:
    """A manifest, a copy of one or an index that is none is an error, for reading and for writing."""
    bomb = PICKLES[kind](fuse)
    if place in {"checkpoint.json", "both"}:
        run.put_index_bytes(bomb)
    if place == "a copy of it":
        for copy in run.root.glob("manifest-*.json"):
            copy.write_bytes(bomb)
    if place in {"manifest.json", "both"}:
        (run.root / "manifest.json").write_bytes(bomb)
    given = dict(looked_at(run.root, also_write=True))
    if place != "a copy of it":
        assert isinstance(given["load"], CloudCkptError)
    assert not fuse.exists()


@pytest.mark.usefixtures("nothing_unpickled")
def test_pickles_that_lie_about_are_left_alone(run: Hostile, fuse: Path) -> None:
    """Files that other tools would read (``.metadata``, ``data.pkl``, ``pytorch_model.bin``) are foreign, and stay."""
    bomb = as_torch_saves(fuse)
    names = (".metadata", "data.pkl", "pytorch_model.bin", "optimizer.pt", "__init__.py", "sitecustomize.py")
    places = [folder / name for folder in (run.root, run.folder) for name in names]
    for place in places:
        place.write_bytes(bomb)
    for _ in looked_at(run.root, also_write=True):
        pass
    assert [place for place in places if place.read_bytes() != bomb] == []
    assert not fuse.exists()


@pytest.mark.usefixtures("nothing_unpickled")
def test_text_that_is_a_pickle_stays_text(run: Hostile, fuse: Path) -> None:
    """As a tag, a mark, a metric's name, a reason, a host, a component, a tensor's name, an unknown field."""
    text = in_base64(fuse)[:180]
    manifest = run.manifest
    entry = manifest["entries"][-1]
    entry["tags"], entry["marks"], entry["damaged"] = [text], [text], text
    entry["metrics"] = {text: 1.0}
    manifest["owner"]["host"] = text
    manifest["journal"][-1]["detail"] = text
    manifest["a field of tomorrow"] = {"$pickle": in_base64(fuse)}
    run.put_manifest(manifest)
    index = run.index
    index["tags"], index["versions"] = [text], {text: text}
    index["structure"]["extra"] = {text: text}
    index["a field of tomorrow"] = {"$pickle": in_base64(fuse)}
    run.put_index(index)
    given = dict(looked_at(run.root, also_write=True))
    loaded = given["load"]
    assert isinstance(loaded, dict)
    assert loaded["extra"] == {text: text}
    assert not fuse.exists()


def test_it_goes_off_where_it_is_allowed(run: Hostile, fuse: Path) -> None:
    """The other way round, so that all of this could fail: with allow_pickle=True the bomb does go off."""
    index = run.index
    index["structure"]["extra"] = {"leaf": {"$pickle": in_base64(fuse)}}
    index["pickled"] = True
    run.put_index(index)
    with pytest.raises(ConfigError, match="allow_pickle=True"):
        cloudckpt.open(run.root).load(2)
    assert not fuse.exists()
    watch().found.clear()
    watch().on = True
    try:
        cloudckpt.open(run.root, allow_pickle=True).load(2)
    finally:
        watch().on = False
    assert fuse.exists()
    assert watch().found, "the watch of the tests above hears nothing"


@pytest.mark.processes
def test_the_command_line_unpickles_nothing(run: Hostile, fuse: Path) -> None:
    """It has no option for it: every command ends as it should, and nothing runs."""
    index = run.index
    index["structure"]["extra"] = {"leaf": {"$pickle": in_base64(fuse)}}
    run.put_index(index)
    for command in (["ls"], ["show", "2"], ["verify", "--deep"], ["log"], ["best"]):
        done = subprocess.run(
            [sys.executable, "-m", "cloudckpt", *command, "-r", str(run.root)],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert "Traceback" not in done.stderr, done.stderr
    assert not fuse.exists()
