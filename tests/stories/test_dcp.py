"""PyTorch's own ``dcp.save`` and ``dcp.load`` on a run, in one process.

(Past 350 lines: the two ends of one format, and what is done to it in between.)
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, SavePlanner

import cloudckpt
from cloudckpt import CheckpointManager, PerRank, TrainState
from cloudckpt.core import keys
from cloudckpt.core.index_json import decode_index, encode_index, index_digest
from cloudckpt.dcp import StorageReader, StorageWriter
from cloudckpt.storage import LocalStorage, MemoryStorage, Storage
from cloudckpt.testing.invariants import check_store

#: Any: the package imports its names without exporting them.
dcp: Any = torch.distributed.checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")


def trained(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer that has stepped."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    return model, optimizer


def values(seed: int) -> dict[str, Any]:
    """What a state holds besides modules: nested, of many types, with tensors and arrays inside."""
    return {
        "step": 7 + seed,
        "note": ("a", {"b": torch.arange(3) + seed}, {1, 2}),
        "table": {"rows": np.arange(5.0) + seed, "half": torch.full((3, 2), 1.5 + seed, dtype=torch.bfloat16)},
        "deep": {"list": [torch.ones(2) * seed, {"x": None, "y": float("inf")}], "dtype": torch.float16},
    }


def same(one: Any, two: Any) -> bool:
    """Equal all the way down, in type as well."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return bool(one.dtype == two.dtype and np.array_equal(one, two))
    if isinstance(one, dict):
        return [*one] == [*two] and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


@contextlib.contextmanager
def refused(kind: type[Exception], match: str) -> Iterator[None]:
    """DCP gives the error of a rank inside of its own."""
    with pytest.raises(CheckpointException) as caught:
        yield
    ((error, _),) = caught.value.failures.values()
    assert isinstance(error, kind), error
    assert match in str(error)


@pytest.mark.parametrize("kind", ["memory", "local", "moto"])
def test_what_is_saved_is_loaded_again(new_storage: Callable[[str], Storage], kind: str) -> None:
    """Modules, optimizers and plain values come back exactly, through DCP; what is there is a checkpoint like any other."""
    storage = new_storage(kind)
    model, optimizer = trained(1)
    writer = StorageWriter(storage, step=500, metrics={"loss": 0.25}, tags=["first"], pin=True)
    dcp.save({"model": model, "optimizer": optimizer, **values(1)}, storage_writer=writer)
    (found,) = cloudckpt.open(storage).checkpoints()
    assert writer.checkpoint == found
    assert (found.step, found.metrics, found.tags, found.pinned) == (500, {"loss": 0.25}, ("first",), True)
    check_store(storage)
    assert cloudckpt.verify(storage, deep=True).findings == ()

    fresh, other = trained(2)
    state = {"model": fresh, "optimizer": other, **values(2)}
    reader = StorageReader(storage)
    dcp.load(state, storage_reader=reader)
    assert reader.checkpoint == found
    assert same(fresh.state_dict(), model.state_dict())
    assert same(other.state_dict(), optimizer.state_dict())
    assert same({name: state[name] for name in values(1)}, values(1))
    assert same({name: cloudckpt.open(storage).load()[name] for name in values(1)}, values(1))


def test_a_manager_restores_what_dcp_saved_and_the_other_way_round(memory_storage: MemoryStorage) -> None:
    """One format: either side reads the other's checkpoints, with the optimizer's state under the parameters' names."""
    model, optimizer = trained(1)
    dcp.save(TrainState(model, optimizer, extra=values(1)), storage_writer=StorageWriter(memory_storage, step=1))
    fresh, other = trained(2)
    state = TrainState(fresh, other, extra=values(2))
    with CheckpointManager(memory_storage) as ckpts:
        resumed = ckpts.restore(state)
        assert resumed is not None
        assert resumed.step == 1
        assert same(fresh.state_dict(), model.state_dict())
        assert same(other.state_dict(), optimizer.state_dict())
        assert same(state["extra"], values(1))
        trained_on, stepped = trained(3)
        ckpts.save(2, TrainState(trained_on, stepped, extra=values(3), rng=PerRank({"seed": 3}))).wait()
    again, last = trained(4)
    loaded = TrainState(again, last, extra=values(4))
    dcp.load(loaded, storage_reader=StorageReader(memory_storage))
    assert same(again.state_dict(), trained_on.state_dict())
    assert same(last.state_dict(), stepped.state_dict())
    assert same(loaded["extra"], values(3))


def test_selections_are_those_of_a_run(memory_storage: MemoryStorage) -> None:
    """Latest, best, a step, a tag and an id, given to the reader or as DCP's ``checkpoint_id``."""
    with CheckpointManager(memory_storage, monitor="loss", mode="min", keep_last=None) as ckpts:
        ckpts.save(0, {"x": torch.zeros(3)}, metrics={"loss": 9.0}).wait()
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.7)):
        writer = StorageWriter(memory_storage, step=step, metrics={"loss": loss}, tags=[f"t{step}"])
        dcp.save({"x": torch.full((3,), float(step))}, storage_writer=writer, checkpoint_id=str(step))
    assert writer.checkpoint is not None

    def loaded(select: str | int, **words: Any) -> float:
        state = {"x": torch.zeros(3)}
        dcp.load(state, storage_reader=StorageReader(memory_storage, select), **words)
        return state["x"][0].item()

    assert [loaded(select) for select in ("latest", "best", 1, "tag:t2", writer.checkpoint.id)] == [3, 2, 1, 2, 3]
    assert loaded("latest", checkpoint_id="best") == 2
    assert StorageReader.validate_checkpoint_id("best")
    assert not StorageReader.validate_checkpoint_id("no such thing")
    assert StorageWriter.validate_checkpoint_id("12")
    assert not StorageWriter.validate_checkpoint_id("./folder")
    with pytest.raises(cloudckpt.ConfigError, match="saves step 3"):
        writer.reset("4")


def test_the_policy_of_the_run_rules(memory_storage: MemoryStorage) -> None:
    """What the run keeps was said when it was made; what is not kept is deleted, and nothing is left over."""
    with CheckpointManager(memory_storage, monitor="loss", mode="min", keep_last=1, keep_best=1) as ckpts:
        ckpts.save(0, {"x": torch.zeros(3)}, metrics={"loss": 0.1}).wait()
    for step in (1, 2, 3):
        dcp.save(
            {"x": torch.ones(3)}, storage_writer=StorageWriter(memory_storage, step=step, metrics={"loss": 1.0 + step})
        )
        check_store(memory_storage)
    assert [c.step for c in cloudckpt.open(memory_storage).checkpoints()] == [0, 3]
    folders = {item.key.split("/")[0] for item in memory_storage.list() if "/" in item.key}
    assert len(folders) == 2
    owner = cloudckpt.open(memory_storage).manifest().owner
    assert owner is not None
    assert owner.closed


def test_a_models_own_state_dict_is_one_component(memory_storage: MemoryStorage) -> None:
    """With ``component=`` the whole state has a name, for writing and for reading; also of a manager's checkpoints."""
    model, _ = trained(1)
    dcp.save(model.state_dict(), storage_writer=StorageWriter(memory_storage, step=1, component="model"))
    assert same(cloudckpt.open(memory_storage).load(), {"model": dict(model.state_dict())})
    fresh, _ = trained(2)
    state = fresh.state_dict()
    dcp.load(state, storage_reader=StorageReader(memory_storage, component="model"))
    assert same(fresh.state_dict(), model.state_dict())
    with CheckpointManager(memory_storage) as ckpts:
        ckpts.save(2, {"model": fresh, "step": 3}).wait()
    dcp.load(state, storage_reader=StorageReader(memory_storage, component="model"))
    for component, match in (("none", "it has 'model', 'step'"), ("step", "no mapping")):
        with pytest.raises(cloudckpt.ConfigError, match=match):
            StorageReader(memory_storage, component=component).read_metadata()
    told: list[Any] = []
    state = {f"layer{number}": torch.ones(1) for number in range(20)}
    dcp.save(state, storage_writer=StorageWriter(memory_storage, step=3, listeners=[told.append]))
    assert any('component="model"' in getattr(event, "message", "") for event in told)


def test_tensors_are_read_into_their_own_memory_or_converted(memory_storage: MemoryStorage) -> None:
    """The same memory before and after; other dtypes and strides get the values, and autograd sees the change."""
    stored = torch.arange(12.0).reshape(3, 4)
    dcp.save({"a": stored, "b": stored, "c": stored}, storage_writer=StorageWriter(memory_storage, step=1))
    plain, turned = torch.zeros(3, 4), torch.zeros(4, 3).t()
    before, version = plain.data_ptr(), plain._version
    state = {"a": plain, "b": turned, "c": torch.zeros(3, 4, dtype=torch.float64)}
    dcp.load(state, storage_reader=StorageReader(memory_storage))
    assert state["a"] is plain
    assert plain.data_ptr() == before
    assert plain._version > version
    assert torch.equal(plain, stored)
    assert torch.equal(turned, stored)
    assert torch.equal(state["c"], stored.double())


def test_async_save_commits_in_the_background(tmp_path: Path) -> None:
    """What is saved is the state at the call, whatever becomes of it afterwards."""
    state: dict[str, Any] = {"x": torch.ones(1000), "step": 1}
    future = dcp.async_save(state, storage_writer=StorageWriter(tmp_path / "run", step=1))
    state["x"].zero_()
    getattr(future, "upload_completion", future).result()
    assert cloudckpt.open(tmp_path / "run").load()["x"].tolist() == [1.0] * 1000


def test_nothing_is_pickled(memory_storage: MemoryStorage) -> None:
    """The planner is never asked for pickled bytes, and there are only the index, safetensors and the manifest."""

    class Refusing(DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:  # noqa: A002 - torch's name
            assert isinstance(object, torch.Tensor)
            return object

    dcp.save(values(1), storage_writer=StorageWriter(memory_storage, step=1), planner=Refusing())
    names = {item.key.rsplit(".", 1)[-1] for item in memory_storage.list()}
    assert names == {"json", "safetensors"}
    assert all(b"PK\x03\x04" not in memory_storage.read(i.key, limit_bytes=10**6).body for i in memory_storage.list())


class Own:
    """Something that only pickle can store."""

    def __init__(self, number: int) -> None:
        self.number = number


def test_what_cannot_be_stored_is_refused_by_its_path_or_pickled_with_permission(memory_storage: MemoryStorage) -> None:
    """A foreign object needs ``allow_pickle=True`` twice; a failed save leaves nothing visible, and the next one works."""
    for bad, match in ((Own(1), "deep[0].inner: a "), (PerRank(1), "PerRank() is a CheckpointManager's")):
        with refused(TypeError, match):
            dcp.save({"deep": [{"inner": bad}]}, storage_writer=StorageWriter(memory_storage, step=1))
        assert cloudckpt.open(memory_storage).checkpoints() == ()
    state = {"deep": {"inner": Own(5)}, "x": torch.ones(2)}
    dcp.save(state, storage_writer=StorageWriter(memory_storage, step=2, allow_pickle=True))
    check_store(memory_storage)
    with pytest.raises(cloudckpt.ConfigError, match="allow_pickle=True"):
        StorageReader(memory_storage).read_metadata()
    state["deep"] = {"inner": None}
    dcp.load(state, storage_reader=StorageReader(memory_storage, allow_pickle=True))
    assert state["deep"]["inner"].number == 5  # type: ignore[index]  # a plain dict
    assert [c.step for c in cloudckpt.open(memory_storage).checkpoints(state=None)] == [2]


class Foreign(SavePlanner):
    """A planner that can only give its values pickled."""

    def __init__(self) -> None:
        self._own = DefaultSavePlanner()

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self._own.set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> Any:
        return self._own.create_local_plan()

    def create_global_plan(self, all_plans: Any) -> Any:
        return self._own.create_global_plan(all_plans)

    def finish_plan(self, new_plan: Any) -> Any:
        return self._own.finish_plan(new_plan)

    def resolve_data(self, write_item: Any) -> Any:
        return self._own.resolve_data(write_item)


def test_a_planner_that_pickles_is_refused_unless_it_may(memory_storage: MemoryStorage) -> None:
    """Its tensors are no problem; its other values need ``allow_pickle=True``, and are not stored pickled even then."""
    state = {"x": torch.ones(2), "options": {"lr": 0.1}}
    with refused(TypeError, "Foreign has no lookup_object()"):
        dcp.save(state, storage_writer=StorageWriter(memory_storage, step=1), planner=Foreign())
    dcp.save(state, storage_writer=StorageWriter(memory_storage, step=2, allow_pickle=True), planner=Foreign())
    run = cloudckpt.open(memory_storage)
    assert run.load()["options"] == {"lr": 0.1}
    assert not run.index("latest").pickled


def test_a_planner_that_keeps_its_plan_is_refused(memory_storage: MemoryStorage) -> None:
    """DCP's class-level cache would send a save into the folder of another; without it everything works."""
    if "enable_plan_caching" not in DefaultSavePlanner.__init__.__code__.co_varnames:
        pytest.skip("this torch has no such cache")
    caches = [getattr(SavePlanner, name) for name in vars(SavePlanner) if name.startswith("_cached_")]
    try:
        planner = DefaultSavePlanner(enable_plan_caching=True)
        dcp.save({"x": torch.ones(2)}, storage_writer=StorageWriter(memory_storage, step=1), planner=planner)
        with refused(cloudckpt.ConfigError, "enable_plan_caching=True"):
            dcp.save({"x": torch.ones(2)}, storage_writer=StorageWriter(memory_storage, step=2), planner=planner)
    finally:
        for cache in caches:
            cache.clear()
    assert [c.step for c in cloudckpt.open(memory_storage).checkpoints()] == [1]


def test_data_of_a_planners_own_is_refused_before_anything_happens(memory_storage: MemoryStorage) -> None:
    """Only names and paths can be stored as JSON; nothing was claimed."""

    class Odd(DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            return replace(super().create_local_plan(), planner_data=Own(1))

    with refused(cloudckpt.ConfigError, "a Own, is no mapping of names to paths"):
        dcp.save({"x": torch.ones(2)}, storage_writer=StorageWriter(memory_storage, step=1), planner=Odd())
    assert [*memory_storage.list()] == []


@pytest.mark.parametrize(
    ("state", "match"),
    [({"..": torch.ones(1), "x" * 200: 1}, "cannot be used as a name"), ({"a": 1, "A": 2}, "differ only by case")],
)
def test_names_that_are_no_components_are_refused_before_anything_happens(
    memory_storage: MemoryStorage, state: dict[str, Any], match: str
) -> None:
    """Too long for a key, or the same on a disk that ignores case; nothing was claimed."""
    with refused(cloudckpt.ConfigError, match):
        dcp.save(state, storage_writer=StorageWriter(memory_storage, step=1))
    assert [*memory_storage.list()] == []


class Breaking(MemoryStorage):
    """Fails to put what has this in its key."""

    broken = ""

    def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
        if self.broken and self.broken in key:
            raise cloudckpt.StorageError(f"{key}: no space left")
        super().put(key, buffers, size_bytes=size_bytes, progress=progress)


@pytest.mark.parametrize("broken", [".safetensors", "checkpoint.json"])
@pytest.mark.parametrize("again", ["the same writer", "a new writer", "a manager"])
def test_a_failed_save_leaves_nothing_visible_and_the_next_one_settles_it(broken: str, again: str) -> None:
    """Whether the payload or the index cannot be put: nothing is committed, and whoever saves next cleans up."""
    storage = Breaking()
    state = {"x": torch.ones(100)}
    dcp.save(state, storage_writer=StorageWriter(storage, step=1))
    storage.broken = broken
    writer = StorageWriter(storage, step=2)
    with refused(cloudckpt.CloudCkptError, "no space left"):
        dcp.save(state, storage_writer=writer)
    assert [c.step for c in cloudckpt.open(storage).checkpoints()] == [1]
    storage.broken = ""
    if again == "a manager":
        with CheckpointManager(storage) as ckpts:
            ckpts.save(2, state).wait()
    else:
        dcp.save(state, storage_writer=writer if again == "the same writer" else StorageWriter(storage, step=2))
    check_store(storage, settled=True)
    assert [(c.step, c.state) for c in cloudckpt.open(storage).checkpoints(state=None)] == [
        (1, cloudckpt.State.COMMITTED),
        (2, cloudckpt.State.COMMITTED),
    ]


def test_a_writer_that_was_replaced_commits_nothing(memory_storage: MemoryStorage) -> None:
    """Another job claims the run while the payload is on its way: the save fails, and the run is the other's."""

    class Replaced(MemoryStorage):
        amid: Callable[[], None] | None = None

        def put(self, key: str, buffers: Any, *, size_bytes: int, progress: Any = None) -> None:
            super().put(key, buffers, size_bytes=size_bytes, progress=progress)
            act, self.amid = self.amid, None
            if act is not None:
                act()

    storage = Replaced()

    def claim() -> None:
        with CheckpointManager(storage) as ckpts:
            ckpts.save(9, {"x": torch.zeros(1)}).wait()

    storage.amid = claim
    with refused(cloudckpt.FencedError, "was replaced by writer 2"):
        dcp.save({"x": torch.ones(100)}, storage_writer=StorageWriter(storage, step=1))
    assert [c.step for c in cloudckpt.open(storage).checkpoints()] == [9]
    check_store(storage)


def _newest(storage: Storage) -> str:
    found = cloudckpt.open(storage).latest()
    assert found is not None
    return found.name


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    """One flipped byte of payload, or an index that is not the committed one: an error, and no silent fallback."""
    storage = LocalStorage(tmp_path / "run")
    for step in (1, 2):
        dcp.save({"x": torch.ones(100)}, storage_writer=StorageWriter(storage, step=step))
    path = tmp_path / "run" / _newest(storage) / "x-00000-of-00001.safetensors"
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)
    with refused(cloudckpt.CorruptCheckpointError, "checksum"):
        dcp.load({"x": torch.zeros(100)}, storage_reader=StorageReader(storage))
    index = path.with_name("checkpoint.json")
    index.write_bytes(index.read_bytes().replace(b'"float32"', b'"float64"'))
    with pytest.raises(cloudckpt.CorruptCheckpointError, match="not the index that was committed"):
        StorageReader(storage).read_metadata()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("structure", {"x": {"$tensor": "y"}}),
        ("structure", {"x": {"$pickle": "gASVAgAAAAAAAABLAS4="}}),
        ("structure", {"x": {"$nothing": 1}}),
        ("structure", {"a.b": 1, "a": {"b": 2}}),
        ("shape", [10**12]),
        ("dtype", "float63"),
    ],
)
def test_a_hostile_index_is_refused(memory_storage: MemoryStorage, field: str, value: Any) -> None:
    """What DCP would be told comes out of checked JSON: names that are not there, pickles, shapes that cannot be."""
    dcp.save({"x": torch.ones(100)}, storage_writer=StorageWriter(memory_storage, step=1))
    found = cloudckpt.open(memory_storage).latest()
    assert found is not None
    key = keys.index_key(found.step, found.id)
    index = decode_index(memory_storage.read(key, limit_bytes=10**6).body)
    if field == "structure":
        index = replace(index, structure=value)
    else:
        changed = {"dtype": value} if field == "dtype" else {"shape": tuple(value)}
        index = replace(index, tensors={"x": {"x": replace(index.tensors["x"]["x"], **changed)}})
    manifest = json.loads(memory_storage.read(keys.MANIFEST, limit_bytes=10**6).body)
    body = encode_index(index)
    memory_storage.put(key, [body], size_bytes=len(body))
    for entry in manifest["entries"]:
        entry["index_digest"] = index_digest(body)
    at = memory_storage.read(keys.MANIFEST, limit_bytes=10**6)
    memory_storage.replace(keys.MANIFEST, json.dumps(manifest).encode(), expecting=at.version)
    with pytest.raises(cloudckpt.CloudCkptError):
        StorageReader(memory_storage).read_metadata()


def test_the_metadata_is_what_dcp_expects(memory_storage: MemoryStorage) -> None:
    """Names, paths, chunks and values: what was told to the planner when it was saved, told again."""
    state = {"model": {"w": torch.ones(3, 2)}, "list": [torch.ones(1), {"k": 1}], "v": 1}
    saved = dcp.save(state, storage_writer=StorageWriter(memory_storage, step=1))
    read = StorageReader(memory_storage).read_metadata()
    assert {*read.state_dict_metadata} == {*saved.state_dict_metadata}
    assert read.planner_data == saved.planner_data
    assert read.storage_data == saved.storage_data
    assert MetadataIndex("model.w", [0, 0]) in read.storage_data
    assert pickle.loads(pickle.dumps(read)) == read  # DCP sends it between ranks


def test_a_state_that_does_not_fit_is_refused(memory_storage: MemoryStorage) -> None:
    """DCP's own words about a name that is not there and a shape that differs; parts of a checkpoint can be loaded."""
    dcp.save({"x": torch.ones(4), "y": 1}, storage_writer=StorageWriter(memory_storage, step=1))
    for state, match in (({"z": torch.ones(4)}, "Missing key"), ({"x": torch.ones(5)}, "ize mismatch")):
        with pytest.raises(CheckpointException, match=match):
            dcp.load(state, storage_reader=StorageReader(memory_storage))
    part: dict[str, Any] = {"y": 0}
    dcp.load(part, storage_reader=StorageReader(memory_storage))
    assert part == {"y": 1}


def test_a_run_that_is_not_there_is_not_found(memory_storage: MemoryStorage) -> None:
    """Nothing was saved, or nothing matches."""
    with pytest.raises(cloudckpt.CheckpointNotFoundError, match="holds no run"):
        StorageReader(memory_storage).read_metadata()
    dcp.save({"y": 1}, storage_writer=StorageWriter(memory_storage, step=1))
    with pytest.raises(cloudckpt.CheckpointNotFoundError):
        StorageReader(memory_storage, 5).read_metadata()
    with pytest.raises(cloudckpt.ConfigError, match="read no metadata"):
        StorageReader(memory_storage).prepare_local_plan(LoadPlan([]))


def test_arguments_are_checked_at_once(memory_storage: MemoryStorage) -> None:
    """A wrong step, metric, tag, component or selection fails where it is given."""
    for words in ({"step": -1}, {"step": 1, "metrics": {"loss": "low"}}, {"step": 1, "tags": [3]}):
        with pytest.raises((cloudckpt.ConfigError, TypeError)):
            StorageWriter(memory_storage, **words)
    with pytest.raises(cloudckpt.ConfigError, match="cannot be used as a name"):
        StorageWriter(memory_storage, step=1, component="")
    with pytest.raises(cloudckpt.ConfigError):
        StorageReader(memory_storage, "no such thing")


def test_tied_tensors_are_stored_once(memory_storage: MemoryStorage) -> None:
    """To DCP they are two; the payload has one, both names load, and the metadata says the same as when it was saved."""
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"model": {"embedding": weight, "head": weight, "turned": weight.t()}}
    saved = dcp.save(state, storage_writer=StorageWriter(memory_storage, step=1))
    index = cloudckpt.open(memory_storage).index("latest")
    assert {name: entry.alias_of for name, entry in index.tensors["model"].items()} == {
        "embedding": None,
        "head": "embedding",
        "turned": None,
    }
    fresh = {"model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()}}
    dcp.load(fresh, storage_reader=StorageReader(memory_storage))
    assert same(fresh, state)
    assert StorageReader(memory_storage).read_metadata().storage_data == saved.storage_data
    check_store(memory_storage)


def test_a_name_that_two_tensors_would_have_is_given_to_one(memory_storage: MemoryStorage) -> None:
    """A tensor inside of a tuple takes another name where its own is a neighbour's; both come back."""
    state = {"m": {"a": (torch.ones(2), 1), "a.0": torch.zeros(3)}}
    dcp.save(state, storage_writer=StorageWriter(memory_storage, step=1))
    assert same(cloudckpt.open(memory_storage).load(), state)


def test_a_checkpoint_that_is_let_go_while_it_is_read_is_not_damaged(memory_storage: MemoryStorage) -> None:
    """The run's policy has retired it between the choice and the reading: not found, instead of corrupt."""
    dcp.save({"x": torch.ones(4)}, storage_writer=StorageWriter(memory_storage, step=1))
    reader = StorageReader(memory_storage)
    metadata = reader.read_metadata()
    with CheckpointManager(memory_storage, keep_last=1) as ckpts:
        ckpts.save(2, {"x": torch.ones(4)}).wait()
    planner = DefaultLoadPlanner()
    planner.set_up_planner({"x": torch.zeros(4)}, metadata, is_coordinator=True)
    with pytest.raises(cloudckpt.CheckpointNotFoundError, match="was retired while it was being read"):
        reader.read_data(planner.create_local_plan(), planner)


def test_ranks_that_mean_different_roots_are_told_before_any_byte(new_storage: Callable[[str], Storage]) -> None:
    """The coordinator has announced a save in one bucket, and another rank would write to another."""
    writers = [StorageWriter(new_storage("moto"), step=1) for _ in range(2)]
    planner = DefaultSavePlanner()
    planner.set_up_planner({"x": torch.ones(4)}, is_coordinator=True)
    for writer, is_coordinator in zip(writers, (True, False), strict=True):
        writer.set_up_storage_writer(is_coordinator)
    plans, _ = planner.create_global_plan([planner.create_local_plan()])
    (plan,) = writers[0].prepare_global_plan(plans)
    with pytest.raises(cloudckpt.ConfigError, match=r"this rank saves to s3://.*, and the coordinator to s3://"):
        writers[1].write_data(plan, planner)
    with pytest.raises(cloudckpt.ConfigError, match="rank saves step 2, and the coordinator step 1"):
        other = StorageWriter(new_storage("memory"), step=2)
        other.set_up_storage_writer(is_coordinator=False)
        other.write_data(plan, planner)
    with pytest.raises(cloudckpt.ConfigError, match="use_collectives=False"):
        other.set_up_storage_writer(is_coordinator=True, rank=0, use_collectives=False)
    with pytest.raises(cloudckpt.ConfigError, match="does not hand on"):
        writers[0].write_data(replace(plan, storage_data=None), planner)


@pytest.mark.parametrize("steps", [0, 1])
def test_an_optimizers_own_numbers_are_put_back(memory_storage: MemoryStorage, steps: int) -> None:
    """DCP makes them text, and leaves an empty state out; a manager restores the very moments all the same."""
    model, optimizer = trained(1)
    if not steps:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    dcp.save(
        {"model": model, "deep": {"optimizer": optimizer.state_dict()}},
        storage_writer=StorageWriter(memory_storage, step=1),
    )
    assert same(cloudckpt.open(memory_storage).load()["deep"], {"optimizer": optimizer.state_dict()})
    dcp.save({"model": model, "optimizer": optimizer}, storage_writer=StorageWriter(memory_storage, step=2))
    fresh, other = trained(2)
    with CheckpointManager(memory_storage) as ckpts:
        assert ckpts.restore({"model": fresh, "optimizer": other}) is not None
    assert same(other.state_dict(), optimizer.state_dict())
