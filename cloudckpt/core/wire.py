"""Strict JSON at the border: bytes become plain values, or an error that lists every problem with its place.

``Reader`` walks a parsed document and collects problems instead of stopping at the first; the codecs of the
manifest and the index are written in its terms.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from cloudckpt.core import keys
from cloudckpt.core.model import FORMAT
from cloudckpt.errors import FormatError

__all__ = ["LARGEST_INTEGER", "Reader", "canonical", "metric_to_json", "metrics_to_json", "parse_document"]

_T = TypeVar("_T")

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_LARGEST_FLOAT = int(sys.float_info.max)
_LOW_HEX = re.compile(r"[0-9a-f]+")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

#: Every counter of the format fits a signed 64-bit integer.
LARGEST_INTEGER = 2**63 - 1

#: Deeper nesting of fields we only carry along could be read, and then not be written again.
_DEPTH_LIMIT = 100

#: More problems than this say nothing new; a hostile document must not make an endless message.
_PROBLEMS_SHOWN = 20

#: Nor are more than these kept: of a document of small wrong things they would take many times its size.
_PROBLEMS_KEPT = 1000


def canonical(document: Mapping[str, Any], *, readable: bool) -> bytes:
    """A document as UTF-8 JSON ending in a newline; NaN is refused.

    ``readable``: sorted keys, indented (the manifest). Otherwise the order is kept and everything stands on one
    line (the index, where order is content and there may be a hundred thousand tensors).
    """
    indent = 1 if readable else None
    text = json.dumps(document, sort_keys=readable, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        # A lone surrogate (an undecodable file name, say) has no UTF-8; JSON's own escapes can carry it.
        return json.dumps(document, sort_keys=readable, indent=indent, allow_nan=False).encode("ascii") + b"\n"


def metric_to_json(value: float) -> float | int | str:
    """A metric as JSON: numbers as they are, NaN and infinities as the strings ``nan``, ``inf``, ``-inf``."""
    if math.isfinite(value):
        return value
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def metrics_to_json(metrics: Mapping[str, float]) -> dict[str, float | int | str]:
    """All metrics of one checkpoint as JSON."""
    return {name: metric_to_json(value) for name, value in metrics.items()}


def parse_document(body: bytes, *, what: str, limit_bytes: int) -> dict[str, Any]:
    """The JSON object in ``body``, after the checks that come before every other one.

    Raises:
        FormatError: too long, not UTF-8, not JSON, not an object, a repeated name, nested too deeply, or of a
            newer format.
    """
    document = parse_object(body, what=what, limit_bytes=limit_bytes)
    found = document.get("format")
    if type(found) is not int or found < 1:
        raise FormatError(f"{what}: format: expected an integer >= 1, got {_shown(found)}")
    if found > FORMAT:
        raise FormatError(
            f"{what} has format {found} and this cloudckpt reads formats up to {FORMAT}: upgrade cloudckpt "
            "(pip install --upgrade cloudckpt). Nothing was changed"
        )
    return document


def parse_object(body: bytes, *, what: str, limit_bytes: int) -> dict[str, Any]:
    """The JSON object in ``body``, which is no document of its own.

    Raises:
        FormatError: too long, not UTF-8, not JSON, not an object, a repeated name, or nested too deeply.
    """
    if len(body) > limit_bytes:
        raise FormatError(f"{what} has {len(body)} bytes, more than the {limit_bytes} that are read")
    try:
        document = json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply to be one of ours") from None
    except ValueError as exc:
        raise FormatError(f"{what} is not valid JSON ({exc}); it has {len(body)} bytes") from exc
    if not isinstance(document, dict):
        raise FormatError(f"{what} is not a JSON object")
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {_shown(twice)} occurs twice in one object")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:30]} is too large")
    return number


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_deeper(value: object, limit: int) -> bool:
    level, depth = [value], 0
    while level and depth <= limit:
        containers = [inner for inner in level if isinstance(inner, dict | list)]
        level = [inner for c in containers for inner in (c.values() if isinstance(c, dict) else c)]
        depth += 1
    return bool(level)


class Reader:
    """One JSON value, the place it was found at, and the list all problems of the document go to.

    Every method answers with a usable value even after a problem, so that the rest is checked as well; call
    ``finish`` before trusting any of it.
    """

    def __init__(self, value: object, place: str, problems: list[str]) -> None:
        self.value = value
        self.place = place
        self._problems = problems
        self._taken: set[str] = set()

    def problem(self, expected: str) -> None:
        """Note that this value is not what was expected."""
        self.complain(f"expected {expected}, got {_shown(self.value)}")

    def complain(self, sentence: str) -> None:
        """Note a problem that is not about this value's own type."""
        if len(self._problems) < _PROBLEMS_KEPT:
            self._problems.append(f"{self.place or 'document'}: {sentence}")

    def finish(self, what: str) -> None:
        """Raise if anything was wrong anywhere in the document.

        Raises:
            FormatError: lists every problem with its place.
        """
        if self._problems:
            shown = "".join(f"\n  {problem}" for problem in self._problems[:_PROBLEMS_SHOWN])
            more = len(self._problems) - _PROBLEMS_SHOWN
            least = "at least " if len(self._problems) == _PROBLEMS_KEPT else ""
            raise FormatError(f"{what} is malformed:{shown}" + (f"\n  and {least}{more} more" if more > 0 else ""))

    # -- containers ------------------------------------------------------------------------------------------

    def at(self, name: str) -> Reader:
        """The value of a field; null where it is absent."""
        self._taken.add(name)
        fields = self.value if isinstance(self.value, dict) else {}
        return Reader(fields.get(name), f"{self.place}.{name}" if self.place else name, self._problems)

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return isinstance(self.value, dict) and self.value.get(name) is not None

    def optional(self, name: str, read: Callable[[Reader], _T]) -> _T | None:
        """A field that may be absent or null."""
        reader = self.at(name)
        return read(reader) if self.has(name) else None

    def object(self) -> Reader:
        """This value, which must be an object."""
        if not isinstance(self.value, dict):
            self.problem("an object")
        return self

    def items(self) -> list[Reader]:
        """The elements of this value, which must be an array."""
        if not isinstance(self.value, list):
            self.problem("an array")
            return []
        return [Reader(item, f"{self.place}[{n}]", self._problems) for n, item in enumerate(self.value)]

    def mapping(self) -> dict[str, Reader]:
        """The fields of this value, which must be an object with names of its own."""
        if not isinstance(self.value, dict):
            self.problem("an object")
            return {}
        return {
            name: Reader(item, f"{self.place}[{_shown(name)}]", self._problems) for name, item in self.value.items()
        }

    def rest(self) -> dict[str, Any]:
        """The fields nobody asked for: written by a newer version, and carried along."""
        fields = self.value if isinstance(self.value, dict) else {}
        unknown = {name: value for name, value in fields.items() if name not in self._taken}
        if _is_deeper(unknown, _DEPTH_LIMIT):
            self.complain(f"unknown fields are nested more than {_DEPTH_LIMIT} deep")
        return unknown

    # -- leaves ----------------------------------------------------------------------------------------------

    def text(self) -> str:
        """A string."""
        if isinstance(self.value, str):
            return self.value
        self.problem("a string")
        return ""

    def word(self) -> str:
        """A string that is not empty."""
        if isinstance(self.value, str) and self.value:
            return self.value
        self.problem("a string that is not empty")
        return "?"

    def integer(self, *, least: int = 0, most: int = LARGEST_INTEGER) -> int:
        """An integer, not a bool and not 1.0."""
        if type(self.value) is int and least <= self.value <= most:
            return self.value
        too_large = type(self.value) is int and self.value > most
        self.problem(f"an integer <= {most}" if too_large else f"an integer >= {least}")
        return least

    def step(self) -> int:
        """A training step."""
        return self.integer(most=keys.STEP_LIMIT)

    def boolean(self) -> bool:
        """True or false."""
        if isinstance(self.value, bool):
            return self.value
        self.problem("true or false")
        return False

    def number(self) -> float:
        """A finite number; an integer stays one."""
        if isinstance(self.value, float):
            return self.value
        if type(self.value) is int and abs(self.value) <= _LARGEST_FLOAT:
            return self.value
        self.problem("a number")
        return 0.0

    def metric(self) -> float:
        """A number, or ``"nan"``, ``"inf"``, ``"-inf"``."""
        if isinstance(self.value, str) and self.value in _NON_FINITE:
            return _NON_FINITE[self.value]
        return self.number()

    def metrics(self) -> dict[str, float]:
        """An object of metrics."""
        return {name: reader.metric() for name, reader in self.mapping().items()}

    def texts(self) -> tuple[str, ...]:
        """An array of strings."""
        return tuple(reader.text() for reader in self.items())

    def integers(self) -> tuple[int, ...]:
        """An array of integers >= 0."""
        return tuple(reader.integer() for reader in self.items())

    def time(self) -> str:
        """An ISO 8601 time with a zone, kept as text."""
        text = self.value if isinstance(self.value, str) else ""
        try:
            if datetime.fromisoformat(text).tzinfo is not None:
                return text
        except ValueError:
            pass
        self.problem("a time such as 2026-01-31T12:00:00.000Z")
        return "1970-01-01T00:00:00.000Z"

    def save_id(self) -> str:
        """A save id."""
        if isinstance(self.value, str) and keys.is_save_id(self.value):
            return self.value
        self.problem("a save id, 8 lower-case hex digits")
        return "00000000"

    def hex(self, digits: int) -> str:
        """Lower-case hex digits of one length."""
        if isinstance(self.value, str) and len(self.value) == digits and _LOW_HEX.fullmatch(self.value):
            return self.value
        self.problem(f"{digits} lower-case hex digits")
        return "0" * digits

    def digest(self) -> str:
        """``sha256:`` and 64 hex digits."""
        if isinstance(self.value, str) and _DIGEST.fullmatch(self.value):
            return self.value
        self.problem('a digest, "sha256:" and 64 hex digits')
        return "sha256:" + "0" * 64

    def choice(self, words: Sequence[str]) -> str:
        """One of a few words."""
        if isinstance(self.value, str) and self.value in words:
            return self.value
        self.problem("one of " + ", ".join(words))
        return words[0]
