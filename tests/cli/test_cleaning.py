"""prune, gc, rm, and the labels: what is shown first is what is done.

(Past 350 lines: the commands that delete share the runs that they are tried on.)
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cloudckpt
from cloudckpt import CheckpointManager, editing
from cloudckpt.collecting import collect_garbage, remove_checkpoints
from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.model import Checkpoint, State
from cloudckpt.core.policy import PolicyWords
from cloudckpt.errors import ConfigError, StorageError
from cloudckpt.storage import LocalStorage, ManifestStore, MemoryStorage, Storage
from cloudckpt.testing import check_store
from cloudckpt.testing.servers import MotoServer
from cloudckpt.tools import open_store


def steps(run: str | Path) -> list[int]:
    """The committed steps."""
    return [c.step for c in cloudckpt.open(str(run)).checkpoints()]


@pytest.fixture
def run(root: str, tmp_path: Path) -> str:
    """A run of one's own: steps 2 (best, tagged), 3 (pinned) and 4."""
    return str(shutil.copytree(root, tmp_path / "run"))


def test_prune_shows_first_and_retires_only_what_it_showed(cli: Any, run: str) -> None:
    """--dry-run and a missing --yes change nothing; --yes retires exactly that; bytes stay until gc."""
    preview = cli("prune", run, "--keep-best", "0", "--keep-last", "1", "--dry-run")
    assert preview.code == 0
    assert "would retire 1" in preview.out
    assert "nothing was changed" in preview.out
    planned = cli("prune", run, "--keep-best", "0", "--keep-last", "1", "--json").json
    assert planned["dry_run"] is True
    assert [d["checkpoint"]["step"] for d in planned["decisions"] if not d["keep"]] == [2]
    assert steps(run) == [2, 3, 4]
    # Nothing was shown, so nobody is asked, and nothing is done.
    assert cli("prune", run, "--keep-best", "0", "--keep-last", "1", "-q").out.startswith("checkpoint-2.")
    assert steps(run) == [2, 3, 4]
    done = cli("prune", run, "--keep-best", "0", "--keep-last", "1", "--yes", "-q")
    assert done.out.startswith("checkpoint-2.")
    assert steps(run) == [3, 4]
    assert [*Path(run).glob("checkpoint-2.*/model-*")]


def test_the_stored_policy_stays_as_it_is(cli: Any, run: str) -> None:
    """Numbers given to prune and gc rule once: the run's own policy is what it was."""
    cli("gc", run, "--keep-last", "1", "--keep-best", "0", "--yes")
    assert "policy: last 2, best 1 by loss (min)" in cli("ls", run).out


def test_gc_deletes_what_it_said(cli: Any, run: str) -> None:
    """What --dry-run lists goes, and nothing else: retired ones, and folders that no entry names; foreign files stay."""
    orphan = Path(run) / "checkpoint-9.abcdef01" / "model-00000-of-00001.safetensors"
    orphan.parent.mkdir()
    orphan.write_bytes(b"orphan")
    (Path(run) / "notes.txt").write_text("mine")
    preview = cli("gc", run, "--keep-best", "0", "--keep-last", "1", "--dry-run")
    assert "delete" in preview.out
    assert "orphan  checkpoint-9.abcdef01/" in preview.out
    assert "foreign notes.txt" in preview.out
    planned = cli("gc", run, "--keep-best", "0", "--keep-last", "1", "--json").json
    before = {p.relative_to(run).as_posix() for p in Path(run).rglob("*") if p.is_file()}
    done = cli("gc", run, "--keep-best", "0", "--keep-last", "1", "--yes", "--json").json
    after = {p.relative_to(run).as_posix() for p in Path(run).rglob("*") if p.is_file()}
    assert set(planned["objects"]) == set(done["objects"]) == before - after
    assert (planned["dry_run"], done["dry_run"]) == (True, False)
    assert steps(run) == [3, 4]
    assert (Path(run) / "notes.txt").exists()
    again = cli("gc", run, "--yes")
    assert again.code == 0
    assert "nothing was changed" in again.out


def test_gc_takes_what_is_gone_already_for_done(cli: Any, run: str) -> None:
    """Objects that somebody deleted by hand are no failure: exit 0."""
    cli("prune", run, "--keep-best", "0", "--keep-last", "1", "--yes")
    shutil.rmtree(next(Path(run).glob("checkpoint-2.*")))
    done = cli("gc", run, "--yes")
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", [["gc", "--keep-best", "0", "--keep-last", "1"], ["rm", "2", "-r"]])
def test_a_clean_up_that_was_interrupted_is_finished_by_the_next(
    cli: Any, run: str, command: list[str], number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C or SIGTERM between two deletes: its own exit code, a run that can be read, and the next gc does the rest."""
    plain = LocalStorage.delete

    def interrupted(self: LocalStorage, keys: Iterable[str]) -> dict[str, StorageError]:
        asked = list(keys)
        failed = plain(self, asked)
        if any(key.startswith("checkpoint-") for key in asked):
            os.kill(os.getpid(), number)
        return failed

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "delete", interrupted)
        broken = cli(*command, run, "--yes")
    assert broken.code == code
    assert "Traceback" not in broken.err
    assert [*Path(run).glob("checkpoint-2.*")] != [], "it was in the middle"
    assert steps(run) == [3, 4]
    assert cli("verify", run).code == 0
    assert cli("gc", run, "--yes").code == 0
    assert [*Path(run).glob("checkpoint-2.*")] == []
    assert "nothing was changed" in cli("gc", run, "--yes").out


def test_rm_asks_and_refuses_what_is_precious(cli: Any, run: str) -> None:
    """Pinned ones and the last usable one need --force; a "no" changes nothing; --yes deletes the bytes."""
    pinned = cli("rm", "3", "-r", run, "--yes")
    assert (pinned.code, steps(run)) == (2, [2, 3, 4])
    assert "is pinned" in pinned.err
    last = cli("rm", "2", "3", "4", "-r", run, "--yes", "--force")
    assert last.code == 0
    assert steps(run) == []
    assert not [*Path(run).glob("checkpoint-*")]


def test_rm_of_the_last_one_needs_force(cli: Any, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing good is lost by a slip: what is usable and alone stays without --force, and a "no" is a no."""
    cli("unpin", "3", "-r", run)
    alone = cli("rm", "2", "3", "4", "-r", run, "--yes")
    assert alone.code == 2
    assert "would leave no usable checkpoint" in alone.err
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert "nothing was changed" in cli("rm", "4", "-r", run).out
    assert steps(run) == [2, 3, 4]
    assert cli("rm", "4", "-r", run, "--dry-run").code == 0
    assert steps(run) == [2, 3, 4]
    assert cli("rm", "99", "-r", run, "--yes").code == 4
    assert cli("rm", f"{run}#2", f"{run}-other#2", "--yes").code == 2


def test_labels(cli: Any, run: str) -> None:
    """Pin, tag, mark and their opposites; --dry-run of each changes nothing."""
    cli("pin", "4", "-r", run, "--dry-run")
    assert not cloudckpt.open(run).select(4).pinned
    assert cli("pin", "4", "-r", run).code == 0
    assert cloudckpt.open(run).select(4).pinned
    cli("unpin", "4", "-r", run)
    assert not cloudckpt.open(run).select(4).pinned
    assert cli("tag", "4", "a", "b", "-r", run, "-q").out.startswith(f"{run}/checkpoint-4.")
    cli("tag", "tag:a", "--remove", "a", "-r", run)
    assert cloudckpt.open(run).select(4).tags == ("b",)
    cli("mark", "4", "diverged", "-r", run)
    assert cli("latest", "--json", run).json["checkpoint"]["step"] == 3
    cli("mark", "4", "--clear", "-r", run)
    assert cli("latest", "--json", run).json["checkpoint"]["step"] == 4
    assert cli("tag", "4", "-r", run).code == 2
    assert cli("mark", "4", "-r", run).code == 2
    assert cli("mark", "4", "x", "--clear", "-r", run).code == 2


def test_a_save_in_flight_can_be_labelled_and_the_preview_knows_it(cli: Any, run: str) -> None:
    """A label of a step that is still being uploaded holds for it, and --dry-run says so; no run at all is exit 4."""
    store = open_store(run)
    entry = Checkpoint(
        id=store.token(8), step=5, seq=0, state=State.PENDING, writer_epoch=1, announced_at=store.clock()
    )
    store.transact(
        lambda m, _: transitions.announce(m, entry, writer_epoch=1, settlements={}, gone=(), at=store.clock()),
        prepare=lambda _: None,
    )
    planned = cli("pin", "5", "-r", run, "--dry-run", "--json").json
    assert (planned["checkpoint"]["id"], planned["checkpoint"]["pinned"]) == (entry.id, False)
    assert cli("pin", "5", "-r", run, "--json").json["checkpoint"]["pinned"] is True
    for also in ((), ("-n",)):
        assert cli("pin", "5", "-r", f"{run}-nowhere", *also).code == 4


def test_release_gives_a_repaired_checkpoint_back(cli: Any, run: str) -> None:
    """What repair holds is held until it is released."""
    (Path(run) / "manifest.json").unlink()
    cli("repair", run, "--yes")
    assert cloudckpt.open(run).select(4).held
    assert cli("release", "4", "-r", run).code == 0
    assert not cloudckpt.open(run).select(4).held


def _saved(storage: MemoryStorage, losses: list[float]) -> None:
    with CheckpointManager(storage, monitor="loss", mode="min", keep_last=None, keep_best=None) as ckpts:
        for step, loss in enumerate(losses):
            ckpts.save(step, {"w": torch.zeros(2)}, metrics={"loss": loss}, block=True)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    losses=st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=1, max_size=4),
    last=st.integers(1, 3),
    best=st.integers(0, 2),
    pinned=st.sets(st.integers(0, 3)),
    retired=st.booleans(),
    orphans=st.sets(st.integers(0, 2**32 - 1), max_size=2),
)
def test_the_preview_of_gc_is_what_gc_does(
    losses: list[float], last: int, best: int, pinned: set[int], *, retired: bool, orphans: set[int]
) -> None:
    """Whatever is in a run: the keys that a dry run names are those that go, and the run is sound afterwards.

    Copies of the manifest aside: each write may rotate them.
    """
    storage = MemoryStorage()
    _saved(storage, losses)
    store = ManifestStore(storage)
    for step in pinned & set(range(len(losses))):
        editing.pin(store, step)
    if retired and len(losses) > 1:
        editing.remove(store, [0])
    for number in orphans:
        storage.put(keys.payload_key(9, f"{number:08x}", keys.payload_name("m", 0, 1)), [b"x"], size_bytes=1)
    words = PolicyWords(keep_last=last, keep_best=best)
    before = {item.key for item in storage.list("")}
    preview = collect_garbage(store, words=words, dry_run=True)
    assert {item.key for item in storage.list("")} == before
    done = collect_garbage(store, words=words, dry_run=False)
    after = {item.key for item in storage.list("")}
    gone = {key for key in before - after if keys.parse(key).kind is not keys.Kind.COPY}
    assert gone == {key for key in preview.keys if keys.parse(key).kind is not keys.Kind.COPY}
    assert [d.checkpoint.id for d in preview.plan.decisions if not d.keep] == [
        d.checkpoint.id for d in done.plan.decisions if not d.keep
    ]
    check_store(storage)


def _files(run: Path) -> set[str]:
    """What lies in a run; copies of the manifest aside, because each write of it may rotate them."""
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    return {key for key in found if keys.parse(key).kind is not keys.Kind.COPY}


def _told(document: Any) -> dict[str, Any]:
    """What a document of gc says that goes, and what stays."""
    return {
        "retired by the rules": [d["checkpoint"]["id"] for d in document["decisions"] if not d["keep"]],
        "kept": [d["checkpoint"]["id"] for d in document["decisions"] if d["keep"]],
        "retired": {checkpoint["id"] for checkpoint in document["retired"]},
        "objects": {key for key in document["objects"] if keys.parse(key).kind is not keys.Kind.COPY},
        "foreign": document["foreign"],
        "uploads": document["aborted_uploads"],
        "failed": document["failed"],
    }


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    losses=st.lists(st.sampled_from([0.1, 0.2, 0.3, math.nan]), min_size=1, max_size=4),
    numbers=st.fixed_dictionaries(
        {},
        optional={
            "--keep-last": st.integers(1, 3),
            "--keep-best": st.integers(0, 2),
            "--keep-every": st.integers(1, 3),
        },
    ),
    pinned=st.sets(st.integers(0, 3)),
    marked=st.sets(st.integers(0, 3)),
    pruned=st.booleans(),
    strangers=st.sets(st.sampled_from(["checkpoint-9.0a1b2c3d/m-00000-of-00001.safetensors", "notes.txt"])),
)
def test_gc_yes_does_what_gc_dry_run_said(
    cli: Any,
    tmp_path: Path,
    losses: list[float],
    numbers: dict[str, int],
    pinned: set[int],
    marked: set[int],
    *,
    pruned: bool,
    strangers: set[str],
) -> None:
    """As commands, whatever is in a run and whatever numbers are given: one document is the other, and the disk agrees."""
    run = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
    with CheckpointManager(str(run), monitor="loss", mode="min", keep_last=None, keep_best=1) as ckpts:
        for step, loss in enumerate(losses):
            ckpts.save(step, {"w": torch.zeros(2)}, metrics={"loss": loss}, block=True)
        for step in sorted(pinned & set(range(len(losses)))):
            ckpts.pin(step)
        for step in sorted(marked & set(range(len(losses)))):
            ckpts.mark(step, "diverged")
    if pruned:
        assert cli("prune", str(run), "--keep-last", "1", "--yes", "-q").code == 0
    for stranger in strangers:
        (run / stranger).parent.mkdir(exist_ok=True)
        (run / stranger).write_bytes(b"x")
    words = [word for name, value in numbers.items() for word in (name, str(value))]
    before = _files(run)
    planned = cli("gc", str(run), *words, "--dry-run", "--json")
    assert (planned.code, _files(run)) == (0, before)
    done = cli("gc", str(run), *words, "--yes", "--json")
    assert done.code == 0
    assert _told(done.json) == _told(planned.json)
    assert before - _files(run) == _told(planned.json)["objects"]
    assert _told(cli("gc", str(run), *words, "--dry-run", "--json").json)["objects"] == set()
    check_store(open_store(str(run)).storage)


def test_numbers_without_a_metric_are_refused(cli: Any, tmp_path: Path) -> None:
    """--keep-best of a run without a monitor needs --metric and --mode; with them it ranks by that metric."""
    run = str(tmp_path / "plain")
    with CheckpointManager(run, keep_last=None) as ckpts:
        for step, acc in enumerate([0.9, 0.1, 0.2]):
            ckpts.save(step, {"w": torch.zeros(1)}, metrics={"acc": acc}, block=True)
    refused = cli("prune", run, "--keep-best", "1", "--keep-last", "1", "-n")
    assert refused.code == 2
    assert "needs to know the metric" in refused.err
    arguments = ["--keep-best", "1", "--keep-last", "1", "--metric", "acc", "--mode", "max"]
    kept = [d for d in cli("prune", run, *arguments, "--json").json["decisions"] if d["keep"]]
    assert [d["checkpoint"]["step"] for d in kept] == [0, 2]


def test_removing_needs_a_selector_that_means_something() -> None:
    """One selector that means nothing, and none is removed."""
    storage = MemoryStorage()
    _saved(storage, [0.1, 0.2, 0.3])
    store = ManifestStore(storage)
    with pytest.raises(cloudckpt.CheckpointNotFoundError):
        remove_checkpoints(store, [0, 77])
    with pytest.raises(ConfigError, match="would leave no usable checkpoint of 3"):
        remove_checkpoints(store, [0, 1, 2])
    assert [c.step for c in remove_checkpoints(store, ["best"]).checkpoints] == [0]
    assert [c.step for c in cloudckpt.open(storage).checkpoints()] == [1, 2]


def test_unfinished_uploads_are_counted_before_and_aborted_after(
    new_storage: Callable[[str], Storage], s3_server: MotoServer
) -> None:
    """An upload that a dead process left is in the preview, and gone after gc; a foreign one is neither."""
    storage = new_storage("moto")
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"w": torch.zeros(2)}, block=True)
    client = s3_server.client()
    prefix = storage.url.removeprefix("s3://shared/")
    for key in ("checkpoint-9.0a1b2c3d/m-00000-of-00001.safetensors", "checkpoint-9.0a1b2c3d/mine.bin"):
        client.create_multipart_upload(Bucket="shared", Key=f"{prefix}/{key}")
    client.close()
    store = ManifestStore(storage)
    assert collect_garbage(store).swept.aborted_uploads == 1
    assert collect_garbage(store, dry_run=False).swept.aborted_uploads == 1
    assert collect_garbage(store).swept.aborted_uploads == 0
