"""A store that deletes by age knows nothing of a manifest: its rules are found before they do harm."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cloudckpt.storage import open_storage
from cloudckpt.storage.lifecycle import google_dangers, s3_dangers
from cloudckpt.testing.servers import MotoServer

EXPIRES = {"ID": "clean", "Status": "Enabled", "Expiration": {"Days": 30}}


@pytest.mark.parametrize(
    ("rule", "prefix", "says"),
    [
        ({**EXPIRES, "Filter": {"Prefix": ""}}, "run/", ["30 days old"]),
        ({**EXPIRES, "Filter": {}}, "run/", ["30 days old"]),
        ({**EXPIRES, "Prefix": "runs/"}, "runs/demo/", ["30 days old"]),
        ({**EXPIRES, "Filter": {"Prefix": "runs/demo/checkpoint-"}}, "runs/demo/", ["30 days old"]),
        ({**EXPIRES, "Filter": {"And": {"Prefix": "runs/", "ObjectSizeGreaterThan": 10}}}, "runs/demo/", ["30 days"]),
        ({**EXPIRES, "Filter": {"Prefix": ""}, "Expiration": {"Date": "2030-01-01"}}, "", ["there on 2030-01-01"]),
        ({**EXPIRES, "Filter": {"Prefix": "logs/"}}, "runs/demo/", []),
        ({**EXPIRES, "Filter": {"Prefix": "runs/other/"}}, "runs/demo/", []),
        ({**EXPIRES, "Status": "Disabled", "Filter": {"Prefix": ""}}, "run/", []),
        ({**EXPIRES, "Filter": {"Tag": {"Key": "temporary", "Value": "yes"}}}, "run/", []),
        ({"Status": "Enabled", "Filter": {}, "Expiration": {"ExpiredObjectDeleteMarker": True}}, "run/", []),
        ({"Status": "Enabled", "Filter": {}, "NoncurrentVersionExpiration": {"NoncurrentDays": 1}}, "run/", []),
        ({"Status": "Enabled", "Filter": {}, "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 2}}, "run/", []),
        ({"Status": "Enabled", "Filter": {}, "Transitions": [{"Days": 1, "StorageClass": "GLACIER"}]}, "r/", ["GLACIER"]),
        ({"Status": "Enabled", "Filter": {}, "Transitions": [{"Days": 1, "StorageClass": "STANDARD_IA"}]}, "r/", []),
    ],
)  # fmt: skip
def test_which_rules_of_s3_would_take_a_live_checkpoint(rule: dict[str, Any], prefix: str, says: list[str]) -> None:
    """Those that are enabled, meet the run's keys, and take current objects away or out of reach; no others."""
    found = s3_dangers([rule], prefix)
    assert len(found) == len(says)
    assert all(said in sentence for said, sentence in zip(says, found, strict=True))


@pytest.mark.parametrize(
    ("rule", "prefix", "dangers"),
    [
        ({"action": {"type": "Delete"}, "condition": {"age": 30}}, "run/", 1),
        ({"action": {"type": "Delete"}, "condition": {}}, "run/", 1),
        ({"action": {"type": "Delete"}, "condition": {"age": 30, "isLive": True}}, "run/", 1),
        ({"action": {"type": "Delete"}, "condition": {"age": 30, "matchesPrefix": ["runs/"]}}, "runs/demo/", 1),
        ({"action": {"type": "Delete"}, "condition": {"age": 30, "matchesPrefix": ["logs/"]}}, "runs/demo/", 0),
        ({"action": {"type": "Delete"}, "condition": {"age": 30, "isLive": False}}, "run/", 0),
        ({"action": {"type": "Delete"}, "condition": {"age": 30, "matchesSuffix": [".log", ".tmp"]}}, "run/", 0),
        ({"action": {"type": "Delete"}, "condition": {"age": 30, "matchesSuffix": ["manifest.json"]}}, "run/", 1),
        ({"action": {"type": "Delete"}, "condition": {"numNewerVersions": 3}}, "run/", 0),
        ({"action": {"type": "Delete"}, "condition": {"daysSinceNoncurrentTime": 3}}, "run/", 0),
        ({"action": {"type": "SetStorageClass", "storageClass": "ARCHIVE"}, "condition": {"age": 3}}, "run/", 0),
        ({"action": {"type": "AbortIncompleteMultipartUpload"}, "condition": {"age": 3}}, "run/", 0),
    ],
)
def test_which_rules_of_google_would_take_a_live_checkpoint(rule: dict[str, Any], prefix: str, dangers: int) -> None:
    """Those that delete live objects below the run's prefix."""
    assert len(google_dangers([rule], prefix)) == dangers


def test_a_rule_that_would_delete_checkpoints_is_found(s3_root: str, s3_server: MotoServer) -> None:
    """The doctor is content with a bucket without rules, and names the rule of one that deletes by age."""
    command = [sys.executable, "-m", "cloudckpt", "doctor", s3_root]
    before = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert before.returncode == 0, before.stdout + before.stderr
    assert "none that would delete a live checkpoint" in before.stdout
    client = s3_server.client()
    rules = [{"ID": "after-a-month", "Status": "Enabled", "Filter": {"Prefix": ""}, "Expiration": {"Days": 30}}]
    client.put_bucket_lifecycle_configuration(Bucket=s3_root.split("/")[2], LifecycleConfiguration={"Rules": rules})
    client.close()
    after = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert after.returncode == 1
    assert "after-a-month" in after.stdout


def test_a_bucket_of_google_without_rules_has_no_dangers(gcs_root: str) -> None:
    """The bucket's own metadata is asked; a bucket that has no rules is fine."""
    storage = open_storage(gcs_root)
    assert storage.lifecycle_dangers() == []  # type: ignore[attr-defined]  # GCSStorage's
    storage.close()
