"""Bytes that nobody wrote on purpose: only errors of ours come out, and nothing is believed that was changed.

Each target is fuzzed for ``--fuzz-seconds`` (2 by default, more at night) in batches with seeds of their own, so that a
failure is found again by its seed.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError
from cloudckpt.core import keys
from cloudckpt.core.index_json import decode_index, encode_index
from cloudckpt.core.layout import read_header
from cloudckpt.core.manifest_json import decode_manifest, encode_manifest, entry_from_bytes
from cloudckpt.core.selection import parse_selector, select
from cloudckpt.core.values import Codec
from cloudckpt.storage import MemoryStorage, open_storage
from tests.records import Recording
from tests.security.hostile import READINGS, Hostile, resealed, state_of

BATCH = 50


def fuzz(strategy: st.SearchStrategy[Any], check: Callable[[Any], None], seconds: float) -> int:
    """Give values to a check until the time is over; how many."""
    end, executed = time.monotonic() + seconds, 0
    for number in itertools.count():

        @seed(number)
        @settings(max_examples=BATCH, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def batch(value: Any) -> None:
            nonlocal executed
            executed += 1
            check(value)

        batch()
        if time.monotonic() >= end:
            break
    return executed


@pytest.fixture
def seconds(pytestconfig: pytest.Config) -> float:
    """How long each target is fuzzed."""
    return float(pytestconfig.getoption("--fuzz-seconds"))


# -- bytes ---------------------------------------------------------------------------------------------------


@st.composite
def changed(draw: st.DrawFn, body: bytes) -> bytes:
    """Bytes that were right, after some cuts, flips, repeats and insertions."""
    found = bytearray(body)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(found) - 1, 0)))
        length = draw(st.integers(0, 40))
        match draw(st.sampled_from(["flip", "cut", "repeat", "insert", "truncate", "move"])):
            case "flip" if found:
                found[start] ^= draw(st.integers(1, 255))
            case "cut":
                del found[start : start + length]
            case "repeat":
                found[start:start] = found[start : start + length] * draw(st.integers(1, 50))
            case "insert":
                found[start:start] = draw(st.binary(max_size=20) | st.sampled_from(SNIPPETS))
            case "truncate":
                del found[start:]
            case "move":
                part = found[start : start + length]
                del found[start : start + length]
                to = draw(st.integers(0, len(found)))
                found[to:to] = part
    return bytes(found)


#: What parsers stumble over.
SNIPPETS = [
    *(b"null", b"true", b"-0", b"1e999", b"NaN", b"9" * 30, b"\\ud800", b'"$pickle"', b"{}", b"[]", b'""', b"\0"),
    *(b"..", b"/", b"\xff\xfe", b"\xef\xbb\xbf", b"{" * 300, b'{"$tuple":[', b",", b":", b"\\u0000", b"\n"),
]


@functools.cache
def golden(name: str) -> bytes:
    """A document as we write it."""
    storage = MemoryStorage()
    with CheckpointManager(storage, monitor="loss", mode="min", keep_last=2) as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, state_of(step), metrics={"loss": 1.0 / step}, tags=["a tag"], block=True)
    if name == "manifest":
        return storage.read("manifest.json", limit_bytes=10**7).body
    wanted = "checkpoint.json" if name == "index" else "model-00000-of-00001.safetensors"
    folder = cloudckpt.open(storage).select("latest").name
    return storage.read(f"{folder}/{wanted}", limit_bytes=10**7).body


def manifest_bytes(body: bytes) -> None:
    """A manifest that is read is the same after its own bytes."""
    try:
        manifest = decode_manifest(body)
    except CloudCkptError:
        return
    assert decode_manifest(encode_manifest(manifest)) == manifest


def index_bytes(body: bytes) -> None:
    """An index that was changed is refused, wherever: its digest is of its bytes."""
    try:
        decode_index(body)
    except CloudCkptError:
        return
    assert body == golden("index")


def header_bytes(body: bytes) -> None:
    """A header that is believed covers its object without holes."""
    try:
        found = read_header(body, object_size_bytes=len(body))
    except CloudCkptError:
        return
    ends = sorted((start, start + length) for _, _, start, length in found.values())
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ends))
    assert not ends or ends[-1][1] == len(body)


BYTES: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "the bytes of a manifest": (st.deferred(lambda: changed(golden("manifest"))) | st.binary(), manifest_bytes),
    "the bytes of an index": (st.deferred(lambda: changed(golden("index"))) | st.binary(), index_bytes),
    "the header of a payload object": (st.deferred(lambda: changed(golden("payload"))) | st.binary(), header_bytes),
    "an entry told by another rank": (st.binary() | st.text().map(str.encode), lambda b: _ours(entry_from_bytes, b)),
}


def _ours(act: Callable[[Any], object], value: Any) -> None:
    try:
        act(value)
    except CloudCkptError:
        return


@pytest.mark.parametrize("target", BYTES)
def test_bytes_that_were_changed(target: str, seconds: float, record: Recording) -> None:
    """Any bytes are refused with an error of ours, or mean the same after they were written again."""
    with record(target, "fuzz", "no store") as case:
        case.points = fuzz(*BYTES[target], seconds)


# -- words ---------------------------------------------------------------------------------------------------

words = st.text(max_size=60) | st.from_regex(r"(checkpoint-|step-|tag:)?[0-9a-f.]{0,24}", fullmatch=True)


def selector(text: str) -> None:
    """A selector is one of the spellings, or a ConfigError; what it selects is there, or an error says so."""
    manifest = decode_manifest(golden("manifest"))
    try:
        found = select(manifest, parse_selector(text))
    except CloudCkptError:
        return
    assert found in manifest.committed


def key(text: str) -> None:
    """A key that is ours is spelled by its own parts and leads nowhere else."""
    parsed = keys.parse(text)
    if parsed.kind is not keys.Kind.FOREIGN:
        assert ".." not in text.split("/")
        assert not text.startswith("/")
        if parsed.step is not None and parsed.id is not None:
            assert text.startswith(f"{keys.checkpoint_prefix(parsed.step, parsed.id)}/")


def root(text: str) -> None:
    """A root is a storage whose URL shows no password, or a ConfigError."""
    secret = "hunter2"
    for place in (text, f"s3://user:{secret}@{text}", f"{text}://user:{secret}@host/run"):
        try:
            storage = open_storage(place)
        except CloudCkptError as exc:
            if place != text:
                assert secret not in str(exc)
            continue
        if place.startswith("s3://"):
            assert secret not in storage.url
        storage.close()


WORDS: dict[str, tuple[st.SearchStrategy[str], Callable[[str], None]]] = {
    "selectors": (words, selector),
    "keys": (words | st.from_regex(r"(checkpoint-[0-9]{1,3}\.[0-9a-f]{8}/)?[ -~]{0,40}", fullmatch=True), key),
}


@pytest.mark.parametrize("target", WORDS)
def test_words_that_people_or_stores_may_say(target: str, seconds: float, record: Recording) -> None:
    """Any text is understood as the grammar says, or refused with an error of ours."""
    with record(target, "fuzz", "no store") as case:
        case.points = fuzz(*WORDS[target], seconds)


# -- documents that are sealed, and wrong ----------------------------------------------------------------------


@functools.cache
def anything() -> st.SearchStrategy[Any]:
    """Any JSON, with our tags in it."""
    names = st.sampled_from(["$tensor", "$tuple", "$dict", "$ndarray", "$numpy", "$torch", "$enum", "$state", "$set",
                             "$ordered", "$per_rank", "$bytes", "$float", "$fraction", "$datetime", "$pickle",
                             "items", "dtype", "shape", "tensor", "size", "class", "value", "w"])  # fmt: skip
    leaves = (
        st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8) | names
    )  # fmt: skip
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=5), inner, max_size=3),
        max_leaves=10,
    )


def _places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(node, dict):
        for name, inner in node.items():
            yield from _places(inner, (*path, name))
    elif isinstance(node, list):
        for number, inner in enumerate(node):
            yield from _places(inner, (*path, number))


@st.composite
def rewritten(draw: st.DrawFn, body: bytes) -> dict[str, Any]:
    """A document of which one or two values were replaced, removed or doubled."""
    document: dict[str, Any] = json.loads(body)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from([path for path in _places(document) if path]))
        parent: Any = document
        try:
            for segment in place[:-1]:
                parent = parent[segment]
            match draw(st.sampled_from(["replace", "remove", "double", "nudge"])):
                case "replace":
                    parent[place[-1]] = draw(anything())
                case "remove":
                    del parent[place[-1]]
                case "double" if isinstance(parent, list):
                    parent.append(parent[place[-1]])
                case "nudge" if type(parent[place[-1]]) is int:
                    parent[place[-1]] += draw(st.sampled_from([-1, 1, 2**31, 2**62, -(2**63)]))
        except (LookupError, TypeError):
            pass  # the first change took the place of the second one away
    return document


def test_a_sealed_index_that_is_wrong(tmp_path: Path, seconds: float, record: Recording) -> None:
    """With digests that are right: everything that reads it gives values or an error of ours, and restore as well."""
    run = Hostile(tmp_path / "run")
    body = (run.folder / "checkpoint.json").read_bytes()

    def check(document: dict[str, Any]) -> None:
        run.put_index_bytes(resealed(document))
        for act in READINGS.values():
            _ours(act, run.root)
        state: dict[str, Any] = {"model": {"w": torch.zeros(300), "b": torch.zeros(3)}, "extra": {}}
        with CheckpointManager(MemoryCopy(run.root)) as ckpts:
            _ours(lambda _: ckpts.restore(state, 2, strict=False), None)

    with record("an index that is sealed and wrong", "fuzz", "local") as case:
        case.points = fuzz(rewritten(body), check, seconds)


class MemoryCopy(MemoryStorage):
    """The files of a run in memory, so that a claim changes nothing of it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        for path in folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                self.put(path.relative_to(folder).as_posix(), [content], size_bytes=len(content))


def test_a_manifest_that_is_wrong(tmp_path: Path, seconds: float, record: Recording) -> None:
    """Whatever a person changed in it: reading, training on, sweeping, collecting and repairing give errors of ours."""
    run = Hostile(tmp_path / "run")
    body = (run.root / "manifest.json").read_bytes()

    def train(root: Any) -> None:
        with CheckpointManager(root, takeover="force") as ckpts:
            ckpts.restore(state_of(0))
            ckpts.save(9, state_of(9), block=True)

    def check(document: dict[str, Any]) -> None:
        (run.root / "manifest.json").write_bytes(json.dumps(document).encode())
        for act in READINGS.values():
            _ours(act, run.root)
        storage = MemoryCopy(run.root)
        for act in (train, lambda s: cloudckpt.gc(s, dry_run=False), lambda s: cloudckpt.repair(s, dry_run=False)):
            _ours(act, storage)

    with record("a manifest that a person changed", "fuzz", "local") as case:
        case.points = fuzz(rewritten(body), check, seconds)


def test_values_that_nobody_encoded(seconds: float, record: Recording) -> None:
    """Any JSON as a state's structure is decoded, or refused with an error of ours."""
    with record("the values of a state", "fuzz", "no store") as case:
        case.points = fuzz(anything(), lambda node: _ours(Codec().decode, node), seconds)


@pytest.mark.filterwarnings("ignore")
def test_roots_that_people_may_write(seconds: float, record: Recording) -> None:
    """Any text as a root is a storage or a ConfigError, and no password is shown."""
    with record("roots", "fuzz", "no store") as case:
        case.points = fuzz(st.text(max_size=40), root, min(seconds, 2.0))


def test_what_we_write_ourselves_is_read() -> None:
    """The other way round, so that the targets above are not all refused at once."""
    assert decode_manifest(golden("manifest")).committed
    assert encode_index(decode_index(golden("index"))) == golden("index")
    assert read_header(golden("payload"), object_size_bytes=len(golden("payload")))
