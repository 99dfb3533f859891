from __future__ import annotations

from typing import Any

import pytest

from cloudckpt.core.model import State
from cloudckpt.testing.builders import checkpoint, manifest, owner


def test_a_checkpoint_knows_its_place() -> None:
    """Its name is its folder's; its URL is the run's and the name."""
    plain = checkpoint(1500, id="9f3ac2e1")
    placed = checkpoint(1500, id="9f3ac2e1", root="s3://bucket/run")

    assert (plain.name, plain.url) == ("checkpoint-1500.9f3ac2e1", "checkpoint-1500.9f3ac2e1")
    assert placed.url == "s3://bucket/run/checkpoint-1500.9f3ac2e1"
    assert placed == plain


@pytest.mark.parametrize(
    ("fields", "usable"),
    [
        ({}, True),
        ({"pinned": True, "held": True}, True),
        ({"state": State.PENDING}, False),
        ({"state": State.RETIRED}, False),
        ({"damaged": "a byte flipped"}, False),
        ({"damaged": ""}, False),
        ({"marks": ("diverged",)}, False),
    ],
)
def test_what_is_usable(fields: dict[str, Any], *, usable: bool) -> None:
    """Usable is what is committed, not damaged and not marked."""
    assert checkpoint(1, **fields).usable is usable


def test_a_manifest_finds_its_entries() -> None:
    """By save id, and by state in the order of ``seq``."""
    m = manifest(checkpoint(2), checkpoint(1), checkpoint(3, state=State.PENDING))

    assert m.find("00000003") is m.entries[2]
    assert m.find("0000dead") is None
    assert [e.step for e in m.committed] == [1, 2]


@pytest.mark.parametrize(
    ("run_key", "text", "identity"),
    [(None, "pid 4711 on node-1", "host node-1"), ("job-7", "pid 4711 on node-1 (run job-7)", "run job-7")],
)
def test_an_owner_names_itself(run_key: str | None, text: str, identity: str) -> None:
    """A message names process, host and run; what stays the same over restarts is the run, else the host."""
    assert (str(owner(run_key=run_key)), owner(run_key=run_key).identity) == (text, identity)
