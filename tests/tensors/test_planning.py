"""The plan of a save: what is in it, when it is kept, and how the index is written from it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager
from cloudckpt.core import keys
from cloudckpt.core.index_json import decode_index, encode_index
from cloudckpt.storage import MemoryStorage
from cloudckpt.tensors.dcp import _ask
from cloudckpt.tensors.planning import Plan, Planner
from cloudckpt.tensors.sharded import is_sharded
from cloudckpt.tensors.tree import flatten


def state(**extra: Any) -> dict[str, Any]:
    """A small state with ties, scalars and values."""
    shared = torch.ones(4, 2)
    model = {"a": shared, "b": torch.zeros(3, dtype=torch.float16), "c": shared, "d": torch.tensor(1), **extra}
    return {"model": model, "optimizer": {"lr": 0.1, "m": torch.zeros(4)}, "nothing": {"x": 1}}


def planned(planner: Planner, value: dict[str, Any]) -> Plan:
    """One plan."""
    return planner.plan(value, allow_pickle=False)


def test_a_plan_is_made_once_for_states_that_differ_in_values_only() -> None:
    """New tensors of the same names, dtypes and shapes: layout, header and index text are the very same, the data is new."""
    planner = Planner(0, 1)
    first, second = planned(planner, state()), planned(planner, state())
    assert second.overall is first.overall
    for one, two in zip(first.payloads, second.payloads, strict=True):
        assert two.layout is one.layout
        assert all(a is not b for a, b in zip(one.tensors, two.tensors, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"e": torch.ones(1)},
        {"b": torch.zeros(3, dtype=torch.bfloat16)},
        {"b": torch.zeros(3, 1, dtype=torch.float16)},
        {"c": torch.ones(4, 2)},
        {"a": torch.ones(4, 2)},
    ],
    ids=["a name more", "another dtype", "another shape", "no longer tied", "tied to nothing"],
)
def test_whatever_is_in_the_index_makes_a_new_plan(change: dict[str, Any]) -> None:
    """A change of names, dtypes, shapes or ties is planned anew, and going back as well."""
    planner = Planner(0, 1)
    first = planned(planner, state())
    changed = planned(planner, state(**change))
    assert changed.overall is not first.overall
    assert planned(planner, state()).overall is not changed.overall


def test_a_component_more_without_tensors_makes_a_new_plan() -> None:
    """The index lists every component, whether it has tensors or not."""
    planner = Planner(0, 1)
    first = planned(planner, state())
    assert planned(planner, {**state(), "more": 3}).overall is not first.overall


def test_plain_tensors_are_planned_as_dcp_would() -> None:
    """Without DCP's planners the boxes of a single process are the same as with them."""
    flat = flatten(state())
    answered = _ask({(c, name): tensor for c, named in flat.tensors.items() for name, tensor in named.items()})
    asked = {c: [box for (owner, _), own in answered.items() if owner == c for box, _ in own] for c in flat.tensors}
    plan = planned(Planner(0, 1), state())
    for payload in plan.payloads:
        ours = sorted(payload.boxes, key=lambda box: box.name)
        assert ours == sorted(asked[payload.component], key=lambda box: box.name)


def test_tensors_that_know_their_shards_are_left_to_dcp() -> None:
    """Plain tensors and parameters are not; a type that makes its own write items is."""

    class Shard(torch.Tensor):
        def __create_write_items__(self, fqn: str, value: object) -> None:
            """As DCP asks for it."""

    assert [is_sharded(kind) for kind in (torch.Tensor, torch.nn.Parameter, Shard)] == [False, False, True]


@pytest.mark.parametrize(
    "name", ["plain", 'quoted " and \\', '"crc32c": "00000000"', "ümlaut", "lone \ud800 surrogate", "\\"]
)
def test_the_index_from_the_plan_is_byte_for_byte_the_index(name: str) -> None:
    """What is written with the plan's text is what is written from the decoded index, whatever the names."""
    storage = MemoryStorage()
    value = {"model": {name: torch.ones(3), "crc32c": torch.ones(2), "last": torch.zeros(0)}, "v": {name: name}}
    with CheckpointManager(storage) as ckpts:
        for step in (1, 2):
            saved = ckpts.save(step, value, block=True).wait()
    body = storage.read(keys.index_key(saved.step, saved.id), limit_bytes=10**6).body
    assert encode_index(decode_index(body)) == body
    assert [*json.loads(body)["tensors"]["model"]] == [name, "crc32c", "last"]


WITHOUT_DCP = """
import sys, torch
from cloudckpt import CheckpointManager
model = torch.nn.Linear(3, 2)
state = {"model": model, "moments": {"m": torch.zeros(3)}, "step": 1}  # an optimizer of torch brings its compiler along
with CheckpointManager(sys.argv[1]) as ckpts:
    ckpts.save(1, state, block=True)
    ckpts.restore(state)
    ckpts.load(1)
print([name for name in sys.modules if name.startswith("torch.distributed.checkpoint")])
"""


def test_whole_tensors_need_no_dcp(tmp_path: Path) -> None:
    """What is not sharded is saved, restored and loaded without importing DCP, which takes as long as torch does."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DCP, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
