"""What can be wrong about a Google bucket, its rights and its settings: each is a clear message, nothing is harmed."""

from __future__ import annotations

import subprocess
import sys
import traceback
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from google.oauth2.credentials import Credentials

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError, Settings, StorageError, UnsafeStorageError
from cloudckpt.storage import Conditions, GCSStorage, open_storage
from cloudckpt.testing import FakeGCS, FaultProxy, check_store

QUICK = Settings(retry_base_s=0.01, retry_cap_s=0.05, manifest_deadline_s=2, storage_deadline_s=2, request_timeout_s=5)


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"model": {"w": torch.full((50,), float(step))}}


def a_run(root: str, *steps: int, **words: Any) -> None:
    """A closed run with these steps."""
    with CheckpointManager(root, settings=QUICK, **words) as ckpts:
        for step in steps:
            ckpts.save(step, state_of(step), metrics={"loss": float(step)}, block=True)


def bearer(token: str) -> Any:
    """Credentials that are this token and no more."""
    never = datetime(2100, 1, 1)  # noqa: DTZ001 - google-auth wants it naive; an older gcsfs refreshes what has no expiry
    return Credentials(token=token, expiry=never)  # type: ignore[no-untyped-call]  # google-auth has no types


def test_a_missing_bucket_is_not_a_new_run(gcs_root: str) -> None:
    """A bucket that does not exist is an error that names it, for writer and reader."""
    with pytest.raises(StorageError, match="bucket 'nobody-made-this' does not exist: create it, or fix the URL"):
        CheckpointManager("gs://nobody-made-this/run", settings=QUICK).restore(state_of(0))
    with pytest.raises(StorageError, match="does not exist: create it"):
        cloudckpt.open("gs://nobody-made-this/run", settings=QUICK).latest()


def test_a_403_is_not_a_404(gcs_root: str, gcs_server: FakeGCS) -> None:
    """Who may not read is told so: an error, never a new run, and nothing is written."""
    gcs_server.denied.add("storage.objects.get")
    try:
        with pytest.raises(StorageError, match=r"403 .*no permission: a trainer needs roles/storage\.objectUser"):
            CheckpointManager(gcs_root, settings=QUICK).restore(state_of(0))
    finally:
        gcs_server.denied.clear()
    assert gcs_server.objects(gcs_root.split("/")[2]) == {}


@pytest.mark.parametrize("right", ["storage.objects.create", "storage.objects.delete"])
def test_who_may_only_read_is_told_at_the_first_write(gcs_root: str, gcs_server: FakeGCS, right: str) -> None:
    """A missing right stops the first save with that right's 403; what was there is untouched."""
    a_run(gcs_root, 1)
    gcs_server.denied.add(right)
    try:
        with pytest.raises(StorageError, match="403"):
            CheckpointManager(gcs_root, settings=QUICK).restore(state_of(0))
    finally:
        gcs_server.denied.clear()
    assert [c.step for c in cloudckpt.open(gcs_root).checkpoints()] == [1]


def test_a_token_that_is_not_taken() -> None:
    """A wrong token is an error that says where credentials come from, and does not show it."""
    with FakeGCS(required_token="right") as server:
        server.create_bucket("tokens")
        options = {"endpoint_url": server.url, "token": bearer("wrong-secret-token")}
        with pytest.raises(StorageError, match=r"401.*gcloud auth application-default login") as refused:
            CheckpointManager("gs://tokens/run", storage_options=options, settings=QUICK).restore(state_of(0))
        assert "wrong-secret-token" not in str(refused.value)
        right = {"endpoint_url": server.url, "token": bearer("right")}
        a_run("gs://tokens/run", 1, storage_options=right)
        run = cloudckpt.open("gs://tokens/run", storage_options=right)
        assert [c.step for c in run.checkpoints()] == [1]


def test_a_raw_token_is_not_shown_when_it_cannot_be_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gcsfs asks Google about a raw token, and puts it into the error if it cannot; ours has it nowhere in its chain."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    options = {"endpoint_url": "http://127.0.0.1:1", "token": "wrong-secret-token"}
    with pytest.raises(StorageError) as refused:
        CheckpointManager("gs://tokens/run", storage_options=options, settings=QUICK).restore(state_of(0))
    assert "wrong-secret-token" not in "".join(traceback.format_exception(refused.value))


def test_a_token_that_expires_is_renewed(gcs_faults: FaultProxy, faulty_gcs_root: str) -> None:
    """A 401 in the middle of a run makes the session anew, and no save fails."""
    with CheckpointManager(faulty_gcs_root, settings=QUICK) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        body = b'{"error": {"code": 401, "message": "Invalid Credentials"}}'
        for skip in (0, 2, 5):
            gcs_faults.inject("status", status=401, body=body, skip=skip)
        ckpts.save(2, state_of(2), block=True)
    assert [c.step for c in cloudckpt.open(faulty_gcs_root).checkpoints()] == [1, 2]


def test_throttling_of_the_manifest_is_waited_out(gcs_faults: FaultProxy, faulty_gcs_root: str) -> None:
    """429 on the manifest, several times over, delays a save and does not fail it."""
    with CheckpointManager(faulty_gcs_root, settings=QUICK) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        throttled = gcs_faults.inject("status", status=429, method="POST", match="ifGenerationMatch", times=5)
        ckpts.save(2, state_of(2), block=True)
    assert throttled.hits == 5


@pytest.mark.parametrize(
    "prefix", ["a run", "a+b", "100%", "50%25", "über/日本語", "q?x=1&y=2", "f#1", "~(a)[b]{c}'\"*"]
)
def test_odd_prefixes(gcs_root: str, gcs_server: FakeGCS, prefix: str) -> None:
    """Whatever characters a prefix has, a run lives in it under exactly that name."""
    bucket = gcs_root.split("/")[2]
    root = f"gs://{bucket}/{prefix}"
    a_run(root, 1, 2, 3, keep_last=2)
    fresh = state_of(0)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        assert ckpts.restore(fresh) is not None
    assert torch.equal(fresh["model"]["w"], torch.full((50,), 3.0))
    assert all(name.startswith(f"{prefix}/") for name in gcs_server.objects(bucket))


def test_a_bucket_that_keeps_old_versions(gcs_root: str, gcs_server: FakeGCS) -> None:
    """Object versioning changes nothing for the run."""
    gcs_server.create_bucket("versioned", versioning=True)
    a_run("gs://versioned/run", 1, 2, 3, keep_last=1)
    cloudckpt.gc("gs://versioned/run", dry_run=False)
    storage = open_storage("gs://versioned/run")
    check_store(storage, settled=True)
    storage.close()


def test_an_emulator_that_ignores_preconditions_is_refused(gcs_faults: FaultProxy, faulty_gcs_root: str) -> None:
    """A server that answers 200 to a create of what is there is found out before anything is written."""
    answer = b'{"name": "x", "size": "3", "generation": "1"}'
    gcs_faults.inject("status", status=200, body=answer, match="ifGenerationMatch", times=None)
    with pytest.raises(UnsafeStorageError, match="does not honour conditional writes"):
        CheckpointManager(faulty_gcs_root, settings=QUICK).restore(state_of(0))
    storage = open_storage(faulty_gcs_root)
    assert storage.conditions is Conditions.ABSENT
    assert [*storage.list("")] == []
    storage.close()


def test_options_that_gcsfs_does_not_take(gcs_root: str) -> None:
    """A misspelt option is named."""
    ckpts = CheckpointManager(gcs_root, storage_options={"acces": "read_only", "access": "everything"}, settings=QUICK)
    with pytest.raises((ConfigError, StorageError), match="access"):
        ckpts.restore(state_of(0))


def test_no_other_service_is_asked(gcs_root: str, tmp_path: Path) -> None:
    """A save to an emulator takes no gRPC probe and no metadata server: the storage is gcsfs's core class."""
    storage = open_storage(gcs_root)
    assert isinstance(storage, GCSStorage)
    assert [*storage.list("")] == []
    filesystems = [found.current for found in storage._sets.values()]
    assert [type(found).__module__ for found in filesystems] == ["gcsfs.core"]
    facts = storage.describe()
    assert facts["identity"] == "anonymous"
    assert facts["lane"].startswith("direct")
    storage.close()


def test_doctor_tells_endpoint_rights_and_conditions(gcs_root: str, gcs_server: FakeGCS) -> None:
    """The doctor is content with the fake, and names the right that is missing when one is."""
    command = [sys.executable, "-m", "cloudckpt", "doctor", gcs_root]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in (gcs_server.url, "identity", "conditional writes", "honoured", "verdict: ready"):
        assert word in done.stdout, word
    gcs_server.denied.add("storage.objects.list")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        gcs_server.denied.clear()
    assert done.returncode == 1
    assert "storage.objects.list" in done.stdout
