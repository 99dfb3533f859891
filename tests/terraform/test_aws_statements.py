"""Every statement in the policies of the AWS module is needed; in a file of its own, for its time.

moto alone judges here: a statement that is not there has no condition, and action and resource are what moto knows. The
judge of our own refuses each role without each of its statements in ``test_aws_doctor``.
"""

from __future__ import annotations

import pytest

from cloudckpt.core.rights import Role
from cloudckpt.testing.servers import MotoServer
from tests.terraform.conftest import Act
from tests.terraform.roles import EVERY_STATEMENT, left, prepared, problems_of


@pytest.mark.parametrize(("role", "sid"), EVERY_STATEMENT, ids=str)
def test_no_statement_can_be_taken_away(role: Role, sid: str, s3_root: str, s3_server: MotoServer, acting: Act) -> None:
    """A policy that has lost one statement is not enough: the role meets an error, or leaves something behind."""
    prepared(s3_root, s3_server, role)
    with acting(role, judge="moto", drop=sid) as who:
        problems = problems_of(role, s3_root, who, direct=True)
    assert [*problems, *left(role, s3_root, s3_server)] != []
