"""Keys under a root, both directions. The only module that knows how a path is spelled.

Grammar (ABNF-like; every key is relative to the root, parts joined with ``/``)::

    manifest    = "manifest.json"
    copy        = "manifest-" 6*19DIGIT ".json"              up to 2^62
    replaced    = "manifest-replaced-" 8HEXDIG ".json"     what repair found in place of a manifest
    prefix      = "checkpoint-" step "." save-id
    index       = prefix "/checkpoint.json"
    payload     = prefix "/" component "-" 5*DIGIT "-of-" 5*DIGIT ".safetensors"
    temporary   = [prefix "/"] "." name ".tmp"             local disk only, while a put of "name" is under way
    probe       = ".cloudckpt-probe-" 8HEXDIG
    lock        = ".cloudckpt.lock"                        local disk only
    swap        = ".cloudckpt-swap.tmp"                    local disk only, written under the lock
    step        = "0" / (%x31-39 *18DIGIT)
    save-id     = 8 lower-case hex digits
    component   = 1*(ALPHA / DIGIT / "_" / "." / "-" / "%" 2HEXDIG), not starting with "." and without ".."

Everything else is foreign: reported, never touched (I12).
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import quote, unquote

from cloudckpt.errors import FormatError

__all__ = [
    "COUNT_LIMIT",
    "INDEX_NAME",
    "LOCK",
    "MANIFEST",
    "PROBE_PREFIX",
    "STEP_LIMIT",
    "SWAP",
    "Key",
    "Kind",
    "checkpoint_prefix",
    "component_of",
    "index_key",
    "is_payload_name",
    "is_save_id",
    "manifest_copy",
    "parse",
    "parse_prefix",
    "payload_key",
    "payload_name",
    "replaced_manifest",
    "temporary_key",
]

MANIFEST = "manifest.json"
INDEX_NAME = "checkpoint.json"
LOCK = ".cloudckpt.lock"
SWAP = ".cloudckpt-swap.tmp"
PROBE_PREFIX = ".cloudckpt-probe-"

#: The highest step: what a folder's name can spell.
STEP_LIMIT = 10**18

#: No run counts its revisions, saves or writers this far: a higher number was put there by hand.
COUNT_LIMIT = 2**62

_ID = re.compile(r"[0-9a-f]{8}")
_PREFIX = re.compile(r"checkpoint-(0|[1-9][0-9]{0,18})\.([0-9a-f]{8})")
_COPY = re.compile(r"manifest-([0-9]{6,19})\.json")
_REPLACED = re.compile(r"manifest-replaced-[0-9a-f]{8}\.json")
_REPLACED_TEMPORARY = re.compile(r"\.manifest-replaced-[0-9a-f]{8}\.json\.tmp")
_PROBE = re.compile(r"\.cloudckpt-probe-[0-9a-f]{8}")
_PAYLOAD = re.compile(r"((?!\.|.*\.\.)(?:[A-Za-z0-9_.-]|%[0-9A-F]{2})+)-([0-9]{5,})-of-([0-9]{5,})\.safetensors")
_TEMPORARY = re.compile(r"\.(.+)\.tmp")

#: Names longer than this do not fit common file systems (255 bytes) with our suffixes.
_COMPONENT_LIMIT = 180


class Kind(StrEnum):
    """What a key under the root is."""

    MANIFEST = "manifest"
    COPY = "copy"
    REPLACED = "replaced"
    INDEX = "index"
    PAYLOAD = "payload"
    TEMPORARY = "temporary"
    PROBE = "probe"
    LOCK = "lock"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A parsed key. ``step`` and ``id`` for keys inside a checkpoint's folder, ``revision`` for copies."""

    text: str
    kind: Kind
    step: int | None = None
    id: str | None = None
    revision: int | None = None


def is_save_id(text: str) -> bool:
    """Whether ``text`` is a save id: 8 lower-case hex digits."""
    return _ID.fullmatch(text) is not None


def checkpoint_prefix(step: int, save_id: str) -> str:
    """The folder of one save, without a trailing slash."""
    return f"checkpoint-{step}.{save_id}"


def parse_prefix(text: str) -> tuple[int, str] | None:
    """``(step, save id)`` of a folder name, or None if it is not one of ours."""
    match = _PREFIX.fullmatch(text)
    return (int(match[1]), match[2]) if match else None


def index_key(step: int, save_id: str) -> str:
    """The key of a checkpoint's index."""
    return f"{checkpoint_prefix(step, save_id)}/{INDEX_NAME}"


def manifest_copy(revision: int) -> str:
    """The key of the immutable copy of one manifest revision."""
    return f"manifest-{revision:06d}.json"


def payload_name(component: str, rank: int, world_size: int) -> str:
    """The name, inside the folder, of the payload object of one component and rank.

    Raises:
        FormatError: the component's name is empty, too long once escaped, or no text at all.
    """
    try:
        escaped = quote(component, safe="", encoding="utf-8", errors="strict").replace("~", "%7E")
    except UnicodeEncodeError:
        raise FormatError(f"component {component!r}: a lone surrogate has no UTF-8, use another name") from None
    escaped = escaped.replace("..", ".%2E")
    if escaped.startswith("."):
        escaped = "%2E" + escaped[1:]
    if not escaped or len(escaped) > _COMPONENT_LIMIT:
        raise FormatError(
            f"component {component!r}: a name needs 1 to {_COMPONENT_LIMIT} characters once escaped for object "
            f"keys, this one has {len(escaped)}. Use a shorter top-level key in the state."
        )
    return f"{escaped}-{rank:05d}-of-{world_size:05d}.safetensors"


def replaced_manifest(token: str) -> str:
    """The key under which ``repair`` keeps what it found in place of a manifest."""
    return f"manifest-replaced-{token}.json"


def is_payload_name(name: str) -> bool:
    """Whether a name inside a checkpoint's folder can be a payload object's."""
    return _PAYLOAD.fullmatch(name) is not None


def component_of(name: str) -> str:
    """The component whose payload object has this name.

    Raises:
        FormatError: it is no payload object's name.
    """
    match = _PAYLOAD.fullmatch(name)
    if match is not None:
        with contextlib.suppress(UnicodeDecodeError):
            return unquote(match[1], errors="strict")
    raise FormatError(f"{name!r} is not the name of a payload object")


def payload_key(step: int, save_id: str, name: str) -> str:
    """The key of a payload object, given its name inside the folder."""
    return f"{checkpoint_prefix(step, save_id)}/{name}"


def temporary_key(key: str) -> str:
    """Where local disk writes the bytes of ``key`` before it renames them."""
    folder, _, name = key.rpartition("/")
    return f"{folder}/.{name}.tmp" if folder else f".{name}.tmp"


_ROOT_KINDS = {MANIFEST: Kind.MANIFEST, LOCK: Kind.LOCK, SWAP: Kind.TEMPORARY}


def parse(text: str) -> Key:
    """What a key under the root is; anything outside the grammar is ``FOREIGN`` (I12)."""
    folder, slash, name = text.partition("/")
    if not slash:
        return _parse_root(text)
    place = parse_prefix(folder)
    kind = _kind_inside(name) if place else None
    if place is None or kind is None:
        return Key(text=text, kind=Kind.FOREIGN)
    return Key(text=text, kind=kind, step=place[0], id=place[1])


def _parse_root(name: str) -> Key:
    if kind := _ROOT_KINDS.get(name):
        return Key(text=name, kind=kind)
    if (match := _COPY.fullmatch(name)) and int(match[1]) <= COUNT_LIMIT:
        return Key(text=name, kind=Kind.COPY, revision=int(match[1]))
    patterns = ((_REPLACED, Kind.REPLACED), (_PROBE, Kind.PROBE), (_REPLACED_TEMPORARY, Kind.TEMPORARY))
    kind = next((kind for pattern, kind in patterns if pattern.fullmatch(name)), Kind.FOREIGN)
    return Key(text=name, kind=kind)


def _kind_inside(name: str) -> Kind | None:
    if name == INDEX_NAME:
        return Kind.INDEX
    if is_payload_name(name):
        return Kind.PAYLOAD
    temporary = _TEMPORARY.fullmatch(name)
    if temporary and (temporary[1] == INDEX_NAME or is_payload_name(temporary[1])):
        return Kind.TEMPORARY
    return None
