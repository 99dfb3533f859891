from __future__ import annotations

from typing import Any

import pytest

from cloudckpt.core.layout import read_header
from cloudckpt.core.model import Chunk, Index, TensorEntry
from cloudckpt.core.whole import as_they_are, plan_whole, weight_map
from cloudckpt.errors import ConfigError
from cloudckpt.testing.builders import index

#: Four rows of three elements, two bytes each, as numbers from 0.
WHOLE = bytes(range(24))


def entry(*chunks: tuple[str, int, tuple[int, int], tuple[int, int]], **fields: Any) -> TensorEntry:
    """A bfloat16 tensor of 4 x 3 in boxes: object, start, offsets, lengths."""
    made = tuple(
        Chunk(object=o, start=s, length=2 * n[0] * n[1], offsets=at, lengths=n, crc32c=0) for o, s, at, n in chunks
    )
    given: dict[str, Any] = {"dtype": "bfloat16", "shape": (4, 3), "chunks": made, **fields}
    return TensorEntry(**given)


def with_tensors(**tensors: TensorEntry) -> Index:
    """An index with these tensors in the component ``model``."""
    return index(tensors={"model": tensors, "empty": {}}, structure={"model": {}, "empty": {}})


def assembled(found: Index, stored: dict[str, bytes], component: str = "model") -> dict[str, bytes]:
    """The bytes of each tensor, as the planned files have them."""
    tensors: dict[str, bytes] = {}
    for file in plan_whole(found, component):
        body = bytearray(file.size_bytes)
        body[: len(file.header)] = file.header
        for move in file.moves:
            chunk = move.chunk
            data = stored[chunk.object][chunk.start : chunk.start + chunk.length]
            for start, length in move.runs:
                body[start : start + length], data = data[:length], data[length:]
            assert data == b""
        for name, (_, _, start, length) in read_header(bytes(body), object_size_bytes=len(body)).items():
            tensors[name] = bytes(body[start : start + length])
    return tensors


def columns(first: int, count: int) -> bytes:
    """Some columns of ``WHOLE``, row after row, as a rank that has them stores them."""
    return b"".join(WHOLE[6 * row + 2 * first : 6 * row + 2 * (first + count)] for row in range(4))


@pytest.mark.parametrize(
    ("stored", "boxes"),
    [
        ({"a": WHOLE}, [("a", 0, (0, 0), (4, 3))]),
        ({"a": WHOLE[:6], "b": WHOLE[6:]}, [("b", 0, (1, 0), (3, 3)), ("a", 0, (0, 0), (1, 3))]),
        ({"a": columns(0, 1), "b": b"xx" + columns(1, 2)}, [("a", 0, (0, 0), (4, 1)), ("b", 2, (0, 1), (4, 2))]),
        ({"a": WHOLE}, [("a", 0, (0, 0), (4, 3)), ("a", 24, (4, 0), (0, 3))]),
    ],
    ids=["whole", "rows", "columns", "an empty box"],
)
def test_a_sharded_tensor_is_whole_again(
    stored: dict[str, bytes], boxes: list[tuple[str, int, tuple[int, int], tuple[int, int]]]
) -> None:
    """Rows or columns of any rank come to where they belong."""
    assert assembled(with_tensors(w=entry(*boxes)), stored) == {"w": WHOLE}


def test_tied_tensors_stand_under_each_of_their_names() -> None:
    """load_state_dict wants every name: the bytes are there twice."""
    found = with_tensors(w=entry(("a", 0, (0, 0), (4, 3))), tied=entry(alias_of="w", chunks=()))
    assert assembled(found, {"a": WHOLE}) == {"w": WHOLE, "tied": WHOLE}


def test_a_dtype_without_a_name_is_bytes_and_said_to_be() -> None:
    """Its size per element follows from its bytes; an empty one has none to tell."""
    odd = entry(("a", 0, (0, 0), (4, 3)), dtype="complex16")
    empty = entry(("a", 0, (0, 0), (0, 3)), dtype="complex16", shape=(0, 3))
    (file,) = plan_whole(with_tensors(odd=odd, empty=empty, plain=entry(("a", 0, (0, 0), (4, 3)))), "model")
    assert file.opaque == ("odd", "empty")
    header = read_header(file.header + bytes(file.size_bytes - len(file.header)), object_size_bytes=file.size_bytes)
    assert header["odd"][:2] == ("U8", (24,))


def test_large_components_are_cut_between_tensors() -> None:
    """Numbered files of at most so many bytes, a larger tensor alone, and the document that finds each tensor."""
    boxes = {name: entry(("a", 0, (0, 0), (4, 3))) for name in "abc"}
    files = plan_whole(with_tensors(**boxes), "model", most_bytes=48)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [file.tensors for file in files] == [("a", "b"), ("c",)]
    assert len(plan_whole(with_tensors(**boxes), "model", most_bytes=1)) == 3
    (one,) = plan_whole(with_tensors(**boxes), "model")
    assert one.name == "model.safetensors"
    assert weight_map(files) == {
        "metadata": {"total_size": 72},
        "weight_map": {"a": files[0].name, "b": files[0].name, "c": files[1].name},
    }


def test_what_is_not_there_is_refused() -> None:
    """No such component, or one that has only values."""
    with pytest.raises(ConfigError, match="has no component 'nope'; it has 'model', 'empty'"):
        plan_whole(with_tensors(), "nope")
    with pytest.raises(ConfigError, match="has no tensors: only values"):
        plan_whole(with_tensors(), "empty")


def test_stored_objects_that_others_can_read_are_listed_as_they_are() -> None:
    """Whole tensors under their own names; tied ones are named once."""
    whole = entry(("a", 0, (0, 0), (4, 3)))
    assert as_they_are(with_tensors(w=whole, tied=entry(alias_of="w", chunks=())), "model") == {
        "metadata": {"total_size": 24},
        "weight_map": {"w": "a"},
    }


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"w": entry(("a", 0, (0, 0), (2, 3)), ("b", 0, (2, 0), (2, 3)))},
        {"w": entry(("a", 0, (0, 0), (2, 3)))},
        {"w": entry(("a", 0, (0, 0), (4, 3)), dtype="complex16")},
        {
            "w": entry(
                chunks=(
                    Chunk(object="a", start=0, length=24, offsets=(0, 0), lengths=(4, 3), crc32c=0, stored_as="w~1"),
                )
            )
        },
    ],
    ids=["none", "two boxes", "a part", "an odd dtype", "another name"],
)
def test_stored_objects_that_others_cannot_read_are_not_listed(tensors: dict[str, TensorEntry]) -> None:
    """A single tensor that they would miss or misread, and there is no document."""
    assert as_they_are(with_tensors(**tensors), "model") is None
