"""The policies of the AWS module are enough for each role's work, and no more.

moto's server enforces them as IAM does, by action and resource and with signatures checked; for conditions and for the
bucket's own policy a judge of our own stands before it (see ``iam``). No request goes to AWS. That every statement is
needed is told in ``test_aws_statements``.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, SaveError, StorageError
from cloudckpt.core import keys
from cloudckpt.core.rights import Role
from cloudckpt.storage import Landed, Lost, open_storage
from cloudckpt.testing.servers import MotoServer
from cloudckpt.tools import gc
from tests.terraform import stories
from tests.terraform.conftest import JUDGES, Act
from tests.terraform.roles import EVERY_WAY, everything, left, prepared, problems_of, refused


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(
    ("role", "direct"), EVERY_WAY, ids=lambda v: str({True: "direct lane", False: "s3fs"}.get(v, v))
)
def test_a_policy_is_enough_for_a_roles_work(
    role: Role, direct: bool, judge: str, s3_root: str, s3_server: MotoServer, acting: Act
) -> None:
    """With its own policy as its only right, each role does its whole work and leaves nothing behind."""
    prepared(s3_root, s3_server, role)
    with acting(role, judge=judge) as who:
        problems = problems_of(role, s3_root, who, direct=direct)
    assert problems == []
    assert left(role, s3_root, s3_server) == []


# -- what is refused, and what a user sees of it ------------------------------------------------------------------


def state() -> dict[str, Any]:
    """A state to restore into."""
    return stories.state_of(0)


@pytest.mark.parametrize("judge", JUDGES)
def test_a_reader_writes_nothing(judge: str, s3_root: str, s3_server: MotoServer, acting: Act) -> None:
    """A claim, a pin and a gc by a reader are refused, each with an error that names the object and the way on."""
    prepared(s3_root, s3_server, Role.READER)
    before = everything(s3_root)
    # Before anybody writes a manifest it is asked whether conditions hold.
    first = refused("creating", f"{s3_root}/{keys.PROBE_PREFIX}", r"\w+")
    with acting(Role.READER, judge=judge) as who:
        words: dict[str, Any] = {"storage_options": who.options, "settings": stories.settings()}
        for attempt in (
            lambda: CheckpointManager(s3_root, **words).restore(state()),
            lambda: CheckpointManager(s3_root, **words).pin(2),
            lambda: gc(s3_root, dry_run=False, storage_options=who.options),
        ):
            with pytest.raises(StorageError, match=first):
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
        run = cloudckpt.open(s3_root, **words)
        latest = run.latest()
        assert latest is not None
        with pytest.raises(StorageError, match=refused("reading", f"{latest.url}/{stories.PAYLOAD}")):
            run.load("latest")
        with pytest.raises(SaveError) as caught:
            with CheckpointManager(s3_root, **words) as ckpts:
                ckpts.save(3, state(), block=True)
        (folder,) = re.findall(r"saving step 3 to (\S+) failed at upload", str(caught.value))
        assert re.search(refused("writing", f"{folder}/{stories.PAYLOAD}"), str(caught.value))


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("role", [Role.TRAINER, Role.SWEEPER])
def test_nobody_deletes_the_manifest(role: Role, judge: str, s3_root: str, s3_server: MotoServer, acting: Act) -> None:
    """Not even who may delete checkpoints: the manifest is denied by name, in a run that lies deeper as well."""
    stories.kill_a_save(s3_root)
    with acting(role, judge=judge) as who:
        storage = open_storage(s3_root, storage_options=who.options, settings=stories.settings())
        for key in (keys.MANIFEST, f"checkpoint-run/{keys.MANIFEST}"):
            assert re.search(refused("deleting", f"{s3_root}/{key}"), str(storage.delete([key])[key]))
        storage.close()
    assert keys.MANIFEST in everything(s3_root)


@pytest.mark.parametrize("judge", JUDGES)
def test_a_trainer_stays_under_its_prefix(judge: str, s3_root: str, s3_server: MotoServer, acting: Act) -> None:
    """Objects beside the prefix are neither read nor written nor deleted; nor listed, where conditions are judged."""
    with acting(Role.TRAINER, judge=judge) as who:
        other = s3_root.removesuffix("run") + "another"
        storage = open_storage(other, storage_options=who.options, settings=stories.settings())
        index = keys.index_key(1, "9f3ac2e1")
        with pytest.raises(StorageError, match=refused("reading", f"{other}/{keys.MANIFEST}")):
            storage.read(keys.MANIFEST, limit_bytes=100)
        with pytest.raises(StorageError, match=refused("writing", f"{other}/{index}")):
            storage.put(index, [b"x"], size_bytes=1)
        assert re.search(refused("deleting", f"{other}/{index}"), str(storage.delete([index])[index]))
        if judge == "conditions":  # moto takes the condition of a listing for fulfilled
            with pytest.raises(StorageError, match=refused("listing", other)):
                list(storage.list(""))
        storage.close()


def test_a_bare_put_of_the_manifest_is_refused_by_the_bucket(s3_root: str, acting: Act) -> None:
    """The bucket's policy refuses a PUT without a condition, and an upload in parts; with a condition it lands."""
    bare = refused("writing", f"{s3_root}/{keys.MANIFEST}")
    with acting(Role.TRAINER, judge="conditions") as who:
        storage = open_storage(s3_root, storage_options=who.options, settings=stories.settings())
        with pytest.raises(StorageError, match=bare):
            storage.put(keys.MANIFEST, [b"bare"], size_bytes=4)
        created = storage.create(keys.MANIFEST, b"one")
        assert isinstance(created, Landed)
        assert isinstance(storage.replace(keys.MANIFEST, b"two", expecting=created.version), Landed)
        assert isinstance(storage.replace(keys.MANIFEST, b"three", expecting=created.version), Lost)
        with pytest.raises(StorageError, match=bare):
            storage.put(keys.MANIFEST, iter([b"x" * stories.PART, b"y"]), size_bytes=stories.PART + 1)
        storage.close()


def test_the_state_of_the_stories_needs_parts() -> None:
    """The stories' state is larger than a part, so that an upload in parts takes part in them."""
    assert stories.state_of(1, parts=True)["model"]["w"].nbytes > stories.PART
    assert torch.equal(stories.state_of(1)["optimizer"]["m"], torch.ones(10))
