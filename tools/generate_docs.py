"""Write the generated parts of the docs anew, or check that they are what the code says.

    python tools/generate_docs.py            exit 1 and a diff if something is stale
    python tools/generate_docs.py --write    replace what is stale

A generated part stands between ``<!-- generated: NAME -->`` and ``<!-- /generated -->``. Everything in it is made by
the package's own functions with a fixed clock and fixed tokens, so that equal code gives equal text.

(Past 350 lines: each generated part is a function here, and the list of them is the program.)
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import hashlib
import inspect
import json
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import crc32c

from cloudckpt import errors
from cloudckpt.cli.app import COMMANDS, function_of
from cloudckpt.cli.common import FINDINGS
from cloudckpt.cli.schema import OBJECTS, SCHEMAS
from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.checksum import combine_all, format_crc32c
from cloudckpt.core.index_json import decode_index, encode_index
from cloudckpt.core.layout import Item, Layout, plan_layout, read_header
from cloudckpt.core.manifest_json import decode_manifest
from cloudckpt.core.model import Checkpoint, Chunk, Index, Manifest, Owner, PayloadObject, State, TensorEntry
from cloudckpt.core.policy import KeepBest, Policy
from cloudckpt.core.rights import NEEDS, Grant, Need, Provider, Role, Verb, needs_of
from cloudckpt.sealed import summed
from cloudckpt.storage import ManifestStore, MemoryStorage
from cloudckpt.vocabulary import TRANSLATIONS

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n)(.*?)(<!-- /generated -->)", re.DOTALL)

COMPONENT = "model"
ITEMS = (
    Item(name="embedding.weight", dtype="float32", shape=(2, 3), item_size=4),
    Item(name="steps", dtype="int64", shape=(), item_size=8),
    Item(name="scale", dtype="float8_e8m0fnu", shape=(2,), item_size=1),
)
DATA = {
    "embedding.weight": struct.pack("<6f", 0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
    "steps": struct.pack("<q", 1000),
    "scale": bytes([127, 128]),
}


class Fixed:
    """A clock that goes on by a minute at each look, and tokens that are the same every time."""

    def __init__(self) -> None:
        self.minutes = 0
        self.tokens = 0

    def clock(self) -> str:
        """The next time label."""
        self.minutes += 1
        return f"2026-01-31T12:{self.minutes:02d}:00.000Z"

    def token(self, digits: int) -> str:
        """The next token."""
        self.tokens += 1
        return hashlib.sha256(f"example {self.tokens}".encode()).hexdigest()[:digits]


class Example:
    """A small run: step 500 retired, step 1000 committed, step 1500 on its way."""

    def __init__(self) -> None:
        fixed = Fixed()
        self.storage = MemoryStorage()
        self.store = ManifestStore(self.storage, clock=fixed.clock, token=fixed.token)
        self.layout: Layout = plan_layout(ITEMS)
        self.payload = self.layout.header + b"".join(DATA[place.item.name] for place in self.layout.places)
        self._claim()
        self._save(500, 0.52)
        self.index_key = self._save(1000, 0.41)
        self._announce(1500, 0.44)

    def _claim(self) -> None:
        owner = Owner(
            token=self.store.token(16), host="node-1", pid=4711, run_key="8123", claimed_at=self.store.clock()
        )
        policy = Policy(keep_last=1, keep_best=(KeepBest("val_loss", "min", 1),))

        def change(current: Manifest, _: None) -> Manifest:
            return transitions.claim(
                current, owner, policy=policy, settlements={}, takeover="last_wins", at=self.store.clock()
            )

        run = Manifest(run_id=self.store.token(32), policy=policy)
        self.store.transact(change, prepare=lambda _: None, new=lambda: run)

    def _announce(self, step: int, loss: float) -> Checkpoint:
        entry = Checkpoint(
            id=self.store.token(8),
            step=step,
            seq=0,
            state=State.PENDING,
            writer_epoch=1,
            announced_at="",
            metrics={"val_loss": loss},
            size_bytes=len(self.payload),
            object_count=2,
        )

        def change(current: Manifest, _: None) -> Manifest:
            return transitions.announce(current, entry, writer_epoch=1, settlements={}, gone=(), at=self.store.clock())

        found = self.store.transact(change, prepare=lambda _: None).find(entry.id)
        if found is None:
            raise RuntimeError(entry.name)
        return found

    def _save(self, step: int, loss: float) -> str:
        entry = self._announce(step, loss)
        name = keys.payload_name(COMPONENT, 0, 1)
        self.storage.put(keys.payload_key(step, entry.id, name), [self.payload], size_bytes=len(self.payload))
        index = self._index(entry, name)
        body = encode_index(index)
        self.storage.put(keys.index_key(step, entry.id), [body], size_bytes=len(body))
        self.store.transact(
            lambda current, _: transitions.commit(
                current, entry.id, summed(index, body), writer_epoch=1, at=self.store.clock()
            ),
            prepare=lambda _: None,
        )
        return keys.index_key(step, entry.id)

    def _index(self, entry: Checkpoint, name: str) -> Index:
        tensors: dict[str, TensorEntry] = {}
        sums = [(crc32c.crc32c(self.layout.header), len(self.layout.header))]
        for place in self.layout.places:
            value = crc32c.crc32c(DATA[place.item.name])
            sums.append((value, place.size_bytes))
            chunk = Chunk(
                object=name,
                start=place.start,
                length=place.size_bytes,
                offsets=(0,) * len(place.item.shape),
                lengths=place.item.shape,
                crc32c=value,
            )
            tensors[place.item.name] = TensorEntry(dtype=place.item.dtype, shape=place.item.shape, chunks=(chunk,))
        tensors["head.weight"] = TensorEntry(dtype="float32", shape=(2, 3), alias_of="embedding.weight")
        refer = {tensor: {"$tensor": tensor} for tensor in sorted(tensors)}
        manifest = self.store.last_seen
        if manifest is None:
            raise RuntimeError("sealed before it was announced")
        return Index(
            run_id=manifest.run_id,
            id=entry.id,
            step=entry.step,
            seq=entry.seq,
            writer_epoch=1,
            announced_at=entry.announced_at,
            sealed_at=self.store.clock(),
            world_size=1,
            metrics=entry.metrics,
            tags=(),
            pinned=False,
            policy=manifest.policy,
            versions={"cloudckpt": "0.1.0", "python": "3.13.1", "torch": "2.13.0"},
            objects=(PayloadObject(name=name, size_bytes=len(self.payload), crc32c=combine_all(sums)),),
            tensors={COMPONENT: tensors, "extra": {}},
            structure={COMPONENT: refer, "extra": {"lr": 0.001, "betas": {"$tuple": [0.9, 0.999]}}},
        )


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```\n"


def example_manifest() -> str:
    """``manifest.json`` of the example run, exactly as it is stored."""
    body = Example().storage.read(keys.MANIFEST, limit_bytes=2**20).body
    decode_manifest(body)
    return _fenced(body.decode(), "json")


def example_index() -> str:
    """The index of the example's committed checkpoint, spread over lines, and what its digest is made from."""
    example = Example()
    body = example.storage.read(example.index_key, limit_bytes=2**20).body
    decode_index(body)
    document = json.loads(body)
    covered = body[: body.rindex(b', "digest"')] + b"}\n"
    if f"sha256:{hashlib.sha256(covered).hexdigest()}" != document["digest"]:
        raise RuntimeError("the rule for the digest in the docs is not the code's")
    return _fenced(json.dumps(document, indent=1, ensure_ascii=False), "json") + (
        f"\nStored, this document has {len(body)} bytes. Its first {len(covered) - 2} bytes followed by `}}` and a "
        f"newline have the SHA-256 that `digest` gives.\n"
    )


def example_header() -> str:
    """The header of the example's payload object."""
    example = Example()
    layout, payload = example.layout, example.payload
    length = struct.unpack("<Q", layout.header[:8])[0]
    read_header(payload, object_size_bytes=len(payload))
    rows = "".join(
        f"| `{p.stored_as}` | {p.start} | {p.size_bytes} | `{format_crc32c(crc32c.crc32c(DATA[p.item.name]))}` |\n"
        for p in layout.places
    )
    return (
        _fenced(json.dumps(json.loads(layout.header[8:]), indent=1), "json")
        + f"\nThe object begins with the bytes `{layout.header[:8].hex(' ')}` (the length {length}, little-endian), "
        f"then this header on one line, padded with spaces; its data begins at byte {len(layout.header)}. The whole "
        f"object has {len(payload)} bytes and CRC-32C `{format_crc32c(crc32c.crc32c(payload))}`.\n\n"
        "| tensor | start in the object | length | CRC-32C |\n| --- | --- | --- | --- |\n" + rows
    )


_VECTORS = (
    "manifest.json",
    "manifest-000480.json",
    "manifest-1000000.json",
    "manifest-480.json",
    "manifest-replaced-9f3ac2e1.json",
    "checkpoint-1500.9f3ac2e1/checkpoint.json",
    "checkpoint-0.00000000/model-00000-of-00001.safetensors",
    "checkpoint-1500.9f3ac2e1/optimizer.0-00003-of-00008.safetensors",
    "checkpoint-1500.9f3ac2e1/m%C3%B6del%2Fa-00000-of-00001.safetensors",
    "checkpoint-1500.9f3ac2e1/.model-00000-of-00001.safetensors.tmp",
    "checkpoint-1500.9f3ac2e1/.checkpoint.json.tmp",
    ".cloudckpt-probe-0a1b2c3d",
    ".cloudckpt.lock",
    ".cloudckpt-swap.tmp",
    "checkpoint-01500.9f3ac2e1/checkpoint.json",
    "checkpoint-1500.9F3AC2E1/checkpoint.json",
    "checkpoint-1500/checkpoint.json",
    "checkpoint-1500.9f3ac2e1",
    "checkpoint-1500.9f3ac2e1/notes.txt",
    "checkpoint-1500.9f3ac2e1/a/model-00000-of-00001.safetensors",
    "checkpoint-1500.9f3ac2e1/../manifest.json",
    "checkpoint-1500.9f3ac2e1/.hidden-00000-of-00001.safetensors",
    "checkpoint-1500.9f3ac2e1/m%c3%b6del-00000-of-00001.safetensors",
    "checkpoint-1500.9f3ac2e1/model-0-of-1.safetensors",
    "/manifest.json",
    "other/manifest.json",
)
_COMPONENTS = ("model", "optimizer.0", "mödel/a", "a b", "~", "..", ".hidden", "100%")


def key_vectors() -> str:
    """What each key is, and how components are escaped."""
    rows = []
    for text in _VECTORS:
        key = keys.parse(text)
        facts = [("step", key.step), ("id", key.id), ("revision", key.revision)]
        said = ", ".join(f"{name} {value}" for name, value in facts if value is not None)
        rows.append(f"| `{text}` | {key.kind} | {said} |\n")
    names = []
    for component in _COMPONENTS:
        name = keys.payload_name(component, 0, 1)
        if keys.component_of(name) != component:
            raise RuntimeError(component)
        names.append(f"| `{component}` | `{name}` |\n")
    return (
        "| key | kind | says |\n| --- | --- | --- |\n"
        + "".join(rows)
        + "\n| component | payload object of rank 0 of 1 |\n| --- | --- |\n"
        + "".join(names)
    )


def translations() -> str:
    """The words of other tools, tool by tool."""
    text = ""
    for tool in dict.fromkeys(t.tool for t in TRANSLATIONS):
        rows = "".join(f"| `{t.word}` | {t.here} |\n" for t in TRANSLATIONS if t.tool == tool)
        text += f"### {tool}\n\n| there | here |\n| --- | --- |\n{rows}\n"
    return text


_CODES = {
    0: "fine",
    1: "failure: the store refused, a save failed, a document cannot be read",
    2: "usage: an argument or setting cannot be used as given",
    FINDINGS: "findings: `verify` found damage, stored bytes are not what was sealed, or `gc` could not delete all",
    4: "nothing matches: no such checkpoint, or no run",
    5: "conflict: another writer owns the run; a supervisor must not restart",
    130: "interrupted (Ctrl-C); the same command again finishes what was begun",
    143: "terminated (SIGTERM); likewise",
}


def exit_codes() -> str:
    """The exit codes of the command line, and the errors that give them."""
    classes = [getattr(errors, name) for name in sorted(errors.__all__)]
    rows = []
    for code, meaning in _CODES.items():
        named = ", ".join(f"`{kind.__name__}`" for kind in classes if kind.exit_code == code)
        rows.append(f"| {code} | {meaning} | {named or '-'} |\n")
    if missing := {kind.exit_code for kind in classes} - set(_CODES):
        raise RuntimeError(f"the exit codes {missing} have no meaning in this table")
    return "| code | meaning | errors |\n| --- | --- | --- |\n" + "".join(rows)


def cli_commands() -> str:
    """Every command and the first line of its help."""
    text = ""
    for panel, commands in COMMANDS.items():
        rows = "".join(
            f"| `{name}` | {(inspect.getdoc(function_of(place)) or '').partition(chr(10))[0]} |\n"
            for name, place in commands.items()
        )
        text += f"| {panel} | |\n| --- | --- |\n{rows}\n"
    return text


def cli_json() -> str:
    """The documents that ``--json`` gives, field by field."""
    text = ""
    for name, fields in {**SCHEMAS, **{f"object {name}": fields for name, fields in OBJECTS.items()}}.items():
        rows = "".join(f"| `{field}` | {meaning} |\n" for field, meaning in fields.items())
        text += f"**{name}**\n\n| field | type; meaning |\n| --- | --- |\n{rows}\n"
    return text


def _grants(found: Iterable[Grant]) -> str:
    return "<br>".join(f"`{grant.action}` on {grant.scope}" for grant in found) or "-"


def rights() -> str:
    """What each role may, in both providers' words, and the functions that need it."""
    roles = "".join(f"| {role} | {', '.join(need.verb for need in needs_of(role))} |\n" for role in Role)
    rows = "".join(
        f"| {need.verb} | {', '.join(need.roles)} | {_grants(need.aws)} | {_grants(need.gcp)} | {need.why} |\n"
        for need in NEEDS
    )

    code = "".join(
        f"| `{action}` | {need.verb} | {_lines(need, provider)} |\n"
        for provider in Provider
        for action in dict.fromkeys(grant.action for need in NEEDS for grant in need.at(provider))
        for need in NEEDS
        if action in {grant.action for grant in need.at(provider)}
    )
    return (
        f"| role | does |\n| --- | --- |\n{roles}\n"
        f"| what | who | at AWS | at Google Cloud | why |\n| --- | --- | --- | --- | --- |\n{rows}\n"
        f"| action | for what | the lines that need it |\n| --- | --- | --- |\n{code}"
    )


#: What a function that does it has in the line that counts: a request, or else the call that leads to one. The first of
#: a verb's patterns that is found in the function decides.
_SHOWS: dict[Verb, tuple[str, ...]] = {
    Verb.READ: (r'"GET"', r'"get_object"', r"_head\(|\.attest\(|\.read\(|_fetch\("),
    Verb.READ_METADATA: (r"\.read\(|_fetch\(",),
    Verb.LIST: (r'"list_objects_v2"|"GET"', r"\.list\("),
    Verb.WRITE_MANIFEST: (r'"put_object"|_upload_whole\(', r"self\._write\(|\.create\(|\.run\("),
    Verb.WRITE_CHECKPOINT: (r'"PUT"|"POST"', r'"(?:create|complete)_multipart_upload"|"put_object"|_upload_whole\('),
    Verb.ABORT_UPLOAD: (r'"abort_multipart_upload"', r"abort_uploads\(|\.abort\(|\._abort\("),
    Verb.LIST_UPLOADS: (r'"list_multipart_uploads"', r"abort_uploads\(|\._find\("),
    Verb.DELETE: (r'"DELETE"', r"\.delete\(|\._delete\(|_delete_\w+\(|\.run\("),
    Verb.DECRYPT: (r'"GET"', r'"get_object"|"complete_multipart_upload"'),
    Verb.ENCRYPT: (r'"put_object"|"create_multipart_upload"',),
}
#: Modules of one provider; every other module needs the action of either.
_OWN = {Provider.AWS: "cloudckpt.storage.s3", Provider.GCP: "cloudckpt.storage.gcs"}


def line_of(place: str, verb: Verb) -> tuple[Path, int]:
    """Where ``module:name`` does what the verb says: the file below the repository's root, and the line.

    Raises:
        LookupError: there is no such function, or nothing in it looks like that.
    """
    module, _, name = place.partition(":")
    path = Path(*module.split(".")).with_suffix(".py")
    text = (ROOT / path).read_text(encoding="utf-8")
    body: list[ast.stmt] = _tree(text).body
    end = 0
    for part in name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = next((node for node in body if isinstance(node, kinds) and node.name == part), None)
        if found is None:
            raise LookupError(f"{path} has no {name}")
        body, end = found.body, found.end_lineno or found.lineno
    # After the docstring, which may speak of requests that it does not make.
    first = body[1].lineno if isinstance(body[0], ast.Expr) and len(body) > 1 else body[0].lineno
    lines = text.splitlines()
    for pattern in _SHOWS[verb]:
        for number in range(first, end + 1):
            if re.search(pattern, lines[number - 1].partition("  # ")[0]):
                return path, number
    raise LookupError(f"nothing in {name} of {path} looks like: {verb}")


@functools.cache
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


def _lines(need: Need, provider: Provider) -> str:
    """Links to the lines by which a need needs a provider's action."""
    others = tuple(module for one, module in _OWN.items() if one is not provider)
    links = []
    for place in need.code:
        if not place.startswith(others):
            path, number = line_of(place, need.verb)
            links.append(f"[`{place.partition(':')[2]}`](../../{path.as_posix()}#L{number})")
    return ", ".join(links)


GENERATED: dict[str, Callable[[], str]] = {
    "example-manifest": example_manifest,
    "example-index": example_index,
    "example-header": example_header,
    "key-vectors": key_vectors,
    "translations": translations,
    "exit-codes": exit_codes,
    "cli-commands": cli_commands,
    "cli-json": cli_json,
    "rights": rights,
}


def documents(root: Path = ROOT) -> list[Path]:
    """The documents that may hold generated parts."""
    return sorted([root / "README.md", *(root / "docs").rglob("*.md")])


def renewed(text: str) -> str:
    """A document with every generated part made anew."""

    def part(match: re.Match[str]) -> str:
        return f"{match[1]}\n{GENERATED[match[2]]().rstrip()}\n\n{match[4]}"

    return _BLOCK.sub(part, text)


def stale(root: Path = ROOT) -> Iterator[tuple[Path, str, str]]:
    """The documents that are not what the code says: path, text, what it should be."""
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        if (wanted := renewed(text)) != text:
            yield path, text, wanted


def check(root: Path = ROOT) -> str:
    """A diff of everything that is stale; empty if nothing is."""
    return "".join(
        line
        for path, text, wanted in stale(root)
        for line in difflib.unified_diff(
            text.splitlines(keepends=True), wanted.splitlines(keepends=True), str(path), "as the code says"
        )
    )


def main() -> int:
    """Check, or write with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace what is stale")
    parser.add_argument("--check", action="store_true", help="only look (the default)")
    if parser.parse_args().write:
        for path, _, wanted in list(stale()):
            path.write_text(wanted, encoding="utf-8", newline="\n")
            print(f"wrote {path.relative_to(ROOT)}")
        return 0
    diff = check()
    sys.stdout.write(diff)
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
