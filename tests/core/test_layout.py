"""Where each tensor lies in a payload object."""

from __future__ import annotations

import json
import math
import struct

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core.layout import ALIGNMENT, Item, plan_layout, read_header
from cloudckpt.errors import FormatError

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "uint8": 1, "bool": 1, "complex128": 16, "float8_e5m2fnuz": 1}
items = st.lists(
    st.builds(
        lambda name, dtype, shape: Item(name=name, dtype=dtype, shape=tuple(shape), item_size=SIZES[dtype]),
        st.sampled_from(["w", "b", "w~1", "__metadata__", "", "ä b.c"]),
        st.sampled_from(sorted(SIZES)),
        st.lists(st.integers(0, 4), max_size=3),
    ),
    max_size=8,
)


@given(items)
def test_no_holes_all_aligned_each_once(given_items: list[Item]) -> None:
    """Tensors follow one another without holes, each on a multiple of its element size, data from a 64-byte boundary."""
    layout = plan_layout(given_items)
    assert len(layout.header) % ALIGNMENT == 0
    at = len(layout.header)
    for place in layout.places:
        assert place.start == at
        assert place.start % place.item.item_size == 0
        assert given_items[place.number] is place.item
        at += place.size_bytes
    assert layout.size_bytes == at
    assert sorted(place.number for place in layout.places) == list(range(len(given_items)))
    names = [place.stored_as for place in layout.places]
    assert len(set(names)) == len(names)
    assert "__metadata__" not in names
    assert set(read_header(layout.header, object_size_bytes=layout.size_bytes)) == set(names)


@given(items)
def test_equal_items_give_equal_bytes(given_items: list[Item]) -> None:
    """The layout is a function of its items alone."""
    assert plan_layout(given_items) == plan_layout(list(given_items))


def test_the_reference_library_reads_it() -> None:
    """What is laid out here is a safetensors file to the safetensors library, odd names and empty tensors included."""
    tensors = {
        "w": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 3, dtype=torch.int16),
        "ö . ": torch.tensor([True, False]),
    }
    listed = [
        Item(name=n, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape), item_size=t.dtype.itemsize)
        for n, t in tensors.items()
    ]
    layout = plan_layout(listed)
    body = bytearray(layout.header)
    for place in layout.places:
        body += tensors[place.item.name].numpy().tobytes()
    loaded = safetensors.torch.load(bytes(body))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize(
    "dtype",
    [
        *("bool", "uint8", "int8", "int16", "uint16", "float16", "bfloat16", "int32", "uint32", "float32", "int64"),
        *("uint64", "float64", "float8_e4m3fn", "float8_e5m2"),
    ],
)
def test_every_dtype_has_the_reference_library_s_name_and_size(dtype: str) -> None:
    """A file that the safetensors library wrote has a header that is read here, and is laid out here in the same way."""
    tensor = torch.zeros(3, dtype=getattr(torch, dtype))
    body = safetensors.torch.save({"w": tensor})
    theirs = read_header(body, object_size_bytes=len(body))["w"]
    layout = plan_layout([Item(name="w", dtype=dtype, shape=(3,), item_size=tensor.dtype.itemsize)])
    ours = read_header(layout.header, object_size_bytes=layout.size_bytes)["w"]
    assert theirs[:2] == ours[:2]
    assert ours[0] != "U8" or dtype == "uint8"


def test_names_that_are_taken_get_a_suffix_and_own_names_win() -> None:
    """A second "w" becomes "w~2" where another item is called "w~1"; ``__metadata__`` is never a tensor's name."""
    listed = [Item(name=n, dtype="uint8", shape=(1,), item_size=1) for n in ("w", "w", "w~1", "__metadata__")]
    assert [p.stored_as for p in plan_layout(listed).places] == ["w", "w~2", "w~1", "__metadata__~1"]


def test_a_dtype_without_a_name_is_stored_as_bytes() -> None:
    """A dtype that safetensors cannot name is U8 of as many bytes as it has."""
    layout = plan_layout([Item(name="z", dtype="complex128", shape=(2, 2), item_size=16)])
    assert read_header(layout.header, object_size_bytes=layout.size_bytes)["z"][:2] == ("U8", (64,))


def test_sizes_past_32_bits() -> None:
    """Tensors past 2**31 and 2**40 bytes are arithmetic."""
    listed = [
        Item(name="big", dtype="float32", shape=(2**20, 2**12), item_size=4),
        Item(name="huge", dtype="bfloat16", shape=(2**20, 2**20), item_size=2),
    ]
    layout = plan_layout(listed)
    assert layout.size_bytes == len(layout.header) + 2**34 + 2**41
    assert layout.places[1].start == len(layout.header) + 2**34


def raw(text: bytes) -> bytes:
    """A header of any bytes."""
    return struct.pack("<Q", len(text)) + text


def head(document: object, extra: int = 0) -> bytes:
    """A header around any document."""
    text = json.dumps(document).encode()
    return struct.pack("<Q", len(text) + extra) + text


ONE = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("body", "size", "what"),
    [
        (b"short", 5, "too short"),
        (head({}, extra=1000), 100, "does not fit"),
        (struct.pack("<Q", 2**60) + b"{}", 2**62, "does not fit"),
        (struct.pack("<Q", 4) + b"nope", 12, "not a safetensors header"),
        (head([1]), 100, "not a safetensors header"),
        (head({"w": {"dtype": "U8"}}), 100, "not a safetensors header"),
        (head({"w": {**ONE, "data_offsets": [1, 4]}}), len(head({"w": ONE})) + 4, "hole or an overlap"),
        (head({"w": ONE, "v": ONE}), len(head({"w": ONE, "v": ONE})) + 4, "hole or an overlap"),
        (head({"w": {**ONE, "data_offsets": [0, -4]}}), 100, "hole or an overlap"),
        (head({"w": ONE}), len(head({"w": ONE})) + 5, "describes"),
        *[
            (head(document), len(head(document)) + 4, what)
            for document, what in [
                ({"w": {**ONE, "shape": [5]}}, "does not lie"),
                ({"w": {**ONE, "shape": [0]}}, "does not lie"),
                ({"w": {**ONE, "shape": [-2, -2]}}, "does not lie"),
                ({"w": {**ONE, "dtype": "F32"}}, "does not lie"),
                ({"w": {**ONE, "dtype": "NEW", "shape": [-1]}}, "does not lie"),
                ({"w": {**ONE, "dtype": 5}}, "not a safetensors header"),
                ({"w": {**ONE, "shape": "4"}}, "not a safetensors header"),
                ({"w": {**ONE, "shape": [4.0]}}, "not a safetensors header"),
                ({"w": {**ONE, "shape": [math.inf]}}, "not a safetensors header"),
                ({"w": {**ONE, "data_offsets": [False, 4]}}, "not a safetensors header"),
                ({"w": {**ONE, "data_offsets": [0, 4, 9]}}, "not a safetensors header"),
                ({"w": ONE, "__metadata__": 7}, "not a safetensors header"),
                ({"w": ONE, "__metadata__": {"format": 7}}, "not a safetensors header"),
            ]
        ],
        (raw(b" {}"), 11, "must begin with"),
        (raw("{}".encode("utf-16-le")), 12, "not a safetensors header"),
        (raw(b'{"\xff":{}}'), 100, "not a safetensors header"),
        (raw(b'{"w":{},"w":{}}'), 100, "occurs twice"),
    ],
)
def test_a_header_that_does_not_cover_its_object_is_refused(body: bytes, size: int, what: str) -> None:
    """Holes, overlaps, wrong sizes and things that are no header are refused by what is wrong."""
    with pytest.raises(FormatError, match=what):
        read_header(body, object_size_bytes=size)


def test_a_younger_dtype_is_believed() -> None:
    """A dtype that this version does not know is read by its offsets alone."""
    body = head({"w": {**ONE, "dtype": "F4", "shape": [8]}})
    assert read_header(body, object_size_bytes=len(body) + 4) == {"w": ("F4", (8,), len(body), 4)}


@pytest.mark.parametrize(
    ("dtype", "shape", "item_size"),
    [
        ("float32", (3,), 8),
        ("float32", (-1,), 4),
        ("float32", (3,), 0),
        ("odd", (1,), 3),
        ("odd", (1,), 0),
        ("odd", (1,), -4),
        ("complex128", (2, -1), 16),
    ],
)
def test_items_that_cannot_be_are_refused(dtype: str, shape: tuple[int, ...], item_size: int) -> None:
    """A negative dimension, or an element size that its dtype does not have, is refused by the tensor's name."""
    with pytest.raises(FormatError, match=r"^layers\.0: no tensor of shape"):
        plan_layout([Item(name="layers.0", dtype=dtype, shape=shape, item_size=item_size)])


def test_an_empty_object_has_only_a_header() -> None:
    """No tensors is a valid layout, and reads back as none."""
    layout = plan_layout([])
    assert read_header(layout.header, object_size_bytes=layout.size_bytes) == {}
