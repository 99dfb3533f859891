"""What the suites of the AWS module's roles share: who does which work, on which run, and what is left of it."""

from __future__ import annotations

import re
from collections.abc import Callable

from cloudckpt.core.rights import Role
from cloudckpt.storage import open_storage
from cloudckpt.testing.servers import MotoServer
from tests.terraform import stories
from tests.terraform.conftest import Acting
from tests.terraform.iam import allowing

STORIES: dict[Role, tuple[Callable[..., list[str]], Callable[[str], str]]] = {
    Role.TRAINER: (stories.train, stories.kill_a_save),
    Role.READER: (stories.read, stories.prepare_for_sweeping),
    Role.SWEEPER: (stories.sweep, stories.prepare_for_sweeping),
}
EVERY_STATEMENT = [(role, sid) for role in Role for sid in allowing(role)]


#: Each role with both lanes; but a sweeper sends and reads no payload, so that it has only one way.
EVERY_WAY = [(role, direct) for role in Role for direct in (True, False) if direct or role is not Role.SWEEPER]


def refused(doing: str, url: str, rest: str = "") -> str:
    """What a user reads of a request that is refused, as a pattern: what was done to which object, why, and the way on.

    ``rest`` is a pattern for the end of a name that the test cannot know.
    """
    return (
        rf"(?:^|: ){doing} {re.escape(url)}{rest}: 403 AccessDenied \(.*\): no permission\..*"
        "`cloudckpt doctor` tells which right is missing"
    )


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


def everything(root: str) -> dict[str, int]:
    """Every object under the root and its size, as somebody with all rights sees it."""
    storage = open_storage(root)
    found = {item.key: item.size_bytes for item in storage.list("")}
    storage.close()
    return found
