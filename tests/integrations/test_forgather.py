"""forgather's ``CheckpointInterface`` over a run: its calls in its order, its numbers, its lines.

forgather is on no package index. What stands in for its trainer here is what its interface says: an object with
``state.global_step`` and ``get_state_components()``, and components with the fields of its ``StateComponent``.
"""

from __future__ import annotations

import enum
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointNotFoundError, ConfigError
from cloudckpt.integrations.forgather import ForgatherCheckpoints
from cloudckpt.storage import MemoryStorage


class SharingPattern(enum.Enum):
    """As forgather's."""

    GLOBAL = "global"
    PER_RANK = "per_rank"
    REPLICATED = "replicated"
    PER_GROUP = "per_group"


@dataclass
class StateComponent:
    """As forgather's."""

    key: str
    stateful: Any
    sharing_pattern: SharingPattern


class Counter:
    """A Stateful with one number."""

    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


@dataclass
class Trainer:
    """What the interface asks of a trainer."""

    model: torch.nn.Linear = field(default_factory=lambda: torch.nn.Linear(4, 2))
    state: Any = field(default_factory=lambda: SimpleNamespace(global_step=0))
    rng: Counter = field(default_factory=lambda: Counter(7))

    def get_state_components(self) -> list[StateComponent]:
        return [
            StateComponent("model", self.model, SharingPattern.REPLICATED),
            StateComponent("rng", self.rng, SharingPattern.PER_RANK),
        ]


def step(checkpoints: ForgatherCheckpoints, number: int, loss: float | None, n: int = 1) -> bool:
    """One periodic save, in the order of forgather's trainer: the best first, then the save."""
    checkpoints._provider.state.global_step = number
    path = f"out/checkpoints/checkpoint-{number}"
    best = False
    if loss is not None:
        best = checkpoints.update_best_checkpoints(path, {"eval_loss": loss}, "loss", None, n)
    checkpoints.save_checkpoint(checkpoint_id=str(number))
    return best


def steps(checkpoints: ForgatherCheckpoints) -> list[int]:
    """What is there, by step."""
    checkpoints.ckpts.wait()
    return sorted(c.step for c in checkpoints.ckpts.checkpoints())


def test_best_and_recent_are_kept_side_by_side() -> None:
    """S8: limit 3 and two best of six saves keep {1, 2} and {4, 5, 6}; L1: the best two are the best two."""
    trainer = Trainer()
    checkpoints = ForgatherCheckpoints(
        MemoryStorage(), trainer, trainer.model, save_total_limit=3, preserve_best_model=True, preserve_n_best=2
    )
    with checkpoints.ckpts:
        answers = [step(checkpoints, n, loss, 2) for n, loss in enumerate((1.0, 1.5, 4.0, 3.0, 3.5, 3.6), 1)]
        assert answers == [True, True, False, False, False, False]
        assert steps(checkpoints) == [1, 2, 4, 5, 6]
        assert [value for _, value in checkpoints.best_checkpoints] == [1.0, 1.5]


def test_the_seeds_second_best_is_not_lost() -> None:
    """S5 and L1: 3.5, 3.6, then 3.15 gives 3.15 and 3.5; a metric of zero is one (L4), and NaN is none (L5)."""
    trainer = Trainer()
    checkpoints = ForgatherCheckpoints(
        MemoryStorage(), trainer, trainer.model, preserve_best_model=True, preserve_n_best=2, save_total_limit=1
    )
    with checkpoints.ckpts:
        assert [step(checkpoints, n, loss, 2) for n, loss in ((2500, 3.5), (1250, 3.6), (6250, 3.15))] == [True] * 3
        checkpoints.ckpts.wait()
        assert [value for _, value in checkpoints.best_checkpoints] == [3.15, 3.5]
        assert step(checkpoints, 6300, float("nan"), 2) is False
        assert step(checkpoints, 6400, 0.0, 2) is True
        checkpoints.ckpts.wait()
        assert [value for _, value in checkpoints.best_checkpoints] == [0.0, 3.15]


def test_everything_comes_back() -> None:
    """Model and each rank's own state; a path of forgather's, a URL and a word all name a checkpoint."""
    storage, trainer = MemoryStorage(), Trainer()
    checkpoints = ForgatherCheckpoints(storage, trainer, trainer.model, output_dir="out", save_total_limit=None)
    with checkpoints.ckpts:
        weights = trainer.model.weight.detach().clone()
        assert checkpoints.save_checkpoint(checkpoint_id="5") == str(Path("out/checkpoints/checkpoint-5"))
        trainer.rng.value = 8
        checkpoints.save_checkpoint(checkpoint_id="6")
        checkpoints.ckpts.wait()
    fresh = Trainer(rng=Counter(0))
    again = ForgatherCheckpoints(storage, fresh, fresh.model, save_total_limit=None)
    with again.ckpts:
        again.load_checkpoint()
        assert torch.equal(fresh.model.weight, weights)
        assert fresh.rng.value == 8
        for path in ("out/checkpoints/checkpoint-5", again.ckpts.select(5).url, "5"):
            fresh.rng.value = 0
            again.load_checkpoint(path)
            assert fresh.rng.value == 7
        assert again.resolve_checkpoint_path(None) == again.ckpts.select(6).url


def test_a_url_means_the_checkpoint_that_it_names() -> None:
    """Of a step that was saved twice the older one is still loaded, and kept, by its URL; the step is the newer one."""
    storage, trainer = MemoryStorage(), Trainer()
    checkpoints = ForgatherCheckpoints(storage, trainer, trainer.model, save_total_limit=None)
    with checkpoints.ckpts:
        for value in (1, 2):
            trainer.rng.value = value
            checkpoints.save_checkpoint(checkpoint_id="5")
        checkpoints.ckpts.wait()
        older, newer = (c.url for c in checkpoints.ckpts.checkpoints())
        for path, value in ((older, 1), (newer, 2), ("out/checkpoints/checkpoint-5", 2)):
            trainer.rng.value = 0
            checkpoints.load_checkpoint(path)
            assert trainer.rng.value == value
        assert checkpoints.resolve_checkpoint_path(older) == older
        checkpoints.set_best_checkpoint(older)
        assert [c.url for c in checkpoints.ckpts.checkpoints() if c.pinned] == [older]


def test_the_lines_people_know(caplog: pytest.LogCaptureFixture) -> None:
    """One line for each save, the best list once it is committed, and the summary of the end."""
    caplog.set_level(logging.INFO, logger="cloudckpt")
    trainer = Trainer()
    checkpoints = ForgatherCheckpoints(
        MemoryStorage(), trainer, trainer.model, preserve_best_model=True, preserve_n_best=2
    )
    with checkpoints.ckpts:
        assert checkpoints.get_best_checkpoints_summary() == "No best checkpoints tracked"
        step(checkpoints, 23750, 2.8901, 2)
        step(checkpoints, 25000, 2.8557, 2)
        checkpoints.ckpts.wait()
        url = re.escape(checkpoints.ckpts.url)
        summary = checkpoints.get_best_checkpoints_summary("loss")
        assert re.fullmatch(
            rf"Best checkpoints \(N=2\):\n  {url}/checkpoint-25000\.\w+: loss=2\.8557\n"
            rf"  {url}/checkpoint-23750\.\w+: loss=2\.8901",
            summary,
        )
    lines = [record.getMessage() for record in caplog.records]
    assert sum(bool(re.fullmatch(rf"Saving checkpoint at {url}/checkpoint-\d+", line)) for line in lines) == 2
    assert sum(line.startswith("New best checkpoint: ") and "(loss=2.8557)" in line for line in lines) == 1
    assert lines[-1] == "=" * 60


def test_nothing_to_resume_is_said_and_nothing_is_guessed(caplog: pytest.LogCaptureFixture) -> None:
    """L25: no checkpoint is a warning and None; loading then raises. A direction is never guessed (L8)."""
    trainer = Trainer()
    checkpoints = ForgatherCheckpoints(MemoryStorage(), trainer, trainer.model)
    with checkpoints.ckpts:
        assert checkpoints.resolve_checkpoint_path(None) is None
        assert any("No model checkpoints found in" in record.getMessage() for record in caplog.records)
        with pytest.raises(CheckpointNotFoundError, match="Could not load checkpoint"):
            checkpoints.load_checkpoint()
        assert checkpoints.update_best_checkpoints("checkpoint-1", {"accuracy": 1.0}, "loss", None, 1) is False
    with pytest.raises(ConfigError, match="best_model_greater_is_better"):
        ForgatherCheckpoints(
            MemoryStorage(), trainer, trainer.model, preserve_best_model=True, best_model_metric="perplexity"
        )


def test_state_of_a_group_is_refused_by_name() -> None:
    """L20: what only works for some patterns says so, before anything is announced."""
    trainer = Trainer()
    trainer.get_state_components = lambda: [  # type: ignore[method-assign]  # this trainer's own
        StateComponent("experts", Counter(1), SharingPattern.PER_GROUP)
    ]
    checkpoints = ForgatherCheckpoints(MemoryStorage(), trainer, trainer.model)
    with checkpoints.ckpts:
        with pytest.raises(ConfigError, match="experts is shared per_group"):
            checkpoints.save_checkpoint(checkpoint_id="1")
        assert checkpoints.ckpts.checkpoints(state=None) == ()
