"""What is loaded is what was saved: every dtype, every shape, every kind of state, bit for bit."""

from __future__ import annotations

import os
from collections import OrderedDict, namedtuple
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError
from cloudckpt.storage import MemoryStorage
from cloudckpt.tensors.memory import byte_view

QUANTISED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)} - QUANTISED, key=str)
Point = namedtuple("Point", "x y")  # noqa: PYI024 - its being a tuple is the point


class Colour(Enum):
    """An enum that is stored by value."""

    RED = "red"


def arbitrary_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every byte value occurs, NaN payloads and all."""
    count = int(np.prod(shape)) if shape else 1
    raw = (torch.arange(count * dtype.itemsize) * 37 % 251).to(torch.uint8)
    if dtype is torch.bool:
        raw = raw % 2
    return raw.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, row by row."""
    return bytes(byte_view(tensor.contiguous())) if tensor.numel() else b""


def round_trip(state: dict[str, Any]) -> dict[str, Any]:
    """Saved and loaded again."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state, block=True)
    return cloudckpt.open(storage).load("latest")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_every_bit(dtype: torch.dtype) -> None:
    """Any dtype torch can hold comes back with its dtype, shape and bits: 0-d, empty, matrices, arbitrary patterns."""
    state = {
        "t": {
            "scalar": arbitrary_bits(dtype),
            "empty": torch.empty(0, dtype=torch.uint8).view(dtype),
            "flat": torch.empty(0, 3, dtype=torch.uint8).view(dtype)
            if dtype.itemsize == 1
            else arbitrary_bits(dtype, 1),
            "matrix": arbitrary_bits(dtype, 5, 3),
        }
    }
    loaded = round_trip(state)["t"]
    for name, tensor in state["t"].items():
        assert loaded[name].dtype == dtype
        assert loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.bool], ids=str)
def test_views_are_saved_as_what_they_show(dtype: torch.dtype) -> None:
    """Transposed, strided, expanded, narrowed and channels-last tensors come back with the values they show."""
    base = arbitrary_bits(dtype, 4, 6)
    views = {
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(3, 6),
        "narrowed": base.narrow(1, 2, 3),
        "channels_last": arbitrary_bits(dtype, 2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    loaded = round_trip({"t": views})["t"]
    for name, view in views.items():
        assert bits(loaded[name]) == bits(view), name
        assert loaded[name].shape == view.shape


def test_lazy_conjugates_and_negatives_are_resolved() -> None:
    """A conjugated or negated view is saved as the value it stands for."""
    z = torch.complex(torch.randn(3), torch.randn(3))
    loaded = round_trip({"t": {"conj": z.conj(), "imag": z.conj().imag}})["t"]
    assert torch.equal(loaded["conj"], z.conj().resolve_conj())
    assert torch.equal(loaded["imag"], z.conj().imag.resolve_neg())


def test_tied_tensors_are_stored_once_and_tied_again() -> None:
    """The same memory under two names is one chunk with an alias, and one tensor again after load."""
    weight = torch.randn(8, 8)
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"model": {"embed": weight, "head": weight, "part": weight[:4]}}, block=True)
    run = cloudckpt.open(storage)
    tensors = run.index("latest").tensors["model"]
    assert tensors["head"].alias_of == "embed"
    assert tensors["head"].chunks == ()
    assert tensors["part"].alias_of is None
    loaded = run.load("latest")["model"]
    assert loaded["head"] is loaded["embed"]
    assert torch.equal(loaded["part"], weight[:4])
    only = run.load("latest", components=["model"], names=["head"])
    assert torch.equal(only["model"]["head"], weight)


class Tied(nn.Module):
    """A model whose output layer shares the weights of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight


def test_a_tied_module_is_still_tied_after_restore() -> None:
    """Restoring fills the module in place: tied parameters stay tied, buffers and versions come along."""
    storage = MemoryStorage()
    torch.manual_seed(0)
    one = Tied()
    one.norm(torch.randn(5, 4))
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"model": one}, block=True)
    two = Tied()
    before = two.embed.weight
    with CheckpointManager(storage) as ckpts:
        ckpts.restore({"model": two})
    assert two.embed.weight is before
    assert two.head.weight is two.embed.weight
    for name, tensor in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], tensor), name
    loaded = cloudckpt.open(storage).load("latest")["model"]
    assert type(loaded) is OrderedDict
    assert loaded._metadata == one.state_dict()._metadata  # type: ignore[attr-defined]  # torch's own attribute


NAMES = ["__metadata__", "a.b", "a b", "ünï.çødé", "w~1", "w", "", "$x", "a/b", "..", "\n"]


def test_names_that_need_escaping_come_back() -> None:
    """Any string is a name, also those that the payload format reserves and those that collide once joined."""
    tensors = {name: torch.full((2,), float(n)) for n, name in enumerate(NAMES)}
    state = {"odd": {**tensors, "a": {"b": torch.full((2,), 99.0)}}}
    loaded = round_trip(state)["odd"]
    assert list(loaded) == [*NAMES, "a"]
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor), name
    assert torch.equal(loaded["a"]["b"], torch.full((2,), 99.0))


@pytest.mark.parametrize("component", ["a/b", "..", ".hidden", "ünï", "100%", "a b", "~", "checkpoint", "x" * 150])
def test_components_may_have_odd_names(component: str) -> None:
    """A component's name never leaves its folder, whatever it spells."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        folder = ckpts.save(1, {component: torch.ones(2)}, block=True).checkpoint.name
    assert torch.equal(cloudckpt.open(storage).load("latest")[component], torch.ones(2))
    assert {item.key.split("/")[0] for item in storage.list("checkpoint-")} == {folder}
    assert cloudckpt.verify(storage, deep=True).ok


def test_payload_objects_are_safetensors_files() -> None:
    """The safetensors library reads each payload object, by the component's own names."""
    storage = MemoryStorage()
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    with CheckpointManager(storage) as ckpts:
        folder = ckpts.save(1, {"model": model}, block=True).checkpoint.name
    body = storage.read(f"{folder}/model-00000-of-00001.safetensors", limit_bytes=10**6).body
    loaded = safetensors.torch.load(body)
    assert loaded.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


OPTIMISERS: dict[str, Any] = {
    name: getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")
}


def stepped(kind: Any) -> tuple[nn.Linear, torch.optim.Optimizer]:
    """A model and an optimizer that has stepped three times."""
    torch.manual_seed(1)
    model = nn.Linear(4, 4)
    optimizer = kind(model.parameters(), lr=0.01)
    for _ in range(3):
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_fresh_optimizer_becomes_the_saved_one(name: str) -> None:
    """An optimizer that has never stepped takes the saved state, and the next step of both gives the same weights."""
    storage = MemoryStorage()
    model, optimizer = stepped(OPTIMISERS[name])
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, {"model": model, "optimizer": optimizer}, block=True)
    fresh = nn.Linear(4, 4)
    other = OPTIMISERS[name](fresh.parameters(), lr=0.5)
    with CheckpointManager(storage) as ckpts:
        ckpts.restore({"model": fresh, "optimizer": other})
    for one, opt in ((model, optimizer), (fresh, other)):
        one(torch.ones(2, 4)).square().sum().backward()
        opt.step()
    assert torch.equal(model.weight, fresh.weight)
    assert torch.equal(model.bias, fresh.bias)


SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": torch.optim.lr_scheduler.ReduceLROnPlateau,
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch 2.6 warns of its own SequentialLR
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_where_they_were(name: str) -> None:
    """A scheduler's whole state comes back, counters and all, and the next learning rate is the same."""
    _, optimizer = stepped(torch.optim.SGD)
    scheduler = SCHEDULERS[name](optimizer)
    for _ in range(3):
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    state = scheduler.state_dict()
    if name == "CyclicLR":
        state = {k: v for k, v in state.items() if not callable(v)}
    loaded = round_trip({"scheduler": state})["scheduler"]
    assert loaded == state
    assert {k: type(v) for k, v in loaded.items()} == {k: type(v) for k, v in state.items()}


def test_python_leaves_keep_their_types() -> None:
    """NumPy scalars and arrays, torch's own small types, enums, and a Stateful deep inside a list come back."""
    generator = torch.Generator().manual_seed(3)
    state: dict[str, Any] = {
        "extra": {
            "f32": np.float32(0.1),
            "b": np.bool_(True),
            "array": np.arange(6, dtype=">i4").reshape(2, 3),
            "empty": np.zeros((0, 2)),
            "size": torch.Size([1, 2]),
            "dtype": torch.bfloat16,
            "device": torch.device("cpu"),
            "format": torch.channels_last,
            "colour": Colour.RED,
            "deep": [nn.Linear(1, 1), (generator.get_state(),)],
            "random": np.random.default_rng(0).bit_generator.state,
        }
    }
    loaded = round_trip(state)["extra"]
    want = state["extra"]
    for name in ("f32", "b", "size", "dtype", "device", "format", "colour", "random"):
        assert loaded[name] == want[name], name
        assert type(loaded[name]) is type(want[name]), name
    for name in ("array", "empty"):
        assert loaded[name].dtype == want[name].dtype
        assert np.array_equal(loaded[name], want[name])
    assert torch.equal(loaded["deep"][0]["weight"], want["deep"][0].weight)
    assert torch.equal(loaded["deep"][1][0], generator.get_state())


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize(
    ("make", "path", "what"),
    [
        (lambda: {"s": {"lr_lambdas": [lambda step: 1.0]}}, r"s\.lr_lambdas\[0\]", "function"),
        (lambda: {"s": [Point(1, 2)]}, r"s\[0\]", "Point"),
        (lambda: {"s": {"w": torch.eye(3).to_sparse()}}, r"s\.w", "sparse"),
        (lambda: {"s": {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}}, r"s\.w", "quantized"),
        (lambda: {"s": {"w": torch.empty(2, device="meta")}}, r"s\.w", "meta"),
        (lambda: {"s": {"w": np.array([object()])}}, r"s\.w", "ndarray"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_announced(make: Any, path: str, what: str) -> None:
    """The error names the path; the run has no entry, and the next save works."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(TypeError, match=rf"^{path}: .*{what}"):
            ckpts.save(1, make())
        assert ckpts.checkpoints(state=None) == ()
        assert ckpts.save(1, {"s": 1}, block=True).checkpoint.step == 1


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, crater: Path) -> None:
        self.crater = crater

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.crater),))


def test_pickle_needs_permission_on_both_sides(tmp_path: Path) -> None:
    """Without allow_pickle nothing is pickled and nothing unpickled; with it on both sides the object comes back."""
    storage = MemoryStorage()
    with CheckpointManager(storage, allow_pickle=True) as ckpts:
        ckpts.save(
            1, {"w": torch.ones(2), "odd": {"point": Point(1, 2), "bomb": Bomb(tmp_path / "crater")}}, block=True
        )
    run = cloudckpt.open(storage)
    assert run.index("latest").pickled
    with pytest.raises(ConfigError, match=r"odd\.point was pickled.*allow_pickle=True"):
        run.load("latest")
    assert not (tmp_path / "crater").exists()
    assert torch.equal(run.load("latest", components=["w"])["w"], torch.ones(2))
    loaded = cloudckpt.open(storage, allow_pickle=True).load("latest")
    assert tuple(loaded["odd"]["point"]) == (1, 2)
    assert (tmp_path / "crater").exists()


def test_what_changes_after_save_is_not_saved() -> None:
    """The state may change the moment save() returns, while the upload is under way."""
    storage = MemoryStorage()
    weight = torch.zeros(50_000)
    values = {"n": [0]}
    with CheckpointManager(storage, keep_last=None) as ckpts:
        for step in range(20):
            weight.fill_(step)
            values["n"][0] = step
            ckpts.save(step, {"w": weight, "v": values})
            weight.fill_(-1.0)
            values["n"][0] = -1
    run = cloudckpt.open(storage)
    for step in range(20):
        loaded = run.load(step)
        assert torch.equal(loaded["w"], torch.full((50_000,), float(step)))
        assert loaded["v"] == {"n": [step]}
