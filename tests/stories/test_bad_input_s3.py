"""What can be wrong about a bucket, its rights and its settings: each is a clear message, and nothing is harmed.

(Past 350 lines: what can be wrong about a bucket is one list.)
"""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest
import s3fs
import torch
from moto import mock_aws

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError, SaveError, Settings, StorageError, UnsafeStorageError
from cloudckpt.storage import Conditions, S3Storage, open_storage
from cloudckpt.testing import FaultProxy, check_store
from cloudckpt.testing.servers import MotoServer, RcloneS3, SeaweedFS

QUICK = Settings(retry_base_s=0.01, retry_cap_s=0.05, manifest_deadline_s=2, storage_deadline_s=2, request_timeout_s=5)


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"model": {"w": torch.full((50,), float(step))}}


def a_run(root: str, *steps: int, **words: Any) -> None:
    """A closed run with these steps."""
    with CheckpointManager(root, settings=QUICK, **words) as ckpts:
        for step in steps:
            ckpts.save(step, state_of(step), metrics={"loss": float(step)}, block=True)


def bucket_of(root: str) -> str:
    """The bucket's name."""
    return root.split("/")[2]


def test_a_missing_bucket_is_not_a_new_run(s3_root: str) -> None:
    """A bucket that does not exist is an error that names it, for writer and reader."""
    root = s3_root.replace(bucket_of(s3_root), "nobody-made-this-one")
    with pytest.raises(StorageError, match="bucket 'nobody-made-this-one' does not exist at this endpoint: create it"):
        CheckpointManager(root, settings=QUICK).restore(state_of(0))
    with pytest.raises(StorageError, match="does not exist at this endpoint"):
        cloudckpt.open(root, settings=QUICK).latest()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "nobodyknowsthis0"}, "does not know this access key: look at AWS_ACCESS_KEY_ID"),
        ({"secret": "wrong"}, "the secret key does not fit the access key"),
    ],
)
def test_wrong_credentials(seaweedfs: SeaweedFS, options: dict[str, str], message: str) -> None:
    """Keys that the server does not take are an error at once that names the variable, and shows no secret."""
    seaweedfs.create_bucket("credentials")
    given = {**seaweedfs.storage_options(), **options}
    with pytest.raises(StorageError, match=message) as refused:
        CheckpointManager("s3://credentials/run", storage_options=given, settings=QUICK).restore(state_of(0))
    assert given["secret"] not in str(refused.value)


def test_no_credentials_at_all(s3_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without any credentials the error says where they are looked for."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageError, match=r"no usable credentials .* or AWS_PROFILE"):
        CheckpointManager(s3_root, settings=QUICK).restore(state_of(0))


def test_a_profile_that_does_not_exist(s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt profile is named."""
    monkeypatch.setenv("AWS_PROFILE", "nosuchprofile")
    with pytest.raises((StorageError, ConfigError), match="nosuchprofile"):
        CheckpointManager(s3_root, settings=QUICK).restore(state_of(0))


def test_a_profile_gives_keys_and_endpoint(
    s3_server: MotoServer, s3_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A profile's credentials and endpoint are used as any AWS tool would use them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[profile mine]\nregion = us-east-1\nendpoint_url = {s3_server.url}\n")
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = PROFILEKEY000000\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    a_run(s3_root, 1)
    storage = open_storage(s3_root)
    assert isinstance(storage, S3Storage)
    facts = storage.describe()
    storage.close()
    assert facts["endpoint"] == s3_server.url
    assert facts["identity"] == "access key PROF…0000 (from shared-credentials-file)"


def test_credentials_that_expire_are_read_again(
    s3_faults: FaultProxy, faulty_s3_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the middle of a run the key expires; the file has a new one by then, and no save fails."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def renewed(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = s\n")

    renewed("FIRSTKEY00000000")
    with CheckpointManager(faulty_s3_root, settings=QUICK) as ckpts:
        ckpts.save(1, state_of(1), block=True)

        def with_old_key(request: Any) -> bool:
            if "FIRSTKEY00000000" not in request.headers.get("Authorization", ""):
                return False
            renewed("SECONDKEY0000000")
            return True

        body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        expired: Any = s3_faults.inject("status", status=400, body=body, when=with_old_key, times=None)
        ckpts.save(2, state_of(2), block=True)
    assert expired.hits >= 1
    assert [c.step for c in cloudckpt.open(faulty_s3_root).checkpoints()] == [1, 2]


def test_c17_credentials_that_expire_in_mid_upload(
    s3_faults: FaultProxy, faulty_s3_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """C17: the key expires at the second part of an upload; the part is sent again with the new one, no other is."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    file.write_text("[default]\naws_access_key_id = FIRSTKEY00000000\naws_secret_access_key = s\n")

    def second_part_with_old_key(request: Any) -> bool:
        if "FIRSTKEY" not in request.headers.get("Authorization", "") or "partNumber=2" not in request.query:
            return False
        file.write_text("[default]\naws_access_key_id = SECONDKEY0000000\naws_secret_access_key = s\n")
        return True

    body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    expired: Any = s3_faults.inject("status", status=400, body=body, when=second_part_with_old_key, times=None)
    settings = Settings(part_size_bytes=5 * 1024 * 1024, retry_base_s=0.01)
    state = {"model": {"w": torch.arange(3_000_000.0)}}
    with CheckpointManager(faulty_s3_root, settings=settings) as ckpts:
        ckpts.save(1, state, block=True)
    assert expired.hits == 1
    parts = [request.query for request in s3_faults.requests if "partNumber" in request.query]
    assert len(parts) == 3 + 1
    loaded = cloudckpt.open(faulty_s3_root).load(1)
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])


def test_c7_no_listing_is_stale(s3_root: str, s3_server: MotoServer) -> None:
    """C7: the user's own filesystem has cached a listing; what we see is what is there."""
    theirs = s3fs.S3FileSystem(**s3_server.storage_options())
    ours = open_storage(s3_root)
    a_run(s3_root, 1, keep_last=None)
    before = theirs.ls(s3_root)
    a_run(s3_root, 2)
    assert theirs.ls(s3_root) == before  # this is what a cached listing does
    assert len({item.key.partition("/")[0] for item in ours.list("checkpoint-")}) == 2
    assert [c.step for c in cloudckpt.open(s3_root).checkpoints()] == [1, 2]
    ours.close()


def test_a_part_that_is_never_taken_is_told_by_name(s3_faults: FaultProxy, faulty_s3_root: str) -> None:
    """The error of the save has step, object, part, the store's answer, and how often it was tried in the time there is."""
    s3_faults.inject("status", method="PUT", match="partNumber=2", status=503, times=None)
    settings = Settings(
        part_size_bytes=5 * 1024 * 1024,
        retry_base_s=0.01,
        retry_cap_s=0.05,
        storage_deadline_s=0.5,
        request_timeout_s=5,
    )
    with CheckpointManager(faulty_s3_root, settings=settings) as ckpts:
        with pytest.raises(SaveError, match="saving step 1 to ") as told:
            ckpts.save(1, {"model": {"w": torch.arange(3_000_000.0)}}, block=True)
        assert [*ckpts.checkpoints()] == []
    said = str(told.value)
    assert re.search(r"/checkpoint-1\.\w+/model-00000-of-00001\.safetensors", said), said
    assert "part 2" in said
    assert "503" in said
    assert re.search(r"tried \d+ times in 0\.5 s", said), said


def test_credentials_that_stay_expired(s3_faults: FaultProxy, faulty_s3_root: str) -> None:
    """If nobody renews them the error says so, once the deadline is over."""
    body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    s3_faults.inject("status", status=400, body=body, times=None)
    with pytest.raises(StorageError, match="the credentials have expired: renew them"):
        CheckpointManager(faulty_s3_root, settings=QUICK).restore(state_of(0))


def test_a_403_is_not_a_404(s3_faults: FaultProxy, faulty_s3_root: str) -> None:
    """Who may not list is told 403 about a missing manifest: an error, never a new run, and nothing is written."""
    s3_faults.inject("status", status=403, method="GET", times=None)
    with pytest.raises(StorageError, match=r"403 AccessDenied.* grant s3:ListBucket on"):
        CheckpointManager(faulty_s3_root, settings=QUICK).restore(state_of(0))
    assert {request.method for request in s3_faults.requests} == {"GET"}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (301, b"<Error><Code>PermanentRedirect</Code><Message>m</Message><Region>eu-west-1</Region></Error>"),
        (
            400,
            b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>m</Message><Region>eu-west-1</Region></Error>",
        ),
    ],
)
def test_a_wrong_region(s3_faults: FaultProxy, faulty_s3_root: str, status: int, body: bytes) -> None:
    """A bucket of another region is an error that names the region to set."""
    s3_faults.inject("status", status=status, body=body, times=None)
    with pytest.raises(StorageError, match="the region is wrong: set AWS_DEFAULT_REGION to 'eu-west-1'"):
        CheckpointManager(faulty_s3_root, settings=QUICK).restore(state_of(0))


def test_s3_endpoint_url_alone_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that other tools read, and that neither s3fs nor AWS does, is pointed out."""
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9000")
    with pytest.warns(UserWarning, match="set AWS_ENDPOINT_URL instead"):
        open_storage("s3://bucket/run")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    open_storage("s3://bucket/run")


@pytest.mark.parametrize(
    "prefix", ["a run", "a+b", "100%", "50%25", "über/日本語", "q?x=1&y=2", "f#1", "~(a)[b]{c}'\"*"]
)
def test_odd_prefixes(s3_root: str, prefix: str) -> None:
    """Whatever characters a prefix has, a run lives in it, and beside a run whose prefix decodes to the same."""
    root = f"s3://{bucket_of(s3_root)}/{prefix}"
    a_run(root, 1, 2, 3, keep_last=2)
    a_run(f"{root}/below", 7)
    fresh = state_of(0)
    with CheckpointManager(root, settings=QUICK) as ckpts:
        resumed = ckpts.restore(fresh)
    assert resumed is not None
    assert torch.equal(fresh["model"]["w"], torch.full((50,), 3.0))
    assert [c.step for c in cloudckpt.open(root).checkpoints()] == [2, 3]
    assert [c.step for c in cloudckpt.open(f"{root}/below").checkpoints()] == [7]


@pytest.mark.parametrize("lock", [False, True], ids=["versioned", "object lock"])
def test_a_bucket_that_keeps_old_versions(s3_server: MotoServer, s3_root: str, *, lock: bool) -> None:
    """Versioning and object lock change nothing for the run; deleted objects stay as versions that are paid for."""
    client: Any = boto3.client("s3", endpoint_url=s3_server.url)
    bucket = f"{bucket_of(s3_root)}-v"
    client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=lock)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    if lock:
        rule = {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}
        client.put_object_lock_configuration(
            Bucket=bucket, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
        )
    root = f"s3://{bucket}/run"
    a_run(root, 1, 2, 3, keep_last=1)
    cloudckpt.gc(root, dry_run=False)
    storage = open_storage(root)
    check_store(storage, settled=True)
    storage.close()
    assert [c.step for c in cloudckpt.open(root).checkpoints()] == [3]
    assert client.list_object_versions(Bucket=bucket)["DeleteMarkers"]


def test_an_object_in_a_cold_tier_is_not_damage(s3_faults: FaultProxy, faulty_s3_root: str) -> None:
    """A payload that a lifecycle rule moved to Glacier stops the restore; it is not stepped over, nor marked."""
    a_run(faulty_s3_root, 1, 2)
    body = b"<Error><Code>InvalidObjectState</Code><Message>not valid for the object's storage class</Message></Error>"
    s3_faults.inject("status", status=403, body=body, match="safetensors", method="GET", times=None)
    with (
        CheckpointManager(faulty_s3_root, settings=QUICK) as ckpts,
        pytest.raises(StorageError, match=r"cold storage class .*: restore it with"),
    ):
        ckpts.restore(state_of(0))
    assert [c.damaged for c in cloudckpt.open(faulty_s3_root).checkpoints()] == [None, None]


def test_the_in_process_mock_is_recognised_before_a_socket_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under moto's mock_aws the constructor says which fixture to use instead; not one connection is tried."""
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a socket was opened"))
    with mock_aws(), pytest.raises(ConfigError, match=r"mock_aws is active.* fixture `s3_root` of cloudckpt\.testing"):
        CheckpointManager("s3://bucket/run")


def test_beside_the_in_process_mock_a_server_works(s3_server: MotoServer) -> None:
    """With an endpoint of its own the mock is not in the way."""
    with mock_aws():
        storage = S3Storage("beside-the-mock", "run", s3_server.storage_options(), QUICK)
    storage.close()


@pytest.mark.processes
def test_a_store_without_conditions_is_refused_and_nothing_is_written(rclone: RcloneS3) -> None:
    """A server that ignores conditions is refused by the first write; with one writer's promise it works."""
    rclone.create_bucket("nocas")
    options = rclone.storage_options()
    with pytest.raises(UnsafeStorageError, match=r"does not honour conditional writes.*single_writer=True"):
        CheckpointManager("s3://nocas/run", storage_options=options, settings=QUICK).save(1, state_of(1), block=True)
    storage = open_storage("s3://nocas/run", storage_options=options)
    assert [*storage.list("")] == []
    assert storage.conditions is Conditions.ABSENT

    with CheckpointManager(storage, single_writer=True, keep_last=2, settings=QUICK) as ckpts:
        for step in (1, 2, 3):
            ckpts.save(step, state_of(step), block=True)
    fresh = state_of(0)
    with CheckpointManager(storage, single_writer=True, settings=QUICK) as ckpts:
        assert ckpts.restore(fresh) is not None
    assert torch.equal(fresh["model"]["w"], torch.full((50,), 3.0))
    with pytest.raises(UnsafeStorageError):
        cloudckpt.gc(storage, dry_run=False)
    cloudckpt.gc(storage, dry_run=False, single_writer=True)
    check_store(storage, settled=True)
    storage.close()


def test_the_promise_of_one_writer_is_logged(s3_root: str, caplog: pytest.LogCaptureFixture) -> None:
    """What a run without conditions depends on is said once, when it begins."""
    storage = open_storage(s3_root)
    storage.conditions = Conditions.ABSENT
    with caplog.at_level(logging.WARNING, "cloudckpt"), CheckpointManager(storage, single_writer=True) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        ckpts.save(2, state_of(2), block=True)
    assert [r.message.count("has no conditional writes") for r in caplog.records] == [1]
    storage.conditions = Conditions.HONOURED
    storage.close()


def test_every_option_of_the_filesystem_arrives(s3_faults: FaultProxy, faulty_s3_root: str) -> None:
    """Encryption with a KMS key is asked for on every write, and the requester pays for every request."""
    seen: list[tuple[str, str, Any]] = []

    def note(request: Any) -> bool:
        seen.append((request.method, request.query, request.headers))
        return False

    s3_faults.inject("delay", delay_s=0.0, when=note, times=None)
    encrypted = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "a-key"}
    options = {"s3_additional_kwargs": encrypted, "requester_pays": True}
    settings = Settings(part_size_bytes=5 * 1024 * 1024)
    with CheckpointManager(faulty_s3_root, storage_options=options, settings=settings) as ckpts:
        ckpts.save(1, {"model": {"w": torch.zeros(1_500_000)}}, block=True)
    writes = [h for method, query, h in seen if (method == "PUT" and "partNumber" not in query) or query == "uploads"]
    assert len(writes) >= 5
    assert all(h["x-amz-server-side-encryption"] == "aws:kms" for h in writes)
    assert all(h["x-amz-server-side-encryption-aws-kms-key-id"] == "a-key" for h in writes)
    assert all(h.get("x-amz-request-payer") == "requester" for _, _, h in seen)


def test_secrets_are_not_shown(s3_root: str, s3_server: MotoServer, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a repr, nor an error, nor a log line at any level of ours has the secret."""
    options = {**s3_server.storage_options(), "secret": "hunter2hunter2"}
    storage = open_storage(s3_root, storage_options=options)
    with caplog.at_level(logging.DEBUG, "cloudckpt"), CheckpointManager(storage) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        assert "hunter2" not in repr(storage) + repr(ckpts) + str(storage.__dict__.get("url"))
    assert "hunter2" not in caplog.text
    assert isinstance(storage, S3Storage)
    assert "hunter2" not in str(storage.describe())
    storage.close()


def test_doctor_tells_endpoint_identity_rights_and_conditions(s3_root: str) -> None:
    """The doctor's table for a bucket that is fine, and its verdict."""
    done = subprocess.run(
        [sys.executable, "-m", "cloudckpt", "doctor", s3_root], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("endpoint", "region", "identity", "lane", "conditional writes", "honoured", "list", "verdict: ready"):
        assert word in done.stdout, word


@pytest.mark.processes
def test_doctor_on_a_store_without_conditions(rclone: RcloneS3) -> None:
    """The doctor says what is missing and what to do, and exits with 1."""
    rclone.create_bucket("doctor-nocas")
    done = subprocess.run(
        [sys.executable, "-m", "cloudckpt", "doctor", "s3://doctor-nocas/run"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **rclone.environment()},
    )
    assert done.returncode == 1
    assert "the store ignored the condition" in done.stdout
    assert "not ready" in done.stdout
