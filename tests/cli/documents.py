"""Whether a document is what its table in ``cloudckpt.cli.schema`` says, down to the objects in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cloudckpt.cli.schema import OBJECTS

#: The first word of what a table says of a field -> what JSON has there. Numbers that are not finite are strings.
KINDS: dict[str, Any] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float, str),
    "object": (dict,),
    "pending": (str,),
    "string": (str,),
    "time": (str,),
}
_OF_KNOWN = re.compile(r"array\?? of (checkpoint|run)\b")
_OF_OBJECTS = re.compile(r"array\?? of objects: ([^;]*)")


def kind_of(said: str) -> str:
    """The type that a table gives a field; with a ``?`` if it can be null."""
    return re.split(r"[ ,;:]", said, maxsplit=1)[0]


def wrong(document: Mapping[str, Any], table: Mapping[str, str], place: str) -> list[str]:
    """What is not as the table says; nothing if all is."""
    if document.keys() != table.keys():
        return [f"{place}: {sorted(document.keys() ^ table.keys())} are in one of document and table only"]
    return [problem for name, said in table.items() for problem in _wrong(document[name], said, f"{place}.{name}")]


def _wrong(value: Any, said: str, place: str) -> list[str]:
    kind = kind_of(said)
    if value is None:
        return [] if kind.endswith("?") else [f"{place} is null"]
    kind = kind.removesuffix("?")
    if kind in OBJECTS:
        return wrong(value, OBJECTS[kind], place)
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return [f"{place} is {value!r}, and not: {said}"]
    if found := _OF_KNOWN.match(said):
        return [problem for n, item in enumerate(value) for problem in _wrong(item, found[1], f"{place}[{n}]")]
    if found := _OF_OBJECTS.match(said):
        names = {name.strip().removesuffix("?") for name in re.sub(r"\(.*?\)", "", found[1]).split(",")}
        return [f"{place}[{n}] has {sorted(item)}" for n, item in enumerate(value) if item.keys() != names]
    return []
