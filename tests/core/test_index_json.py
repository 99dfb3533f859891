from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.core import index_json
from cloudckpt.core.index_json import StructureText, TensorsText, decode_index, encode_index, index_digest
from cloudckpt.core.model import Cells, Index, TensorEntry
from cloudckpt.errors import FormatError
from cloudckpt.testing.builders import index
from cloudckpt.testing.strategies import indexes

Document = dict[str, Any]


def document() -> Document:
    """The JSON of a small index without its digest, to be changed."""
    found: Document = json.loads(encode_index(index()))
    del found["digest"]
    return found


def resealed(changed: Document) -> bytes:
    """These fields with a digest that fits: what a faulty or hostile writer could have sealed."""
    body = json.dumps(changed).encode() + b"\n"
    return body[:-2] + f', "digest": "sha256:{hashlib.sha256(body).hexdigest()}"}}\n'.encode()


# -- round trip ----------------------------------------------------------------------------------------------


@given(indexes())
def test_an_index_survives_its_bytes(drawn: Index) -> None:
    """Decoding what was encoded gives an equal index, in the same order, and encoding that the same bytes."""
    body = encode_index(drawn)
    found = decode_index(body)

    assert found == drawn
    assert encode_index(found) == body
    assert [list(tensors) for tensors in found.tensors.values()] == [list(t) for t in drawn.tensors.values()]


@given(indexes())
def test_an_index_whose_tensors_are_text_has_the_same_bytes(drawn: Index) -> None:
    """The text that is kept from save to save, filled with the sums, makes the very bytes of the index itself."""
    sums: list[int] = []

    def numbered(entry: TensorEntry) -> TensorEntry:
        chunks = []
        for chunk in entry.chunks:
            chunks.append(replace(chunk, crc32c=len(sums)))
            sums.append(chunk.crc32c)
        return replace(entry, chunks=tuple(chunks))

    tensors = {c: {name: numbered(entry) for name, entry in own.items()} for c, own in drawn.tensors.items()}
    text = TensorsText(tensors).filled(sums)

    assert encode_index(replace(drawn, tensors={}), tensors=text) == encode_index(drawn)


def test_each_of_many_sums_comes_to_its_own_chunk() -> None:
    """Hundreds of chunks: their numbers have several digits."""
    entry = index().tensors["model"]["weight"]

    def tensors(sums: list[int]) -> dict[str, dict[str, TensorEntry]]:
        return {
            "model": {
                f"w{n:03}": replace(entry, chunks=(replace(entry.chunks[0], crc32c=s),)) for n, s in enumerate(sums)
            }
        }

    sums = [n * 9973 for n in range(300)]
    text = TensorsText(tensors([*range(300)])).filled(sums)

    assert encode_index(replace(index(), tensors={}), tensors=text) == encode_index(
        replace(index(), tensors=tensors(sums))
    )


@given(indexes(), st.lists(indexes(), max_size=2))
def test_an_index_whose_structure_is_kept_text_has_the_same_bytes(drawn: Index, before: list[Index]) -> None:
    """Whatever the states before it looked like, the text of this structure makes the very bytes of the index."""
    text = StructureText()
    for other in before:
        text.of(other.structure)

    assert encode_index(drawn, structure=text.of(drawn.structure)) == encode_index(drawn)
    assert encode_index(drawn, structure=text.of(drawn.structure)) == encode_index(drawn)


@pytest.mark.parametrize("values", [(1, True), (True, 1), (1, 1.0), (1.0, 1), (0.0, -0.0), ([1], [True]), ("", "a")])
def test_values_that_python_finds_equal_are_told_apart(values: tuple[Any, Any]) -> None:
    """True that became 1, or 1 that became 1.0, is spelled as what it is now."""
    text = StructureText()

    for value in values:
        assert json.dumps(json.loads(text.of({"a": {"b": value}}))) == json.dumps({"a": {"b": value}})


def test_text_with_a_lone_surrogate_is_encoded_as_well() -> None:
    """A metric or tensor name that UTF-8 cannot hold makes the same bytes either way."""
    drawn = replace(index(), tags=("\ud800",))
    sums = [chunk.crc32c for own in drawn.tensors.values() for entry in own.values() for chunk in entry.chunks]
    numbers = itertools.count()
    tensors = {
        component: {
            name: replace(entry, chunks=tuple(replace(chunk, crc32c=next(numbers)) for chunk in entry.chunks))
            for name, entry in own.items()
        }
        for component, own in drawn.tensors.items()
    }

    text = TensorsText(tensors).filled(sums)

    assert encode_index(replace(drawn, tensors={}), tensors=text) == encode_index(drawn)


def test_the_last_field_is_the_digest_of_the_rest() -> None:
    """Anybody can check an index: cut the last field off and take the SHA-256."""
    body = encode_index(index())
    rest, field = body.rsplit(b', "digest": ', 1)

    assert json.loads(field.removesuffix(b"}\n")) == index_digest(rest + b"}\n")
    assert index_digest(body) == f"sha256:{hashlib.sha256(body).hexdigest()}"


def test_unknown_fields_are_given_back() -> None:
    """A field that a newer version sealed is read and kept."""
    found = decode_index(resealed({**document(), "later": {"a": [1]}}))
    assert found.extra == {"later": {"a": [1]}}


def test_an_object_may_have_the_sums_of_its_cells() -> None:
    """The hex digits of all cells stand end to end; an index from before there were cells has none."""
    changed = document()
    changed["objects"][0] |= {"size_bytes": 10_000, "cells": {"size_bytes": 4096, "crc32c": "00000001e3069283ffffffff"}}

    assert decode_index(resealed(changed)).objects[0].cells == Cells(
        size_bytes=4096, crc32c=(1, 0xE3069283, 0xFFFFFFFF)
    )
    assert decode_index(resealed(document())).objects[0].cells is None


# -- bad input -----------------------------------------------------------------------------------------------


@given(indexes(), st.data())
def test_any_changed_byte_is_found(drawn: Index, data: st.DataObject) -> None:
    """An index with a byte changed, cut off or put in is refused, wherever it is (L11)."""
    body = encode_index(drawn)
    start = data.draw(st.integers(0, len(body) - 1))
    changed = body[:start] + data.draw(st.binary(max_size=2)) + body[start + data.draw(st.integers(0, 1)) :]
    if changed == body:
        return
    with pytest.raises(FormatError):
        decode_index(changed)


def test_an_index_spelled_otherwise_is_refused() -> None:
    """The digest is of the bytes: the same JSON with other spaces is not what was sealed."""
    body = encode_index(index())
    with pytest.raises(FormatError, match="changed after it was written: its digest does not match"):
        decode_index(json.dumps(json.loads(body), indent=1).encode())


def _tensor(name: str, **fields: Any) -> Callable[[Document], None]:
    return lambda changed: changed["tensors"]["model"][name].update(fields)


def _chunk(**fields: Any) -> Callable[[Document], None]:
    return lambda changed: changed["tensors"]["model"]["weight"]["chunks"][0].update(fields)


def _object(**fields: Any) -> Callable[[Document], None]:
    return lambda changed: changed["objects"][0].update(fields)


def _cells(**fields: Any) -> Callable[[Document], None]:
    return _object(cells={"size_bytes": 4096, "crc32c": "00000000", **fields})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_object(name="../manifest.json"), "objects[0].name: expected the name of a payload object inside this folder"),
        (_object(name="/etc/passwd"), "objects[0].name: expected the name of a payload object inside this folder"),
        (_object(name="checkpoint.json"), "objects[0].name: expected the name of a payload object inside this folder"),
        (_object(name=7), "objects[0].name: expected a string, got 7"),
        (_object(size_bytes=-1), "objects[0].size_bytes: expected an integer >= 0, got -1"),
        (_object(size_bytes=100), "tensors: model: weight: bytes outside of its payload object"),
        (_object(crc32c="DEADBEEF"), 'objects[0].crc32c: expected 8 lower-case hex digits, got "DEADBEEF"'),
        (_object(cells=7), "objects[0].cells: expected an object, got 7"),
        (_cells(size_bytes=2048), "objects[0].cells.size_bytes: expected a power of two from 4096 to 1073741824, got 2048"),
        (_cells(size_bytes=2**31), "objects[0].cells.size_bytes: expected a power of two from 4096 to 1073741824, got 2147"),
        (_cells(size_bytes=4097), "objects[0].cells.size_bytes: expected a power of two from 4096 to 1073741824, got 4097"),
        (_cells(size_bytes=4096.0), "objects[0].cells.size_bytes: expected a power of two from 4096 to 1073741824, got 4096.0"),
        (_cells(crc32c=7), "objects[0].cells.crc32c: expected a string, got 7"),
        (_cells(crc32c="0" * 9), "objects[0].cells.crc32c: expected 8 lower-case hex digits, 8 for each cell of 4096 bytes"),
        (_cells(crc32c="0" * 16), "objects[0].cells.crc32c: expected 8 lower-case hex digits, 8 for each cell of 4096 bytes"),
        (_cells(crc32c="0000000G"), "objects[0].cells.crc32c: expected 8 lower-case hex digits, 8 for each cell of 4096 bytes"),
        (_cells(crc32c="0000000\u0661"), "objects[0].cells.crc32c: expected 8 lower-case hex digits, 8 for each cell of"),
        (_object(size_bytes=2**62, cells={"size_bytes": 4096, "crc32c": ""}), "objects[0].cells.crc32c: expected 90071992547"),
        (lambda d: d["objects"].append(d["objects"][0]), "objects: two payload objects have the same name"),
        (lambda d: d["objects"].clear(), "tensors: model: weight: bytes outside of its payload object"),
        (_chunk(start=145), "tensors: model: weight: bytes outside of its payload object"),
        (_chunk(object="other"), "tensors: model: weight: bytes outside of its payload object"),
        (_chunk(offsets=[1]), "tensors: model: weight: a chunk outside of its shape"),
        (_chunk(lengths=[5]), "tensors: model: weight: a chunk outside of its shape"),
        (_chunk(offsets=[3], lengths=[3]), "tensors: model: weight: a chunk outside of its shape"),
        (_chunk(offsets=[0, 0]), "tensors: model: weight: a chunk outside of its shape"),
        (_chunk(lengths=[]), "tensors: model: weight: a chunk outside of its shape"),
        (_chunk(lengths=["4"]), 'tensors["model"]["weight"].chunks[0].lengths[0]: expected an integer >= 0, got "4"'),
        (_tensor("weight", shape=[4, -1]), 'tensors["model"]["weight"].shape[1]: expected an integer >= 0, got -1'),
        (_tensor("weight", shape=[]), "tensors: model: weight: a chunk outside of its shape"),
        (_tensor("weight", alias_of="bias"), "tensors: model: weight: an alias has no bytes of its own"),
        (_tensor("tied", alias_of="nobody"), "tensors: model: tied: alias_of names no stored tensor"),
        (_tensor("tied", alias_of="tied"), "tensors: model: tied: alias_of names no stored tensor"),
        (_tensor("tied", alias_of=1), 'tensors["model"]["tied"].alias_of: expected a string, got 1'),
        (lambda d: d["tensors"].update(model=[]), 'tensors["model"]: expected an object, got an array'),
        (lambda d: d["versions"].update(torch=2.6), 'versions["torch"]: expected a string, got 2.6'),
        (lambda d: d["policy"].update(keep_last=0), "policy.keep_last: expected an integer >= 1, got 0"),
        (lambda d: d.update(step="100"), 'step: expected an integer >= 0, got "100"'),
        (lambda d: d.update(structure=None), "structure: expected an object, got null"),
        (lambda d: d.update(pickled="no"), 'pickled: expected true or false, got "no"'),
    ],
)  # fmt: skip
def test_every_problem_is_named_by_its_place(change: Callable[[Document], None], message: str) -> None:
    """A sealed index that reaches out of its folder, its objects or its shapes is refused, and the place is named."""
    changed = document()
    change(changed)
    with pytest.raises(FormatError) as refused:
        decode_index(resealed(changed), what="s3://b/checkpoint.json")

    assert "s3://b/checkpoint.json is malformed:" in str(refused.value)
    assert f"\n  {message}" in str(refused.value)


_ANY: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1, 1.0, 2**63, "", "4", "0000000g", "DEADBEEF", [], [1], [True], ["1"], {}]
)


@given(st.data())
def test_the_quick_look_at_tensors_says_what_the_long_one_says(data: st.DataObject) -> None:
    """Tensors are read in bulk; one thing amiss, and they are read one by one. Both take and give the same."""
    changed = document()
    tensors: Any = changed["tensors"]["model"]
    tensor = tensors[data.draw(st.sampled_from([*tensors]))]
    place = data.draw(st.sampled_from([tensors, tensor, *tensor.get("chunks", [])]))
    place[data.draw(st.sampled_from([*place]))] = data.draw(_ANY)
    body = resealed(changed)

    def outcome() -> Index | str:
        try:
            return decode_index(body)
        except FormatError as exc:
            return str(exc)

    quick = outcome()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(index_json, "_plain_tensors", lambda _: None)
        assert outcome() == quick


@pytest.mark.parametrize("digest", [None, 7, "md5:abc"])
def test_an_index_without_a_digest_is_refused(digest: object) -> None:
    """Without a digest nobody can tell a whole index from a changed one."""
    with pytest.raises(FormatError, match="digest: expected a digest"):
        decode_index(json.dumps({**document(), "digest": digest}).encode())


@pytest.mark.parametrize(("field", "depth"), [("structure", 300), ("later", 50)])
def test_a_state_may_be_nested_deeply(field: str, depth: int) -> None:
    """The structure of a state is taken as it is; the codec of values has its own limit."""
    nested: Any = {}
    for _ in range(depth):
        nested = {"a": nested}

    assert decode_index(resealed({**document(), field: nested})).step == 100
