"""Stored bytes into memory: which requests are made, where the bytes go, and how damage is found on the way.

(Past 350 lines: the requests, the places and the damage of a load are told over the same states.)
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError, CorruptCheckpointError, Settings, StorageError
from cloudckpt.core import keys
from cloudckpt.core.model import Chunk, Index, TensorEntry
from cloudckpt.storage import MemoryStorage
from cloudckpt.tensors import extents
from cloudckpt.tensors.fetch import fetch
from cloudckpt.tensors.outline import Outline
from cloudckpt.tensors.targets import Homes


class Watched(MemoryStorage):
    """Remembers each range that was asked for, and the addresses it went to."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[str, int, int]] = []
        self.addresses: list[tuple[int, int]] = []
        self.most_at_once = self._now = 0
        self._count = threading.Lock()

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        with self._count:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self.ranges.append((key, start, sum(map(len, targets))))
            self.addresses += [(np.frombuffer(t, np.uint8).ctypes.data, len(t)) for t in targets]
        super().read_into(key, start, *targets)
        with self._count:
            self._now -= 1

    def went_straight_to(self, tensor: torch.Tensor) -> bool:
        """Whether all of the tensor's bytes were read to where the tensor is."""
        end = tensor.data_ptr() + tensor.nbytes
        inside = [(at, n) for at, n in self.addresses if tensor.data_ptr() <= at < end]
        return sum(n for _, n in inside) == tensor.nbytes


def saved(state: dict[str, Any], storage: MemoryStorage | None = None) -> Any:
    """A run with this state as its one checkpoint."""
    storage = Watched() if storage is None else storage
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state, block=True)
    return storage


SMALL = Settings(max_read_bytes=1000, io_threads=3, read_gap_bytes=64)


# -- requests --------------------------------------------------------------------------------------------------


def test_every_byte_is_downloaded_once() -> None:
    """A whole load reads exactly the data of its payload objects, in pieces of at most max_read_bytes."""
    state: dict[str, Any] = {"a": {f"w{n}": torch.randn(n * 10) for n in range(1, 20)}, "b": torch.randn(3000), "n": 1}
    storage = saved(state)
    back = cloudckpt.open(storage, settings=SMALL).load()
    assert all(torch.equal(back["a"][name], tensor) for name, tensor in state["a"].items())
    assert torch.equal(back["b"], state["b"])
    assert sum(length for _, _, length in storage.ranges) == 3000 * 4 + sum(t.nbytes for t in state["a"].values())
    assert max(length for _, _, length in storage.ranges) == 1000
    assert len(storage.ranges) == len(set(storage.ranges))


def test_reads_run_side_by_side_and_no_more_than_allowed() -> None:
    """As many requests as there are threads are under way at once, over all objects together."""

    class Gated(Watched):
        gate: Any = None

        def read_into(self, key: str, start: int, *targets: memoryview) -> None:
            if self.gate is not None:
                self.gate.wait(30)  # opens when four are here
            super().read_into(key, start, *targets)

    storage = saved({name: torch.randn(500) for name in "abcdefgh"}, Gated())
    storage.gate = threading.Barrier(4)
    back = cloudckpt.open(storage, settings=Settings(io_threads=4)).load()
    assert len(storage.ranges) == len(back) == 8
    assert storage.most_at_once <= 4


def test_only_what_is_asked_for_is_read() -> None:
    """Of one component by names, only those tensors' bytes travel; a small gap between two is read and thrown away."""
    storage = saved({"m": {f"w{n}": torch.full((100,), float(n)) for n in range(20)}, "other": torch.ones(1000)})
    run = cloudckpt.open(storage, settings=Settings(read_gap_bytes=400))
    back = run.load(components=["m"], names=["w3", "w5", "w12"])
    assert {name: tensor[0].item() for name, tensor in back["m"].items()} == {"w3": 3, "w5": 5, "w12": 12}
    assert sorted(length for _, _, length in storage.ranges) == [400, 1200]


def test_tied_tensors_are_read_once() -> None:
    """Two names of one memory are one range."""
    weight = torch.randn(100)
    storage = saved({"m": {"a": weight, "b": weight, "c": weight}})
    back = cloudckpt.open(storage).load()["m"]
    assert back["a"] is back["b"] is back["c"]
    assert sum(length for _, _, length in storage.ranges) == 400


# -- the arena -------------------------------------------------------------------------------------------------


def test_loaded_tensors_are_read_straight_into_one_arena() -> None:
    """They lie close together, each on 64 bytes, and the bytes went there from the store without another copy."""
    state = {"m": {f"w{n}": torch.randn(n * 7 + 1) for n in range(30)}, "o": torch.randn(500).to(torch.bfloat16)}
    storage = saved(state)
    back = cloudckpt.open(storage).load()
    tensors = [*back["m"].values(), back["o"]]
    assert all(storage.went_straight_to(tensor) for tensor in tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    first = min(tensor.data_ptr() for tensor in tensors)
    last = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors)
    assert last - first <= sum(tensor.nbytes for tensor in tensors) + 64 * len(tensors)


def test_a_copy_of_one_loaded_tensor_takes_only_that_one_along() -> None:
    """Each tensor has a storage of its own size: deepcopy and torch.save of one do not drag the arena along."""
    back = cloudckpt.open(saved({"m": {"big": torch.zeros(10_000), "small": torch.ones(2)}})).load()["m"]
    assert back["small"].untyped_storage().nbytes() == 8
    assert copy.deepcopy(back["small"]).untyped_storage().nbytes() == 8
    file = io.BytesIO()
    torch.save(back["small"], file)
    assert file.tell() < 5000


def test_arrays_have_memory_of_their_own() -> None:
    """A NumPy array can be changed without reaching anything else, and two loads share nothing."""
    storage = saved({"x": {"a": np.arange(5), "b": np.arange(5.0), "t": torch.ones(3)}})
    one, two = cloudckpt.open(storage).load()["x"], cloudckpt.open(storage).load()["x"]
    one["a"] += 1
    assert two["a"].tolist() == [0, 1, 2, 3, 4]
    assert one["b"].tolist() == [0, 1, 2, 3, 4]
    assert one["a"].flags.writeable


def test_what_is_loaded_in_inference_mode_can_be_trained() -> None:
    """load() inside torch.inference_mode() gives ordinary tensors."""
    storage = saved({"m": {"w": torch.ones(3), "none": torch.empty(0), "z": torch.ones((), dtype=torch.int64)}})
    with torch.inference_mode():
        back = cloudckpt.open(storage).load()["m"]
    assert not any(tensor.is_inference() for tensor in back.values())
    back["w"].requires_grad_().square().sum().backward()


def test_shapes_alone_need_no_payload() -> None:
    """device="meta" gives shapes and dtypes without reading a payload byte; arrays are still arrays."""
    storage = saved({"m": {"w": torch.ones(3, 2, dtype=torch.float16)}, "a": np.arange(3)})
    back = cloudckpt.open(storage).load(device="meta")
    assert back["m"]["w"].is_meta
    assert (back["m"]["w"].shape, back["m"]["w"].dtype) == ((3, 2), torch.float16)
    assert back["a"].tolist() == [0, 1, 2]
    assert sum(length for _, _, length in storage.ranges) == back["a"].nbytes


@pytest.mark.parametrize("device", ["cuda:99", "no-such-device", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(device: str) -> None:
    """The error names the device."""
    storage = saved({"w": torch.ones(1)})
    with pytest.raises(ConfigError, match=f"device='{device}' cannot be used here"):
        cloudckpt.open(storage).load(device=device)
    assert storage.ranges == []


# -- chunks ----------------------------------------------------------------------------------------------------


def sharded(storage: MemoryStorage, boxes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[Index, Any]:
    """The one tensor ``w`` of a run, its payload rewritten as these boxes (offsets, lengths) end to end."""
    import crc32c

    run = cloudckpt.open(storage)
    checkpoint, index = run.select("latest"), run.index("latest")
    whole = run.load()["w"]["w"]
    entry = index.tensors["w"]["w"]
    name, at, chunks, body = entry.chunks[0].object, 0, [], b""
    for offsets, lengths in boxes:
        box = whole
        for dimension, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
            box = box.narrow(dimension, offset, length)
        raw = box.contiguous().numpy().tobytes()
        chunks.append(
            Chunk(object=name, start=at, length=len(raw), offsets=offsets, lengths=lengths, crc32c=crc32c.crc32c(raw))
        )
        at, body = at + len(raw), body + raw
    storage.put(keys.payload_key(checkpoint.step, checkpoint.id, name), [body], size_bytes=len(body))
    tensors = {"w": {"w": TensorEntry(dtype=entry.dtype, shape=entry.shape, chunks=tuple(chunks))}}
    return replace(index, tensors=tensors), checkpoint


ROWS = [((0, 0, 0), (1, 3, 4)), ((1, 0, 0), (1, 3, 4)), ((2, 0, 0), (4, 3, 4))]
COLUMNS = [((0, 0, 0), (6, 3, 1)), ((0, 0, 1), (6, 3, 3))]
TILES = [((0, 0, 0), (1, 2, 4)), ((0, 2, 0), (1, 1, 4)), ((1, 0, 0), (5, 2, 4)), ((1, 2, 0), (5, 1, 4))]


@pytest.mark.parametrize("settings", [Settings(), SMALL, Settings(max_read_bytes=7)], ids=["default", "small", "7"])
@pytest.mark.parametrize(
    ("boxes", "straight"), [(ROWS, True), (COLUMNS, False), (TILES, False)], ids=["rows", "columns", "tiles"]
)
@pytest.mark.parametrize("target", [None, torch.zeros(6, 3, 4)], ids=["fresh", "in place"])
def test_sharded_tensors_are_put_together(
    boxes: list[Any], straight: bool, settings: Settings, target: torch.Tensor | None
) -> None:
    """Chunks that are rows of the whole are read to their place in it; other boxes are copied there once proven."""
    storage = saved({"w": {"w": torch.arange(72.0).view(6, 3, 4)}})
    index, checkpoint = sharded(storage, boxes)
    storage.addresses.clear()
    outline = Outline(checkpoint, index)
    found = outline.tensor("w", "w")
    fetch(storage, outline, Homes({("w", "w"): target} if target is not None else {}), settings)
    assert torch.equal(found, torch.arange(72.0).view(6, 3, 4))
    assert target is None or found.data_ptr() == target.data_ptr()
    assert storage.went_straight_to(found) is straight


def test_a_damaged_chunk_is_named_however_it_is_cut() -> None:
    """A chunk that came in many pieces is compared as a whole; the error has its object, its range and both sums."""
    storage = saved({"m": {"a": torch.zeros(3000), "b": torch.ones(3000), "c": torch.zeros(10)}})
    run = cloudckpt.open(storage)
    chunk = run.index("latest").tensors["m"]["b"].chunks[0]
    key = f"{run.select('latest').name}/{chunk.object}"
    body = bytearray(storage.read(key, limit_bytes=10**6).body)
    body[chunk.start + 5000] ^= 1
    storage.put(key, [bytes(body)], size_bytes=len(body))
    place = rf"{chunk.object} bytes {chunk.start}\.\.{chunk.start + chunk.length}"
    for settings in (Settings(), SMALL):
        with pytest.raises(CorruptCheckpointError, match=rf"{place}: checksum \w{{8}}, sealed as {chunk.crc32c:08x}$"):
            cloudckpt.open(storage, settings=settings).load(1)


@pytest.mark.parametrize("order", ["damage first", "refusal first"])
def test_a_refusal_beside_damage_is_what_is_raised(order: str) -> None:
    """A store that refuses one range while another is damaged is an error of the store: nothing is called damaged."""
    inner = saved({"a": {"w": torch.zeros(100)}, "b": {"w": torch.ones(200)}}, MemoryStorage())
    both = threading.Barrier(2)
    met: set[str] = set()

    class Torn(MemoryStorage):
        def read(self, key: str, *, limit_bytes: int) -> Any:
            return inner.read(key, limit_bytes=limit_bytes)

        def read_into(self, key: str, start: int, *targets: memoryview) -> None:
            if key not in met:  # damage is looked at twice
                met.add(key)
                both.wait(30)
            if ("/a-" in key) == (order == "damage first"):
                targets[0][:] = bytes(len(targets[0]) - 1) + b"\1"
            else:
                raise StorageError("503: slow down")

    with pytest.raises(StorageError, match="503"):
        cloudckpt.open(Torn()).load()


def test_nothing_is_written_after_an_error_has_come_out() -> None:
    """Reads that were under way when another failed have ended when load() or restore() raises."""
    target = {f"w{n}": torch.zeros(100) for n in range(4)}
    storage = saved({"m": {name: torch.ones(100) for name in target}}, Watched())
    under_way, failed = threading.Event(), threading.Event()

    class Late(MemoryStorage):
        def read(self, key: str, *, limit_bytes: int) -> Any:
            return storage.read(key, limit_bytes=limit_bytes)

        def replace(self, key: str, body: bytes, *, expecting: str) -> Any:
            return storage.replace(key, body, expecting=expecting)

        def read_into(self, key: str, start: int, *targets: memoryview) -> None:
            if start == first:
                under_way.wait(30)
                failed.set()
                raise StorageError("503")
            under_way.set()
            failed.wait(30)
            storage.read_into(key, start, *targets)

    first = cloudckpt.open(storage).index("latest").tensors["m"]["w0"].chunks[0].start
    settings = Settings(max_read_bytes=400, io_threads=2)
    with CheckpointManager(Late(), settings=settings) as ckpts:
        with pytest.raises(StorageError, match="503"):
            ckpts.restore({"m": target})
        before = {name: tensor.clone() for name, tensor in target.items()}
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("cloudckpt-read")]
        assert all(torch.equal(before[name], tensor) for name, tensor in target.items())


# -- by way of a device's buffers ------------------------------------------------------------------------------


@pytest.fixture
def by_ferry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is brought as if its memory were not the host's: read into a buffer, summed, carried on."""
    monkeypatch.setattr(extents, "on_host", lambda _: False)


@pytest.mark.usefixtures("by_ferry")
@pytest.mark.parametrize("settings", [Settings(), SMALL], ids=["default", "small"])
def test_what_goes_by_way_of_buffers_arrives_whole(settings: Settings) -> None:
    """Pieces, gaps and chunks that are cut in two all arrive, in few buffers used again and again."""
    state: dict[str, Any] = {"m": {f"w{n}": torch.randn(n * 30 + 1) for n in range(20)}, "a": np.arange(50)}
    storage = saved(state)
    back = cloudckpt.open(storage, settings=settings).load()
    assert all(torch.equal(back["m"][name], tensor) for name, tensor in state["m"].items())
    assert np.array_equal(back["a"], state["a"])
    some = cloudckpt.open(storage, settings=settings).load(names=["w3", "w5"])["m"]
    assert torch.equal(some["w5"], state["m"]["w5"])
    assert not any(storage.went_straight_to(tensor) for tensor in back["m"].values())


@pytest.mark.usefixtures("by_ferry")
def test_damage_is_found_before_it_leaves_the_host() -> None:
    """The sums are those of the bytes that came."""
    storage = saved({"w": torch.ones(100)})
    run = cloudckpt.open(storage)
    key = f"{run.select('latest').name}/w-00000-of-00001.safetensors"
    body = bytearray(storage.read(key, limit_bytes=10**6).body)
    body[-1] ^= 1
    storage.put(key, [bytes(body)], size_bytes=len(body))
    with pytest.raises(CorruptCheckpointError, match="checksum"):
        run.load(1)


def test_a_malformed_reference_is_damage() -> None:
    """An index that refers to a tensor it does not list, or to a tensor as if it were an array's bytes, is damaged."""
    storage = saved({"m": {"w": torch.ones(3)}})
    run = cloudckpt.open(storage)
    checkpoint, index = run.select("latest"), run.index("latest")
    cases: list[tuple[Callable[[Outline], object], str]] = [
        (lambda outline: outline.tensor("m", "v"), r"refers to m\.v, which it does not list"),
        (lambda outline: outline.tensor("q", "w"), r"refers to q\.w, which it does not list"),
        (lambda outline: outline.array("m", "w"), r"m\.w is referred to as an array's bytes"),
    ]
    for ask, message in cases:
        with pytest.raises(CorruptCheckpointError, match=message):
            ask(Outline(checkpoint, index))
    whole = index.tensors["m"]["w"]
    (chunk,) = whole.chunks
    for entry, message in [
        (replace(whole, chunks=(replace(chunk, length=11),)), "cannot lie at bytes"),
        (replace(whole, chunks=(replace(chunk, start=3),)), "cannot lie at bytes"),
        (replace(whole, chunks=()), "its chunks hold 0 of 3 elements"),
    ]:
        with pytest.raises(CorruptCheckpointError, match=message):
            Outline(checkpoint, replace(index, tensors={"m": {"w": entry}})).tensor("m", "w")
