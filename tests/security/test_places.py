"""Nothing that stands in a manifest or an index leads out of the run: no path, no URL, no name of another object."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cloudckpt
from cloudckpt import CheckpointManager, CorruptCheckpointError, FormatError
from cloudckpt.core import keys
from cloudckpt.storage import LocalStorage
from cloudckpt.testing import ScriptedStorage
from tests.security.hostile import Hostile, looked_at, resealed, state_of

#: What people write who want another object than one of this folder.
NAMES = [
    "../manifest.json",
    "../checkpoint-1.00000000/model-00000-of-00001.safetensors",
    "../../other/manifest.json",
    "..",
    ".",
    "",
    "/etc/passwd",
    "//etc/passwd",
    "C:\\windows\\win.ini",
    "..\\manifest.json",
    "model-00000-of-00001.safetensors/../checkpoint.json",
    "a/model-00000-of-00001.safetensors",
    "./model-00000-of-00001.safetensors",
    "model-00000-of-00001.safetensors\0.txt",
    "model-00000-of-00001.safetensors\n",
    "model%2F..%2Fmanifest.json",
    "..%2F-00000-of-00001.safetensors",
    "s3://other-bucket/model-00000-of-00001.safetensors",
    "file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data/",
    "checkpoint.json",
    ".model-00000-of-00001.safetensors.tmp",
    "~/model-00000-of-00001.safetensors",
    "$HOME/model-00000-of-00001.safetensors",
    "\uff4dodel/../x-00000-of-00001.safetensors",
    "model-00000-of-00001.safetensors" + "x" * 5000,
]

#: Where a manifest names things.
FIELDS: dict[str, Callable[[dict[str, Any], Any], object]] = {
    "an entry's id": lambda m, name: m["entries"][-1].update(id=name),
    "an entry's step": lambda m, name: m["entries"][-1].update(step=name),
    "an entry's digest": lambda m, name: m["entries"][-1].update(index_digest=name),
    "what was resumed from": lambda m, name: m.update(resumed_from=name),
    "a copy's revision": lambda m, name: m.update(copies=[name]),
    "the run's id": lambda m, name: m.update(run_id=name),
    "the writer": lambda m, name: m["owner"].update(token=name),
    "a best id": lambda m, name: m.update(best=[{"metric": "loss", "mode": "min", "ids": [name]}]),
    "a recent id": lambda m, name: m.update(recent=[name]),
    "a journal's id": lambda m, name: m["journal"][-1].update(id=name),
}


@pytest.fixture
def run(tmp_path: Path) -> Hostile:
    """A run to be made hostile, beside things that are not its own."""
    (tmp_path / "precious.txt").write_text("mine")
    other = tmp_path / "other"
    with CheckpointManager(other) as ckpts:
        ckpts.save(1, state_of(1), block=True)
    return Hostile(tmp_path / "run")


def everything_outside(run: Hostile) -> dict[Path, bytes]:
    """Every file beside the run."""
    around = run.root.parent
    return {p: p.read_bytes() for p in around.rglob("*") if p.is_file() and not p.is_relative_to(run.root)}


def looked_at_from_inside(run: Hostile) -> dict[str, object]:
    """Everything that can be done, under a storage that keeps a log; no key in the log may lead anywhere else."""
    before = everything_outside(run)
    scripted = ScriptedStorage(LocalStorage(run.root))
    given = dict(looked_at(scripted, also_write=True))
    assert everything_outside(run) == before
    asked = scripted.keys_of("read", "create", "replace", "put", "read_into", "size", "delete")
    foreign = [key for key in asked if keys.parse(key).kind is keys.Kind.FOREIGN]
    assert foreign == [], "a key outside of the grammar was asked for (I12)"
    return given


@pytest.mark.parametrize("name", NAMES)
def test_an_index_names_no_object_but_its_own(run: Hostile, name: str) -> None:
    """As an object, and in the chunks that lie in it: the index is damage, and nothing outside is read or deleted."""
    index = run.index
    was = index["objects"][0]["name"]
    index["objects"][0]["name"] = name
    for tensors in index["tensors"].values():
        for tensor in tensors.values():
            for chunk in tensor.get("chunks", ()):
                chunk["object"] = name if chunk["object"] == was else chunk["object"]
    run.put_index(index)
    given = looked_at_from_inside(run)
    assert isinstance(given["load"], CorruptCheckpointError | FormatError)
    assert isinstance(given["index"], CorruptCheckpointError | FormatError)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", ["../other", "/etc", "s3://bucket/run", "..", "a/b", "\0", -1, 1.5, {"$path": "x"}])
def test_a_manifest_names_no_place(run: Hostile, field: str, name: Any) -> None:
    """Ids are eight hex digits, steps and revisions are numbers: anything else makes the manifest unreadable."""
    manifest = run.manifest
    FIELDS[field](manifest, name)
    run.put_manifest(manifest)
    given = looked_at_from_inside(run)
    assert isinstance(given["checkpoints"], FormatError)
    assert isinstance(given["train"], FormatError)
    assert not isinstance(given["repair"], FormatError), given["repair"]  # the way out


@pytest.mark.parametrize("place", ["manifest", "entry", "index"])
@pytest.mark.parametrize("field", ["root", "url", "path", "base_url", "storage_options", "endpoint_url"])
def test_a_url_in_a_document_is_just_an_unknown_field(run: Hostile, place: str, field: str) -> None:
    """A run lies where it was found (L13): no field of any document changes where anything is read or written."""
    foreign = f"file://{run.root.parent / 'other'}"
    if place == "index":
        index = run.index
        index[field] = foreign
        run.put_index(index)
    else:
        manifest = run.manifest
        (manifest if place == "manifest" else manifest["entries"][-1])[field] = foreign
        run.put_manifest(manifest)
    given = looked_at_from_inside(run)
    assert isinstance(given["load"], dict), given["load"]
    assert cloudckpt.open(run.root).select(2).url == f"{run.root}/{run.folder.name}"


def test_a_committed_entry_that_points_at_another_folder_is_damage(run: Hostile) -> None:
    """An entry may be given the id and digest of a checkpoint of this run, and still not another's step."""
    manifest = run.manifest
    first, second = manifest["entries"]
    second.update(id="0badc0de", index_digest=first["index_digest"])
    run.put_manifest(manifest)
    folder = run.root / cloudckpt.open(run.root).select(1).name
    folder.rename(run.root / "checkpoint-2.0badc0de")
    with pytest.raises(CorruptCheckpointError, match="describes checkpoint-1"):
        cloudckpt.open(run.root).load(2)


def test_a_retired_entry_deletes_its_own_folder_and_no_other(run: Hostile) -> None:
    """Whatever names an index of a retired entry lists: what is deleted lies in the folder that the entry spells."""
    index = run.index
    for name in ("../manifest.json", "model-00000-of-00001.safetensors/../../precious.txt"):
        hostile = copy.deepcopy(index)
        hostile["objects"][0]["name"] = name
        (run.folder / "checkpoint.json").write_bytes(resealed(hostile))
        manifest = run.manifest
        manifest["entries"][-1].update(state="retired", retired_because="by a stranger")
        run.put_manifest(manifest)
        before = everything_outside(run)
        scripted = ScriptedStorage(LocalStorage(run.root))
        cloudckpt.sweep(scripted, dry_run=False)
        assert everything_outside(run) == before
        assert all(key.startswith(f"{run.folder.name}/") for key in scripted.keys_of("delete"))
        assert (run.root / "manifest.json").exists()
        assert not run.folder.exists()
        run = Hostile(run.root.parent / f"again-{len(name)}")
        index = run.index


@pytest.mark.parametrize("link", ["checkpoint-3.0badc0de", "checkpoint-3.0badc0de/model-00000-of-00001.safetensors"])
def test_gc_follows_no_link_out_of_the_run(run: Hostile, link: str) -> None:
    """A link to a folder is one foreign key; of a link to a file, the link is what goes."""
    target = run.root.parent / ("other" if "/" not in link else "precious.txt")
    (run.root / link).parent.mkdir(exist_ok=True)
    (run.root / link).symlink_to(target)
    before = everything_outside(run)
    cloudckpt.gc(run.root, dry_run=False)
    assert everything_outside(run) == before


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_this_list_is_a_payload_objects(name: str) -> None:
    """The grammar itself: none of them is a name inside a folder, and as a key each is foreign or no payload."""
    assert not keys.is_payload_name(name)
    key = keys.parse(f"checkpoint-1.00000000/{name}")
    assert key.kind in {keys.Kind.FOREIGN, keys.Kind.INDEX, keys.Kind.TEMPORARY}


def test_the_documents_hold_no_place_of_their_own(run: Hostile) -> None:
    """What we write names neither the root nor the machine's folders: a run can be moved as it is."""
    for path in run.root.rglob("*.json"):
        text = path.read_text()
        assert str(run.root) not in text
        assert str(Path.home()) not in text or str(Path.home()) == "/"
        json.loads(text)


def test_nothing_is_written_where_everybody_may_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run on a local disk leaves nothing in the system's temporary folder, at no moment: it does not use it."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = temporary.stat().st_mtime_ns
    with CheckpointManager(tmp_path / "run", keep_last=1) as ckpts:
        for step in (1, 2):
            ckpts.save(step, state_of(step), block=True)
        ckpts.restore(state_of(0))
    cloudckpt.gc(tmp_path / "run", dry_run=False)
    assert [*temporary.iterdir()] == []
    assert temporary.stat().st_mtime_ns == before, "something was there for a while"


@pytest.mark.parametrize("mask", [0o077, 0o027])
def test_a_run_is_as_closed_as_its_owner_wants_it(tmp_path: Path, mask: int) -> None:
    """Under the user's umask no file or folder of a run, temporary ones and the lock included, lets others in."""
    before = os.umask(mask)
    try:
        with CheckpointManager(tmp_path / "run", keep_last=1) as ckpts:
            for step in (1, 2):
                ckpts.save(step, state_of(step), block=True)
        cloudckpt.gc(tmp_path / "run", dry_run=False)
    finally:
        os.umask(before)
    places = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(places) > 4
    assert [place for place in places if place.stat().st_mode & mask] == []
