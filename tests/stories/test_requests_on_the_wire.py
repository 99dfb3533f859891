"""The request budget as a bill would show it: what really goes over the wire to S3 and to Google Cloud Storage."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, Settings
from cloudckpt.storage import Conditions, open_storage
from cloudckpt.testing.fault_proxy import FaultProxy, Request

PART = 5 * 1024 * 1024


def state_of(step: int, size: int = 100) -> dict[str, Any]:
    """Two components with tensors, one without."""
    return {"model": {"w": torch.full((size,), float(step))}, "optimizer": {"m": torch.zeros(100)}, "epoch": 3}


def s3_kind(request: Request) -> str:
    """What a request to S3 is billed as."""
    names = {name.partition("=")[0] for name in request.query.split("&")}
    if "list-type" in names:
        return "LIST"
    if request.method == "GET" and "uploads" in names:
        return "LIST uploads"
    if request.method == "POST":
        return "BULK DELETE" if "delete" in names else "CREATE UPLOAD" if "uploads" in names else "COMPLETE UPLOAD"
    if "x-amz-copy-source" in {name.lower() for name in request.headers}:
        return "COPY"
    return "PART" if "partNumber" in names else request.method


def gcs_kind(request: Request) -> str:
    """What a request to Google Cloud Storage is; uploads in parts go to its XML API, which S3's is much like."""
    if not request.path.startswith(("/storage/", "/upload/", "/download/")):
        return s3_kind(request)
    if request.path.endswith("/o") and request.method == "GET":
        return "LIST"
    if request.path.startswith("/upload/"):
        resumable = "uploadType=resumable" in request.query or "upload_id" in request.query
        return ("CHUNK" if request.method == "PUT" else "BEGIN UPLOAD") if resumable else "PUT"
    if "rewriteTo" in request.path or "copyTo" in request.path:
        return "COPY"
    if request.method == "GET" and "alt=media" not in request.query:
        return "HEAD"
    return request.method


@pytest.fixture(params=["s3", "gcs"])
def wire(request: pytest.FixtureRequest) -> tuple[str, FaultProxy, Any]:
    """A root, the proxy before it, and how its requests are called."""
    name = str(request.param)
    root = request.getfixturevalue(f"faulty_{name}_root")
    proxy = request.getfixturevalue(f"{name}_faults")
    storage = open_storage(root)
    storage.conditions = Conditions.HONOURED  # as at AWS and Google, where nothing is probed
    storage.close()
    return root, proxy, s3_kind if name == "s3" else gcs_kind


def bill(proxy: FaultProxy, kind: Any) -> Counter[str]:
    """The requests since the last look, by kind."""
    found = Counter(kind(request) for request in proxy.requests)
    proxy.clear()
    return found


def test_the_budget_of_a_small_run(wire: tuple[str, FaultProxy, Any]) -> None:
    """Claim, steady save, retention, clean claim and restore: each costs what the design says, and not one more."""
    root, proxy, kind = wire
    deletes = {"DELETE": 3} if root.startswith("gs://") else {"BULK DELETE": 1, "DELETE": 1}
    with CheckpointManager(root, keep_last=2) as ckpts:
        assert ckpts.restore(state_of(0)) is None
        assert bill(proxy, kind) == {"GET": 1, "LIST": 1, "PUT": 1}
        for step in (0, 1):
            ckpts.save(step, state_of(step), block=True)
            assert bill(proxy, kind) == {"PUT": 2 + 1 + 2}
        ckpts.save(2, state_of(2), block=True)
        assert bill(proxy, kind) == {"PUT": 2 + 1 + 2, **deletes}
    proxy.clear()
    ckpts = CheckpointManager(root)
    assert ckpts.restore(state_of(0)) is not None
    assert bill(proxy, kind) == {"GET": 1 + 1 + 2, "PUT": 1}
    ckpts.close()


def test_preparing_opens_a_connection(wire: tuple[str, FaultProxy, Any]) -> None:
    """prepare() reads the manifest once in the background, before any save; a refusal of that is nobody's business."""
    root, proxy, kind = wire
    early = proxy.inject("status", method="GET", status=403)
    with CheckpointManager(root) as ckpts:
        ckpts.prepare(state_of(0))
        assert early.wait()
        assert bill(proxy, kind) == {"GET": 1}
        ckpts.save(0, state_of(0), block=True)
        assert bill(proxy, kind) == {"GET": 1, "LIST": 1, "PUT": 1 + 2 + 1 + 2}
        ckpts.prepare(state_of(0))
        ckpts.wait()
        ckpts.save(1, state_of(1), block=True)
        assert bill(proxy, kind) == {"PUT": 2 + 1 + 2}


def test_the_budget_of_a_large_object(wire: tuple[str, FaultProxy, Any]) -> None:
    """An object of three parts: one request each, one to begin and one to complete; no LIST, HEAD or COPY."""
    root, proxy, kind = wire
    settings = Settings(part_size_bytes=PART)
    with CheckpointManager(root, keep_last=None, settings=settings) as ckpts:
        ckpts.save(0, state_of(0), block=True)
        proxy.clear()
        ckpts.save(1, state_of(1, 3_000_000), block=True)
        assert bill(proxy, kind) == {"CREATE UPLOAD": 1, "PART": 3, "COMPLETE UPLOAD": 1, "PUT": 1 + 1 + 2}


def test_readers_ask_for_what_they_need(wire: tuple[str, FaultProxy, Any]) -> None:
    """A listing of the run is one GET of the manifest; a load adds the index and one range per object."""
    root, proxy, kind = wire
    with CheckpointManager(root) as ckpts:
        ckpts.save(1, state_of(1), block=True)
    proxy.clear()
    run = cloudckpt.open(root)
    assert len(run.checkpoints()) == 1
    assert bill(proxy, kind) == {"GET": 1}
    run.load(1, components=["model"])
    assert bill(proxy, kind) == {"GET": 1 + 1 + 1}


def test_a_claim_after_a_crash_lists_one_folder_and_its_uploads(wire: tuple[str, FaultProxy, Any]) -> None:
    """What a dead process was saving costs one LIST of its folder, one of its unfinished uploads, and no more."""
    root, proxy, kind = wire
    dead = CheckpointManager(root)
    dead.save(1, state_of(1), block=True)
    proxy.inject("status", method="PUT", match="safetensors", status=403, times=None)
    proxy.inject("status", method="POST", match="upload", status=403, when=_is_payload, times=None)
    pending = dead.save(2, state_of(2))
    with pytest.raises(cloudckpt.SaveError):
        pending.wait()
    proxy.clear()
    # The dead process never settles: another one comes.
    second = CheckpointManager(root)
    assert second.restore(state_of(0)) is not None
    second.close()
    found = bill(proxy, kind)
    with pytest.raises(cloudckpt.FencedError):
        dead.close()
    # Claim: manifest, LIST of the folder. Restore: index, two ranges. Clean-up: the index that is not there, the LIST
    # that stands in for it, its DELETE. PUTs: claim, close, and the copy of the manifest that a close leaves.
    assert found == {"GET": 1 + 3 + 1, "LIST": 1 + 1, "DELETE": 1, "PUT": 3, "LIST uploads": 1}


def _is_payload(request: Request) -> bool:
    return "upload" in request.path and "ifGenerationMatch" not in request.query
