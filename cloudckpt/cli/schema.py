"""What ``--json`` gives, as a table: the documentation is made from it, and the tests compare it with what is printed.

Fields are only ever added. A program that reads a document must pass over names that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["OBJECTS", "SCHEMAS"]

#: command -> field -> type and meaning. "?" stands for a field that can be null.
SCHEMAS: Mapping[str, Mapping[str, str]] = {
    "ls": {
        "root": "string; the run's URL",
        "run_id": "string, 32 hex digits",
        "revision": "integer; of the manifest",
        "policy": "object; the stored retention policy",
        "best": "array of objects: metric, mode, ids (best first)",
        "recent": "array of ids, newest first",
        "uploaded_bytes": "object: id of an upload in flight -> bytes in place",
        "checkpoints": "array of checkpoint, oldest first",
    },
    "ls PREFIX": {"root": "string; the prefix", "runs": "array of run"},
    "show": {"checkpoint": "checkpoint", "index": "object; the index without the plain values"},
    "best": {"metric": "string", "value": "number", "checkpoint": "checkpoint"},
    "latest": {"checkpoint": "checkpoint"},
    "log": {"root": "string", "events": "array of objects: at, revision, event, id?, step?, detail?"},
    "diff": {
        "before": "checkpoint",
        "after": "checkpoint",
        "metrics": "array of objects: name, before?, after?",
        "components": "array of objects: name, before?, after?",
        "facts": "array of objects: name, before?, after?",
        "tensors": "array of objects: name, kind (added, removed, shape, dtype, values, unknown), before?, after?",
        "values": "array of names; components whose plain values differ",
        "same_tensors": "integer",
        "same": "boolean; whether state and metrics are the same",
        "by_how_much": "array? of objects: name, elements, changed, largest, relative; with --values",
    },
    "plot": {
        "root": "string",
        "metric": "string",
        "points": "array of objects: step, value?, kind (saved, best, pinned, deleted, failed), name, note",
        "path": "string?; the file that was written",
    },
    "ui": {
        "root": "string; the run or prefix that is shown",
        "url": "string; of the page, as long as the command runs",
    },
    "cost": {
        "found": "object: root, checkpoint, kept, save_every_s, every_from, hours_a_month, prices, costs",
        "total": "number; a month, at the prices given",
    },
    "pin, unpin, tag, mark, release": {"dry_run": "boolean", "checkpoint": "checkpoint; as it is now"},
    "pull": {
        "dry_run": "boolean",
        "checkpoint": "checkpoint",
        "folder": "string; where it lies",
        "files": "array of names",
        "size_bytes": "integer; of the files",
        "read_bytes": "integer; came from the store",
        "opaque": "array of names; tensors that are plain bytes in the files",
    },
    "cp": {
        "source": "checkpoint",
        "checkpoint": "checkpoint; what it is at the target",
        "dry_run": "boolean",
        "new_run": "boolean; whether the target was no run before",
        "stored_bytes": "integer; copied by the store itself",
        "carried_bytes": "integer; carried by this machine",
        "retired": "array of checkpoint; older ones of the target that its policy lets go",
        "url": "string; of the copy",
    },
    "export": {
        "dry_run": "boolean",
        "checkpoint": "checkpoint",
        "format": "string",
        "path": "string",
        "components": "array of names; what goes in",
        "files": "array of names (not for a dry run)",
        "left_out": "array of names; components without tensors",
    },
    "import": {
        "dry_run": "boolean",
        "plan": "object: path, kind, step?, metrics, parts, left_out",
        "root": "string (only for a dry run)",
        "checkpoint": "checkpoint (not for a dry run)",
        "components": "array of names (not for a dry run)",
        "url": "string (not for a dry run)",
    },
    "prune": {
        "root": "string",
        "dry_run": "boolean; true if nothing was changed",
        "decisions": "array of objects: checkpoint, keep, reasons; oldest first",
        "size_bytes": "integer; of what is retired",
    },
    "gc": {
        "root": "string",
        "dry_run": "boolean; true if nothing was changed",
        "decisions": "array of objects: checkpoint, keep, reasons; oldest first",
        "size_bytes": "integer; of the objects that go",
        "retired": "array of checkpoint; their bytes go",
        "objects": "array of keys that go",
        "foreign": "array of keys that are not ours",
        "aborted_uploads": "integer",
        "failed": "object: what stays -> why",
    },
    "rm": {"dry_run": "boolean", "checkpoints": "array of checkpoint", "failed": "object: name -> why"},
    "verify": {
        "ok": "boolean",
        "checkpoints": "array of checkpoint; what was looked at",
        "findings": "array of objects: checkpoint, key, problem, start?, length?",
        "deep": "boolean",
        "bytes_read": "integer",
    },
    "doctor": {"root": "string", "ok": "boolean", "checks": "array of objects: name, ok, detail"},
    "repair": {
        "url": "string",
        "carried_out": "boolean",
        "basis": "string",
        "admitted": "array of checkpoint",
        "refused": "object: folder -> why",
        "could_not_know": "array of sentences",
        "manifest": "object; the proposed manifest",
    },
}

#: The objects that several documents have.
OBJECTS: Mapping[str, Mapping[str, str]] = {
    "checkpoint": {
        "id": "string, 8 hex digits; the save id",
        "step": "integer",
        "seq": "integer; place in the run's order",
        "state": "pending, committed or retired",
        "writer_epoch": "integer",
        "announced_at": "time, UTC, ISO 8601",
        "committed_at": "time?",
        "metrics": "object: name -> number, or nan, inf, -inf as strings",
        "size_bytes": "integer",
        "object_count": "integer",
        "world_size": "integer",
        "tags": "array of strings",
        "pinned": "boolean",
        "held": "boolean; admitted by repair",
        "damaged": "string?; why its bytes are unusable",
        "marks": "array of strings",
        "kept_because": "array of strings",
        "index_digest": "string?",
        "retired_because": "string?",
        "name": "string; the folder's name",
        "url": "string",
    },
    "run": {
        "name": "string; its place below the prefix",
        "url": "string",
        "run_id": "string",
        "checkpoints": "integer; committed",
        "size_bytes": "integer",
        "latest": "checkpoint?",
        "best": "checkpoint?",
        "metric": "string?",
        "best_value": "number?",
        "uploading": "integer",
        "closed": "boolean; whether its last writer has closed it",
        "updated_at": "time",
        "problem": "string?; why its manifest cannot be read",
    },
}
