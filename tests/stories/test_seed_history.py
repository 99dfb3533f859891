"""Defects from the history of an earlier manager (the H numbers of docs/seed-scenarios.md), with their own numbers.

Those that are one question to a decision, or told as part of a longer story, are in ``test_seed.py`` and beside it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cloudckpt
from cloudckpt import (
    Best,
    CheckpointManager,
    ConfigError,
    ConflictError,
    SaveError,
    Settings,
    StateMismatchError,
    UnsafeStorageError,
)
from cloudckpt.events import Event, SaveCommitted
from cloudckpt.storage import Conditions, MemoryStorage, Storage
from cloudckpt.testing import Fault, ScriptedStorage, check_store


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"w": torch.full((3,), float(step))}


def saved(storage: Storage, losses: Mapping[int, float], **words: Any) -> list[int]:
    """A closed run with these losses; the steps that it keeps."""
    with CheckpointManager(storage, **words) as ckpts:
        for step, loss in losses.items():
            ckpts.save(step, state_of(step), metrics={"loss": loss, "accuracy": -loss}, block=True)
    return [c.step for c in cloudckpt.open(storage).checkpoints()]


class Detector:
    """Two moving averages of a loss; nothing at all before the first value."""

    def __init__(self) -> None:
        self.short: float | None = None
        self.long: float | None = None

    def see(self, loss: float) -> None:
        """One more value."""
        self.short = loss if self.short is None else 0.1 * loss + 0.9 * self.short
        self.long = loss if self.long is None else 0.01 * loss + 0.99 * self.long

    def state_dict(self) -> dict[str, float | None]:
        """The averages."""
        return {"short": self.short, "long": self.long}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """The averages, as they were."""
        self.short, self.long = state["short"], state["long"]


@pytest.mark.parametrize("losses", [[], [3.154, 7.860, 8.272, 8.389]])
def test_h3_the_state_of_a_callback_comes_back_bit_for_bit(losses: list[float]) -> None:
    """H3, L12: a detector is a component like any other, also one that has seen no value yet, and what comes after it."""
    storage = MemoryStorage()
    detector = Detector()
    for loss in losses:
        detector.see(loss)
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"detector": detector, "later": torch.ones(2)}, block=True)
    again, later = Detector(), torch.zeros(2)
    again.see(99.0)
    with CheckpointManager(storage) as ckpts:
        ckpts.restore({"later": later, "detector": again})
    assert again.state_dict() == detector.state_dict()
    assert later.tolist() == [1.0, 1.0]


def test_h11_a_manager_that_saves_nothing_leaves_the_root_as_it_was(tmp_path: Path) -> None:
    """H11: where nothing is saved nothing is written: not even the folder is made."""
    root = tmp_path / "runs" / "demo"
    with CheckpointManager(str(root), monitor="loss", mode="min") as ckpts:
        assert ckpts.checkpoints() == ()
    assert list(tmp_path.iterdir()) == []


def test_h21_a_data_position_that_was_never_saved_is_said_to_be_missing(caplog: pytest.LogCaptureFixture) -> None:
    """H21: a checkpoint without the data loader's state is refused by name, or restored with one WARNING naming it."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(7, {"model": torch.ones(2)}, block=True)
        assert list(ckpts.index("latest").structure) == ["model"]
    model = torch.zeros(2)
    state = {"model": model, "data": {"position": 0}}
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(StateMismatchError, match="data: the checkpoint has no such component"):
            ckpts.restore(state)
        assert model.tolist() == [0.0, 0.0]
        assert ckpts.restore(state, strict=False) is not None
    assert model.tolist() == [1.0, 1.0]
    assert state["data"] == {"position": 0}
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert [("data: the checkpoint has no such component" in text) for text in warnings] == [True]


def test_h23_the_resumed_step_tells_a_logger_where_to_cut(tmp_path: Path) -> None:
    """H23: restore returns the step it resumed from, so that a log of steps is cut there and never forks."""
    storage, log = MemoryStorage(), tmp_path / "log.txt"
    with CheckpointManager(storage) as ckpts:
        for step in range(10):
            with log.open("a") as lines:
                lines.write(f"{step}\n")
            if step % 4 == 0:
                ckpts.save(step, state_of(step), block=True)
    with CheckpointManager(storage) as ckpts:
        resumed = ckpts.restore(state_of(0))
        assert resumed is not None
        assert resumed.step == 8
        log.write_text("".join(f"{line}\n" for line in log.read_text().split() if int(line) <= resumed.step))
        with log.open("a") as lines:
            lines.writelines(f"{step}\n" for step in range(resumed.step + 1, 12))
    assert [int(line) for line in log.read_text().split()] == list(range(12))


def test_h24_a_step_saved_again_is_never_torn() -> None:
    """H24: whatever call of the second save of a step fails, the step is still whole: the old one, or the new one."""
    probe = ScriptedStorage(MemoryStorage())
    with CheckpointManager(probe, keep_last=None) as ckpts:
        ckpts.save(100, state_of(1), block=True)
        first = len(probe.calls)
        ckpts.save(100, state_of(2), block=True)
        calls = range(first, len(probe.calls))
    assert [call.verb for call in probe.calls[first : calls.stop]] == ["replace", "put", "put", "replace"]
    for at in calls:
        inner = MemoryStorage()
        with CheckpointManager(ScriptedStorage(inner, at, Fault.REFUSED), keep_last=None) as ckpts:
            ckpts.save(100, state_of(1), block=True)
            with pytest.raises((SaveError, cloudckpt.StorageError)):
                ckpts.save(100, state_of(2), block=True)
            assert torch.equal(ckpts.load(100)["w"], state_of(1)["w"])
            ckpts.save(100, state_of(3), block=True)
            assert torch.equal(ckpts.load(100)["w"], state_of(3)["w"])
        check_store(inner, settled=True)


# -- H25: a setting without an effect is a setting that went dead ------------------------------------------------

LOSSES = {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.3, 5: 0.2, 6: 0.6}


def _last() -> bool:
    return saved(MemoryStorage(), LOSSES, keep_last=2) == [5, 6]


def _best() -> bool:
    return saved(MemoryStorage(), LOSSES, monitor="loss", mode="min", keep_last=1, keep_best=2) == [2, 5, 6]


def _mode() -> bool:
    return saved(MemoryStorage(), LOSSES, monitor="loss", mode="max", keep_last=1, keep_best=2) == [1, 6]


def _monitor() -> bool:
    return saved(MemoryStorage(), LOSSES, monitor="accuracy", mode="max", keep_last=1) == [2, 6]


def _rules() -> bool:
    rules = [Best("loss", "min", 1), Best("accuracy", "min", 2)]
    return saved(MemoryStorage(), LOSSES, keep_last=1, keep_best=rules) == [1, 2, 6]


def _every() -> bool:
    return saved(MemoryStorage(), LOSSES, keep_last=1, keep_every=3) == [3, 6]


def _within() -> bool:
    return saved(MemoryStorage(), LOSSES, keep_last=1, keep_within=3600.0) == [1, 2, 3, 4, 5, 6]


def _unscored() -> bool:
    words: dict[str, Any] = {"monitor": "f1", "mode": "max", "keep_last": 1}
    return [saved(MemoryStorage(), LOSSES, keep_unscored=n, **words) for n in (0, 3)] == [[6], [4, 5, 6]]


def _change_policy() -> bool:
    storage = MemoryStorage()
    saved(storage, {1: 0.1, 2: 0.2}, monitor="loss", mode="min")
    with pytest.raises(ConfigError, match="change_policy=True"):
        saved(storage, {3: 0.3}, monitor="loss", mode="max")
    return saved(storage, {3: 0.3}, monitor="loss", mode="max", keep_last=1, change_policy=True) == [3]


def _takeover() -> bool:
    storage = MemoryStorage()
    first = CheckpointManager(storage)
    first.restore(state_of(0))
    with pytest.raises(ConflictError):
        CheckpointManager(storage, takeover="refuse").restore(state_of(0))
    first.close()
    return True


def _allow_pickle() -> bool:
    storage = MemoryStorage()
    with pytest.raises(TypeError), CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"odd": Path}, block=True)
    with CheckpointManager(storage, allow_pickle=True) as ckpts:
        ckpts.save(1, {"odd": Path}, block=True)
        return ckpts.load()["odd"] is Path


def _storage_options() -> bool:
    ckpts = CheckpointManager("s3://bucket/run", storage_options={"no_such_option": 1})
    with pytest.raises(ConfigError, match=r"storage_options that s3fs does not take: .*no_such_option"):
        ckpts.save(1, {"w": 1}, block=True)
    return True


def _single_writer() -> bool:
    storage = MemoryStorage()
    storage.conditions = Conditions.ABSENT
    with pytest.raises(UnsafeStorageError, match="single_writer=True"):
        CheckpointManager(storage).restore({"w": 1})
    assert [*storage.list()] == []
    with CheckpointManager(storage, single_writer=True) as ckpts:
        return ckpts.save(1, {"w": 1}, block=True).done()


def _process_group() -> bool:
    # With real groups: tests/distributed.
    with pytest.raises(ConfigError, match="not initialised"):
        CheckpointManager(MemoryStorage(), process_group=object())  # type: ignore[arg-type]  # on purpose
    return True


def _settings() -> bool:
    storage = ScriptedStorage(MemoryStorage())
    saved(storage, {1: 0.1}, settings=Settings(copy_every_revisions=1))
    return len([key for key in storage.keys_of("create") if key.startswith("manifest-")]) == 4


def _listeners() -> bool:
    events: list[Event] = []
    saved(MemoryStorage(), {1: 0.1}, listeners=[events.append])
    return any(isinstance(event, SaveCommitted) for event in events)


EFFECTS = {
    "monitor": (_monitor,),
    "mode": (_mode,),
    "keep_last": (_last,),
    "keep_best": (_best, _rules),
    "keep_every": (_every,),
    "keep_within": (_within,),
    "keep_unscored": (_unscored,),
    "change_policy": (_change_policy,),
    "takeover": (_takeover,),
    "single_writer": (_single_writer,),
    "allow_pickle": (_allow_pickle,),
    "storage_options": (_storage_options,),
    "process_group": (_process_group,),
    "settings": (_settings,),
    "listeners": (_listeners,),
}


@pytest.mark.parametrize("setting", EFFECTS)
def test_h25_every_setting_does_something(setting: str) -> None:
    """H25: each keyword of the manager, given through the public entry point, has the effect it is there for."""
    for effect in EFFECTS[setting]:
        assert effect()


def test_h25_no_setting_is_without_such_a_test() -> None:
    """H25: a keyword that is added later needs an effect in the table above."""
    given = set(inspect.signature(CheckpointManager.__init__).parameters) - {"self", "root", "unknown"}
    assert given == set(EFFECTS)


def test_h26_a_whole_run_needs_neither_a_gpu_nor_a_process_group(tmp_path: Path) -> None:
    """H26: model and optimizer are saved and restored on the CPU, and no process group exists before or after."""
    assert not torch.distributed.is_initialized()
    torch.manual_seed(1)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    with CheckpointManager(str(tmp_path / "run")) as ckpts:
        ckpts.save(1, {"model": model, "optimizer": optimizer}, block=True)
    other = nn.Linear(4, 4)
    state = {"model": other, "optimizer": torch.optim.AdamW(other.parameters())}
    with CheckpointManager(str(tmp_path / "run")) as ckpts:
        assert ckpts.restore(state) is not None
    assert torch.equal(other.weight, model.weight)
    assert not torch.distributed.is_initialized()
