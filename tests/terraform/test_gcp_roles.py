"""The permissions of the GCP module are enough for each role's work, and no more; every one of them is needed.

The fake of Cloud Storage refuses a permission by its name, whatever the object: conditions on a prefix are not judged
here, they are IAM's own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cloudckpt
from cloudckpt import CheckpointManager, StorageError
from cloudckpt.cli.doctor import examine
from cloudckpt.core import keys
from cloudckpt.core.rights import Provider, Role, grants, needs_of
from cloudckpt.storage import GCSStorage, open_storage
from cloudckpt.testing import FakeGCS
from tests.terraform import stories
from tests.terraform.iam import MODULES

#: Every permission that the fake asks for.
EVERYTHING = {
    *("storage.objects.get", "storage.objects.list", "storage.objects.create", "storage.objects.delete"),
    *("storage.objects.update", "storage.buckets.get"),
    *("storage.multipartUploads.create", "storage.multipartUploads.abort", "storage.multipartUploads.list"),
}
#: Without it uploads go another way, slower: the doctor notices, the story does not.
ONLY_FASTER = "storage.multipartUploads.create"
PERMISSIONS = json.loads((MODULES / "gcp" / "permissions.json").read_text(encoding="utf-8"))
STORIES: dict[Role, tuple[Callable[..., list[str]], Callable[[str], str]]] = {
    Role.TRAINER: (stories.train, stories.kill_a_save),
    Role.READER: (stories.read, stories.prepare_for_sweeping),
    Role.SWEEPER: (stories.sweep, stories.prepare_for_sweeping),
}
EVERY_PERMISSION = [
    (role, action) for role in Role for action in dict.fromkeys(g.action for g in grants(role, Provider.GCP))
]


def of_role(role: Role) -> set[str]:
    """The permissions of a role's custom role, and of the one that lists uploads where it has that."""
    return {*PERMISSIONS[role]["prefix"], *PERMISSIONS[role]["bucket"]}


@contextlib.contextmanager
def only(server: FakeGCS, permissions: set[str]) -> Iterator[None]:
    """Nobody has any other permission meanwhile."""
    server.denied |= EVERYTHING - permissions
    try:
        yield
    finally:
        server.denied.clear()


def unfinished(root: str, *, begin: str = "") -> list[str]:
    """The keys of unfinished uploads under a root, as somebody with all rights sees them; begins one first."""
    storage = open_storage(root)
    assert isinstance(storage, GCSStorage)
    if begin:
        storage._uploads_of(begin).begin().begin().ended.result()
    found = [key for key, _ in storage._parts.find("looking for uploads", "run/")]
    storage.close()
    return found


def left(role: Role, root: str) -> list[str]:
    """What is left behind by a role that has to tidy up."""
    return [] if role is Role.READER else [*stories.left_behind(root), *unfinished(root)]


def prepared(root: str, role: Role) -> None:
    """The run that a role's story begins with, and an upload that a killed process left."""
    assert unfinished(root, begin=STORIES[role][1](root)) != []


@pytest.mark.parametrize("direct", [True, False], ids=["direct lane", "gcsfs"])
@pytest.mark.parametrize("role", Role)
def test_the_permissions_are_enough_for_a_roles_work(
    role: Role, direct: bool, gcs_root: str, gcs_server: FakeGCS
) -> None:
    """With the permissions of its custom role and no others, each role does its work and leaves nothing behind."""
    prepared(gcs_root, role)
    with only(gcs_server, of_role(role)):
        problems = STORIES[role][0](gcs_root, {}, direct=direct)
    assert problems == []
    assert left(role, gcs_root) == []


@pytest.mark.parametrize(("role", "permission"), [p for p in EVERY_PERMISSION if p[1] != ONLY_FASTER], ids=str)
def test_no_permission_can_be_taken_away(role: Role, permission: str, gcs_root: str, gcs_server: FakeGCS) -> None:
    """A custom role that has lost one permission is not enough: the role meets an error, or leaves something behind."""
    prepared(gcs_root, role)
    with only(gcs_server, of_role(role) - {permission}):
        problems = STORIES[role][0](gcs_root, {}, direct=True)
    assert [*problems, *left(role, gcs_root)] != []


@pytest.mark.parametrize("role", Role)
def test_the_doctor_is_content_with_a_roles_permissions(role: Role, gcs_root: str, gcs_server: FakeGCS) -> None:
    """On a new root and on one with a run every probe is permitted, and none leaves anything behind."""
    bucket = gcs_root.split("/")[2]
    for root in (gcs_root, f"{gcs_root}/new"):
        if root == gcs_root:
            stories.prepare_for_sweeping(root)
        before = gcs_server.objects(bucket)
        with only(gcs_server, of_role(role)):
            report = examine(root, role)
        assert [check for check in report.checks if not check.ok] == []
        verbs = {need.verb.value for need in needs_of(role) if need.gcp}
        assert verbs <= {check.name for check in report.checks}
        assert gcs_server.objects(bucket) == before
        assert unfinished(gcs_root) == []


@pytest.mark.parametrize(("role", "permission"), EVERY_PERMISSION, ids=str)
def test_the_doctor_names_the_permission_that_is_missing(
    role: Role, permission: str, gcs_root: str, gcs_server: FakeGCS
) -> None:
    """The first probe that fails needs the permission that was taken away, says so, and leaves nothing behind."""
    bucket = gcs_root.split("/")[2]
    with only(gcs_server, of_role(role) - {permission}):
        report = examine(gcs_root, role)
    failed = [check for check in report.checks if not check.ok]
    assert failed[0].name in {need.verb for need in needs_of(role)}
    assert f"{permission} (" in failed[0].detail
    assert gcs_server.objects(bucket) == {}
    assert unfinished(gcs_root) == []


def test_a_reader_writes_nothing(gcs_root: str, gcs_server: FakeGCS) -> None:
    """A reader's claim is refused with an error that names the permission and the way on; nothing is changed."""
    stories.prepare_for_sweeping(gcs_root)
    bucket = gcs_root.split("/")[2]
    before = gcs_server.objects(bucket)
    with (
        only(gcs_server, of_role(Role.READER)),
        pytest.raises(StorageError, match=r"403 .*storage\.objects\.create.*`cloudckpt doctor`"),
    ):
        CheckpointManager(gcs_root, settings=stories.settings()).restore(stories.state_of(0))
    assert gcs_server.objects(bucket) == before


def test_at_google_a_trainer_can_delete_a_manifest(gcs_root: str, gcs_server: FakeGCS) -> None:
    """What IAM there cannot tell apart: who may replace the manifest may delete it. The run is refused then, not new."""
    stories.prepare_for_sweeping(gcs_root)
    with only(gcs_server, of_role(Role.TRAINER)):
        storage = open_storage(gcs_root)
        assert storage.delete([keys.MANIFEST]) == {}
        storage.close()
    words: dict[str, Any] = {"settings": stories.settings()}
    with pytest.raises(cloudckpt.FormatError, match="cloudckpt repair"):
        CheckpointManager(gcs_root, **words).restore(stories.state_of(0))
