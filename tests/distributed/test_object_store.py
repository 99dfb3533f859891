"""Jobs of several processes on a real S3 server: nothing is shared but the bucket."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cloudckpt
from cloudckpt.testing.servers import SeaweedFS
from tests.distributed import scenarios, sharded
from tests.distributed.ranks import Outcome, Ranks

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def ranks(seaweedfs: SeaweedFS) -> Iterator[Ranks]:
    """Four ranks that know the server."""
    seaweedfs.create_bucket("ranks")
    found = Ranks(4, environment=seaweedfs.environment())
    yield found
    found.close()


@pytest.fixture
def root() -> str:
    """A run of its own."""
    return f"s3://ranks/{uuid.uuid4().hex[:8]}"


def values(outcomes: list[Outcome]) -> list[Any]:
    """What the ranks returned, where none raised."""
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    return [outcome.value for outcome in outcomes]


def test_ranks_save_one_checkpoint_and_restore_it(ranks: Ranks, root: str, seaweedfs: SeaweedFS) -> None:
    """Every rank uploads its own payload; a laptop reads the whole without any process group."""
    saved = values(ranks.run(scenarios.save_replicated, root=root))
    assert len({json.dumps(value) for value in saved}) == 1
    restored = values(ranks.run(scenarios.restore_replicated, root=root))
    assert [value["model"] for value in restored] == [saved[0]["model"]] * 4
    loaded = cloudckpt.open(root, storage_options=seaweedfs.storage_options()).load()
    assert scenarios.digest(loaded["model"]) == saved[0]["model"]


@pytest.mark.parametrize(("kind", "before", "after"), [("fsdp", 4, 2), ("fsdp", 2, 4), ("tp", 4, 1), ("ddp", 1, 4)])
def test_sharded_state_is_restored_on_another_number_of_ranks(
    ranks: Ranks, root: str, kind: str, before: int, after: int
) -> None:
    """Bit for bit, over the wire."""
    saved = values(ranks.run(sharded.save_sharded, root=root, kind=kind, ranks=before, wrapped=True))
    restored = values(ranks.run(sharded.restore_sharded, root=root, kind=kind, ranks=after, wrapped=True))
    assert restored[:after] == [saved[0]] * after


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_an_upload_that_fails_on_one_rank_fails_on_all(ranks: Ranks, root: str, bad_rank: int) -> None:
    """One error everywhere; the next save works."""
    for value in values(ranks.run(scenarios.one_rank_cannot, root=root, bad_rank=bad_rank, how="upload")):
        assert value["said"].startswith("SaveError: ")
        assert f"rank {bad_rank} (" in value["said"]
        assert value["steps"] == [0, 2]


def test_what_a_killed_rank_was_uploading_is_gone_after_the_next_claim(root: str, seaweedfs: SeaweedFS) -> None:
    """Its save is settled, its bytes and its uploads are deleted, and the new job goes on from what was committed."""
    seaweedfs.create_bucket("ranks")
    job = Ranks(2, environment=seaweedfs.environment())
    try:
        outcomes = job.run(scenarios.die_in_upload, root=root, victim=1)
    finally:
        job.close()
    assert outcomes[1].gone
    assert outcomes[0].error is None, outcomes[0].error
    assert outcomes[0].value["committed"] == [0]
    job = Ranks(2, environment=seaweedfs.environment())
    try:
        found = values(job.run(scenarios.save_with_steps, root=root, steps=[9, 9]))
    finally:
        job.close()
    assert found[0] == found[1]
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    with contextlib.closing(seaweedfs.client()) as client:
        keys = [item["Key"] for item in client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])]
        uploads = client.list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/").get("Uploads", [])
    assert not [key for key in keys if "/checkpoint-1." in key]
    assert not uploads
    run = cloudckpt.open(root, storage_options=seaweedfs.storage_options())
    assert [c.step for c in run.checkpoints()] == [0, 9]


def test_a_long_upload_is_broken_off_when_a_rank_is_gone(root: str, seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    """The others do not send on what will never be committed, and leave no upload behind."""
    seaweedfs.create_bucket("ranks")
    job = Ranks(2, environment=seaweedfs.environment())
    try:
        survivor, killed = job.run(scenarios.die_in_long_upload, root=root, notes=str(tmp_path), mib=60)
    finally:
        job.close()
    assert killed.gone
    assert survivor.error is None, survivor.error
    assert survivor.value["said"].startswith("RankError: rank 1 (")
    assert survivor.value["sent"] < survivor.value["of"]
    bucket, _, prefix = root.removeprefix("s3://").partition("/")
    with contextlib.closing(seaweedfs.client()) as client:
        found = client.list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/").get("Uploads", [])
    assert [upload["Key"] for upload in found if "00000-of" in upload["Key"]] == []
