"""Payload objects by range: the same bytes and sums from the tensors' own memory as from the arena."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from crc32c import crc32c

from cloudckpt import SaveError
from cloudckpt.storage.base import Source
from cloudckpt.tensors.arena import PAGE_BYTES, Arena, positions
from cloudckpt.tensors.memory import byte_view
from cloudckpt.tensors.planning import Payload, Planner
from cloudckpt.tensors.sources import ArenaSource, Buffers, PayloadSource, TensorSource
from cloudckpt.tensors.staging import stage

KIB = 1024
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHELLS = [
    d
    for name in ("float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn_x2", "bits16", "uint16")
    if (d := getattr(torch, name, None))
]


def odd_state() -> dict[str, torch.Tensor]:
    """One of every kind of tensor, small and large."""
    torch.manual_seed(0)
    base = torch.randn(300, 70, 11)
    wave = torch.randn(50, 40, dtype=torch.complex64)
    shared = torch.randn(1000)
    state = {
        "large": torch.randn(100_000),
        "large and strided": base.transpose(0, 2),
        "every other": torch.randn(200_000)[::2],
        "expanded": torch.randn(1, 300).expand(400, 300),
        "conjugate": wave.conj(),
        "conjugate and strided": torch.randn(200, 100, dtype=torch.complex128).conj().T,
        "negative": wave.conj().imag,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "bool": torch.rand(77) > 0.5,
        "bytes": torch.arange(251, dtype=torch.uint8),
        "bfloat16": torch.randn(33).bfloat16(),
        "double": torch.randn(40_001, dtype=torch.float64),
        "parameter": torch.nn.Parameter(torch.randn(17, 3)),
        "graph": torch.randn(3, requires_grad=True) * 2,
        "slice": torch.arange(1000)[100:200],
        "small and strided": torch.randn(10, 10).T,
        "tied": shared,
        "tied too": shared,
    }
    for dtype in SHELLS:
        values = torch.randint(0, 100, (64, 3), dtype=torch.uint8).repeat(1, dtype.itemsize).view(dtype)
        state[f"{dtype}"] = values
        state[f"{dtype} strided"] = values.T
    with torch.inference_mode():
        state["inference"] = torch.randn(9)
    return state


def planned(tensors: dict[str, Any]) -> Payload:
    """The one payload object of these tensors."""
    (payload,) = Planner(0, 1).plan({"m": tensors}, allow_pickle=False).payloads
    return payload


def expected(payload: Payload) -> bytes:
    """The object's bytes, made in the plainest way."""
    parts = [payload.layout.header]
    for tensor in payload.tensors:
        plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
        parts.append(bytes(byte_view(plain)) if plain.numel() else b"")
    return b"".join(parts)


def from_tensors(payload: Payload) -> PayloadSource:
    """The tensors' own memory."""
    return TensorSource(payload, Buffers(4))


def from_arena(payload: Payload) -> PayloadSource:
    """Staged into an arena of small segments, behind another object, so that tensors cross from one to the next."""
    arena = Arena(segment_bytes=4 * PAGE_BYTES)
    other = planned({"w": torch.zeros(2000)})
    starts, total = positions([other.size_bytes, payload.size_bytes])
    arena.fit(total)
    stage([other, payload], arena)
    return ArenaSource(payload, arena, starts[1])


both = pytest.mark.parametrize("source_of", [from_tensors, from_arena])


@both
def test_iterating_gives_every_byte_in_order(source_of: Callable[[Payload], PayloadSource]) -> None:
    """Whatever the dtype, the strides, the ties: the bytes are those of the contiguous tensors after the header."""
    payload = planned(odd_state())
    source = source_of(payload)
    assert isinstance(source, Source)
    assert b"".join(bytes(view) for view in source) == expected(payload)


@both
def test_any_range_can_be_held_by_any_thread_again_and_again(source_of: Callable[[Payload], PayloadSource]) -> None:
    """Parts of any size, from several threads at once, in any order: the bytes are right, and their sums."""
    payload = planned(odd_state())
    source, whole = source_of(payload), expected(payload)
    pick = random.Random(7)
    ranges = [(0, len(whole)), (0, 0), (len(whole), 0), (3, 1)]
    for most in (50, 5000, 500_000):
        starts = [pick.randrange(len(whole)) for _ in range(30)]
        ranges += [(start, min(len(whole) - start, pick.randrange(most))) for start in starts]

    def check(wanted: tuple[int, int]) -> None:
        start, length = wanted
        with source.hold(start, length) as part:
            assert b"".join(part.views) == whole[start : start + length]
            assert part.size_bytes == length
            assert part.crc32c == crc32c(whole[start : start + length])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, ranges * 2))


@both
@pytest.mark.parametrize("part_bytes", [1000, 64 * KIB, 300 * KIB, 10**9])
def test_the_seal_knows_the_sum_of_the_object_and_of_every_box(
    part_bytes: int, source_of: Callable[[Payload], PayloadSource]
) -> None:
    """However the parts were cut, last ones first: the sums are those of the bytes."""
    payload = planned(odd_state())
    source, whole = source_of(payload), expected(payload)
    for start in reversed(range(0, len(whole), part_bytes)):
        with source.hold(start, min(part_bytes, len(whole) - start)):
            pass
    sealed, sums = source.seal()
    assert (sealed.size_bytes, sealed.crc32c) == (len(whole), crc32c(whole))
    places = payload.layout.places
    assert sums == [crc32c(whole[p.start : p.start + p.size_bytes]) for p in places]


@both
def test_what_nobody_has_held_is_summed_by_the_seal(source_of: Callable[[Payload], PayloadSource]) -> None:
    """A storage need not hold all of it, or may hold parts that overlap: the sums are right all the same."""
    payload = planned(odd_state())
    source, whole = source_of(payload), expected(payload)
    for start, length in ((10, 5000), (3000, 70_000), (200_000, 100)):
        with source.hold(start, length):
            pass
    sealed, sums = source.seal()
    assert sealed.crc32c == crc32c(whole)
    assert sums == [crc32c(whole[p.start : p.start + p.size_bytes]) for p in payload.layout.places]


@both
def test_a_range_outside_of_the_object_is_refused(source_of: Callable[[Payload], PayloadSource]) -> None:
    """Nobody gets a neighbour's bytes."""
    source = source_of(planned({"w": torch.ones(3)}))
    for start, length in ((-1, 2), (0, source.size_bytes + 1), (source.size_bytes, 1), (5, -1)):
        with pytest.raises(ValueError, match="bytes, not"), source.hold(start, length):
            pass


@both
def test_a_stopped_source_gives_out_nothing(source_of: Callable[[Payload], PayloadSource]) -> None:
    """Whoever asks after that is told why; it cannot be sealed either."""
    source = source_of(planned({"w": torch.ones(3)}))
    source.stop("the first reason")
    source.stop("the second reason")
    with pytest.raises(SaveError, match="first reason"), source.hold(0, 1):
        pass
    with pytest.raises(SaveError, match="first reason"):
        source.seal()


@both
def test_a_source_that_has_let_go_knows_no_tensor(source_of: Callable[[Payload], PayloadSource]) -> None:
    """Whoever still asks it is told that the save has failed."""
    source = source_of(planned({"w": torch.ones(3)}))
    source.let_go()
    assert source.payload.tensors == ()
    with pytest.raises(SaveError, match="its save has failed"), source.hold(0, 1):
        pass


def test_large_tensors_are_sent_from_where_they_are_and_small_ones_joined() -> None:
    """A thousand small tensors are one view; a large one is its own memory, not a copy."""
    large = torch.randn(50_000)
    payload = planned({"large": large} | {f"s{n:03}": torch.full((100,), float(n)) for n in range(1000)})
    with from_tensors(payload).hold(0, payload.size_bytes) as part:
        assert len(part.views) == 3  # header, the large one, the small ones
        large.fill_(7.0)
        assert bytes(part.views[1][:4]) == bytes(byte_view(torch.tensor(7.0)))


@pytest.mark.parametrize("name", ["large", "small and strided", "scalar"])
def test_a_tensor_that_changes_meanwhile_is_named(name: str) -> None:
    """When the object is sealed, and already when a part is sent again."""
    state = odd_state()
    payload = planned(state)
    source = TensorSource(payload, Buffers(2))
    with source.hold(0, 10):
        state[name].add_(1)
    with pytest.raises(SaveError, match=f"m.{name} changed while"), source.hold(0, 10):
        pass
    with pytest.raises(SaveError, match=f"m.{name} changed while"):
        source.seal()


def test_buffers_are_bounded() -> None:
    """Who comes when all are lent waits until one is back, and gets that one."""
    buffers, waiting, got = Buffers(1), threading.Event(), []

    def second() -> None:
        waiting.set()
        with buffers.lend(10) as buffer:
            got.append(buffer.data_ptr())

    with buffers.lend(1000) as buffer:
        thread = threading.Thread(target=second)
        thread.start()
        waiting.wait()
        assert got == []
        address = buffer.data_ptr()
    thread.join()
    assert got == [address]


def test_a_buffer_that_cannot_be_had_is_an_error_with_its_size() -> None:
    """And the place is free again for who needs less."""
    buffers = Buffers(1)
    with (
        pytest.raises(MemoryError, match=r"a part that is sent needs 1024\.0 PiB of host memory"),
        buffers.lend(1 << 60),
    ):
        pass
    with buffers.lend(10) as buffer:
        assert buffer.numel() >= 10


@pytest.mark.parametrize("dtype", list(BITS.values()))
def test_no_more_than_the_range_is_copied_of_a_strided_tensor(dtype: torch.dtype) -> None:
    """Every range of a tensor whose dimensions are all mixed up is the range of its contiguous copy."""
    tensor = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).to(dtype).permute(2, 0, 3, 1)
    payload = planned({"w": tensor})
    source, whole = from_tensors(payload), expected(payload)
    begin = payload.bounds[1]
    for start in range(begin, len(whole), dtype.itemsize + 1):
        for stop in range(start, len(whole), 7):
            with source.hold(start, stop - start) as part:
                assert b"".join(part.views) == whole[start:stop]
