"""``Settings(stage="overlap")``: save() returns while the state is still being copied, and training goes on."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, SaveError, Settings
from cloudckpt.events import Event, Warned
from cloudckpt.storage import MemoryStorage, Storage
from cloudckpt.tensors import overlap

OVERLAP = Settings(stage="overlap")


class Trainer:
    """A small model under AdamW, with an average of its weights that no optimizer knows."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.BatchNorm1d(256), torch.nn.Linear(256, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.step()

    @property
    def state(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer, "average": self.average, "extra": {"n": 1}}

    def backward(self) -> None:
        self.model(torch.randn(16, 256)).square().mean().backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 0.1)


def snapshot_of(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of what the state is now."""
    return {
        "model": {name: value.clone() for name, value in state["model"].state_dict().items()},
        "moments": {n: s["exp_avg"].clone() for n, s in state["optimizer"].state_dict()["state"].items()},
        "average": {name: value.clone() for name, value in state["average"].items()},
    }


def assert_saved(storage: Storage, expected: dict[str, Any], select: str | int = "latest") -> None:
    """What the checkpoint holds is bit for bit what was expected."""
    found = cloudckpt.open(storage).load(select)
    for name, value in expected["model"].items():
        assert torch.equal(found["model"][name], value), name
    for name, value in expected["average"].items():
        assert torch.equal(found["average"][name], value), name
    for number, value in expected["moments"].items():
        assert torch.equal(found["optimizer"]["state"][number]["exp_avg"], value), number


@pytest.fixture
def storage() -> Storage:
    """An empty storage."""
    return MemoryStorage()


@pytest.fixture(autouse=True)
def _even_small_tensors_are_copied_beside(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "held" in request.fixturenames:
        monkeypatch.setattr(overlap, "AT_ONCE_BYTES", 0)


def test_what_is_saved_is_the_state_at_the_call(storage: Storage, held: threading.Event) -> None:
    """Forward and backward run before a byte of the weights is copied; the step waits; the copy is of the call."""
    trainer = Trainer()
    with CheckpointManager(storage, settings=OVERLAP) as ckpts:
        expected = snapshot_of(trainer.state)
        pending = ckpts.save(1, trainer.state)
        assert not pending.done()
        trainer.backward()
        threading.Timer(0.05, held.set).start()
        trainer.step()
        trainer.step()
        pending.wait()
    assert_saved(storage, expected)


def test_many_saves_in_a_row(storage: Storage) -> None:
    """A save at every step, each exact."""
    trainer = Trainer()
    expected = {}
    with CheckpointManager(storage, settings=OVERLAP, keep_last=None) as ckpts:
        for step in range(8):
            expected[step] = snapshot_of(trainer.state)
            ckpts.save(step, trainer.state)
            trainer.step()
    for step, state in expected.items():
        assert_saved(storage, state, step)


def test_a_write_that_no_step_announces_fails_the_save_by_name(storage: Storage, held: threading.Event) -> None:
    """A clamp of a weight during the copy: that save fails and names it, training and the next save go on."""
    trainer = Trainer()
    weight = trainer.model[0].weight
    assert isinstance(weight, torch.nn.Parameter)
    with CheckpointManager(storage, settings=OVERLAP) as ckpts:
        pending = ckpts.save(1, trainer.state)
        with torch.no_grad():
            weight.clamp_(-0.01, 0.01)
        held.set()
        with pytest.raises(SaveError, match=r"model\.0\.weight.*not by a step of a torch optimizer"):
            pending.wait()
        expected = snapshot_of(trainer.state)
        ckpts.save(2, trainer.state).wait()
    assert [c.step for c in cloudckpt.open(storage).checkpoints()] == [2]
    assert_saved(storage, expected)


def test_after_wait_staged_everything_may_change(storage: Storage, held: threading.Event) -> None:
    """wait_staged() is the leave for writes of one's own: they are neither in the checkpoint nor a failure."""
    trainer = Trainer()
    weight = trainer.model[0].weight
    assert isinstance(weight, torch.nn.Parameter)
    with CheckpointManager(storage, settings=OVERLAP) as ckpts:
        expected = snapshot_of(trainer.state)
        pending = ckpts.save(1, trainer.state)
        held.set()
        pending.wait_staged()
        with torch.no_grad():
            weight.zero_()
        pending.wait()
    assert_saved(storage, expected)


@pytest.mark.parametrize("state", ["no optimizer", "patched step"])
def test_what_cannot_overlap_is_copied_at_once_and_says_so(storage: Storage, state: str) -> None:
    """Without an optimizer, or with one whose steps cannot be seen, save() copies before it returns, told once."""
    trainer = Trainer()
    if state == "patched step":
        vars(trainer.optimizer)["step"] = lambda: None
    given = {"model": trainer.model} if state == "no optimizer" else trainer.state
    told: list[str] = []

    def listener(event: Event) -> None:
        if isinstance(event, Warned):
            told.append(event.message)

    with CheckpointManager(storage, settings=OVERLAP, listeners=[listener]) as ckpts:
        weight = trainer.model[0].weight
        assert isinstance(weight, torch.nn.Parameter)
        before = weight.detach().clone()
        pending = ckpts.save(1, given)
        with torch.no_grad():
            weight.zero_()
        pending.wait()
        ckpts.save(2, given)
    assert len([text for text in told if "overlap" in text]) == 1
    assert torch.equal(cloudckpt.open(storage).load(1)["model"]["0.weight"], before)


def test_tensors_that_cross_segments(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """With segments of a page every larger tensor crosses one, odd strides included; every bit is right."""
    from cloudckpt.tensors import arena

    monkeypatch.setattr(arena.Arena, "__init__", _with_small_segments(arena.Arena.__init__))
    trainer = Trainer()
    extra = torch.arange(9000, dtype=torch.float64).view(90, 100).t()
    state = {**trainer.state, "odd": {"t": extra}}
    expected = snapshot_of(state)
    with CheckpointManager(storage, settings=OVERLAP) as ckpts:
        ckpts.save(1, state)
        trainer.step()
    assert_saved(storage, expected)
    assert torch.equal(cloudckpt.open(storage).load(1)["odd"]["t"], extra)


def _with_small_segments(make: Any) -> Any:
    def small(self: Any, *args: Any, **words: Any) -> None:
        make(self, *args, **{**words, "segment_bytes": 4096})

    return small
