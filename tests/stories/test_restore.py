"""What a restore does, and what it refuses, without harming the state it was given.

(Past 350 lines: everything that a restore may be given is one list.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import (
    CheckpointManager,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    Settings,
    StateMismatchError,
    StorageError,
)
from cloudckpt.storage import MemoryStorage
from cloudckpt.testing import check_store


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"model": {"w": torch.full((50,), float(step)), "b": torch.full((3,), -float(step))}, "note": f"s{step}"}


def run_of(*steps: int, **policy: Any) -> MemoryStorage:
    """A closed run with these steps."""
    storage = MemoryStorage()
    with CheckpointManager(storage, **{"keep_last": None, **policy}) as ckpts:
        for step in steps:
            ckpts.save(step, state_of(step), metrics={"loss": 10.0 - step}, block=True)
    return storage


def payload_of(storage: MemoryStorage, step: int) -> str:
    """The key of the payload object of one step's model."""
    folder = cloudckpt.open(storage).select(step).name
    return f"{folder}/model-00000-of-00001.safetensors"


def flip(storage: MemoryStorage, step: int) -> None:
    """One bit of the last tensor byte is another."""
    key = payload_of(storage, step)
    body = bytearray(storage.read(key, limit_bytes=10**6).body)
    body[-1] ^= 1
    storage.put(key, [bytes(body)], size_bytes=len(body))


def truncate(storage: MemoryStorage, step: int) -> None:
    """The payload object is one byte short."""
    key = payload_of(storage, step)
    body = storage.read(key, limit_bytes=10**6).body[:-1]
    storage.put(key, [body], size_bytes=len(body))


def remove(storage: MemoryStorage, step: int) -> None:
    """Somebody deleted the payload object."""
    storage.delete([payload_of(storage, step)])


def remove_index(storage: MemoryStorage, step: int) -> None:
    """Somebody deleted the index."""
    storage.delete([f"{cloudckpt.open(storage).select(step).name}/checkpoint.json"])


def replace_index(storage: MemoryStorage, step: int) -> None:
    """Somebody put the index of another checkpoint there."""
    other = cloudckpt.open(storage).checkpoints()[0].name
    body = storage.read(f"{other}/checkpoint.json", limit_bytes=10**6).body
    storage.put(f"{cloudckpt.open(storage).select(step).name}/checkpoint.json", [body], size_bytes=len(body))


HARMS = [flip, truncate, remove, remove_index, replace_index]


@pytest.mark.parametrize("harm", HARMS, ids=lambda h: h.__name__)
def test_proven_damage_falls_back_to_the_one_before(
    harm: Callable[[MemoryStorage, int], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A changed, short or missing object: one WARNING, the damage is recorded, and the one before is restored whole."""
    storage = run_of(1, 2, 3)
    harm(storage, 3)
    state = state_of(0)
    with CheckpointManager(storage) as ckpts:
        resumed = ckpts.restore(state)
        assert resumed is not None
        assert resumed.step == 2
        assert torch.equal(state["model"]["w"], state_of(2)["model"]["w"])
        assert state["note"] == "s2"
        assert [c.step for c in ckpts.checkpoints() if c.damaged] == [3]
        latest = ckpts.latest()
        assert latest is not None
        assert latest.step == 2
        ckpts.save(4, state_of(4), block=True)
        assert 3 in {c.step for c in ckpts.checkpoints()}, "a damaged one is deleted only by a person"
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING and "is damaged" in r.getMessage()]
    assert len(warnings) == 1
    check_store(storage)


@pytest.mark.parametrize("harm", HARMS, ids=lambda h: h.__name__)
def test_a_named_one_that_is_damaged_is_refused_and_the_state_is_untouched(
    harm: Callable[[MemoryStorage, int], None],
) -> None:
    """By name there is no fall-back; with read_in_place=False no byte reached the model before all were proven."""
    storage = run_of(1, 2, 3)
    harm(storage, 3)
    state = state_of(7)
    with CheckpointManager(storage, settings=Settings(read_in_place=False)) as ckpts:
        with pytest.raises(CorruptCheckpointError, match="checkpoint-3") as caught:
            ckpts.restore(state, select=3)
    assert "overwritten" not in str(caught.value)
    assert torch.equal(state["model"]["w"], state_of(7)["model"]["w"])
    assert torch.equal(state["model"]["b"], state_of(7)["model"]["b"])


def test_when_everything_is_damaged_nothing_starts_from_the_beginning() -> None:
    """With no usable checkpoint left, restore raises; it never answers None for a run that has committed something."""
    storage = run_of(1, 2)
    for step in (1, 2):
        flip(storage, step)
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(CorruptCheckpointError):
            ckpts.restore(state_of(0))
        with pytest.raises(CheckpointNotFoundError, match="all 2 committed checkpoints are marked or damaged"):
            ckpts.restore(state_of(0))


@pytest.mark.memory_only
@pytest.mark.parametrize("where", ["manifest.json", "checkpoint.json", "safetensors"])
def test_a_refusal_of_the_store_is_never_taken_for_damage(where: str) -> None:
    """A 403 or time-out on the manifest, the index or a range is raised at once; nothing is marked, nothing falls back."""
    inner = run_of(1, 2)

    class Forbidden(MemoryStorage):
        def _refuse(self, key: str) -> None:
            if key.endswith(where):
                raise StorageError(f"403: {key}")

        def read(self, key: str, *, limit_bytes: int) -> Any:
            self._refuse(key)
            return inner.read(key, limit_bytes=limit_bytes)

        def read_into(self, key: str, start: int, *targets: memoryview) -> None:
            self._refuse(key)
            inner.read_into(key, start, *targets)

        def replace(self, key: str, body: bytes, *, expecting: str) -> Any:
            return inner.replace(key, body, expecting=expecting)

        def create(self, key: str, body: bytes) -> Any:
            return inner.create(key, body)

    with CheckpointManager(Forbidden()) as ckpts, pytest.raises(StorageError, match="403"):
        ckpts.restore(state_of(0))
    assert not [c for c in cloudckpt.open(inner).checkpoints() if c.damaged]


def test_an_older_resume_is_protected_until_the_first_commit() -> None:
    """The checkpoint a job resumed from is not deleted under it, whatever the rules say, until it has saved itself."""
    storage = run_of(1, 2, 3)
    with CheckpointManager(storage, keep_last=1) as ckpts:
        assert ckpts.restore(state_of(0), select=1) is not None
        ckpts.prune()
        kept = {c.step: c.kept_because for c in ckpts.checkpoints()}
        assert kept == {1: ("resumed from",), 3: ("last #1",)}
        ckpts.save(2, state_of(2), block=True)
        assert [c.step for c in ckpts.checkpoints()] == [2]


def test_the_first_start_restores_nothing() -> None:
    """A run that has never committed gives None for latest and best, and an error for a step by name."""
    with CheckpointManager(MemoryStorage(), monitor="loss", mode="min") as ckpts:
        assert ckpts.restore(state_of(0)) is None
        assert ckpts.restore(state_of(0), select="best") is None
        assert ckpts.latest() is None
        assert ckpts.best() is None
        with pytest.raises(CheckpointNotFoundError):
            ckpts.restore(state_of(0), select=5)


def test_every_spelling_selects() -> None:
    """latest, last, best, steps in three spellings, tags, ids and folder names all select."""
    storage = run_of(1, 2, 3, monitor="loss", mode="max", keep_best=1)
    run = cloudckpt.open(storage)
    with CheckpointManager(storage) as ckpts:
        ckpts.tag(2, "release")
    one = run.select(1)
    spellings: dict[str | int, int] = {
        "latest": 3, "last": 3, "best": 1, 2: 2, "2": 2, "step-2": 2, "checkpoint-2": 2, "tag:release": 2,
        one.id: 1, one.name: 1,
    }  # fmt: skip
    for spelling, step in spellings.items():
        assert run.select(spelling).step == step, spelling
        assert run.load(spelling)["note"] == f"s{step}"


def small() -> nn.Module:
    """A model."""
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_a_state_that_does_not_fit_is_refused_whole() -> None:
    """Missing, unexpected and mis-shaped names are listed together, and nothing at all was changed."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"model": small(), "extra": 1}, block=True)
    other = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    state: dict[str, Any] = {"model": other, "extra": 5, "scheduler": {"lr": 1.0}}
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(StateMismatchError) as refused:
            ckpts.restore(state)
        text = str(refused.value)
        assert "model: missing in the checkpoint: 2.weight, 2.bias" in text
        assert (
            "model: mis-shaped: 0.weight (a tensor of shape (5, 3) here, a tensor of shape (4, 3) in the checkp" in text
        )
        assert "scheduler: the checkpoint has no such component (it has extra, model)" in text
        assert "strict=False" in text
        assert state["extra"] == 5
        for name, tensor in other.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert ckpts.restore(state, strict=False) is not None
    assert state["extra"] == 1
    assert state["scheduler"] == {"lr": 1.0}
    assert torch.equal(other.state_dict()["2.weight"], before["2.weight"])


def test_an_optimizer_of_another_shape_is_refused_before_the_model_changes() -> None:
    """Parameter groups are compared before anything is filled."""
    storage = MemoryStorage()
    model = small()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}, block=True)
    other = small()
    weights = other[0].weight.detach().clone()  # type: ignore[index]  # a Sequential
    optimizer = torch.optim.AdamW(list(other.parameters())[:2])
    message = r"groups of \[2\] parameters, the checkpoint of \[4\]"
    with CheckpointManager(storage) as ckpts, pytest.raises(StateMismatchError, match=message):
        ckpts.restore({"model": other, "optimizer": optimizer})
    assert torch.equal(other[0].weight, weights)  # type: ignore[index]  # a Sequential


def test_parts_can_be_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """components= restores only those; a state with fewer components says what it left out; unknown ones are refused."""
    storage = run_of(1)
    state = state_of(9)
    with CheckpointManager(storage) as ckpts:
        assert ckpts.restore(state, components=["note"]) is not None
        assert state["note"] == "s1"
        assert torch.equal(state["model"]["w"], state_of(9)["model"]["w"])
        ckpts.restore({"model": state["model"]})
        with pytest.raises(StateMismatchError, match="'optimizer'"):
            ckpts.restore(state, components=["optimizer"])
    assert any("not restored, because the state does not name them: note" in r.getMessage() for r in caplog.records)
    run = cloudckpt.open(storage)
    assert list(run.load("latest", components=["note"])) == ["note"]
    assert list(run.load("latest", components=["model"], names=["b"])["model"]) == ["b"]
    with pytest.raises(ConfigError, match="no component 'optimizer'; it has 'model', 'note'"):
        run.load("latest", components=["optimizer"])
    with pytest.raises(ConfigError, match="no tensor 'q'"):
        run.load("latest", names=["q"])
    with pytest.raises(ConfigError, match=r"write \['model'\]"):
        run.load("latest", components="model")


def test_nested_containers_are_filled_in_place() -> None:
    """Dicts and lists stay the caller's own objects; tensors in them are filled, plain values replaced."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"a": {"t": torch.ones(2), "l": [torch.full((1,), 5.0), 2], "n": 3}}, block=True)
    tensor, item = torch.zeros(2), torch.zeros(1)
    inner = [item, 0]
    outer: dict[str, Any] = {"t": tensor, "l": inner, "n": 0}
    with CheckpointManager(storage) as ckpts:
        ckpts.restore({"a": outer})
    assert outer["t"] is tensor
    assert outer["l"] is inner
    assert inner[0] is item
    assert (tensor.tolist(), item.tolist(), inner[1], outer["n"]) == ([1.0, 1.0], [5.0], 2, 3)


def test_without_strict_what_fits_is_restored_and_the_rest_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """strict=False leaves mis-shaped tensors, other kinds and optimizers of other groups as they are, each with a warning."""
    storage = MemoryStorage()
    model = small()
    saved = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
        "t": 5,
        "u": torch.ones(2),
        "v": 1,
    }
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, saved, block=True)
    other = small()
    tensor, shaped, plain = torch.zeros(3), torch.zeros(3), torch.optim.SGD(other.parameters(), lr=0.1)
    few = torch.optim.SGD(list(other.parameters())[:1], lr=0.1)
    state: dict[str, Any] = {"optimizer": few, "t": tensor, "u": shaped, "v": plain, "model": other}
    with CheckpointManager(storage) as ckpts:
        assert ckpts.restore(state, strict=False) is not None
    warnings = [r.getMessage() for r in caplog.records if "strict=False" in r.getMessage()]
    assert [text.partition(": ")[2].partition(":")[0] for text in warnings] == ["optimizer", "t", "u", "v"]
    assert state["optimizer"] is few
    assert few.param_groups[0]["lr"] == 0.1
    assert state["t"] is tensor
    assert state["u"] is shaped
    assert state["v"] is plain
    assert (tensor.tolist(), shaped.tolist()) == ([0.0] * 3, [0.0] * 3)
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_an_object_that_refuses_its_state_is_named() -> None:
    """What load_state_dict() raises is told with the component's name and what had been restored before it."""

    class Stubborn:
        def state_dict(self) -> dict[str, int]:
            return {"a": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise KeyError("b")

    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"first": 1, "odd": Stubborn()}, block=True)
        with pytest.raises(StateMismatchError, match=r"^odd refused .*'b'.*Already restored: first; start again"):
            ckpts.restore({"first": 0, "odd": Stubborn()})


def test_top_level_values_are_replaced_in_the_callers_mapping() -> None:
    """Numbers and strings land in the mapping itself; a read-only mapping is refused by name."""
    from types import MappingProxyType

    storage = run_of(1)
    state = {"note": "?"}
    with CheckpointManager(storage) as ckpts:
        ckpts.restore(state)
        assert state == {"note": "s1"}
        with pytest.raises(StateMismatchError, match="note is a plain value, and the state is read-only: pass a dict"):
            ckpts.restore(MappingProxyType({"note": "?"}))


@pytest.mark.parametrize("device", ["cpu", None, torch.device("cpu")])
def test_load_puts_tensors_where_it_is_told(device: Any) -> None:
    """device= takes a name, a torch.device, or None; the default is the CPU."""
    assert cloudckpt.open(run_of(1)).load(device=device)["model"]["w"].device.type == "cpu"
    assert cloudckpt.open(run_of(1)).load(device="meta", names=["w"])["model"]["w"].device.type == "meta"
