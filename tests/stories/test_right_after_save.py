"""What may be said about a save whose announce is still under way."""

from __future__ import annotations

import threading

import pytest
import torch

from cloudckpt import CheckpointManager
from cloudckpt.storage import MemoryStorage
from cloudckpt.storage.base import Outcome


class LateAnnounce(MemoryStorage):
    """Holds every replace back until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def replace(self, key: str, body: bytes, *, expecting: str) -> Outcome:
        """See ``Storage.replace``."""
        self.go.wait(60)
        return super().replace(key, body, expecting=expecting)


def test_metrics_and_labels_reach_a_save_that_is_not_announced_yet() -> None:
    """report_metrics, pin, tag and mark right after save() wait for its announce, and count at its commit."""
    storage = LateAnnounce()
    with CheckpointManager(storage, monitor="loss", mode="min", keep_unscored=0, keep_last=1) as ckpts:
        storage.go.set()
        ckpts.save(1, {"w": torch.zeros(2)}, metrics={"loss": 1.0}, block=True)
        storage.go.clear()
        ckpts.save(2, {"w": torch.zeros(2)})
        letting_go = threading.Timer(0.05, storage.go.set)
        letting_go.start()
        assert ckpts.report_metrics(2, {"loss": 0.5})
        letting_go.join()
        ckpts.wait()
        best = ckpts.best()
        assert best is not None
        assert best.step == 2
        assert ckpts.pin(2).pinned
        assert ckpts.tag(2, "good").tags == ("good",)
        assert ckpts.mark(2, "odd").marks == ("odd",)


def test_metrics_of_a_checkpoint_that_is_gone_are_refused_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """report_metrics on a retired or unknown step warns and answers False."""
    with CheckpointManager(MemoryStorage(), keep_last=1) as ckpts:
        for step in (1, 2):
            ckpts.save(step, {"w": torch.zeros(2)}, block=True)
        assert not ckpts.report_metrics(1, {"loss": 0.5})
        assert not ckpts.report_metrics(77, {"loss": 0.5})
    assert len([r for r in caplog.records if "report_metrics" in r.getMessage()]) == 2


def test_prepare_makes_the_memory_and_announces_nothing() -> None:
    """After prepare(state) the first save finds its memory made; nothing was written for it."""
    storage = MemoryStorage()
    state = {"w": torch.arange(1000.0)}
    with CheckpointManager(storage) as ckpts:
        ckpts.prepare(state)
        assert list(storage.list()) == []
        ckpts.save(1, state, block=True)
        assert torch.equal(ckpts.load()["w"], state["w"])
        with pytest.raises(TypeError, match=r"^f: a builtins\.function|f: a "):
            ckpts.prepare({"f": print})
