"""To other programs and back: safetensors, torch.save, Hugging Face, DCP; forgather, Trainer, Lightning, plain folders."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError, CorruptCheckpointError, FormatError
from cloudckpt.exporting import export_checkpoint
from cloudckpt.foreign import plan_import
from cloudckpt.importing import load_safetensors
from cloudckpt.progress import Meter
from cloudckpt.storage import ManifestStore, MemoryStorage, Storage

#: Any: the package imports its names without exporting them.
dcp: Any = torch.distributed.checkpoint


def state() -> dict[str, Any]:
    """A model, an optimizer that has stepped, and a plain value."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}


@pytest.fixture
def run() -> Storage:
    """A run with one checkpoint."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(10, state(), metrics={"loss": 0.5}, block=True)
    return storage


def same(one: Any, two: Any) -> bool:
    """Whether two trees of values are the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return isinstance(two, dict) and [*one] == [*two] and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def test_to_torch_and_back(run: Storage, tmp_path: Path) -> None:
    """One file that torch.load reads without pickle, with everything in it."""
    done = export_checkpoint(ManifestStore(run), "latest", to="torch", path=tmp_path / "all.pt")
    assert same(torch.load(done.path, weights_only=True), cloudckpt.open(run).load())
    assert [p.name for p in tmp_path.iterdir()] == ["all.pt"]


def test_to_safetensors(run: Storage, tmp_path: Path) -> None:
    """One file for each component that has tensors; the others are named as left out; all bytes are counted."""
    meter = Meter("exporting")
    done = export_checkpoint(ManifestStore(run), 10, to="safetensors", path=tmp_path / "out", meter=meter)
    assert meter.transfer.bytes_done == meter.transfer.bytes_total > 0
    assert done.left_out == ("epoch",)
    assert sorted(p.name for p in done.path.iterdir()) == ["model.safetensors", "optimizer.safetensors"]
    assert same(safetensors.torch.load_file(done.path / "model.safetensors")["weight"], state()["model"]["weight"])


def test_to_hugging_face(run: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model.safetensors; or shards with the index by which from_pretrained finds each tensor."""
    done = export_checkpoint(ManifestStore(run), 10, to="hf", path=tmp_path / "one")
    assert done.files == ("model.safetensors",)
    monkeypatch.setattr("cloudckpt.exporting._SHARD_BYTES", 20)
    shards = export_checkpoint(ManifestStore(run), 10, to="hf", path=tmp_path / "two").path
    document = json.loads((shards / "model.safetensors.index.json").read_text())
    assert len(set(document["weight_map"].values())) == 2
    for name, file in document["weight_map"].items():
        assert same(safetensors.torch.load_file(shards / file)[name], state()["model"][name])


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_to_dcp(run: Storage, tmp_path: Path) -> None:
    """A folder that plain ``dcp.load`` reads into a state of the same form."""
    done = export_checkpoint(ManifestStore(run), 10, to="dcp", path=tmp_path / "dcp", components=["model"])
    target = {"model": {name: torch.zeros_like(tensor) for name, tensor in state()["model"].items()}}
    dcp.load(target, checkpoint_id=str(done.path))
    assert same(target["model"], dict(state()["model"]))


def test_what_cannot_be_exported_is_refused_before_anything_is_written(run: Storage, tmp_path: Path) -> None:
    """No such format or component, a place that is taken, a component without tensors."""
    store = ManifestStore(run)
    (tmp_path / "taken").mkdir()
    for words, message in [
        ({"to": "onnx", "path": tmp_path / "x"}, "none of the formats"),
        ({"to": "torch", "path": tmp_path / "taken"}, "is there already"),
        ({"to": "torch", "path": tmp_path / "x", "components": ["nope"]}, "has no component 'nope'"),
        ({"to": "safetensors", "path": tmp_path / "x", "components": ["epoch"]}, "there are no tensors in it"),
        ({"to": "hf", "path": tmp_path / "x", "components": ["model", "optimizer"]}, "name one component"),
        ({"to": "torch", "path": tmp_path / "x", "components": []}, "names none"),
    ]:
        with pytest.raises(ConfigError, match=message):
            export_checkpoint(store, 10, **words)  # type: ignore[arg-type]  # a table of mistakes
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def hugging_face(folder: Path) -> Path:
    """A folder as the Trainer writes it."""
    place = folder / "checkpoint-500"
    place.mkdir(parents=True)
    whole = state()
    safetensors.torch.save_file(dict(whole["model"]), place / "model.safetensors", metadata={"format": "pt"})
    torch.save(whole["optimizer"], place / "optimizer.pt")
    torch.save({"last_epoch": 500, "_last_lr": [0.1]}, place / "scheduler.pt")
    history = [
        {"loss": 1.0, "step": 500},
        {"eval_loss": 0.25, "eval_runtime": 1.5, "step": 500},
        {"eval_loss": 9.0, "step": 250},
    ]
    (place / "trainer_state.json").write_text(json.dumps({"global_step": 500, "log_history": history}))
    (place / "training_args.bin").write_bytes(b"a pickle")
    (place / "config.json").write_text("{}")
    return place


def test_from_hugging_face(tmp_path: Path) -> None:
    """Weights, optimizer, scheduler and the Trainer's state become components; step and eval metrics come along."""
    there = MemoryStorage()
    done = cloudckpt.import_folder(hugging_face(tmp_path), there, tags=["old"])
    run = cloudckpt.open(there)
    found = run.select(500)
    assert found.metrics == {"eval_loss": 0.25, "eval_runtime": 1.5}
    assert found.tags == ("old",)
    assert run.manifest().policy.keep_last is None
    loaded = run.load()
    # In the order of the file, which the safetensors library chooses.
    assert sorted(loaded["model"]) == ["bias", "weight"]
    assert all(same(loaded["model"][name], tensor) for name, tensor in state()["model"].items())
    assert same(loaded["optimizer"], state()["optimizer"])
    assert loaded["trainer_state"]["global_step"] == 500
    assert done.plan.kind == "huggingface"
    assert set(done.plan.left_out) == {"training_args.bin", "config.json"}


def test_from_sharded_weights_beside_a_stale_copy(tmp_path: Path) -> None:
    """The shards that the index names are read, and the other copy of the weights is named as left out."""
    place = tmp_path / "checkpoint-7"
    place.mkdir()
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        safetensors.torch.save_file({name: tensor}, place / f"model-0000{number}-of-00002.safetensors")
    files = {name: f"model-0000{number}-of-00002.safetensors" for number, name in enumerate(tensors, 1)}
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    torch.save({"a": torch.full((2,), 9.0)}, place / "pytorch_model.bin")
    there = MemoryStorage()
    done = cloudckpt.import_folder(place, there)
    assert same(cloudckpt.open(there).load()["model"], tensors)
    assert "another copy of the weights" in done.plan.left_out["pytorch_model.bin"]


def test_from_forgather(tmp_path: Path) -> None:
    """Its state files become components, ranks included; eval_metrics.json becomes the metrics."""
    place = tmp_path / "checkpoints" / "checkpoint-25"
    place.mkdir(parents=True)
    safetensors.torch.save_file({"w": torch.ones(2)}, place / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(state()["optimizer"], place / "optimizer_state.pt")
    torch.save({"seed": 1}, place / "rng_state_rank_0.pt")
    torch.save({"seed": 2}, place / "rng_state_rank_1.pt")
    (place / "checkpoint_manifest.json").write_text("{}")
    (place / "eval_metrics.json").write_text(json.dumps({"loss": 2.5, "step": 25, "name": "x"}))
    there = MemoryStorage()
    cloudckpt.import_folder(place, there)
    run = cloudckpt.open(there)
    assert run.select(25).metrics == {"loss": 2.5}
    assert set(run.load()) == {"model", "optimizer", "rng_rank_0", "rng_rank_1"}


def test_from_lightning(tmp_path: Path) -> None:
    """state_dict becomes the model; step and the monitored metric are the file's own."""
    path = tmp_path / "epoch=0-step=32.ckpt"
    callback = {"monitor": "val_loss", "current_score": torch.tensor(0.5)}
    whole = {"state_dict": state()["model"], "optimizer_states": [state()["optimizer"]]}
    torch.save({**whole, "epoch": 0, "global_step": 33, "callbacks": {"ModelCheckpoint{}": callback}}, path)
    there = MemoryStorage()
    done = cloudckpt.import_folder(path, there)
    assert (done.checkpoint.step, done.checkpoint.metrics) == (32, {"val_loss": 0.5})
    assert same(dict(cloudckpt.open(there).load()["model"]), dict(state()["model"]))
    assert cloudckpt.import_folder(tmp_path, MemoryStorage(), step=40).checkpoint.step == 40


class Harmful:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("was-here"),))


def test_nothing_is_unpickled_unless_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that needs pickle is refused by name with both ways out; no code of it has run."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "checkpoint-1"
    place.mkdir()
    torch.save({"w": torch.ones(1)}, place / "model.pt")
    torch.save({"x": Harmful()}, place / "extra.pt")
    with pytest.raises(ConfigError, match=r"extra\.pt in .* allow_pickle=True .*--skip extra\.pt"):
        cloudckpt.import_folder(place, MemoryStorage())
    assert not Path("was-here").exists()
    there = MemoryStorage()
    cloudckpt.import_folder(place, there, skip=["ex*"])
    assert set(cloudckpt.open(there).load()) == {"model"}
    assert not Path("was-here").exists()


#: A job of one rank that saves a DTensor with torch alone.
DTENSOR_WRITER = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
folder = sys.argv[1]
dist.init_process_group("gloo", init_method=f"file://{folder}/../meeting", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
torch.save({"w": distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])}, f"{folder}/model.pt")
dist.destroy_process_group()
"""

#: What imports it, with nothing else of torch imported before.
DTENSOR_READER = """
import sys, cloudckpt
cloudckpt.import_folder(sys.argv[1], sys.argv[2], step=1)
assert cloudckpt.open(sys.argv[2]).load()["model"]["w"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
"""


@pytest.mark.processes
def test_a_file_with_dtensors_needs_no_pickle(tmp_path: Path) -> None:
    """Torch knows DTensors as harmless once their module is imported, which a process that only imports has not done."""
    place = tmp_path / "job"
    place.mkdir()
    for code, arguments in ((DTENSOR_WRITER, [place]), (DTENSOR_READER, [place, tmp_path / "run"])):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_a_class_that_is_not_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpickling may be allowed and still be impossible: whose class it is, and how to go on without it."""
    place = tmp_path / "checkpoint-1"
    place.mkdir()
    thing = type("Thing", (), {"__module__": "gone_by_then"})
    module = types.ModuleType("gone_by_then")
    vars(module)["Thing"] = thing
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gone_by_then", module)
        torch.save({"x": thing()}, place / "extra.pt")
    with pytest.raises(ConfigError, match=r"gone_by_then.*--skip extra\.pt"):
        cloudckpt.import_folder(place, MemoryStorage(), allow_pickle=True)


@pytest.mark.parametrize("kind", ["missing", "empty", "no step", "cut", "bad index", "twice"])
def test_what_cannot_be_imported_says_why(tmp_path: Path, kind: str) -> None:
    """Nothing there, no step, a file cut short, an index that names another folder: each by name, and no run is made."""
    place = tmp_path / ("folder" if kind == "no step" else "checkpoint-3")
    there = MemoryStorage()
    expected: tuple[type[Exception], str] = (ConfigError, "is no folder")
    if kind != "missing":
        place.mkdir()
        expected = (ConfigError, "holds nothing that can be imported")
    if kind in {"no step", "cut", "twice"}:
        torch.save({"w": torch.ones(1000)}, place / "model.pt")
        expected = (ConfigError, "does not tell its training step")
    if kind == "cut":
        (place / "model.pt").write_bytes((place / "model.pt").read_bytes()[:1000])
        expected = (CorruptCheckpointError, "probably cut short")
    if kind == "bad index":
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
        expected = (FormatError, "names no files beside it")
    if kind == "twice":
        torch.save({"w": torch.ones(1)}, place / "model.pth")
        expected = (ConfigError, "would both be the component 'model'")
    with pytest.raises(expected[0], match=expected[1]):
        cloudckpt.import_folder(place, there)
    assert not [*there.list("")]


def test_a_plan_tells_what_becomes_what(tmp_path: Path) -> None:
    """Before anything is read: kind, step, and each file's component."""
    plan = plan_import(hugging_face(tmp_path))
    assert (plan.kind, plan.step) == ("huggingface", 500)
    assert {part.component: part.files for part in plan.parts} == {
        "model": ("model.safetensors",),
        "optimizer": ("optimizer.pt",),
        "scheduler": ("scheduler.pt",),
        "trainer_state": ("trainer_state.json",),
    }


def test_safetensors_of_every_dtype_are_read(tmp_path: Path) -> None:
    """What the library writes is what is read, bit for bit: scalars, empty ones, every dtype that both know."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8, torch.bool]
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 5)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    loaded = load_safetensors(tmp_path / "x.safetensors")
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    (tmp_path / "y.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"y\.safetensors"):
        load_safetensors(tmp_path / "y.safetensors")
