"""The manifest as bytes, both directions. Canonical: UTF-8 JSON, sorted keys, readable with ``cat``.

Its last field, ``digest``, is the SHA-256 of the same bytes without it: a bit that flipped in a number would otherwise
be believed, and could make retention delete the best. What has none (from before there was one, or because a person
took it out with an edit) is read as it stands.
"""

from __future__ import annotations

import hashlib
from typing import Any

from cloudckpt.core.model import Best, Checkpoint, Claim, JournalEvent, Manifest, Owner, State
from cloudckpt.core.policy import MODES, KeepBest, Policy
from cloudckpt.core.wire import Reader, canonical, metrics_to_json, parse_document, parse_object
from cloudckpt.errors import ConfigError, FormatError

__all__ = [
    "MANIFEST_LIMIT_BYTES",
    "decode_manifest",
    "encode_manifest",
    "entry_from_bytes",
    "entry_to_bytes",
    "policy_from_json",
    "policy_to_json",
]

#: A manifest with 10,000 kept entries has about 8 MiB; anything past this limit is not one of ours.
MANIFEST_LIMIT_BYTES = 64 * 1024 * 1024

_END = b"\n}\n"


def encode_manifest(manifest: Manifest) -> bytes:
    """The manifest's canonical bytes. Equal manifests give equal bytes."""
    body = canonical(
        {
            **manifest.extra,
            "format": manifest.format,
            "requires": list(manifest.requires),
            "run_id": manifest.run_id,
            "revision": manifest.revision,
            "write_id": manifest.write_id,
            "history": list(manifest.history),
            "writer_epoch": manifest.writer_epoch,
            "owner": _owner_to_json(manifest.owner),
            "claims": [{"writer_epoch": c.writer_epoch, "identity": c.identity} for c in manifest.claims],
            "next_seq": manifest.next_seq,
            "commits": manifest.commits,
            "resumed_from": manifest.resumed_from,
            "policy": policy_to_json(manifest.policy),
            "entries": [_entry_to_json(entry) for entry in manifest.entries],
            "best": [{"metric": b.metric, "mode": b.mode, "ids": list(b.ids)} for b in manifest.best],
            "recent": list(manifest.recent),
            "journal": [_event_to_json(event) for event in manifest.journal],
            "copies": list(manifest.copies),
            "updated_at": manifest.updated_at,
        },
        readable=True,
    )
    return body.removesuffix(_END) + _digest_field(_digest(body))


def _digest(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _digest_field(digest: str) -> bytes:
    return f',\n "digest": "{digest}"'.encode("ascii") + _END


def decode_manifest(body: bytes, *, what: str = "manifest.json") -> Manifest:
    """The manifest in ``body``.

    Raises:
        FormatError: not a manifest of a format this code knows, which names every problem and its place; or changed
            since it was written.
    """
    root = Reader(parse_document(body, what=what, limit_bytes=MANIFEST_LIMIT_BYTES), "", [])
    digest = root.optional("digest", Reader.digest)
    manifest = Manifest(
        format=root.at("format").integer(least=1),
        requires=root.at("requires").texts(),
        run_id=root.at("run_id").hex(32),
        revision=root.at("revision").integer(least=1),
        write_id=root.at("write_id").hex(16),
        history=tuple(item.hex(16) for item in root.at("history").items()),
        writer_epoch=root.at("writer_epoch").integer(),
        owner=root.optional("owner", _owner),
        claims=tuple(_claim(item) for item in root.at("claims").items()),
        next_seq=root.at("next_seq").integer(least=1),
        commits=root.at("commits").integer(),
        resumed_from=root.optional("resumed_from", Reader.save_id),
        policy=policy_from_json(root.at("policy")),
        entries=tuple(_entry(item) for item in root.at("entries").items()),
        best=tuple(_best(item) for item in root.at("best").items()),
        recent=tuple(item.save_id() for item in root.at("recent").items()),
        journal=tuple(_event(item) for item in root.at("journal").items()),
        copies=root.at("copies").integers(),
        updated_at=root.at("updated_at").time(),
        extra=root.rest(),
    )
    _check_together(manifest, root)
    root.finish(what)
    tail = b"" if digest is None else _digest_field(digest)
    # Elsewhere than at the end it is an old one that a writer carried along which did not know the field.
    if tail and body.endswith(tail) and _digest(body.removesuffix(tail) + _END) != digest:
        raise FormatError(
            f"{what} was changed after it was written: its digest does not match. If that was you, and on purpose, "
            'take the line with "digest" out as well'
        )
    return manifest


def _check_together(manifest: Manifest, root: Reader) -> None:
    ids = [entry.id for entry in manifest.entries]
    seqs = [entry.seq for entry in manifest.entries]
    if len(set(ids)) != len(ids):
        root.at("entries").complain("two entries have the same id")
    if seqs != sorted(set(seqs)) or any(seq >= manifest.next_seq for seq in seqs):
        root.at("entries").complain("seq must rise from entry to entry and stay below next_seq")
    if manifest.write_id not in manifest.history:
        root.at("history").complain("does not hold write_id")


def policy_to_json(policy: Policy) -> dict[str, Any]:
    """A policy as it stands in the manifest and in each index."""
    return {
        **policy.extra,
        "keep_last": policy.keep_last,
        "keep_best": [{"metric": r.metric, "mode": r.mode, "n": r.n} for r in policy.keep_best],
        "keep_every": policy.keep_every,
        "keep_within_s": policy.keep_within_s,
        "keep_unscored": policy.keep_unscored,
    }


def policy_from_json(reader: Reader) -> Policy:
    """The policy at this place; a value no rule allows is a problem of the document."""
    reader.object()
    try:
        return Policy(
            keep_last=reader.optional("keep_last", lambda r: r.integer(least=1)),
            keep_best=tuple(
                KeepBest(
                    r.object().at("metric").word(),
                    r.at("mode").choice(MODES),
                    r.optional("n", lambda n: n.integer()),
                )
                for r in reader.at("keep_best").items()
            ),
            keep_every=reader.optional("keep_every", lambda r: r.integer(least=1)),
            keep_within_s=reader.optional("keep_within_s", Reader.number),
            keep_unscored=reader.at("keep_unscored").integer(),
            extra=reader.rest(),
        )
    except ConfigError as exc:
        reader.complain(str(exc))
        return Policy()


def _owner_to_json(owner: Owner | None) -> dict[str, Any] | None:
    if owner is None:
        return None
    return {
        **owner.extra,
        "host": owner.host,
        "pid": owner.pid,
        "run_key": owner.run_key,
        "claimed_at": owner.claimed_at,
        "closed": owner.closed,
        "token": owner.token,
    }


def _owner(reader: Reader) -> Owner:
    reader.object()
    return Owner(
        host=reader.at("host").text(),
        pid=reader.at("pid").integer(),
        run_key=reader.optional("run_key", Reader.text),
        claimed_at=reader.at("claimed_at").time(),
        closed=reader.at("closed").boolean(),
        token=reader.at("token").hex(16),
        extra=reader.rest(),
    )


def _claim(reader: Reader) -> Claim:
    reader.object()
    return Claim(writer_epoch=reader.at("writer_epoch").integer(), identity=reader.at("identity").text())


def _best(reader: Reader) -> Best:
    reader.object()
    return Best(
        metric=reader.at("metric").text(),
        mode=reader.at("mode").choice(MODES),
        ids=tuple(item.save_id() for item in reader.at("ids").items()),
    )


def _event_to_json(event: JournalEvent) -> dict[str, Any]:
    fields = {"id": event.id, "step": event.step, "detail": event.detail}
    named = {name: value for name, value in fields.items() if value is not None}
    return {**event.extra, "at": event.at, "revision": event.revision, "event": event.event, **named}


def _event(reader: Reader) -> JournalEvent:
    reader.object()
    return JournalEvent(
        at=reader.at("at").time(),
        revision=reader.at("revision").integer(),
        event=reader.at("event").text(),
        id=reader.optional("id", Reader.save_id),
        step=reader.optional("step", Reader.step),
        detail=reader.optional("detail", Reader.text),
        extra=reader.rest(),
    )


def entry_to_bytes(entry: Checkpoint) -> bytes:
    """One entry alone, as one rank tells it to another."""
    return canonical(_entry_to_json(entry), readable=False)


def entry_from_bytes(body: bytes, *, what: str = "an entry") -> Checkpoint:
    """The entry in ``body``.

    Raises:
        FormatError: it is none.
    """
    root = Reader(parse_object(body, what=what, limit_bytes=MANIFEST_LIMIT_BYTES), "", [])
    entry = _entry(root)
    root.finish(what)
    return entry


def _entry_to_json(entry: Checkpoint) -> dict[str, Any]:
    return {
        **entry.extra,
        "id": entry.id,
        "step": entry.step,
        "seq": entry.seq,
        "state": str(entry.state),
        "writer_epoch": entry.writer_epoch,
        "announced_at": entry.announced_at,
        "committed_at": entry.committed_at,
        "metrics": metrics_to_json(entry.metrics),
        "size_bytes": entry.size_bytes,
        "object_count": entry.object_count,
        "world_size": entry.world_size,
        "tags": list(entry.tags),
        "pinned": entry.pinned,
        "held": entry.held,
        "damaged": entry.damaged,
        "marks": list(entry.marks),
        "kept_because": list(entry.kept_because),
        "index_digest": entry.index_digest,
        "retired_because": entry.retired_because,
    }


def _entry(reader: Reader) -> Checkpoint:
    reader.object()
    state = State(reader.at("state").choice([str(state) for state in State]))
    entry = Checkpoint(
        id=reader.at("id").save_id(),
        step=reader.at("step").step(),
        seq=reader.at("seq").integer(least=1),
        state=state,
        writer_epoch=reader.at("writer_epoch").integer(least=1),
        announced_at=reader.at("announced_at").time(),
        committed_at=reader.optional("committed_at", Reader.time),
        metrics=reader.at("metrics").metrics(),
        size_bytes=reader.at("size_bytes").integer(),
        object_count=reader.at("object_count").integer(),
        world_size=reader.at("world_size").integer(least=1),
        tags=reader.at("tags").texts(),
        pinned=reader.at("pinned").boolean(),
        held=reader.at("held").boolean(),
        damaged=reader.optional("damaged", Reader.text),
        marks=reader.at("marks").texts(),
        kept_because=reader.at("kept_because").texts(),
        index_digest=reader.optional("index_digest", Reader.digest),
        retired_because=reader.optional("retired_because", Reader.text),
        extra=reader.rest(),
    )
    if state is State.COMMITTED and (entry.index_digest is None or entry.committed_at is None):
        reader.complain("a committed entry needs index_digest and committed_at")
    return entry
