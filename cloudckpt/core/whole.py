"""A component as plain safetensors files with whole tensors, whoever wrote which part of it, for others to read.

What a checkpoint stores is in payload objects of one component and one writing rank each, and a sharded tensor is in
several of them. Here each tensor is whole and stands under its own name, tied ones as often as they have names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cloudckpt.core import keys
from cloudckpt.core.cells import plan_blocks
from cloudckpt.core.layout import Item, item_size, plan_layout
from cloudckpt.core.model import Chunk, Index, TensorEntry
from cloudckpt.errors import ConfigError

__all__ = ["Move", "WholeFile", "as_they_are", "plan_whole", "weight_map"]

#: Larger than any tensor: nothing is cut.
_UNCUT = 2**62

#: What the name of a payload object of rank 0 of 1 has after the component's name.
_SUFFIX = "-00000-of-00001.safetensors"


@dataclass(frozen=True, slots=True)
class Move:
    """A stored chunk and where its bytes go.

    Attributes:
        chunk: where they are.
        runs: (byte of the file, length), in the order of the chunk's own bytes; together as long as it is.
    """

    chunk: Chunk
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeFile:
    """One safetensors file.

    Attributes:
        name: its name.
        header: its first bytes.
        size_bytes: all of it.
        moves: where the rest comes from.
        tensors: the names of its tensors.
        opaque: the names of those whose dtype safetensors cannot name: they are bytes (U8) in the file.
    """

    name: str
    header: bytes
    size_bytes: int
    moves: tuple[Move, ...]
    tensors: tuple[str, ...]
    opaque: tuple[str, ...]


def plan_whole(index: Index, component: str, *, most_bytes: int | None = None) -> tuple[WholeFile, ...]:
    """The files of one component: ``model.safetensors``, or numbered ones where it has more than ``most_bytes``.

    Raises:
        ConfigError: the checkpoint has no such component, or it has no tensors.
    """
    if component not in index.structure:
        raise ConfigError(
            f"checkpoint-{index.step}.{index.id} has no component {component!r}; it has "
            f"{', '.join(map(repr, index.structure))}"
        )
    tensors = index.tensors.get(component, {})
    if not tensors:
        raise ConfigError(f"component {component!r} of checkpoint-{index.step}.{index.id} has no tensors: only values")
    groups = [*_grouped(tensors, most_bytes)]
    stem = keys.payload_name(component, 0, 1).removesuffix(_SUFFIX)
    names = [f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [f"{stem}.safetensors"]
    return tuple(_file(name, group, tensors) for name, group in zip(names, groups, strict=True))


def _grouped(tensors: Mapping[str, TensorEntry], most_bytes: int | None) -> Iterator[dict[str, Item]]:
    """The tensors in their order, in groups of at most ``most_bytes``; a larger one is alone."""
    group: dict[str, Item] = {}
    size = 0
    for name, entry in tensors.items():
        item = _item(name, tensors[entry.alias_of] if entry.alias_of is not None else entry)
        if group and most_bytes is not None and size + item.size_bytes > most_bytes:
            yield group
            group, size = {}, 0
        group[name] = item
        size += item.size_bytes
    yield group


def _item(name: str, entry: TensorEntry) -> Item:
    known = item_size(entry.dtype)
    if known is None:
        # Not in the table: the bytes there are tell, and where there are none it does not matter.
        known = next((c.length // math.prod(c.lengths) for c in entry.chunks if c.length), 1)
    return Item(name=name, dtype=entry.dtype, shape=entry.shape, item_size=known)


def _file(name: str, group: Mapping[str, Item], tensors: Mapping[str, TensorEntry]) -> WholeFile:
    items = [*group.values()]
    layout = plan_layout(items)
    moves: list[Move] = []
    for place in layout.places:
        entry = tensors[place.item.name]
        stored = tensors[entry.alias_of] if entry.alias_of is not None else entry
        moves += [_move(chunk, place.item, place.start) for chunk in stored.chunks if chunk.length]
    return WholeFile(
        name=name,
        header=layout.header,
        size_bytes=layout.size_bytes,
        moves=tuple(moves),
        tensors=tuple(item.name for item in items),
        opaque=tuple(item.name for item in items if item_size(item.dtype) is None),
    )


def _move(chunk: Chunk, item: Item, start: int) -> Move:
    blocks = plan_blocks(
        item.shape, chunk.offsets, chunk.lengths, item_bytes=item.item_size, gap_bytes=0, most_bytes=_UNCUT
    )
    return Move(chunk, tuple((start + block.start, block.length) for block in blocks))


def weight_map(files: tuple[WholeFile, ...]) -> dict[str, object]:
    """The document ``<component>.safetensors.index.json``, by which ``from_pretrained`` finds each tensor."""
    total = sum(file.size_bytes - len(file.header) for file in files)
    places = {name: file.name for file in files for name in file.tensors}
    return {"metadata": {"total_size": total}, "weight_map": places}


def as_they_are(index: Index, component: str) -> dict[str, object] | None:
    """The same document over the payload objects as they are stored; None where other programs could not read those.

    They can where every tensor lies whole in one object, under its own name and with a dtype that safetensors knows.
    Tied tensors are named once.
    """
    own = {name: entry for name, entry in index.tensors.get(component, {}).items() if entry.alias_of is None}
    fit = all(
        len(entry.chunks) == 1
        and entry.chunks[0].lengths == entry.shape
        and entry.chunks[0].stored_as is None
        and item_size(entry.dtype) is not None
        for entry in own.values()
    )
    if not own or not fit:
        return None
    total = sum(entry.chunks[0].length for entry in own.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: entry.chunks[0].object for name, entry in own.items()},
    }
