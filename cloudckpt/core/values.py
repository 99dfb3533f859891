"""Python values as JSON and back, with their types; never pickle.

What JSON holds without loss stands as it is: None, bool, int, finite float, str, list, and dict with plain string
keys (its order is kept). Everything else is an object with the one key ``$tag``. Types are compared exactly,
so a subclass (a named tuple, an IntEnum) is never silently flattened: it is taken by a handler or refused.

A *handler* teaches the codec further types, such as tensors. Handlers are asked first, at every place of the
tree. A container that stands at two places is stored twice.
"""

from __future__ import annotations

import base64
import math
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final, Protocol

from cloudckpt.errors import CloudCkptError, FormatError

__all__ = ["SKIP", "Codec", "Handler", "Path", "render_path"]

Path = tuple[object, ...]
Json = Any

#: What a handler answers to a value that is not its own.
SKIP: Final = object()

#: Deeper nesting than this is a mistake, or an attack; Python's own recursion ends soon after.
_DEPTH_LIMIT = 100

_FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)
}
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


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
        if isinstance(segment, str) and segment.isidentifier():
            text += f".{segment}" if text else segment
        else:
            text += f"[{segment!r}]"
    return text or "the state"


class Codec:
    """Encodes and decodes trees of values.

    Args:
        handlers: asked in order, before the built-in types.
    """

    def __init__(self, handlers: Sequence[Handler] = ()) -> None:
        self._handlers = tuple(handlers)
        self._by_tag = {handler.tag: handler for handler in self._handlers}
        self._open: set[int] = set()

    # -- encoding --------------------------------------------------------------------------------------------

    def encode(self, value: object, path: Path = ()) -> Json:
        """The JSON node of ``value``.

        Raises:
            TypeError: something in it cannot be stored; names the path, the type and the ways out.
        """
        for handler in self._handlers:
            payload = handler.encode(value, path, self)
            if payload is not SKIP:
                return {f"${handler.tag}": payload}
        if value is None or type(value) in {bool, int, str}:
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": _spelled(value)}
        encode = _ENCODERS.get(type(value))
        if encode is None:
            raise TypeError(
                f"{render_path(path)}: a {type(value).__module__}.{type(value).__qualname__} cannot be stored. Give "
                "the object that holds it a state_dict() and load_state_dict() without it, or pass allow_pickle=True"
            )
        if id(value) in self._open:
            raise TypeError(f"{render_path(path)}: this {type(value).__name__} contains itself and cannot be stored")
        if len(self._open) >= _DEPTH_LIMIT:
            raise TypeError(f"{render_path(path)}: nested more than {_DEPTH_LIMIT} deep and cannot be stored")
        self._open.add(id(value))
        try:
            return encode(self, value, path)
        finally:
            self._open.discard(id(value))

    def _list(self, values: Sequence[object], path: Path) -> list[Json]:
        return [self.encode(item, (*path, n)) for n, item in enumerate(values)]

    def _pairs(self, mapping: dict[Any, Any], path: Path) -> list[list[Json]]:
        return [[self.encode(k, (*path, k)), self.encode(v, (*path, k))] for k, v in mapping.items()]

    def _dict(self, value: dict[Any, Any], path: Path) -> Json:
        if all(type(key) is str and not key.startswith("$") for key in value):
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
            return node
        tags = [key for key in node if key.startswith("$")]
        if not tags:
            return {key: self.decode(item, (*path, key)) for key, item in node.items()}
        if len(node) != 1:
            raise FormatError(f"{render_path(path)}: {tags[0]} stands beside other keys")
        payload = node[tags[0]]
        handler = self._by_tag.get(tags[0][1:])
        decode = _DECODERS.get(tags[0])
        if handler is None and decode is None:
            raise FormatError(f"{render_path(path)}: {tags[0]} is unknown to this version of cloudckpt")
        try:
            if handler is not None:
                return handler.decode(payload, path, self)
            return decode(self, payload, path) if decode else None
        except CloudCkptError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as exc:
            raise FormatError(f"{render_path(path)}: {tags[0]} is malformed: {exc!r}") from exc

    def _decode_list(self, payload: Json, path: Path) -> list[Any]:
        if not isinstance(payload, list):
            raise FormatError(f"{render_path(path)}: expected an array")
        return [self.decode(item, (*path, n)) for n, item in enumerate(payload)]

    def _decode_pairs(self, payload: Json, path: Path) -> list[tuple[Any, Any]]:
        pairs = []
        for n, pair in enumerate(payload):
            if not isinstance(pair, list) or len(pair) != 2:
                raise FormatError(f"{render_path(path)}: expected pairs of key and value")
            key = self.decode(pair[0], (*path, n))
            pairs.append((key, self.decode(pair[1], (*path, key))))
        return pairs

    def _decode_ordered(self, payload: Json, path: Path) -> OrderedDict[Any, Any]:
        value = OrderedDict(self._decode_pairs(payload["items"], path))
        for name, node in payload.get("attributes", {}).items():
            setattr(value, name, self.decode(node, (*path, name)))
        return value

    def _decode_default(self, payload: Json, path: Path) -> defaultdict[Any, Any]:
        name = payload["factory"]
        return defaultdict(None if name is None else _FACTORIES[name], self._decode_pairs(payload["items"], path))


def _spelled(value: float) -> str:
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def _b64(value: bytes | bytearray) -> str:
    return base64.b64encode(value).decode("ascii")


def _unb64(payload: Json) -> bytes:
    return base64.b64decode(payload, validate=True)


def _complex(value: complex) -> list[str]:
    return [repr(value.real), repr(value.imag)]


#: exact type -> (codec, value, path) -> node
_ENCODERS: dict[type, Callable[[Codec, Any, Path], Json]] = {
    list: Codec._list,  # noqa: SLF001 - the codec's own table
    dict: Codec._dict,  # noqa: SLF001
    tuple: lambda codec, v, path: {"$tuple": codec._list(v, path)},  # noqa: SLF001
    set: lambda codec, v, path: {"$set": codec._unordered(v, path)},  # noqa: SLF001
    frozenset: lambda codec, v, path: {"$frozenset": codec._unordered(v, path)},  # noqa: SLF001
    OrderedDict: Codec._ordered,  # noqa: SLF001
    defaultdict: Codec._default,  # noqa: SLF001
    Counter: lambda codec, v, path: {"$counter": codec._pairs(v, path)},  # noqa: SLF001
    deque: lambda codec, v, path: {"$deque": {"items": codec._list(v, path), "maxlen": v.maxlen}},  # noqa: SLF001
    bytes: lambda _, v, __: {"$bytes": _b64(v)},
    bytearray: lambda _, v, __: {"$bytearray": _b64(v)},
    complex: lambda _, v, __: {"$complex": _complex(v)},
    range: lambda _, v, __: {"$range": [v.start, v.stop, v.step]},
    slice: lambda codec, v, path: {"$slice": codec._list([v.start, v.stop, v.step], path)},  # noqa: SLF001
    datetime: lambda _, v, __: {"$datetime": [v.isoformat(), v.fold]},
    date: lambda _, v, __: {"$date": v.isoformat()},
    time: lambda _, v, __: {"$time": [v.isoformat(), v.fold]},
    timedelta: lambda _, v, __: {"$timedelta": [v.days, v.seconds, v.microseconds]},
    Decimal: lambda _, v, __: {"$decimal": str(v)},
    Fraction: lambda _, v, __: {"$fraction": [v.numerator, v.denominator]},
    uuid.UUID: lambda _, v, __: {"$uuid": str(v)},
}

#: tag -> (codec, payload, path) -> value
_DECODERS: dict[str, Callable[[Codec, Json, Path], Any]] = {
    "$float": lambda _, p, __: _NON_FINITE[p],
    "$dict": lambda codec, p, path: dict(codec._decode_pairs(p, path)),  # noqa: SLF001
    "$tuple": lambda codec, p, path: tuple(codec._decode_list(p, path)),  # noqa: SLF001
    "$set": lambda codec, p, path: set(codec._decode_list(p, path)),  # noqa: SLF001
    "$frozenset": lambda codec, p, path: frozenset(codec._decode_list(p, path)),  # noqa: SLF001
    "$ordered": Codec._decode_ordered,  # noqa: SLF001
    "$defaultdict": Codec._decode_default,  # noqa: SLF001
    "$counter": lambda codec, p, path: Counter(dict(codec._decode_pairs(p, path))),  # noqa: SLF001
    "$deque": lambda codec, p, path: deque(codec._decode_list(p["items"], path), p["maxlen"]),  # noqa: SLF001
    "$bytes": lambda _, p, __: _unb64(p),
    "$bytearray": lambda _, p, __: bytearray(_unb64(p)),
    "$complex": lambda _, p, __: complex(float(p[0]), float(p[1])),
    "$range": lambda _, p, __: range(*p),
    "$slice": lambda codec, p, path: slice(*codec._decode_list(p, path)),  # noqa: SLF001
    "$datetime": lambda _, p, __: datetime.fromisoformat(p[0]).replace(fold=p[1]),
    "$date": lambda _, p, __: date.fromisoformat(p),
    "$time": lambda _, p, __: time.fromisoformat(p[0]).replace(fold=p[1]),
    "$timedelta": lambda _, p, __: timedelta(*p),
    "$decimal": lambda _, p, __: Decimal(p),
    "$fraction": lambda _, p, __: Fraction(*p),
    "$uuid": lambda _, p, __: uuid.UUID(p),
}
