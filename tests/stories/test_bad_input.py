"""Bad input gets an error that says what, where and what to do next, at the earliest moment; nothing is half-written.

(Past 350 lines: bad input is one list.)
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
import cloudckpt.editing
import cloudckpt.tools
from cloudckpt import (
    CheckpointManager,
    ConfigError,
    ConflictError,
    FencedError,
    FormatError,
    PreemptionGuard,
    Settings,
    StorageError,
)
from cloudckpt.storage import (
    Landed,
    Listed,
    LocalStorage,
    ManifestStore,
    MemoryStorage,
    PulledFolder,
    Storage,
    Versioned,
    open_storage,
)
from cloudckpt.testing import ScriptedStorage, check_store
from cloudckpt.vocabulary import TRANSLATIONS

W = {"w": torch.ones(3)}


def saved(root: str, *steps: int, **policy: Any) -> None:
    """A closed run on local disk."""
    with CheckpointManager(root, **policy) as ckpts:
        for step in steps:
            ckpts.save(step, {"w": torch.full((3,), float(step))}, metrics={"loss": float(step)}, block=True)


@pytest.mark.parametrize("row", TRANSLATIONS, ids=lambda row: f"{row.tool}:{row.word}")
def test_the_words_of_other_tools_are_translated(row: Any) -> None:
    """S9: a keyword of another tool is a TypeError that names the tool and what to write here; never silence."""
    words: dict[str, Any] = {row.word: 1}
    with pytest.raises(TypeError) as refused:
        CheckpointManager(MemoryStorage(), **words)
    assert str(refused.value) == f"CheckpointManager() has no {row.word}: that is the {row.tool} name. Here: {row.here}"


def test_misspelt_words_are_corrected() -> None:
    """A word that nobody uses is answered with the nearest one, on every public call."""
    with pytest.raises(TypeError, match=r"CheckpointManager\(\) has no keep_lats; did you mean keep_last\?"):
        CheckpointManager(MemoryStorage(), keep_lats=1)
    with CheckpointManager(MemoryStorage()) as ckpts:
        with pytest.raises(TypeError, match=r"save\(\) has no metric; did you mean metrics\?"):
            ckpts.save(1, W, metric={"loss": 1.0})
        with pytest.raises(TypeError, match=r"restore\(\) has no components_; did you mean components\?"):
            ckpts.restore(W, components_=["w"])
        with pytest.raises(TypeError, match=r"load\(\) has no map_location: that is the torch\.load name"):
            ckpts.load(map_location="cpu")
        assert ckpts.checkpoints(state=None) == ()


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("r2://bucket/run", r"such a store speaks S3\. Write 's3://bucket/run' and set AWS_ENDPOINT_URL"),
        ("minio://bucket/run", "AWS_ENDPOINT_URL"),
        ("nonsense://x", "nothing is known of nonsense://"),
        ("simplecache::s3://b/k", "chained URLs"),
        ("", "is no root"),
        (Path("s3://bucket/run"), r"went through pathlib .* pass the string 's3://bucket/run'"),
        ("gs:/bucket/run", "'gs://bucket/run'"),
        ("http://example.com/run", "a run needs a filesystem that can be written"),
        ("s3://", "cannot be a bucket's name"),
        ("s3://my bucket/run", "'my bucket' cannot be a bucket's name"),
        ("gs://bucket/a//b", "choose another prefix"),
        ("s3://bucket/a/../b", "choose another prefix"),
        ("s3://bucket/" + "x" * 801, "longer than 800 bytes"),
    ],
)
def test_roots_that_cannot_be_used(root: Any, message: str) -> None:
    """A root that cannot work is refused by the constructor, with what to write instead."""
    with pytest.raises(ConfigError, match=message):
        CheckpointManager(root)
    with pytest.raises(ConfigError, match=message):
        cloudckpt.open(root)


@pytest.mark.parametrize(("root", "module", "extra"), [("s3://b/k", "s3fs", "s3"), ("gs://b/k", "gcsfs", "gcs")])
def test_a_missing_extra_is_named(root: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library for a store the error is the command that installs it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else find(name, *a))
    with pytest.raises(ConfigError, match=rf'pip install "cloudckpt\[{extra}\]"'):
        CheckpointManager(root)


def test_secrets_in_storage_options_are_never_shown() -> None:
    """Neither the options nor a password in the URL are in the message that refuses a root."""
    for root in ("http://example.com/run", "s3://user:hunter2@bucket/run", "minio://user:hunter2@bucket/run"):
        with pytest.raises(ConfigError) as refused:
            CheckpointManager(root, storage_options={"secret": "hunter2"})
        assert "hunter2" not in str(refused.value)


def test_a_root_that_can_never_be_written_fails_in_the_constructor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file as the root, or a folder above it without write permission, fails in second one and writes nothing."""
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(StorageError, match="must be a folder"):
        CheckpointManager(str(file))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StorageError, match="permission denied"):
        CheckpointManager(str(tmp_path / "new" / "run"))
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"monitor": "val_loss"}, r'needs a direction, nobody guesses it: .*a loss is usually mode="min"'),
        ({"monitor": "perplexity"}, r'add mode="min" or mode="max"$'),
        ({"monitor": "acc", "mode": "up"}, r'mode=.up. for .acc.: write mode="min"'),
        ({"monitor": None, "mode": "min"}, "needs to know the metric"),
        ({"monitor": None, "keep_best": 2}, "needs to know the metric"),
        ({"keep_last": 0}, "The newest checkpoint is always kept, so write keep_last=1"),
        ({"keep_last": -1}, "keep_last=None to keep all"),
        ({"keep_every": 0}, "keep_every=0"),
        ({"keep_within": -5.0}, "keep_within"),
        ({"takeover": "never"}, "write one of last_wins, refuse, force"),
        ({"process_group": object()}, "not initialised; call init_process_group"),
    ],
)
def test_settings_that_cannot_be_used(words: dict[str, Any], message: str) -> None:
    """A wrong word fails at the latest at the first call, before anything is written."""
    storage = ScriptedStorage(MemoryStorage())
    with pytest.raises(ConfigError, match=message):
        CheckpointManager(storage, **words).restore(W)
    assert set(storage.counts()) <= {"read", "list"}


def test_every_bad_number_of_the_settings_is_listed() -> None:
    """Settings are checked all at once."""
    with pytest.raises(ConfigError, match=r"on_busy='later'.*storage_deadline_s=-1.*io_threads=0"):
        Settings(on_busy="later", storage_deadline_s=-1, io_threads=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"step": -1}, "step=-1: expected an integer from 0"),
        ({"step": True}, "step=True: expected an integer >= 0, got bool"),
        ({"step": 1.5}, "got float"),
        ({"step": float("nan")}, "got float"),
        ({"metrics": {"loss": "low"}}, "metric 'loss': expected a number, got 'low'"),
        ({"metrics": 0.5}, "metrics must be a mapping"),
        ({"tags": "release"}, r"write \['release'\]"),
        ({"tags": ["a\nb"]}, "printable"),
        ({"state": {}}, "an empty one"),
        ({"state": torch.ones(1)}, "got Tensor"),
        ({"state": {1: torch.ones(1)}}, "component 1: a top-level key"),
        ({"state": {"": torch.ones(1)}}, "component ''"),
        ({"state": {"x" * 300: torch.ones(1)}}, "shorter top-level key"),
        ({"state": {"Model": 1, "model": 2}}, "differ only by case"),
    ],
)
def test_arguments_of_save_that_cannot_be_used(call: dict[str, Any], message: str) -> None:
    """A bad step, metric, tag or state is refused before anything is announced, and the next save works."""
    with CheckpointManager(MemoryStorage()) as ckpts:
        arguments: dict[str, Any] = {"step": 1, "state": W, **call}
        with pytest.raises(ConfigError, match=message):
            ckpts.save(arguments.pop("step"), arguments.pop("state"), **arguments)
        assert ckpts.checkpoints(state=None) == ()
        ckpts.save(1, W, block=True)


def test_a_closed_manager_says_so() -> None:
    """A manager that was closed saves no more; closing twice is fine."""
    ckpts = CheckpointManager(MemoryStorage())
    ckpts.save(1, W)
    ckpts.close()
    ckpts.close()
    with pytest.raises(ConfigError, match="is closed: make a new one"):
        ckpts.save(2, W)


def test_a_folder_with_other_peoples_files_is_refused(tmp_path: Path) -> None:
    """A root that holds files but no run is not ours: refused, nothing written; files that come later are tolerated."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FormatError, match=r"holds no run of ours \(there is 'notes.txt'\)"):
        CheckpointManager(str(tmp_path)).save(1, W)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    root = tmp_path / "run"
    saved(str(root), 1, keep_last=1)
    inside = next(root.glob("checkpoint-1.*"))
    (root / "events.out").write_text("mine")
    (inside / "notes.txt").write_text("mine")
    saved(str(root), 2)
    cloudckpt.gc(str(root), dry_run=False)
    assert (root / "events.out").read_text() == "mine"
    assert [p.name for p in inside.iterdir()] == ["notes.txt"]


def test_a_deleted_manifest_is_refused_and_repaired(tmp_path: Path) -> None:
    """Without its manifest a run is never taken for a new one: the refusal names repair, and repair brings it back."""
    root = str(tmp_path / "run")
    saved(root, 1, 2, 3, monitor="loss", mode="min", keep_best=1, keep_last=2)
    before = {c.id: c.step for c in cloudckpt.open(root).checkpoints()}
    for copy in Path(root).glob("manifest*.json"):
        copy.unlink()
    acts: list[Any] = [lambda: CheckpointManager(root).restore(dict(W)), lambda: cloudckpt.open(root).latest()]
    for act in acts:
        with pytest.raises(FormatError, match=rf"but no manifest\.json.* run: cloudckpt repair {root}"):
            act()
    proposal = cloudckpt.repair(root)
    assert not proposal.carried_out
    assert not Path(root, "manifest.json").exists()
    assert proposal.basis == "the indexes alone"
    done = cloudckpt.repair(root, dry_run=False)
    assert {c.id: c.step for c in done.admitted} == before
    assert all(c.held for c in done.admitted)
    assert done.could_not_know
    state = {"w": torch.zeros(3)}
    with CheckpointManager(root) as ckpts:
        resumed = ckpts.restore(state)
        assert resumed is not None
        assert resumed.step == 3
        ckpts.save(4, {"w": torch.full((3,), 4.0)}, metrics={"loss": 0.5}, block=True)
        assert {c.step for c in ckpts.checkpoints()} == {1, 2, 3, 4}
        policy = ckpts.manifest().policy
        assert policy.monitor is not None
        assert policy.monitor.metric == "loss"
    assert torch.equal(state["w"], torch.full((3,), 3.0))
    check_store(LocalStorage(root))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda body: body[: len(body) // 2], r"not valid JSON.*cloudckpt repair"),
        (lambda body: body.replace(b'"step": 2', b'"step": "2"'), r'entries\[1\]\.step: expected an integer.*got "2"'),
        (lambda body: body.replace(b'"format": 1', b'"format": 7'), "has format 7 .* upgrade cloudckpt"),
        (lambda body: b"", "not valid JSON"),
    ],
)
def test_a_manifest_that_cannot_be_read_stops_everything(tmp_path: Path, harm: Any, message: str) -> None:
    """Truncated, hand-edited or newer: refused by place with what to do, and not a byte is changed."""
    root = str(tmp_path / "run")
    saved(root, 1, 2)
    place = Path(root, "manifest.json")
    place.write_bytes(harm(place.read_bytes()))
    before = {p: p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}
    for act in (
        lambda: CheckpointManager(root).restore(dict(W)),
        lambda: CheckpointManager(root).save(9, W),
        lambda: cloudckpt.gc(root, dry_run=False),
        lambda: cloudckpt.open(root).checkpoints(),
    ):
        with pytest.raises(FormatError, match=f"(?s){message}"):
            act()
    assert {p: p.read_bytes() for p in Path(root).rglob("*") if p.is_file()} == before


def test_a_manifest_put_back_under_a_writer_stops_it(tmp_path: Path) -> None:
    """A writer that finds an older revision, or none, stops with ConflictError and deletes nothing."""
    root = str(tmp_path / "run")
    saved(root, 1)
    place = Path(root, "manifest.json")
    old = place.read_bytes()
    ckpts = CheckpointManager(root)
    ckpts.save(2, W, block=True)
    place.write_bytes(old)
    with pytest.raises(ConflictError, match="an older one was put back"):
        ckpts.save(3, W, block=True)
    place.unlink()
    with pytest.raises(ConflictError, match="somebody deleted it"):
        ckpts.save(4, W, block=True)
    assert len(list(Path(root).glob("checkpoint-2.*/checkpoint.json"))) == 1
    with pytest.raises(ConflictError):
        ckpts.close()


def test_gc_never_deletes_what_is_newer_than_a_manifest_that_was_put_back(tmp_path: Path) -> None:
    """A sealed checkpoint that the manifest cannot have known means that it was rolled back: gc refuses, repair helps."""
    root = str(tmp_path / "run")
    saved(root, 1)
    old = Path(root, "manifest.json").read_bytes()
    saved(root, 2)
    Path(root, "manifest.json").write_bytes(old)
    with pytest.raises(ConflictError, match=r"newer than the manifest.*cloudckpt repair"):
        cloudckpt.gc(root, dry_run=False)
    assert {c.step for c in cloudckpt.repair(root, dry_run=False).admitted} == {1, 2}


def test_a_resume_that_forgets_its_monitor_retires_nothing_it_should_not() -> None:
    """Policy words left out are inherited: the bests of the first job survive the saves of the second."""
    storage = MemoryStorage()
    with CheckpointManager(storage, monitor="loss", mode="min", keep_best=2, keep_last=1) as ckpts:
        for step, loss in enumerate([1.0, 2.0, 5.0, 6.0]):
            ckpts.save(step, W, metrics={"loss": loss}, block=True)
    with CheckpointManager(storage) as ckpts:
        for step in (4, 5, 6):
            ckpts.save(step, W, block=True)
        assert {0, 1} <= {c.step for c in ckpts.checkpoints()}


def test_another_direction_needs_permission() -> None:
    """Changing monitor or mode of a run that has entries is a ConfigError, unless change_policy=True."""
    storage = MemoryStorage()
    with CheckpointManager(storage, monitor="loss", mode="min") as ckpts:
        ckpts.save(1, W, metrics={"loss": 1.0}, block=True)
    changes: list[dict[str, Any]] = [
        {"monitor": "loss", "mode": "max"},
        {"monitor": "acc", "mode": "max"},
        {"monitor": None},
    ]
    for words in changes:
        with pytest.raises(ConfigError, match="change_policy=True"):
            CheckpointManager(storage, **words).restore(dict(W))
    with CheckpointManager(storage, monitor="acc", mode="max", change_policy=True) as ckpts:
        assert ckpts.restore(dict(W)) is not None
        assert ckpts.manifest().policy.monitor == cloudckpt.Best("acc", "max", 1)


def test_a_tighter_policy_says_what_it_will_retire(caplog: pytest.LogCaptureFixture) -> None:
    """Tightened numbers warn, before the first commit, which checkpoints it will retire; nothing is retired yet."""
    storage = MemoryStorage()
    with CheckpointManager(storage, keep_last=None) as ckpts:
        names = [ckpts.save(step, W, block=True).checkpoint.name for step in range(4)]
    caplog.clear()
    with CheckpointManager(storage, keep_last=2) as ckpts:
        ckpts.restore(dict(W))
        assert len(ckpts.checkpoints()) == 4
        warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert len(warnings) == 1
        assert warnings[0].endswith(f"the next commit will retire {names[0]}, {names[1]}")
        ckpts.save(4, W, block=True)
        assert [c.step for c in ckpts.checkpoints()] == [3, 4]


def test_the_same_root_may_be_spelled_in_several_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """L13: relative, absolute, with a trailing slash, as file:// URL and as Path: all the same run."""
    monkeypatch.chdir(tmp_path)
    saved("./run", 1)
    spellings: list[Any] = ["run", "./run/", str(tmp_path / "run"), f"file://{tmp_path}/run", tmp_path / "run"]
    for spelling in spellings:
        assert open_storage(spelling).url == str(tmp_path / "run")
        latest = cloudckpt.open(spelling).latest()
        assert latest is not None
        assert latest.step == 1


def test_a_leaf_that_cannot_be_stored_announces_nothing() -> None:
    """H20: an object without a state dict fails the save by its path before anything is announced."""
    with CheckpointManager(MemoryStorage()) as ckpts:
        with pytest.raises(TypeError, match=r"^scheduler\.lr_lambdas\[0\]: .*allow_pickle=True"):
            ckpts.save(1, {"scheduler": {"lr_lambdas": [lambda step: 1.0]}})
        assert ckpts.checkpoints(state=None) == ()
        ckpts.save(1, W, block=True)


@pytest.mark.parametrize("row", TRANSLATIONS, ids=lambda row: f"{row.tool}:{row.word}")
def test_every_call_knows_the_words_of_other_tools(row: Any) -> None:
    """save, restore and load translate as the constructor does, and touch nothing."""
    storage = ScriptedStorage(MemoryStorage())
    words: dict[str, Any] = {row.word: 1}
    with CheckpointManager(storage) as ckpts:
        for call in (lambda: ckpts.save(1, W, **words), lambda: ckpts.restore(W, **words), lambda: ckpts.load(**words)):
            with pytest.raises(TypeError, match=f"has no {row.word}: that is the"):
                call()
    assert storage.calls == []


@pytest.mark.parametrize("harm", ["truncated", "edited", "rolled back"])
def test_repair_brings_a_harmed_manifest_back(tmp_path: Path, harm: str) -> None:
    """Whatever happened to the manifest, repair admits every whole checkpoint, held, and training goes on."""
    root = str(tmp_path / "run")
    saved(root, 1)
    place = Path(root, "manifest.json")
    old = place.read_bytes()
    saved(root, 2)
    body = place.read_bytes()
    harmed = {
        "truncated": body[: len(body) // 2],
        "edited": body.replace(b'"step": 2', b'"step": -2'),
        "rolled back": old,
    }
    place.write_bytes(harmed[harm])
    done = cloudckpt.repair(root, dry_run=False)
    assert {(c.step, c.held) for c in done.admitted} == {(1, True), (2, True)}
    with CheckpointManager(root, keep_last=1) as ckpts:
        state = {"w": torch.zeros(3)}
        resumed = ckpts.restore(state)
        assert resumed is not None
        assert resumed.step == 2
        assert state["w"].tolist() == [2.0] * 3
        ckpts.save(3, W, block=True)
        ckpts.save(4, W, block=True)
        assert [c.step for c in ckpts.checkpoints()] == [1, 2, 4]
    check_store(LocalStorage(root))


def test_two_managers_in_one_process(tmp_path: Path) -> None:
    """The later claim wins: the earlier manager is fenced at its next save and has deleted nothing."""
    root = str(tmp_path / "run")
    first = CheckpointManager(root)
    first.save(1, W, block=True)
    with CheckpointManager(root) as second:
        second.save(2, W, block=True)
        with pytest.raises(FencedError, match="stop this process"):
            first.save(3, W, block=True)
        first.close()
        assert [c.step for c in second.checkpoints(state=None)] == [1, 2]
    check_store(LocalStorage(root))


def test_a_run_that_needs_more_is_read_and_never_written(tmp_path: Path) -> None:
    """An unknown name in requires refuses writing and deleting, not reading."""
    root = str(tmp_path / "run")
    saved(root, 1)
    place = Path(root, "manifest.json")
    needing_more(root)
    before = place.read_bytes()
    assert cloudckpt.open(root).load()["w"].tolist() == [1.0] * 3
    for act in (
        lambda: CheckpointManager(root).save(2, W),
        lambda: CheckpointManager(root).pin(1),
        lambda: cloudckpt.sweep(root, dry_run=False),
        lambda: cloudckpt.gc(root, dry_run=False),
    ):
        with pytest.raises(FormatError, match="needs shared-bytes"):
            act()
    assert place.read_bytes() == before


def test_metrics_that_are_no_numbers_are_never_best(caplog: pytest.LogCaptureFixture) -> None:
    """NaN and infinities are recorded, warned about, and never best; 0.0 is a metric like any other."""
    with CheckpointManager(MemoryStorage(), monitor="loss", mode="min", keep_last=None) as ckpts:
        for step, loss in enumerate([float("nan"), float("inf"), -float("inf"), 0.0]):
            ckpts.save(step, W, metrics={"loss": loss}, block=True)
        best = ckpts.best()
    assert best is not None
    assert best.step == 3
    assert len([r for r in caplog.records if "is never best" in r.getMessage()]) == 3


def needing_more(root: str) -> None:
    """Make a run name a feature that this version does not know."""
    place = Path(root, "manifest.json")
    rest, _ = place.read_bytes().rsplit(b',\n "digest": ', 1)  # of what it was
    place.write_bytes(rest.replace(b'"requires": []', b'"requires": [\n  "shared-bytes"\n ]') + b"\n}\n")


def test_a_run_that_needs_what_we_do_not_know_is_read_and_never_changed(tmp_path: Path) -> None:
    """An unknown feature in requires: reading works; save, edit, sweep, gc and repair refuse before anything is deleted."""
    root = str(tmp_path / "run")
    saved(root, 1, 2)
    cloudckpt.editing.remove(cloudckpt.tools.open_store(root), [1])
    needing_more(root)
    before = {p: p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}
    acts: list[Any] = [
        lambda: CheckpointManager(root).save(3, W),
        lambda: CheckpointManager(root).pin(2),
        lambda: cloudckpt.sweep(root, dry_run=False),
        lambda: cloudckpt.gc(root, dry_run=False),
        lambda: cloudckpt.repair(root, dry_run=False),
    ]
    for act in acts:
        with pytest.raises(FormatError, match="needs shared-bytes"):
            act()
    assert {p: p.read_bytes() for p in Path(root).rglob("*") if p.is_file()} == before
    assert torch.equal(cloudckpt.open(root).load(2)["w"], torch.full((3,), 2.0))


def test_repair_remembers_damage_and_a_person_releases(tmp_path: Path) -> None:
    """What was proven damaged stays damaged through a repair; what is held is given back by release()."""
    root = str(tmp_path / "run")
    saved(root, 1, 2, keep_last=None)
    payload = next(Path(root).glob("checkpoint-2.*/w-*.safetensors"))
    body = bytearray(payload.read_bytes())
    body[-1] ^= 1
    payload.write_bytes(body)
    with CheckpointManager(root) as ckpts:
        ckpts.restore({"w": torch.zeros(3)})
    cloudckpt.repair(root, dry_run=False)
    assert {c.step: (c.held, c.damaged is not None) for c in cloudckpt.open(root).checkpoints()} == {
        1: (True, False),
        2: (True, True),
    }
    with CheckpointManager(root) as ckpts:
        assert not ckpts.release(1).held
        latest = ckpts.latest()
        assert latest is not None
        assert latest.step == 1


def test_a_forked_child_may_use_the_storage_of_its_parent(tmp_path: Path) -> None:
    """A process forked after the storage was made takes a lock of its own."""
    storage = LocalStorage(tmp_path)
    assert isinstance(storage.create("manifest.json", b"1"), Landed)
    pid = os.fork()
    if pid == 0:
        answer = storage.create(".cloudckpt-probe-00000000", b"child")
        os._exit(0 if isinstance(answer, Landed) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / ".cloudckpt-probe-00000000").read_bytes() == b"child"


class _Silent(MemoryStorage):
    """A store that answers nothing for now."""

    def read(self, key: str, *, limit_bytes: int) -> Versioned:
        raise StorageError(f"{self.url}/{key}: no answer", retryable=True)

    def list(self, prefix: str = "", *, limit: int | None = None) -> Iterator[Listed]:
        raise StorageError(f"{self.url}/{prefix}: no answer", retryable=True)


def _exported(root: Storage, *, settings: Settings) -> None:
    cloudckpt.export(root, to="torch", path="never-made.pt", settings=settings)


def _imported(root: Storage, *, settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "trainer.json").write_text("{}")
        cloudckpt.import_folder(place, root, step=1, settings=settings)


def _listed(root: Storage, *, settings: Settings) -> None:
    cloudckpt.open(root, settings=settings).checkpoints()


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        *((tool, ()) for tool in (cloudckpt.sweep, cloudckpt.gc, cloudckpt.repair, cloudckpt.verify, cloudckpt.pull)),
        (cloudckpt.copy, ("latest", MemoryStorage("memory://target"))),
        (cloudckpt.diff, (1, 2)),
        (cloudckpt.runs, ()),
        (_exported, ()),
        (_imported, ()),
        (_listed, ()),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_"),
)
def test_every_tool_asks_a_silent_store_as_long_as_it_is_told_to(
    tool: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    """``settings=`` of each function of a root holds for its requests, and the error says how long that was."""
    with pytest.raises(StorageError, match=r"no answer \(tried again for 0\.01 s\)"):
        tool(_Silent(), *arguments, settings=Settings(storage_deadline_s=0.01, retry_base_s=1e-3))


def test_a_pulled_folder_is_read_with_the_settings_of_its_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``import_folder`` reads two places, and ``settings=`` holds for the one that is imported as well."""
    with CheckpointManager(run := MemoryStorage()) as ckpts:
        ckpts.save(1, {"w": torch.zeros(1)}, block=True)
    pulled = cloudckpt.pull(run, "latest", tmp_path)
    monkeypatch.setattr(PulledFolder, "read", _Silent.read)
    with pytest.raises(StorageError, match=r"no answer \(tried again for 0\.01 s\)"):
        cloudckpt.import_folder(
            pulled.folder, MemoryStorage(), settings=Settings(storage_deadline_s=0.01, retry_base_s=1e-3)
        )


@pytest.mark.parametrize("given", ["x", {"secret": "do-not-show"}, {}, 5], ids=repr)
@pytest.mark.parametrize(
    "call",
    [cloudckpt.runs, cloudckpt.open, CheckpointManager, ManifestStore, PreemptionGuard],
    ids=lambda c: c.__name__,
)
def test_settings_that_are_none_are_refused(call: Any, given: object) -> None:
    """Every function that takes ``settings=`` says what was given and what to write, and shows no value."""
    arguments = () if call is PreemptionGuard else (MemoryStorage(),)
    with pytest.raises(
        ConfigError, match=rf"given a {type(given).__name__}: write settings=cloudckpt\.Settings\("
    ) as said:
        call(*arguments, settings=given)
    assert "do-not-show" not in str(said.value)
