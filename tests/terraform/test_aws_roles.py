"""The policies of the AWS module are enough for each role's work, and no more; every statement in them is needed.

moto's server enforces them as IAM does, by action and resource and with signatures checked; for conditions and for the
bucket's own policy a judge of our own stands before it (see ``iam``). No request goes to AWS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, StorageError
from cloudckpt.cli.doctor import Report, examine
from cloudckpt.core import edits, keys
from cloudckpt.core.rights import Role, needs_of
from cloudckpt.errors import CloudCkptError
from cloudckpt.storage import Landed, Lost, open_storage
from cloudckpt.testing.servers import MotoServer
from cloudckpt.tools import gc, open_store
from tests.terraform import stories
from tests.terraform.conftest import JUDGES, Act, Acting
from tests.terraform.iam import allowing

STORIES: dict[Role, tuple[Callable[..., list[str]], Callable[[str], str]]] = {
    Role.TRAINER: (stories.train, stories.kill_a_save),
    Role.READER: (stories.read, stories.prepare_for_sweeping),
    Role.SWEEPER: (stories.sweep, stories.prepare_for_sweeping),
}
EVERY_STATEMENT = [(role, sid) for role in Role for sid in allowing(role)]


def bucket_of(root: str) -> str:
    """The bucket's name."""
    return root.split("/")[2]


def prepared(root: str, server: MotoServer, role: Role) -> None:
    """The run that a role's story begins with, and an upload that a killed process left."""
    key = STORIES[role][1](root)
    client = server.client()
    client.create_multipart_upload(Bucket=bucket_of(root), Key=f"run/{key}")
    client.close()


def problems_of(role: Role, root: str, who: Acting, *, direct: bool) -> list[str]:
    """What a role meets in its story."""
    return STORIES[role][0](root, who.options, direct=direct)


def left(role: Role, root: str, server: MotoServer) -> list[str]:
    """What is left behind by a role that has to tidy up."""
    return [] if role is Role.READER else [*stories.left_behind(root), *server.uploads(bucket_of(root))]


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("direct", [True, False], ids=["direct lane", "s3fs"])
@pytest.mark.parametrize("role", Role)
def test_a_policy_is_enough_for_a_roles_work(
    role: Role, direct: bool, judge: str, s3_root: str, s3_server: MotoServer, acting: Act
) -> None:
    """With its own policy as its only right, each role does its whole work and leaves nothing behind."""
    prepared(s3_root, s3_server, role)
    with acting(role, judge=judge) as who:
        problems = problems_of(role, s3_root, who, direct=direct)
    assert problems == []
    assert left(role, s3_root, s3_server) == []


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(("role", "sid"), EVERY_STATEMENT, ids=str)
def test_no_statement_can_be_taken_away(
    role: Role, sid: str, judge: str, s3_root: str, s3_server: MotoServer, acting: Act
) -> None:
    """A policy that has lost one statement is not enough: the role meets an error, or leaves something behind."""
    prepared(s3_root, s3_server, role)
    with acting(role, judge=judge, drop=sid) as who:
        problems = problems_of(role, s3_root, who, direct=True)
    assert [*problems, *left(role, s3_root, s3_server)] != []


# -- what is refused, and what a user sees of it ------------------------------------------------------------------


def state() -> dict[str, Any]:
    """A state to restore into."""
    return stories.state_of(0)


@pytest.mark.parametrize("judge", JUDGES)
def test_a_reader_writes_nothing(judge: str, s3_root: str, s3_server: MotoServer, acting: Act) -> None:
    """A claim, a pin and a gc by a reader are refused, each with an error that names the object and the way on."""
    prepared(s3_root, s3_server, Role.READER)
    before = everything(s3_root)
    with acting(Role.READER, judge=judge) as who:
        words: dict[str, Any] = {"storage_options": who.options, "settings": stories.settings()}
        for attempt in (
            lambda: CheckpointManager(s3_root, **words).restore(state()),
            lambda: CheckpointManager(s3_root, **words).pin(2),
            lambda: gc(s3_root, dry_run=False, storage_options=who.options),
        ):
            with pytest.raises(StorageError, match=r"403 AccessDenied.*no permission.*`cloudckpt doctor`"):
                attempt()
    assert everything(s3_root) == before


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("direct", [True, False], ids=["direct lane", "s3fs"])
def test_a_sweeper_reads_no_tensor_and_writes_none(
    judge: str, direct: bool, s3_root: str, s3_server: MotoServer, acting: Act
) -> None:
    """A sweeper's load and save are refused at the first payload object."""
    prepared(s3_root, s3_server, Role.SWEEPER)
    with acting(Role.SWEEPER, judge=judge) as who:
        words: dict[str, Any] = {"storage_options": who.options, "settings": stories.settings(direct=direct)}
        with pytest.raises(StorageError, match=r"reading s3://.*safetensors: 403"):
            cloudckpt.open(s3_root, **words).load("latest")
        with pytest.raises(CloudCkptError, match=r"403"):
            with CheckpointManager(s3_root, **words) as ckpts:
                ckpts.save(3, state(), block=True)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("role", [Role.TRAINER, Role.SWEEPER])
def test_nobody_deletes_the_manifest(role: Role, judge: str, s3_root: str, s3_server: MotoServer, acting: Act) -> None:
    """Not even who may delete checkpoints: the manifest is denied by name, in a run that lies deeper as well."""
    stories.kill_a_save(s3_root)
    with acting(role, judge=judge) as who:
        storage = open_storage(s3_root, storage_options=who.options, settings=stories.settings())
        for key in (keys.MANIFEST, f"checkpoint-run/{keys.MANIFEST}"):
            assert "403" in str(storage.delete([key])[key])
        storage.close()
    assert keys.MANIFEST in everything(s3_root)


@pytest.mark.parametrize("judge", JUDGES)
def test_a_trainer_stays_under_its_prefix(judge: str, s3_root: str, s3_server: MotoServer, acting: Act) -> None:
    """Objects beside the prefix are neither read nor written nor deleted; nor listed, where conditions are judged."""
    with acting(Role.TRAINER, judge=judge) as who:
        other = s3_root.removesuffix("run") + "another"
        storage = open_storage(other, storage_options=who.options, settings=stories.settings())
        with pytest.raises(StorageError, match="403"):
            storage.read(keys.MANIFEST, limit_bytes=100)
        with pytest.raises(StorageError, match="403"):
            storage.put(keys.index_key(1, "9f3ac2e1"), [b"x"], size_bytes=1)
        assert "403" in str(storage.delete([keys.index_key(1, "9f3ac2e1")]))
        if judge == "conditions":  # moto takes the condition of a listing for fulfilled
            with pytest.raises(StorageError, match="403"):
                list(storage.list(""))
        storage.close()


def test_a_bare_put_of_the_manifest_is_refused_by_the_bucket(s3_root: str, acting: Act) -> None:
    """The bucket's policy refuses a PUT without a condition, and an upload in parts; with a condition it lands."""
    with acting(Role.TRAINER, judge="conditions") as who:
        storage = open_storage(s3_root, storage_options=who.options, settings=stories.settings())
        with pytest.raises(StorageError, match="403 AccessDenied"):
            storage.put(keys.MANIFEST, [b"bare"], size_bytes=4)
        created = storage.create(keys.MANIFEST, b"one")
        assert isinstance(created, Landed)
        assert isinstance(storage.replace(keys.MANIFEST, b"two", expecting=created.version), Landed)
        assert isinstance(storage.replace(keys.MANIFEST, b"three", expecting=created.version), Lost)
        with pytest.raises(StorageError, match="403 AccessDenied"):
            storage.put(keys.MANIFEST, iter([b"x" * stories.PART, b"y"]), size_bytes=stories.PART + 1)
        storage.close()


def everything(root: str) -> dict[str, int]:
    """Every object under the root and its size, as somebody with all rights sees it."""
    storage = open_storage(root)
    found = {item.key: item.size_bytes for item in storage.list("")}
    storage.close()
    return found


# -- the doctor ---------------------------------------------------------------------------------------------------


def examined(root: str, role: Role, who: Acting, monkeypatch: pytest.MonkeyPatch) -> Report:
    """What the doctor finds in a role, whose keys are in the environment as they are on a job's machine."""
    with monkeypatch.context() as patch:
        for name, value in who.environment.items():
            patch.setenv(name, value)
        return examine(root, role)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("role", Role)
def test_the_doctor_is_content_with_a_roles_own_policy(
    role: Role, judge: str, s3_root: str, s3_server: MotoServer, acting: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a new root and on one with a run every probe is permitted, and none leaves anything behind."""
    for root in (s3_root, f"{s3_root}/new"):
        if root == s3_root:
            stories.prepare_for_sweeping(root)
        before = everything(s3_root)
        with acting(role, judge=judge) as who:
            report = examined(root, role, who, monkeypatch)
        assert [check for check in report.checks if not check.ok] == []
        asked = {check.name for check in report.checks}
        assert {need.verb.value for need in needs_of(role)} - {"encrypt", "decrypt"} <= asked
        assert everything(s3_root) == before
        assert s3_server.uploads(bucket_of(s3_root)) == []


@pytest.mark.parametrize(("role", "sid"), EVERY_STATEMENT, ids=str)
def test_the_doctor_names_the_right_that_is_missing(
    role: Role, sid: str, s3_root: str, s3_server: MotoServer, acting: Act, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first probe that fails is that of the statement taken away; it says the right, and leaves nothing behind."""
    before = everything(s3_root)
    with acting(role, judge="conditions", drop=sid) as who:
        report = examined(s3_root, role, who, monkeypatch)
    need = next(need for need in needs_of(role) if need.verb.title().replace(" ", "") == sid)
    failed = [check for check in report.checks if not check.ok]
    assert not report.ok
    assert failed[0].name == need.verb
    assert f"{need.aws[0].action} ({need.aws[0].scope}): refused: " in failed[0].detail
    assert "403" in failed[0].detail
    assert everything(s3_root) == before
    assert s3_server.uploads(bucket_of(s3_root)) == []


def test_an_old_damage_keeps_no_job_from_starting(s3_root: str) -> None:
    """A run with a damaged checkpoint can be gone on with: the doctor names the damage, and no role lacks a right."""
    stories.prepare_for_sweeping(s3_root)
    store = open_store(s3_root)
    found = store.read()
    assert found is not None
    (entry,) = found.committed
    store.transact(
        lambda current, _: edits.damage(current, entry.id, "a flipped bit", at=store.clock()), prepare=lambda _: None
    )
    store.storage.close()
    assert [check.name for check in examine(s3_root).checks if not check.ok] == ["damaged"]
    for role in Role:
        assert [check for check in examine(s3_root, role).checks if not check.ok] == []


def test_a_role_needs_a_bucket(tmp_path: Any) -> None:
    """On local disk there are no roles: that is an error of usage, which says what to leave out."""
    with pytest.raises(cloudckpt.ConfigError, match="leave --role out"):
        examine(str(tmp_path / "run"), Role.TRAINER)


def test_the_state_of_the_stories_needs_parts() -> None:
    """The stories' state is larger than a part, so that an upload in parts takes part in them."""
    assert stories.state_of(1)["model"]["w"].nbytes > stories.PART
    assert torch.equal(stories.state_of(1)["optimizer"]["m"], torch.ones(10))
