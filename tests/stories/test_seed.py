"""The scenarios that this package grew out of: defects of an earlier manager, each by its number and with its numbers.

(Past 350 lines: those defects are one list.)
"""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, CorruptCheckpointError, SaveError, Settings, State
from cloudckpt.core import keys
from cloudckpt.errors import StorageError
from cloudckpt.storage import ManifestStore, MemoryStorage
from cloudckpt.testing import Fault, ScriptedStorage, check_store


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"w": torch.full((8,), float(step))}


def save_all(ckpts: CheckpointManager, losses: dict[int, float | None]) -> None:
    """One save after another, each committed before the next."""
    for step, loss in losses.items():
        ckpts.save(step, state_of(step), metrics={} if loss is None else {"loss": loss}, block=True)


def manager(
    storage: Any, keep_last: int | None, keep_best: int | None, mode: str = "min", **words: Any
) -> CheckpointManager:
    """A manager that keeps the best by loss."""
    return CheckpointManager(storage, monitor="loss", mode=mode, keep_last=keep_last, keep_best=keep_best, **words)


def steps(run: Any) -> list[int]:
    """The committed steps, oldest first."""
    return [c.step for c in run.checkpoints()]


def best_steps(storage: Any) -> list[int]:
    """The steps of the best list, best first."""
    manifest = cloudckpt.open(storage).manifest()
    return [entry.step for save_id in manifest.best[0].ids if (entry := manifest.find(save_id)) is not None]


class Watched(MemoryStorage):
    """Looks, as any reader might, after every change of the store, and before every byte and every delete."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.longest: list[int] = []

    def _entry_of(self, key: str) -> Any:
        save_id = keys.parse(key).id
        return cloudckpt.open(self).manifest().find(save_id) if save_id else None

    def _look(self) -> None:
        # Collected, not raised: housekeeping of the product survives what a delete raises.
        try:
            check_store(self)
            manifest = cloudckpt.open(self).manifest()
            for rule, best in zip(manifest.policy.keep_best, manifest.best, strict=True):
                values = [entry.metrics[rule.metric] for i in best.ids if (entry := manifest.find(i)) is not None]
                self.longest.append(len(best.ids))
                if len(values) != len(best.ids) or values != sorted(values) or len(values) > (rule.n or 0):
                    self.problems.append(f"revision {manifest.revision}: best by {rule} are {values}")
        except AssertionError as exc:
            self.problems.append(str(exc))

    def create(self, key: str, body: bytes) -> Any:
        outcome = super().create(key, body)
        self._look()
        return outcome

    def replace(self, key: str, body: bytes, *, expecting: str) -> Any:
        outcome = super().replace(key, body, expecting=expecting)
        self._look()
        return outcome

    def put(self, key: str, *args: Any, **kwargs: Any) -> None:
        entry = self._entry_of(key)
        if entry is None or entry.state is not State.PENDING:
            self.problems.append(f"{key} is uploaded and the manifest says {entry}")
        super().put(key, *args, **kwargs)
        self._look()

    def delete(self, keys: Any) -> dict[str, StorageError]:
        going = [*keys]
        for key in going:
            if key.startswith("checkpoint-") and (e := self._entry_of(key)) is not None and e.state != State.RETIRED:
                self.problems.append(f"{key} is deleted and the manifest says {e.state}")
        failed = super().delete(going)
        self._look()
        return failed


def words(storage: ScriptedStorage) -> list[str]:
    """What the log changed, one phrase per request: the verb, and the manifest, a step's payload or its index."""
    return [
        f"{call.verb} {parsed.step} {parsed.kind}" if parsed.step is not None else f"{call.verb} {parsed.kind}"
        for call in storage.calls
        if call.verb in {"create", "replace", "put", "delete"}
        for parsed in [keys.parse(call.keys[0])]
    ]


def test_s1_the_manifest_names_a_save_before_its_first_byte_and_before_any_delete() -> None:
    """S1: limit 1, best 1, losses 3.0, 2.0, 2.5, 2.6: manifest before bytes, deletes last, step 2 always there."""
    watched = Watched()
    storage = ScriptedStorage(watched)
    with manager(storage, 1, 1) as ckpts:
        for step, loss in {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.6}.items():
            save_all(ckpts, {step: loss})
            assert step == 1 or 2 in steps(ckpts)
        assert steps(ckpts) == [2, 4]

    def saved(step: int) -> list[str]:
        return ["replace manifest", f"put {step} payload", f"put {step} index", "replace manifest"]

    def deleted(step: int) -> list[str]:
        return [f"delete {step} payload", f"delete {step} index"]

    assert words(storage) == [
        "create manifest",
        *saved(1),
        *saved(2),
        *deleted(1),
        *saved(3),
        *saved(4),
        *deleted(3),
        "replace manifest",
        "create copy",
    ]
    assert watched.problems == []


@pytest.mark.parametrize("keep_best", [0, 1, 2, 3])
def test_s3_the_best_list_never_exceeds_its_number(keep_best: int) -> None:
    """S3: at every moment a reader can see, and when N is lowered between runs, the list is sorted and at most N."""
    storage = Watched()
    rng = random.Random(keep_best)
    with manager(storage, 2, 3) as ckpts:
        save_all(ckpts, {step: rng.random() for step in range(5)})
    with manager(storage, 2, keep_best) as ckpts:
        ckpts.restore(state_of(0))
        storage.longest.clear()
        for step in range(5, 12):
            assert len(best_steps(storage)) <= keep_best
            save_all(ckpts, {step: rng.random()})
            assert len(ckpts.best_list()[2]) == keep_best
    assert set(storage.longest) == {keep_best}
    assert storage.problems == []


def test_s4_what_is_listed_as_best_is_whole_at_every_moment() -> None:
    """S4: after every single request each listed best is there to the last byte, and no delete ever names one."""
    storage = Watched()
    with manager(storage, 2, 2) as ckpts:
        save_all(ckpts, {23750: 2.8901, 24000: 3.2, 24250: 3.1, 24500: 3.0, 25000: 2.8557})
        ckpts.report_metrics(24500, {"loss": 2.5})
        ckpts.pin(25000)
        save_all(ckpts, {25250: 2.7, 25500: None})
    with CheckpointManager(storage) as ckpts:
        ckpts.restore(state_of(0), select="best")
        ckpts.prune()
        save_all(ckpts, {24750: 2.6, 25000: 2.4})
    cloudckpt.gc(storage, dry_run=False)
    assert storage.problems == []
    assert best_steps(storage) == [25000, 24500]
    assert len(storage.longest) > 40


def test_s5_the_new_best_is_not_dropped_by_its_own_arrival() -> None:
    """S5: [(2500, 3.5), (1250, 3.6)], N=2, new (6250, 3.15): the result is [(6250, 3.15), (2500, 3.5)]."""
    storage = MemoryStorage()
    with manager(storage, 1, 2) as ckpts:
        save_all(ckpts, {1250: 3.6, 2500: 3.5, 6250: 3.15})
        assert best_steps(storage) == [6250, 2500]


def test_s7_the_best_list_belongs_to_the_run_not_to_a_process() -> None:
    """S7: steps 1..5 with best = 2, a new process saves 6..10 without metrics: 2 is still there."""
    storage = MemoryStorage()
    with manager(storage, 2, 1) as ckpts:
        save_all(ckpts, {1: 5.0, 2: 1.0, 3: 4.0, 4: 3.0, 5: 2.0})
    with CheckpointManager(storage) as ckpts:
        ckpts.restore(state_of(0))
        save_all(ckpts, dict.fromkeys(range(6, 11)))
        assert 2 in steps(ckpts)
        best = ckpts.best()
        assert best is not None
        assert best.step == 2


def test_s8_limit_three_and_best_two_keep_five() -> None:
    """S8, L3: limit 3, N 2, six saves with the two best first: exactly {1, 2} and {4, 5, 6} remain."""
    storage = MemoryStorage()
    with manager(storage, 3, 2) as ckpts:
        save_all(ckpts, {1: 0.1, 2: 0.2, 3: 0.9, 4: 0.8, 5: 0.7, 6: 0.6})
        assert steps(ckpts) == [1, 2, 4, 5, 6]
    check_store(storage, settled=True)


def test_s10_after_a_spike_latest_and_best_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    """S10: a diverged end is the latest, the bests before it are in the summary, and one call restores the best."""
    caplog.set_level(logging.INFO, logger="cloudckpt")
    storage = MemoryStorage()
    with manager(storage, 2, 2) as ckpts:
        save_all(ckpts, {1: 3.154, 2: 3.1, 3: 7.86, 4: 8.389})
        latest, best = ckpts.latest(), ckpts.best()
        assert latest is not None
        assert best is not None
        assert (latest.step, best.step) == (4, 2)
    first, second = (c.url for c in reversed(cloudckpt.open(storage).checkpoints()[:2]))
    assert [r.getMessage() for r in caplog.records][-6:] == [
        "=" * 60,
        "Training complete!",
        "Best checkpoints (N=2):",
        f"  {first}: loss=3.1000",
        f"  {second}: loss=3.1540",
        "=" * 60,
    ]
    with CheckpointManager(storage) as ckpts:
        state = state_of(0)
        resumed = ckpts.restore(state, select="best")
        assert resumed is not None
        assert resumed.step == 2
        assert torch.equal(state["w"], state_of(2)["w"])


def test_s10_a_mark_takes_a_diverged_checkpoint_out_of_the_way() -> None:
    """S10: what is marked "diverged" is never the latest to resume from, and is still there to be named."""
    storage = MemoryStorage()
    with manager(storage, 2, 2) as ckpts:
        save_all(ckpts, {1: 3.154, 2: 3.1, 3: 7.86, 4: 8.389})
        for step in (3, 4):
            ckpts.pin(step)
            ckpts.mark(step, "diverged")
        resumed = ckpts.restore(state_of(0))
        assert resumed is not None
        assert resumed.step == 2
        assert ckpts.restore(state_of(0), select=4) is not None


def test_h1_bests_whose_bytes_were_removed_free_their_slots(caplog: pytest.LogCaptureFixture) -> None:
    """H1: two bests removed by hand are reported by name, count in no rule, and their slots are free at once."""
    storage = MemoryStorage()
    with manager(storage, 1, 2) as ckpts:
        save_all(ckpts, {1: 0.1, 2: 0.2, 3: 0.5, 4: 0.6})
    for checkpoint in cloudckpt.open(storage).checkpoints()[:2]:
        storage.delete([item.key for item in storage.list(f"{checkpoint.name}/")])
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(CorruptCheckpointError):
            ckpts.restore(state_of(0), select=1)
        resumed = ckpts.restore(state_of(0), select="best")
        assert resumed is not None
        assert resumed.step == 4
        assert len([r for r in caplog.records if "is damaged" in r.getMessage()]) == 2
        save_all(ckpts, {5: 0.9, 6: 0.8, 7: 0.7})
        assert best_steps(storage) == [4, 7]


def test_h2_every_delete_follows_from_the_one_retention() -> None:
    """H2: limit 4, N 2, five saves: what is deleted is what the commit retired, and nothing else is ever deleted."""
    storage = ScriptedStorage(MemoryStorage())
    with manager(storage, 4, 2) as ckpts:
        save_all(ckpts, {1: 0.9, 2: 0.1, 3: 0.2, 4: 0.8, 5: 0.7})
        journal = ckpts.journal()
    retired = {event.id for event in journal if event.event == "retire"}
    assert {keys.parse(key).id for key in storage.keys_of("delete") if keys.parse(key).id} == retired
    assert len(retired) == 1


@pytest.mark.parametrize("in_place", [True, False])
def test_h4_a_damaged_optimizer_is_an_error_that_names_it(in_place: bool) -> None:
    """H4: a corrupt optimizer object is an error that names it.

    The error says that the objects are partly overwritten, or with ``read_in_place=False`` the model was not changed either.
    """
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        folder = ckpts.save(1, {"model": torch.ones(3), "optimizer": torch.ones(3)}, block=True).checkpoint.name
    key = f"{folder}/optimizer-00000-of-00001.safetensors"
    body = bytearray(storage.read(key, limit_bytes=10**6).body)
    body[-1] ^= 8
    storage.put(key, [bytes(body)], size_bytes=len(body))
    state = {"model": torch.zeros(3), "optimizer": torch.zeros(3)}
    with CheckpointManager(storage, settings=Settings(read_in_place=in_place)) as ckpts:
        with pytest.raises(CorruptCheckpointError, match=r"optimizer-00000.*checksum") as caught:
            ckpts.restore(state)
    if in_place:
        assert "partly overwritten: build fresh ones before you go on" in str(caught.value)
    else:
        assert state["model"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_h14_load_takes_every_spelling_of_a_device(device: Any) -> None:
    """H14: a string, a torch.device and None are devices."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        assert ckpts.load(device=device)["w"].device.type == "cpu"


def test_h15_what_could_be_mixed_up_is_keyword_only() -> None:
    """H15: nothing but the selector and the state is positional on load, restore and save."""
    with CheckpointManager(MemoryStorage()) as ckpts:
        acts: list[Any] = [
            lambda: ckpts.load("latest", ["w"]),  # type: ignore[call-arg]  # that is the point
            lambda: ckpts.restore(state_of(0), "latest", False),  # type: ignore[call-arg]  # that is the point
            lambda: ckpts.save(1, state_of(1), {"loss": 1.0}),  # type: ignore[call-arg]  # that is the point
        ]
        for act in acts:
            with pytest.raises(TypeError):
                act()


def test_h16_the_index_decides_what_belongs_to_a_checkpoint() -> None:
    """H16: a stale weight file beside the sealed ones is not read, whatever its name."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        folder = ckpts.save(1, state_of(1), block=True).checkpoint.name
        storage.put(f"{folder}/model.safetensors", [b"stale"], size_bytes=5)
        storage.put(f"{folder}/w-00001-of-00002.safetensors", [b"stale"], size_bytes=5)
        assert torch.equal(ckpts.load()["w"], state_of(1)["w"])


def test_h17_a_missing_component_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """H17: restoring a weights-only checkpoint with strict=False says one line per missing component, no traceback."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"model": torch.ones(1)}, block=True)
        ckpts.restore({"model": torch.ones(1), "optimizer": {"m": 1}, "rng": {"s": 2}}, strict=False)
    lines = [r for r in caplog.records if "no such component" in r.getMessage()]
    assert [line.getMessage().split(": ")[1] for line in lines] == ["optimizer", "rng"]
    assert all(line.exc_info is None for line in lines)


class Shuffled:
    """A data loader of its own kind."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.given = 0

    def batch(self) -> list[int]:
        """The next indices."""
        self.given += 1
        return torch.randperm(50, generator=self.generator)[:5].tolist()

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"generator": self.generator.get_state(), "given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Stand there again."""
        self.generator.set_state(state["generator"])
        self.given = state["given"]


def test_h18_the_next_batches_are_those_of_no_interruption() -> None:
    """H18: data state is the loader's own; a resume at step k gives the same next batches."""
    storage = MemoryStorage()
    loader = Shuffled()
    for _ in range(3):
        loader.batch()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(3, {"data": loader}, block=True)
    again = Shuffled()
    with CheckpointManager(storage) as ckpts:
        ckpts.restore({"data": again})
    assert [again.batch() for _ in range(3)] == [loader.batch() for _ in range(3)]
    assert again.given == 6


def test_h22_random_numbers_of_every_library_come_back() -> None:
    """H22: the states of Python's, NumPy's and torch's generators are values like any other."""
    storage = MemoryStorage()
    python, numpy = random.Random(5), np.random.default_rng(5)
    python.random()
    torch.manual_seed(5)
    state = {"rng": {"python": python.getstate(), "numpy": numpy.bit_generator.state, "torch": torch.get_rng_state()}}
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state, block=True)
    want = (python.random(), numpy.random(), torch.rand(1))
    loaded = cloudckpt.open(storage).load()["rng"]
    python.setstate(loaded["python"])
    numpy.bit_generator.state = loaded["numpy"]
    torch.set_rng_state(loaded["torch"])
    assert (python.random(), numpy.random(), torch.rand(1)) == want


def test_h24_a_step_saved_again_is_another_checkpoint() -> None:
    """H24, L6, L29, C15: re-reaching a step makes a new entry in a new folder; both are whole, the newer is selected."""
    storage = MemoryStorage()
    with CheckpointManager(storage, keep_last=None) as ckpts:
        for value in (1.0, 2.0):
            ckpts.save(100, {"w": torch.full((2,), value)}, block=True)
    with CheckpointManager(storage) as ckpts:
        first, second = ckpts.checkpoints()
        assert (first.step, second.step) == (100, 100)
        assert first.name != second.name
        assert ckpts.load(100)["w"].tolist() == [2.0, 2.0]
        assert ckpts.load(first.id)["w"].tolist() == [1.0, 1.0]
        ckpts.restore({"w": torch.zeros(2)}, select=first.name)
        ckpts.save(50, state_of(50), block=True)
        latest = ckpts.latest()
        assert latest is not None
        assert latest.step == 50, "newest is the order of saving, not the step"


@pytest.mark.parametrize(
    ("mode", "values", "want"), [("min", [2.0, 3.0, 2.5], [1, 3]), ("max", [0.9, 0.5, 0.7], [1, 3])]
)
def test_l1_a_newcomer_is_compared_with_the_worst(mode: str, values: list[float], want: list[int]) -> None:
    """L1: N=2 and 2.0, 3.0, 2.5 keep 2.0 and 2.5; mirrored where greater is better."""
    storage = MemoryStorage()
    with manager(storage, 1, 2, mode) as ckpts:
        save_all(ckpts, dict(enumerate(values, 1)))
        assert best_steps(storage) == want


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("best", [0, 1, 2, 4])
def test_l2_what_was_just_committed_exists(limit: int, best: int) -> None:
    """L2: whatever the limits, the checkpoint just saved is there when save returns."""
    with manager(MemoryStorage(), limit, best) as ckpts:
        for step in range(6):
            checkpoint = ckpts.save(step, state_of(step), metrics={"loss": float(step)}, block=True).checkpoint
            assert checkpoint.id in {c.id for c in ckpts.checkpoints()}
            assert torch.equal(ckpts.load(checkpoint.name)["w"], state_of(step)["w"])


def test_l4_zero_is_a_metric() -> None:
    """L4: a loss of 0.0 is the best there can be, an accuracy of 0.0 the worst, and both count."""
    for mode, want in (("min", [2, 1]), ("max", [1, 2])):
        storage = MemoryStorage()
        with manager(storage, 1, 2, mode) as ckpts:
            save_all(ckpts, {1: 0.5, 2: 0.0})
        assert best_steps(storage) == want


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_l5_what_is_not_finite_is_never_best(mode: str, value: float, caplog: pytest.LogCaptureFixture) -> None:
    """L5, L31: NaN and infinities take no slot in either direction; the checkpoint is kept as recent, with a WARNING."""
    storage = MemoryStorage()
    with manager(storage, 1, 2, mode) as ckpts:
        save_all(ckpts, {1: value})
        assert steps(ckpts) == [1]
        assert [r.levelno for r in caplog.records if "is never best" in r.getMessage()] == [logging.WARNING]
        save_all(ckpts, {2: 0.5, 3: 0.6})
        assert sorted(best_steps(storage)) == [2, 3]


def test_l14_touching_a_file_changes_nothing(tmp_path: Path) -> None:
    """L14: neither new files nor new dates in an old checkpoint's folder make it the latest."""
    root = tmp_path / "run"
    with CheckpointManager(str(root)) as ckpts:
        save_all(ckpts, {1: None, 2: None})
        old = root / ckpts.checkpoints()[0].name
        (old / "notes.bak").write_text("edited")
        os.utime(old)
        latest = ckpts.latest()
        assert latest is not None
        assert latest.step == 2


def test_l15_strays_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    """L15: a stray checkpoint-99.partial takes no slot, and neither retention nor gc touches it."""
    root = tmp_path / "run"
    with CheckpointManager(str(root), keep_last=2) as ckpts:
        save_all(ckpts, {1: None})
        stray = root / "checkpoint-99.partial"
        stray.mkdir()
        (stray / "model.safetensors").write_text("mine")
        save_all(ckpts, {2: None, 3: None})
        assert steps(ckpts) == [2, 3]
    report = cloudckpt.gc(str(root), dry_run=False)
    assert report.garbage is not None
    assert report.garbage.foreign == ("checkpoint-99.partial/model.safetensors",)
    assert (stray / "model.safetensors").read_text() == "mine"


def test_l27_bests_newer_than_the_resumed_one_stay_best() -> None:
    """L27: going back to an older checkpoint forgets no best that was saved after it."""
    storage = MemoryStorage()
    with manager(storage, None, 1) as ckpts:
        save_all(ckpts, {1: 0.9, 2: 0.8, 3: 0.1})
    with manager(storage, 1, 1) as ckpts:
        ckpts.restore(state_of(0), select=1)
        save_all(ckpts, {2: 0.7, 3: 0.6})
        assert best_steps(storage) == [3]
        best = ckpts.best()
        assert best is not None
        assert best.metrics["loss"] == 0.1


def test_l28_a_failed_new_best_does_not_evict_the_old_one() -> None:
    """L28: limit 2, N 1; 1 (1.0) saved; 2 (0.9) fails; 3, 4, 5 saved: the real best, 1, is still there and listed."""
    probe = ScriptedStorage(MemoryStorage())
    with manager(probe, 2, 1) as ckpts:
        save_all(ckpts, {1: 1.0})
        before = len(probe.calls)
        save_all(ckpts, {2: 0.9})
        at = next(n for n in range(before, len(probe.calls)) if probe.calls[n].verb == "put")
    inner = MemoryStorage()
    with manager(ScriptedStorage(inner, at, Fault.REFUSED), 2, 1) as ckpts:
        save_all(ckpts, {1: 1.0})
        with pytest.raises(SaveError):
            save_all(ckpts, {2: 0.9})
        assert best_steps(inner) == [1]
        save_all(ckpts, {3: 1.3, 4: 1.4, 5: 1.5})
        assert steps(ckpts) == [1, 4, 5]
        assert torch.equal(ckpts.load("best")["w"], state_of(1)["w"])
    check_store(inner, settled=True)


def test_l34_a_monitor_without_metrics_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """L34: under a monitor, saves without the metric give one WARNING that says how to mend it, not one each."""
    with manager(MemoryStorage(), 2, 1) as ckpts:
        save_all(ckpts, dict.fromkeys(range(4)))
    warnings = [r.getMessage() for r in caplog.records if "has no such metric" in r.getMessage()]
    assert len(warnings) == 1
    assert "report_metrics() later" in warnings[0]


def test_a_loss_may_be_called_eval_loss(caplog: pytest.LogCaptureFixture) -> None:
    """§3.1 #6: monitor="loss" is satisfied by eval_loss where loss is absent; said once."""
    storage = MemoryStorage()
    with manager(storage, 1, 1) as ckpts:
        for step, loss in [(1, 0.5), (2, 0.0), (3, 0.7)]:
            ckpts.save(step, state_of(step), metrics={"eval_loss": loss}, block=True)
        assert best_steps(storage) == [2]
    assert len([r for r in caplog.records if "stands in" in r.getMessage()]) == 1


@pytest.mark.memory_only
def test_c9_a_forbidden_delete_never_fails_training(caplog: pytest.LogCaptureFixture) -> None:
    """C9: where deleting is forbidden, saves go on, each failure is a WARNING, and the bytes go once it is allowed."""

    class NoDelete(MemoryStorage):
        allowed = False

        def delete(self, keys: Any) -> dict[str, StorageError]:
            if self.allowed:
                return super().delete(keys)
            return {key: StorageError("403") for key in keys}

    storage = NoDelete()
    with CheckpointManager(storage, keep_last=1) as ckpts:
        save_all(ckpts, {1: None, 2: None, 3: None})
        assert steps(ckpts) == [3]
        assert [c.step for c in ckpts.checkpoints(state=State.RETIRED)] == [1, 2]
        assert any("could not delete" in r.getMessage() for r in caplog.records)
        storage.allowed = True
        save_all(ckpts, {4: None})
    check_store(storage, settled=True)


def test_c12_a_clock_that_goes_back_changes_nothing() -> None:
    """C12: newest, best and what is deleted do not depend on any clock."""
    times = iter([f"2026-01-31T{23 - n % 24:02d}:00:00.000Z" for n in range(500)])
    storage = MemoryStorage()
    with manager(storage, 2, 1) as ckpts:
        ckpts._store.clock = lambda: next(times)
        save_all(ckpts, {1: 0.1, 2: 0.5, 3: 0.4, 4: 0.6})
        assert steps(ckpts) == [1, 3, 4]
        latest = ckpts.latest()
        assert latest is not None
        assert latest.step == 4
    check_store(storage, settled=True)


def test_c14_of_equal_ones_the_older_stays_best() -> None:
    """C14: equal metrics rank by age, the same before and after a restart."""
    storage = MemoryStorage()
    with manager(storage, 1, 1) as ckpts:
        save_all(ckpts, {1: 0.5, 2: 0.5, 3: 0.5})
        assert best_steps(storage) == [1]
    with CheckpointManager(storage) as ckpts:
        save_all(ckpts, {4: 0.5})
        assert steps(ckpts) == [1, 4]


@pytest.mark.parametrize("name", ["a b", "a+b", "100%", "grüße", "#1", "[x]", "checkpoint-1", "a=b,c"])
def test_c18_roots_may_have_odd_names(tmp_path: Path, name: str) -> None:
    """C18: spaces, plus, percent, brackets and Unicode in a root are part of its name."""
    root = str(tmp_path / name / "run")
    with CheckpointManager(root, keep_last=1) as ckpts:
        save_all(ckpts, {1: None, 2: None})
    run = cloudckpt.open(root)
    assert torch.equal(run.load()["w"], state_of(2)["w"])
    assert cloudckpt.verify(root, deep=True).ok
    assert run.url == root


def test_a_manifest_store_takes_any_clock() -> None:
    """The clock of a run is a part that is passed in; it only labels."""
    store = ManifestStore(MemoryStorage(), clock=lambda: "2026-01-31T12:00:00.000Z")
    assert store.clock() == "2026-01-31T12:00:00.000Z"
