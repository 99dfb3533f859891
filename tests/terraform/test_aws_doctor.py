"""``cloudckpt doctor --role`` is content with a role's own policy, and names the statement that is missing."""

from __future__ import annotations

import re
from typing import Any

import pytest

import cloudckpt
from cloudckpt.cli.doctor import Report, examine
from cloudckpt.core import edits
from cloudckpt.core.rights import Role, needs_of
from cloudckpt.testing.servers import MotoServer
from cloudckpt.tools import open_store
from tests.terraform import stories
from tests.terraform.conftest import JUDGES, Act, Acting
from tests.terraform.roles import EVERY_STATEMENT, bucket_of, everything


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
    assert re.search(rf"refused: [\w: ]+ {re.escape(s3_root)}.*: 403 AccessDenied", failed[0].detail)
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
