"""The copy into the arena."""

from __future__ import annotations

import torch

from cloudckpt.tensors.arena import PAGE_BYTES, Arena, positions
from cloudckpt.tensors.planning import Payload, Planner
from cloudckpt.tensors.sources import ArenaSource
from cloudckpt.tensors.staging import stage

MIB = 1024 * 1024


def planned(state: dict[str, object]) -> tuple[Payload, ...]:
    """The payload objects of a state."""
    return Planner(0, 1).plan(state, allow_pickle=False).payloads


def staged(payloads: tuple[Payload, ...], arena: Arena) -> list[bytes]:
    """The bytes of each object, staged."""
    starts, total = positions([payload.size_bytes for payload in payloads])
    arena.fit(total)
    stage(payloads, arena).wait_staged()
    sources = [ArenaSource(payload, arena, start) for payload, start in zip(payloads, starts, strict=True)]
    return [b"".join(map(bytes, source)) for source in sources]


def test_several_threads_copy_what_one_would() -> None:
    """A state that is large enough for several threads, with segments that end inside of tensors, comes out whole."""
    torch.manual_seed(1)
    state: dict[str, object] = {
        "a": {f"w{n}": torch.randn(900_001) for n in range(20)},
        "b": {f"s{n}": torch.randn(100 + n) for n in range(2000)},
        "c": {"strided": torch.randn(2000, 3000).T, "half": torch.randn(4_000_001).half()},
    }
    payloads = planned(state)
    for payload, body in zip(payloads, staged(payloads, Arena(segment_bytes=5 * MIB + PAGE_BYTES)), strict=True):
        assert body[: payload.bounds[1]] == payload.layout.header
        for tensor, place in zip(payload.tensors, payload.layout.places, strict=True):
            found = torch.frombuffer(bytearray(body), dtype=tensor.dtype, count=tensor.numel(), offset=place.start)
            assert torch.equal(found.view(tensor.shape), tensor)


def test_the_state_may_change_as_soon_as_it_is_staged() -> None:
    """What was staged is a copy, whether the tensor lay flat or not."""
    flat, strided = torch.zeros(100_000), torch.zeros(300, 300).T
    payloads = planned({"m": {"flat": flat, "strided": strided}})
    arena = Arena()
    before = staged(payloads, arena)
    flat.fill_(1), strided.fill_(1)
    starts, _ = positions([payload.size_bytes for payload in payloads])
    assert [b"".join(map(bytes, ArenaSource(payloads[0], arena, starts[0])))] == before


def test_a_component_without_tensors_needs_no_memory() -> None:
    """There is no payload object to stage."""
    assert planned({"lr": {"value": 0.1}}) == ()
    assert staged((), Arena()) == []
