"""The index ``checkpoint.json`` as bytes, both directions.

Its keys keep their order (the order of a state dict is part of the state), and its last field, ``digest``, is
the SHA-256 of the same bytes without that field, so that a claim can tell a whole index from a changed one
even before any manifest has recorded its digest.
"""

from __future__ import annotations

import hashlib
import json
import marshal
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

from cloudckpt.core import keys
from cloudckpt.core.checksum import format_crc32c, format_sums, is_crc32c, parse_crc32c, parse_sums
from cloudckpt.core.manifest_json import policy_from_json, policy_to_json
from cloudckpt.core.model import Cells, Chunk, Index, Json, PayloadObject, TensorEntry, Tensors
from cloudckpt.core.wire import LARGEST_INTEGER, Reader, canonical, metrics_to_json, parse_document
from cloudckpt.errors import FormatError

__all__ = ["INDEX_LIMIT_BYTES", "StructureText", "TensorsText", "decode_index", "encode_index", "index_digest"]

#: An index with 1,000,000 tensors has about 300 MiB; anything past this limit is not one of ours.
INDEX_LIMIT_BYTES = 512 * 1024 * 1024

#: How large the cells of an object may be. Smaller ones would make an index of more sums than names.
_CELL_BYTES = range(4096, 2**30 + 1)

_END = b"}\n"


def index_digest(body: bytes) -> str:
    """The digest of an index's bytes as the manifest records it: ``sha256:<hex>``."""
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


#: What stands before the eight digits of a chunk's sum. Nothing else can look like it: a quotation mark inside of a
#: JSON string has a backslash before it, and the other ``crc32c`` fields are not below ``tensors``.
_SUM = '"crc32c": "'


class TensorsText:
    """The index's ``tensors`` as text that lacks nothing but the sums: all else stays from save to save.

    Args:
        tensors: the entries. Each chunk has its number, from 0, for a sum.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._first, *rest = _dumped(_tensors_to_json(tensors)).split(_SUM)
        self._numbers = [int(text[:8], 16) for text in rest]
        self._between = [text[8:] for text in rest]

    def filled(self, sums: Sequence[int]) -> str:
        """The text with ``sums[n]`` as the sum of chunk ``n``."""
        pairs = zip(self._numbers, self._between, strict=True)
        return self._first + "".join([f"{_SUM}{sums[number]:08x}{text}" for number, text in pairs])


class StructureText:
    """The index's ``structure`` as text. What a component looked like at the last save is not spelled anew."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[bytes, str]] = {}

    def of(self, structure: Mapping[str, Json]) -> str:
        """The text; remembers it."""
        # As bytes, since Python finds 1, 1.0 and True equal.
        seen = {name: marshal.dumps(node, _BY_VALUE) for name, node in structure.items()}
        before = self._known
        self._known = {
            name: before[name] if name in before and before[name][0] == now else (now, _dumped(structure[name]))
            for name, now in seen.items()
        }
        return "{" + ", ".join(f"{_dumped(name)}: {text}" for name, (_, text) in self._known.items()) + "}"


#: The version of marshal in which equal values are equal bytes, whatever else shares them.
_BY_VALUE = 2


def encode_index(index: Index, *, tensors: str | None = None, structure: str | None = None) -> bytes:
    """The index's bytes.

    Args:
        tensors: ``index.tensors`` as text, where the caller has it.
        structure: ``index.structure`` likewise.
    """
    if tensors is None and structure is None:
        body = canonical(_to_json(index), readable=False)
    else:
        tensors = _dumped(_tensors_to_json(index.tensors)) if tensors is None else tensors
        structure = _dumped(dict(index.structure)) if structure is None else structure
        head, extra = _dumped(_head_to_json(index)), _dumped(dict(index.extra))
        tail = f", {extra[1:]}" if index.extra else "}"
        text = f'{head[:-1]}, "tensors": {tensors}, "structure": {structure}{tail}'
        try:
            body = text.encode("utf-8") + b"\n"
        except UnicodeEncodeError:  # a lone surrogate somewhere
            body = canonical(json.loads(text), readable=False)
    return body.removesuffix(_END) + _digest_field(index_digest(body))


def _dumped(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _digest_field(digest: str) -> bytes:
    return f', "digest": "{digest}"'.encode("ascii") + _END


def decode_index(body: bytes, *, what: str = keys.INDEX_NAME) -> Index:
    """The index in ``body``.

    Raises:
        FormatError: not an index of a format this code knows, or changed since it was written.
    """
    root = Reader(parse_document(body, what=what, limit_bytes=INDEX_LIMIT_BYTES), "", [])
    digest = root.at("digest").digest()
    index = Index(
        format=root.at("format").integer(least=1),
        requires=root.at("requires").texts(),
        run_id=root.at("run_id").hex(32),
        id=root.at("id").save_id(),
        step=root.at("step").step(),
        seq=root.at("seq").integer(least=1),
        writer_epoch=root.at("writer_epoch").integer(least=1),
        announced_at=root.at("announced_at").time(),
        sealed_at=root.at("sealed_at").time(),
        world_size=root.at("world_size").integer(least=1),
        metrics=root.at("metrics").metrics(),
        tags=root.at("tags").texts(),
        pinned=root.at("pinned").boolean(),
        policy=policy_from_json(root.at("policy")),
        versions={name: item.text() for name, item in root.at("versions").mapping().items()},
        objects=tuple(_object(item) for item in root.at("objects").items()),
        tensors={component: _tensors(tensors) for component, tensors in root.at("tensors").mapping().items()},
        structure={name: item.value for name, item in root.at("structure").mapping().items()},
        pickled=root.at("pickled").boolean(),
        extra=root.rest(),
    )
    _check_together(index, root)
    root.finish(what)
    sealed = body.removesuffix(_digest_field(digest)) + _END
    if index_digest(sealed) != digest:
        raise FormatError(f"{what} was changed after it was written: its digest does not match")
    return index


def _check_together(index: Index, root: Reader) -> None:
    sizes = {item.name: item.size_bytes for item in index.objects}
    if len(sizes) != len(index.objects):
        root.at("objects").complain("two payload objects have the same name")
    for component, tensors in index.tensors.items():
        for name, tensor in tensors.items():
            if tensor.alias_of is not None and tensors.get(tensor.alias_of, tensor).alias_of is not None:
                root.at("tensors").complain(f"{component}: {name}: alias_of names no stored tensor")
            if tensor.alias_of is not None and tensor.chunks:
                root.at("tensors").complain(f"{component}: {name}: an alias has no bytes of its own")
            for chunk in tensor.chunks:
                if chunk.object not in sizes or chunk.start + chunk.length > sizes[chunk.object]:
                    root.at("tensors").complain(f"{component}: {name}: bytes outside of its payload object")
                if len(chunk.offsets) != len(tensor.shape) or not _inside(chunk, tensor):
                    root.at("tensors").complain(f"{component}: {name}: a chunk outside of its shape")


def _inside(chunk: Chunk, tensor: TensorEntry) -> bool:
    places: Iterable[tuple[int, int, int]] = zip(chunk.offsets, chunk.lengths, tensor.shape, strict=False)
    return len(chunk.lengths) == len(tensor.shape) and all(o + n <= size for o, n, size in places)


def _to_json(index: Index) -> dict[str, Any]:
    tensors, structure = _tensors_to_json(index.tensors), dict(index.structure)
    return {**_head_to_json(index), "tensors": tensors, "structure": structure, **index.extra}


def _head_to_json(index: Index) -> dict[str, Any]:
    return {
        "format": index.format,
        "requires": list(index.requires),
        "run_id": index.run_id,
        "id": index.id,
        "step": index.step,
        "seq": index.seq,
        "writer_epoch": index.writer_epoch,
        "announced_at": index.announced_at,
        "sealed_at": index.sealed_at,
        "world_size": index.world_size,
        "metrics": metrics_to_json(index.metrics),
        "tags": list(index.tags),
        "pinned": index.pinned,
        "policy": policy_to_json(index.policy),
        "versions": dict(index.versions),
        "pickled": index.pickled,
        "objects": [_object_to_json(item) for item in index.objects],
    }


def _object_to_json(item: PayloadObject) -> dict[str, Any]:
    found = {"name": item.name, "size_bytes": item.size_bytes, "crc32c": format_crc32c(item.crc32c)}
    if (cells := item.cells) is None:
        return found
    return {**found, "cells": {"size_bytes": cells.size_bytes, "crc32c": format_sums(cells.crc32c)}}


def _tensors_to_json(tensors: Tensors) -> dict[str, Any]:
    return {
        component: {name: _tensor_to_json(tensor) for name, tensor in own.items()} for component, own in tensors.items()
    }


def _tensor_to_json(tensor: TensorEntry) -> dict[str, Any]:
    head: dict[str, Any] = {"dtype": tensor.dtype, "shape": list(tensor.shape)}
    if tensor.alias_of is not None:
        return {**head, "alias_of": tensor.alias_of}
    return {**head, "chunks": [_chunk_to_json(chunk) for chunk in tensor.chunks]}


def _chunk_to_json(chunk: Chunk) -> dict[str, Any]:
    stored: Mapping[str, Any] = {} if chunk.stored_as is None else {"stored_as": chunk.stored_as}
    return {
        "object": chunk.object,
        "start": chunk.start,
        "length": chunk.length,
        "offsets": list(chunk.offsets),
        "lengths": list(chunk.lengths),
        "crc32c": format_crc32c(chunk.crc32c),
        **stored,
    }


def _object(reader: Reader) -> PayloadObject:
    name = reader.object().at("name").text()
    if not keys.is_payload_name(name):
        reader.at("name").problem("the name of a payload object inside this folder")
    size_bytes = reader.at("size_bytes").integer()
    return PayloadObject(
        name=name,
        size_bytes=size_bytes,
        crc32c=_crc32c(reader.at("crc32c")),
        cells=reader.optional("cells", lambda cells: _cells(cells, size_bytes)),
    )


def _cells(reader: Reader, object_bytes: int) -> Cells | None:
    size = reader.object().at("size_bytes")
    if type(size.value) is not int or size.value not in _CELL_BYTES or size.value & (size.value - 1):
        size.problem(f"a power of two from {_CELL_BYTES[0]} to {_CELL_BYTES[-1]}")
        return None
    sums, count = reader.at("crc32c"), -(-object_bytes // size.value)
    try:
        return Cells(size_bytes=size.value, crc32c=parse_sums(sums.text(), count))
    except FormatError:
        sums.problem(f"{8 * count} lower-case hex digits, 8 for each cell of {size.value} bytes")
        return None


def _tensors(reader: Reader) -> dict[str, TensorEntry]:
    """What stands below one component. Only where something is not as it should be, it is read so as to say what."""
    found = _plain_tensors(reader.value)
    return found if found is not None else {name: _tensor(item) for name, item in reader.mapping().items()}


def _plain_tensors(value: Any) -> dict[str, TensorEntry] | None:
    """The same at a tenth of the time: an index can have a hundred thousand of them. None if anything is amiss."""
    found: dict[str, TensorEntry] = {}
    for name, item in value.items() if type(value) is dict else [("", value)]:
        if type(item) is not dict:
            return None
        dtype, shape, alias_of = item.get("dtype"), _plain_integers(item.get("shape")), item.get("alias_of")
        chunks = _plain_chunks(item.get("chunks"), shape)
        if type(dtype) is not str or shape is None or chunks is None or type(alias_of) not in _NAMED:
            return None
        found[name] = TensorEntry(dtype=dtype, shape=shape, chunks=chunks, alias_of=alias_of)
    return found


_NAMED = {str, NoneType}


def _plain_chunks(value: Any, shape: tuple[int, ...] | None) -> tuple[Chunk, ...] | None:
    if value is None:
        return ()
    found = []
    for item in value if type(value) is list else [value]:
        if type(item) is not dict:
            return None
        name, stored_as, crc32c = item.get("object"), item.get("stored_as"), item.get("crc32c")
        place = _plain_integers([item.get("start"), item.get("length")])
        offsets, lengths = _plain_integers(item.get("offsets")), _plain_integers(item.get("lengths"))
        if type(name) is not str or type(stored_as) not in _NAMED or type(crc32c) is not str:
            return None
        if place is None or offsets is None or lengths is None or not is_crc32c(crc32c):
            return None
        found.append(
            Chunk(
                object=name,
                start=place[0],
                length=place[1],
                offsets=offsets,
                lengths=shape if lengths == shape else lengths,
                crc32c=int(crc32c, 16),
                stored_as=stored_as,
            )
        )
    return tuple(found)


def _plain_integers(value: Any) -> tuple[int, ...] | None:
    if type(value) is not list:
        return None
    for number in value:
        if type(number) is not int or not 0 <= number <= LARGEST_INTEGER:
            return None
    return tuple(value)


def _tensor(reader: Reader) -> TensorEntry:
    reader.object()
    return TensorEntry(
        dtype=reader.at("dtype").text(),
        shape=reader.at("shape").integers(),
        chunks=tuple(_chunk(item) for item in reader.at("chunks").items()) if reader.has("chunks") else (),
        alias_of=reader.optional("alias_of", Reader.text),
    )


def _chunk(reader: Reader) -> Chunk:
    reader.object()
    return Chunk(
        object=reader.at("object").text(),
        start=reader.at("start").integer(),
        length=reader.at("length").integer(),
        offsets=reader.at("offsets").integers(),
        lengths=reader.at("lengths").integers(),
        crc32c=_crc32c(reader.at("crc32c")),
        stored_as=reader.optional("stored_as", Reader.text),
    )


def _crc32c(reader: Reader) -> int:
    return parse_crc32c(reader.hex(8))
