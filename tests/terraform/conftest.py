"""Buckets in which a role has its own policy and nothing else."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import botocore.session
import pytest
from moto.core import enable_iam_authentication

from cloudckpt.core.rights import Role
from cloudckpt.testing.fault_proxy import FaultProxy
from cloudckpt.testing.servers import MotoServer
from tests.terraform.iam import asked_of, decide, filled_in, without

#: Who judges: moto knows actions and resources, the other one conditions and the bucket's own policy as well.
JUDGES = ("moto", "conditions")


@dataclass(frozen=True, slots=True)
class Acting:
    """Somebody in a role.

    Attributes:
        environment: variables for a process that acts in it.
        options: the same for ``s3fs.S3FileSystem``.
        proxy: what every request passes.
    """

    environment: Mapping[str, str]
    options: Mapping[str, object]
    proxy: FaultProxy


Act = Callable[..., AbstractContextManager[Acting]]


@pytest.fixture
def acting(s3_root: str, s3_server: MotoServer) -> Act:
    """Take a role in the bucket of ``s3_root``: the reader's without List, by ``(Role.READER, judge="moto", drop="List")``.

    ``drop`` names a statement that the policy has lost. Outside of the block the environment has every right.
    """
    bucket = s3_root.split("/")[2]

    @contextlib.contextmanager
    def act(role: Role, *, judge: str, drop: str = "") -> Iterator[Acting]:
        policy = filled_in(role, bucket=bucket, key_prefix="run/")
        policy = without(policy, drop) if drop else policy
        guard = filled_in("guard", bucket=bucket, key_prefix="run/")
        environment = {**s3_server.environment(), **_user(s3_server, policy)}
        with FaultProxy(s3_server.url) as proxy, contextlib.ExitStack() as stack:
            # As on a server without bulk deletes: moto would judge them by the bucket, and AWS judges each key.
            proxy.inject("status", method="POST", match=r"\?delete", times=None, status=501)
            if judge == "conditions":
                documents = [policy, guard]
                proxy.inject("status", when=lambda r: not decide(documents, asked_of(r)), times=None, status=403)
            else:
                stack.enter_context(enable_iam_authentication())
            environment["AWS_ENDPOINT_URL"] = proxy.url
            options = {
                "endpoint_url": proxy.url,
                "key": environment["AWS_ACCESS_KEY_ID"],
                "secret": environment["AWS_SECRET_ACCESS_KEY"],
                "client_kwargs": {"region_name": environment["AWS_DEFAULT_REGION"]},
            }
            yield Acting(environment, options, proxy)

    return act


def _user(server: MotoServer, policy: Mapping[str, Any]) -> dict[str, str]:
    """A user of moto's IAM that has this policy and no other: the variables with its keys."""
    everybody = server.environment()
    client = botocore.session.get_session().create_client(
        "iam",
        endpoint_url=server.url,
        region_name=everybody["AWS_DEFAULT_REGION"],
        aws_access_key_id=everybody["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=everybody["AWS_SECRET_ACCESS_KEY"],
    )
    name = f"user-{uuid.uuid4().hex}"
    try:
        client.create_user(UserName=name)
        client.put_user_policy(UserName=name, PolicyName="role", PolicyDocument=json.dumps(policy))
        found = client.create_access_key(UserName=name)["AccessKey"]
    finally:
        client.close()
    return {"AWS_ACCESS_KEY_ID": found["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": found["SecretAccessKey"]}
