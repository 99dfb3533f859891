"""Python values as JSON and back, with their types; never pickle.

What JSON holds without loss stands as it is: None, bool, int, finite float, str, list, and dict with plain string
keys (its order is kept). Everything else is an object with the one key ``$tag``. Types are compared exactly,
so a subclass (a named tuple, an IntEnum) is never silently flattened: it is taken by a handler or refused.

A *handler* teaches the codec further types, such as tensors. Handlers are asked first, at every place of the
tree, about everything but plain numbers and strings. A container that stands at two places is stored twice.

Past 350 lines, because encoders, decoders and the strictness between them are read side by side or not at all.
"""

# The tables at the end are the codec's own, and hold its methods.
# ruff: noqa: SLF001

from __future__ import annotations

import base64
import math
import re
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final, Protocol

from cloudckpt.errors import CloudCkptError, FormatError

__all__ = ["SKIP", "Codec", "Encoded", "Handler", "Path", "render_path"]

Path = tuple[object, ...]
Json = Any

#: What a handler answers to a value that is not its own.
SKIP: Final = object()

#: Deeper nesting than this is a mistake, or an attack; Python's own recursion ends soon after.
_DEPTH_LIMIT = 100

#: How much of a name or a value an error shows: a hostile document must not make an endless message.
_SHOWN = 200

_FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)
}
_NON_FINITE = {"nan", "inf", "-inf"}

#: Longer ints are written in hexadecimal: Python refuses decimal numbers past a limit that may be set as low as
#: 640 digits, and JSON writers and readers pass through it.
_INT_BITS = 2048

#: A high and a low surrogate side by side: JSON's escapes read them back as the one character they encode.
_SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A value that is a node already, encoded by somebody else: it is taken as it stands."""

    node: Json


class Handler(Protocol):
    """A type that the codec learns. Its values become ``{"$" + tag: payload}``."""

    @property
    def tag(self) -> str:
        """The tag without its dollar sign."""
        ...

    def encode(self, value: object, path: Path, codec: Codec) -> Json:
        """The payload, or ``SKIP`` if the value is not this handler's."""
        ...

    def decode(self, payload: Json, path: Path, codec: Codec) -> object:
        """The value. Raises ``FormatError`` where the payload is none."""
        ...


def render_path(path: Path) -> str:
    """``optimizer.param_groups[0].lr``: identifiers with dots, everything else in brackets."""
    text = ""
    for segment in path:
        if isinstance(segment, str) and segment.isidentifier() and len(segment) <= _SHOWN:
            text += f".{segment}" if text else segment
        else:
            text += f"[{segment!r:.{_SHOWN}}]"
    return text or "the state"


class Codec:
    """Encodes and decodes trees of values. A codec remembers where it is: give each thread its own.

    Args:
        handlers: asked in order, before the built-in types.
        leaves: handlers of values with nothing inside, which never ask the codec in turn. Asked before all others.
    """

    def __init__(self, handlers: Sequence[Handler] = (), *, leaves: Sequence[Handler] = ()) -> None:
        self._handlers = tuple(handlers)
        self._leaves = tuple((f"${leaf.tag}", leaf.encode) for leaf in leaves)
        self._by_tag = {handler.tag: handler for handler in (*leaves, *handlers)}
        self._open: set[int] = set()

    # -- encoding --------------------------------------------------------------------------------------------

    def encode(self, value: object, path: Path = ()) -> Json:
        """The JSON node of ``value``.

        Raises:
            TypeError: something in it cannot be stored; names the path, the type and the ways out.
        """
        plain = _PLAIN.get(type(value))
        if plain is not None:
            return plain(value)
        for tag, encode_leaf in self._leaves:
            payload = encode_leaf(value, path, self)
            if payload is not SKIP:
                return {tag: payload}
        # Asked before the handlers, so that an object whose state is itself ends here as well.
        if id(value) in self._open:
            raise TypeError(f"{render_path(path)}: this {type(value).__name__} contains itself and cannot be stored")
        if len(self._open) > _DEPTH_LIMIT:
            raise TypeError(f"{render_path(path)}: nested more than {_DEPTH_LIMIT} deep and cannot be stored")
        self._open.add(id(value))
        try:
            for handler in self._handlers:
                payload = handler.encode(value, path, self)
                if payload is not SKIP:
                    return {f"${handler.tag}": payload}
            encode = _ENCODERS.get(type(value))
            if encode is None:
                kind = f"{type(value).__module__}.{type(value).__qualname__}"
                raise TypeError(
                    f"{render_path(path)}: a {kind} cannot be stored. Give the object that holds it a state_dict() and "
                    "load_state_dict() without it, or pass allow_pickle=True"
                )
            return encode(self, value, path)
        finally:
            self._open.discard(id(value))

    def _list(self, values: Sequence[object], path: Path) -> list[Json]:
        return [self.encode(item, (*path, n)) for n, item in enumerate(values)]

    def _pairs(self, mapping: dict[Any, Any], path: Path) -> list[list[Json]]:
        return [[self.encode(k, (*path, k)), self.encode(v, (*path, k))] for k, v in mapping.items()]

    def _dict(self, value: dict[Any, Any], path: Path) -> Json:
        if all(map(_is_plain_key, value)):
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        return {"$dict": self._pairs(value, path)}

    def _ordered(self, value: OrderedDict[Any, Any], path: Path) -> Json:
        # A module's state dict carries its versions in an attribute, ``_metadata``; without it old checkpoints
        # could not be migrated by the module's own code.
        payload: dict[str, Json] = {"items": self._pairs(value, path)}
        if vars(value):
            payload["attributes"] = self._dict(dict(vars(value)), path)
        return {"$ordered": payload}

    def _unordered(self, value: set[Any] | frozenset[Any], path: Path) -> list[Json]:
        return sorted((self.encode(item, (*path, item)) for item in value), key=repr)

    def _default(self, value: defaultdict[Any, Any], path: Path) -> Json:
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", "")
        if name is not None and _FACTORIES.get(name) is not factory:
            raise TypeError(
                f"{render_path(path)}: a defaultdict with the factory {factory!r} cannot be stored: make it a dict"
            )
        return {"$defaultdict": {"factory": name, "items": self._pairs(value, path)}}

    def _counter(self, value: Counter[Any], path: Path) -> Json:
        if vars(value):
            raise TypeError(f"{render_path(path)}: a Counter with attributes cannot be stored: make it a dict")
        return {"$counter": self._pairs(value, path)}

    # -- decoding --------------------------------------------------------------------------------------------

    def decode(self, node: Json, path: Path = ()) -> Any:
        """The value of a node, exactly as it was encoded.

        Raises:
            FormatError: an unknown tag or a malformed payload; names the path.
        """
        if len(path) > 2 * _DEPTH_LIMIT:
            raise FormatError(f"{render_path(path[:5])}…: nested too deeply")
        if isinstance(node, list):
            return [self.decode(item, (*path, n)) for n, item in enumerate(node)]
        if not isinstance(node, dict):
            if node is None or type(node) in {bool, int, str} or (type(node) is float and math.isfinite(node)):
                return node
            raise FormatError(f"{render_path(path)}: {node!r} is no JSON")
        tags = [key for key in node if key.startswith("$")]
        if not tags:
            return {key: self.decode(item, (*path, key)) for key, item in node.items()}
        if len(node) != 1:
            raise FormatError(f"{render_path(path)}: {tags[0][:_SHOWN]} stands beside other keys")
        return self._decode_tagged(tags[0], node, path)

    def _decode_tagged(self, tag: str, node: dict[str, Json], path: Path) -> Any:
        handler = self._by_tag.get(tag[1:])
        decode = _DECODERS.get(tag)
        try:
            if handler is not None:
                return handler.decode(node[tag], path, self)
            if decode is None:
                raise FormatError(f"{render_path(path)}: {tag[:_SHOWN]} is unknown to this version of cloudckpt")
            value = decode(self, node[tag], path)
            if tag in _ONE_SPELLING and not _identical(_ENCODERS[type(value)](self, value, path), node):
                raise ValueError(node[tag])
            return value
        except CloudCkptError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as exc:
            raise FormatError(f"{render_path(path)}: {tag[:_SHOWN]} is malformed: {exc!r:.{_SHOWN}}") from exc

    def _decode_list(self, payload: Json, path: Path) -> list[Any]:
        if not isinstance(payload, list):
            raise FormatError(f"{render_path(path)}: expected an array")
        return [self.decode(item, (*path, n)) for n, item in enumerate(payload)]

    def _decode_set(self, payload: Json, path: Path) -> set[Any]:
        items = self._decode_list(payload, path)
        found = set(items)
        if len(found) != len(items):
            raise FormatError(f"{render_path(path)}: an item stands there twice")
        return found

    def _decode_pairs(self, payload: Json, path: Path) -> dict[Any, Any]:
        if not isinstance(payload, list):
            raise FormatError(f"{render_path(path)}: expected an array")
        found: dict[Any, Any] = {}
        for n, pair in enumerate(payload):
            if not isinstance(pair, list) or len(pair) != 2:
                raise FormatError(f"{render_path(path)}: expected pairs of key and value")
            key = self.decode(pair[0], (*path, n))
            if key in found:
                raise FormatError(f"{render_path((*path, key))}: the key stands there twice")
            found[key] = self.decode(pair[1], (*path, key))
        return found

    def _decode_ordered(self, payload: Json, path: Path) -> OrderedDict[Any, Any]:
        _check_fields(payload, {"items"}, {"items", "attributes"})
        value = OrderedDict(self._decode_pairs(payload["items"], path))
        # Into its namespace and not by setattr: no name in a file may reach a property or the class.
        vars(value).update(self.decode(payload.get("attributes", {}), path))
        return value

    def _decode_default(self, payload: Json, path: Path) -> defaultdict[Any, Any]:
        _check_fields(payload, {"factory", "items"})
        name = payload["factory"]
        return defaultdict(None if name is None else _FACTORIES[name], self._decode_pairs(payload["items"], path))

    def _decode_deque(self, payload: Json, path: Path) -> deque[Any]:
        _check_fields(payload, {"items", "maxlen"})
        items, longest = self._decode_list(payload["items"], path), payload["maxlen"]
        if longest is not None and (type(longest) is not int or len(items) > longest):
            raise FormatError(f"{render_path(path)}: {len(items)} items do not fit maxlen {longest!r:.{_SHOWN}}")
        return deque(items, longest)

    def _decode_slice(self, payload: Json, path: Path) -> slice:
        start, stop, step = self._decode_list(payload, path)
        return slice(start, stop, step)


def _is_plain_key(key: object) -> bool:
    return type(key) is str and key[:1] != "$" and (key.isascii() or not _SURROGATE_PAIR.search(key))


def _check_fields(payload: Json, needed: set[str], known: set[str] | None = None) -> None:
    if not needed <= payload.keys() <= (known or needed):
        raise ValueError(f"fields {sorted(payload)}")


def _identical(one: Json, two: Json) -> bool:
    """Equal in type as well: 1, 1.0 and True differ."""
    if type(one) is not type(two) or one != two:
        return False
    if isinstance(one, dict):
        return all(_identical(one[key], two[key]) for key in one)
    return not isinstance(one, list) or all(map(_identical, one, two))


def _int(value: int) -> Json:
    return value if value.bit_length() <= _INT_BITS else {"$int": hex(value)}


def _str(value: str) -> Json:
    if value.isascii() or not _SURROGATE_PAIR.search(value):
        return value
    return {"$str": _b64(value.encode("utf-8", "surrogatepass"))}


def _float(value: float) -> Json:
    return value if math.isfinite(value) else {"$float": _spelled(value)}


def _unfloat(payload: Json) -> float:
    if payload not in _NON_FINITE:
        raise ValueError(payload)
    # A NaN of its own each time: two NaN keys are two keys only while they are two objects.
    return float(payload)


def _clock(value: datetime | time, path: Path) -> list[Json]:
    zone = value.tzinfo
    if zone is None:
        return [value.isoformat(), value.fold]
    if type(zone) is not timezone:
        raise TypeError(
            f"{render_path(path)}: a {type(value).__name__} in the time zone {zone!r} cannot be stored, only fixed "
            "offsets can: store value.astimezone(datetime.UTC) and the zone's name beside it"
        )
    name = zone.tzname(None)
    named = [] if name == timezone(zone.utcoffset(None)).tzname(None) else [_str(name)]
    return [value.isoformat(), value.fold, *named]


def _unclock(kind: Any, payload: Json, codec: Codec, path: Path) -> Any:
    text, fold, *named = payload
    value = kind.fromisoformat(text).replace(fold=fold)
    if not named:
        return value
    return value.replace(tzinfo=timezone(value.tzinfo.utcoffset(None), codec.decode(named[0], path)))


def _fraction(numbers: list[Any]) -> Fraction:
    numerator, denominator = numbers
    if type(numerator) is not int or type(denominator) is not int:
        # Of text, Fraction computes the power of ten that it names: twelve bytes would take all of the memory.
        raise TypeError("a fraction is two integers")
    return Fraction(numerator, denominator)


def _decimal(payload: Json) -> Decimal:
    # Not held to one spelling: a context at save time may have chosen "e" or "E".
    if not isinstance(payload, str):
        raise TypeError(payload)
    return Decimal(payload)


def _spelled(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _b64(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode("ascii")


def _unb64(payload: Json) -> bytes:
    return base64.b64decode(payload, validate=True)


def _complex(value: complex) -> list[str]:
    return [repr(value.real), repr(value.imag)]


#: The types that no handler is asked about: most values of a state are one of them.
_PLAIN: dict[type, Callable[[Any], Json]] = {
    type(None): lambda v: v,
    bool: lambda v: v,
    int: _int,
    float: _float,
    str: _str,
    Encoded: lambda v: v.node,
}

#: exact type -> (codec, value, path) -> node
_ENCODERS: dict[type, Callable[[Codec, Any, Path], Json]] = {
    type(None): lambda _, v, __: v,
    bool: lambda _, v, __: v,
    int: lambda _, v, __: _int(v),
    float: lambda _, v, __: _float(v),
    str: lambda _, v, __: _str(v),
    list: Codec._list,
    dict: Codec._dict,
    tuple: lambda codec, v, path: {"$tuple": codec._list(v, path)},
    set: lambda codec, v, path: {"$set": codec._unordered(v, path)},
    frozenset: lambda codec, v, path: {"$frozenset": codec._unordered(v, path)},
    OrderedDict: Codec._ordered,
    defaultdict: Codec._default,
    Counter: Codec._counter,
    deque: lambda codec, v, path: {"$deque": {"items": codec._list(v, path), "maxlen": v.maxlen}},
    bytes: lambda _, v, __: {"$bytes": _b64(v)},
    bytearray: lambda _, v, __: {"$bytearray": _b64(v)},
    complex: lambda _, v, __: {"$complex": _complex(v)},
    range: lambda _, v, __: {"$range": [_int(v.start), _int(v.stop), _int(v.step)]},
    slice: lambda codec, v, path: {"$slice": codec._list([v.start, v.stop, v.step], path)},
    datetime: lambda _, v, path: {"$datetime": _clock(v, path)},
    date: lambda _, v, __: {"$date": v.isoformat()},
    time: lambda _, v, path: {"$time": _clock(v, path)},
    timedelta: lambda _, v, __: {"$timedelta": [v.days, v.seconds, v.microseconds]},
    Decimal: lambda _, v, __: {"$decimal": str(v)},
    Fraction: lambda _, v, __: {"$fraction": [_int(v.numerator), _int(v.denominator)]},
    uuid.UUID: lambda _, v, __: {"$uuid": str(v)},
}

#: tag -> (codec, payload, path) -> value
_DECODERS: dict[str, Callable[[Codec, Json, Path], Any]] = {
    "$float": lambda _, p, __: _unfloat(p),
    "$int": lambda _, p, __: int(p, 16),
    "$str": lambda _, p, __: _unb64(p).decode("utf-8", "surrogatepass"),
    "$dict": Codec._decode_pairs,
    "$tuple": lambda codec, p, path: tuple(codec._decode_list(p, path)),
    "$set": Codec._decode_set,
    "$frozenset": lambda codec, p, path: frozenset(codec._decode_set(p, path)),
    "$ordered": Codec._decode_ordered,
    "$defaultdict": Codec._decode_default,
    "$counter": lambda codec, p, path: Counter(codec._decode_pairs(p, path)),
    "$deque": Codec._decode_deque,
    "$bytes": lambda _, p, __: _unb64(p),
    "$bytearray": lambda _, p, __: bytearray(_unb64(p)),
    "$complex": lambda _, p, __: complex(float(p[0]), float(p[1])),
    "$range": lambda codec, p, path: range(*codec._decode_list(p, path)),
    "$slice": Codec._decode_slice,
    "$datetime": lambda codec, p, path: _unclock(datetime, p, codec, path),
    "$date": lambda _, p, __: date.fromisoformat(p),
    "$time": lambda codec, p, path: _unclock(time, p, codec, path),
    "$timedelta": lambda _, p, __: timedelta(*p),
    "$decimal": lambda _, p, __: _decimal(p),
    "$fraction": lambda codec, p, path: _fraction(codec._decode_list(p, path)),
    "$uuid": lambda _, p, __: uuid.UUID(p),
}

#: Tags whose values are written in one way only: a payload that would not be written again as it stands is malformed.
_ONE_SPELLING = {
    *("$int", "$str", "$bytes", "$bytearray", "$complex", "$range", "$fraction", "$uuid"),
    *("$datetime", "$date", "$time", "$timedelta"),
}
