"""Where each tensor lies inside a payload object, known before a byte moves.

A payload object is a valid safetensors file: 8 bytes little-endian header length, a JSON header, the data
(https://huggingface.co/docs/safetensors, format). Tensors are ordered by element size, largest first, so that
each is aligned without holes, and the data starts on a 64-byte boundary.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cloudckpt.errors import FormatError

__all__ = ["ALIGNMENT", "Item", "Layout", "Place", "item_size", "plan_layout", "read_header", "torch_name"]

#: Data begins on a multiple of this many bytes; a cache line, and enough for every element size.
ALIGNMENT = 64

#: Larger headers are refused by the safetensors library as well.
_HEADER_LIMIT = 100_000_000

_METADATA = "__metadata__"

#: torch's dtype names -> safetensors' names, for those that readers of the last years all know.
_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "int64": "I64",
    "uint64": "U64",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}

#: safetensors' names -> bytes per element.
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One tensor, or one box of a tensor, to be stored.

    Attributes:
        name: the name it should have in the file.
        dtype: torch's name of its dtype, such as ``bfloat16``.
        shape: elements per dimension.
        item_size: bytes per element.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    item_size: int

    @property
    def size_bytes(self) -> int:
        """Elements times element size."""
        return math.prod(self.shape) * self.item_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where item ``number`` lies: ``start`` counts from the beginning of the object."""

    number: int
    item: Item
    stored_as: str
    start: int
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A whole payload object: ``header`` are its first bytes, ``places`` the rest, in file order."""

    header: bytes
    places: tuple[Place, ...]
    size_bytes: int


def item_size(dtype: str) -> int | None:
    """Bytes per element of a dtype that safetensors can name, by torch's name of it; None for another one."""
    known = _NAMES.get(dtype)
    return None if known is None else _SIZES[known]


def torch_name(dtype: str) -> str | None:
    """Torch's name of a dtype, by safetensors' name of it; None for one that is not known here."""
    return next((name for name, known in _NAMES.items() if known == dtype), None)


def plan_layout(items: Sequence[Item]) -> Layout:
    """Lay out one payload object. Equal items in equal order give equal bytes.

    Raises:
        FormatError: a dimension is negative, or an element size is not its dtype's or no power of two.
    """
    for item in items:
        _check_item(item)
    names = _stored_names(items)
    order = sorted(range(len(items)), key=lambda n: -items[n].item_size)
    header: dict[str, object] = {_METADATA: {"format": "pt"}}
    offset = 0
    offsets: list[int] = []
    for n in order:
        end = offset + items[n].size_bytes
        known = _NAMES.get(items[n].dtype)
        header[names[n]] = {
            "dtype": known or "U8",
            "shape": list(items[n].shape) if known else [items[n].size_bytes],
            "data_offsets": [offset, end],
        }
        offsets.append(offset)
        offset = end
    # JSON's own escapes keep the header ASCII: any name survives, lone surrogates included.
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    head = struct.pack("<Q", len(text)) + text
    places = tuple(
        Place(number=n, item=items[n], stored_as=names[n], start=len(head) + at, size_bytes=items[n].size_bytes)
        for n, at in zip(order, offsets, strict=True)
    )
    return Layout(header=head, places=places, size_bytes=len(head) + offset)


def _check_item(item: Item) -> None:
    known = _NAMES.get(item.dtype)
    fits = item.item_size == _SIZES[known] if known else item.item_size > 0 and item.item_size.bit_count() == 1
    if not fits or min(item.shape, default=0) < 0:
        raise FormatError(
            f"{item.name}: no tensor of shape {item.shape} has elements of {item.dtype} with {item.item_size} bytes"
        )


def _stored_names(items: Sequence[Item]) -> list[str]:
    """A name of its own for each item; the first to ask for a free name gets it."""
    plain = {item.name for item in items} | {_METADATA}
    taken = {_METADATA}
    names: list[str] = []
    for item in items:
        name, number = item.name, 0
        while name in taken or (number and name in plain):
            number += 1
            name = f"{item.name}~{number}"
        taken.add(name)
        names.append(name)
    return names


def read_header(head: bytes, *, object_size_bytes: int) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """What the header of a payload object says: name -> (dtype, shape, start in the object, length in bytes).

    Args:
        head: the first bytes of the object, at least the whole header.
        object_size_bytes: the object's size.

    Raises:
        FormatError: it is no safetensors header, or it does not cover the object without holes and overlaps.
    """
    if len(head) < 8:
        raise FormatError("too short for a safetensors header")
    length = struct.unpack("<Q", head[:8])[0]
    if length > _HEADER_LIMIT or 8 + length > min(len(head), object_size_bytes):
        raise FormatError(f"a safetensors header of {length} bytes does not fit")
    try:
        # Decoded here: given bytes, json would also take UTF-16 and UTF-32, which the format does not know.
        text = head[8 : 8 + length].decode("utf-8")
        header = json.loads(text, object_pairs_hook=_unique)
        if not text.startswith("{"):
            raise ValueError("it must begin with {")
        found = {name: _read_tensor(name, value) for name, value in header.items() if name != _METADATA}
        if not all(type(value) is str for value in header.get(_METADATA, {}).values()):
            raise ValueError(f"{_METADATA} holds more than strings")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as exc:
        raise FormatError(f"not a safetensors header: {exc!r}") from exc
    _check_covers((start, end) for _, _, start, end in found.values())
    for name, (dtype, shape, start, end) in found.items():
        # A dtype younger than this code is believed: its element size is not known here.
        if min(shape, default=0) < 0 or (dtype in _SIZES and math.prod(shape) * _SIZES[dtype] != end - start):
            raise FormatError(f"{name!r}: {dtype} of shape {shape} does not lie at bytes {start}..{end} of the data")
    data = 8 + length
    end = max((end for _, _, _, end in found.values()), default=0)
    if data + end != object_size_bytes:
        raise FormatError(f"the header describes {data + end} bytes and the object has {object_size_bytes}")
    return {name: (dtype, shape, data + start, end - start) for name, (dtype, shape, start, end) in found.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _read_tensor(name: str, value: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
    if type(dtype) is not str or type(shape) is not list or any(type(n) is not int for n in (*shape, start, end)):
        raise TypeError(name)
    return dtype, tuple(shape), start, end


def _check_covers(ranges: Iterable[tuple[int, int]]) -> None:
    at = 0
    for start, end in sorted(ranges):
        if start != at or end < start:
            raise FormatError(f"a hole or an overlap at byte {min(start, at)} of the data")
        at = end
