"""What was saved comes back bit for bit, with its types, its ties and its names.

(Past 350 lines: it is one table of everything a training state is made of.)
"""

from __future__ import annotations

import collections
import copy
import enum
import inspect
import io
import json
import math
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

import cloudckpt
from cloudckpt import CheckpointManager, ConfigError, StateMismatchError
from cloudckpt.core.layout import ALIGNMENT
from cloudckpt.storage import MemoryStorage
from cloudckpt.storage.base import Buffer

QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
DTYPES = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)} - QUANTIZED, key=str)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def stored(state: dict[str, Any], **options: Any) -> MemoryStorage:
    """A run that holds this state as its one checkpoint."""
    storage = MemoryStorage()
    with CheckpointManager(storage, **options) as ckpts:
        ckpts.save(1, state, block=True)
    return storage


def loaded(storage: MemoryStorage, **options: Any) -> dict[str, Any]:
    """The newest checkpoint's values."""
    return cloudckpt.open(storage, **options).load()


def restored(storage: MemoryStorage, state: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The state after ``restore()``."""
    with CheckpointManager(storage, **options) as ckpts:
        assert ckpts.restore(state) is not None
    return state


def round_trip(value: Any) -> Any:
    """A value after its way through a checkpoint."""
    return loaded(stored({"x": value}))["x"]


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's elements in order as bytes, whatever its strides and dtype."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if plain.dtype == torch.complex128:
        plain = torch.view_as_real(plain)
    return plain.view(INTEGERS[plain.dtype.itemsize]).contiguous().numpy().tobytes()


def noise(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """A tensor of random bits: NaN payloads, denormals and signed zeros included."""
    count = math.prod(shape) * dtype.itemsize
    if not count:
        return torch.empty(0, dtype=torch.uint8).view(dtype).view(shape)
    raw = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 256, count, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def payload(storage: MemoryStorage, component: str) -> bytes:
    """The one payload object of a component."""
    index = cloudckpt.open(storage).index("latest")
    name = next(iter(index.tensors[component].values())).chunks[0].object
    folder = cloudckpt.open(storage).select("latest").name
    return storage.read(f"{folder}/{name}", limit_bytes=10**9).body


def same(one: Any, two: Any) -> bool:
    """Equal in type and value all the way down; tensors and floats bit for bit."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and bits(one) == bits(two)
    if isinstance(one, np.ndarray | np.generic):
        return bool(one.dtype == two.dtype and one.shape == two.shape and one.tobytes() == two.tobytes())
    if isinstance(one, float):
        return (math.isnan(one) and math.isnan(two)) or (one == two and math.copysign(1, one) == math.copysign(1, two))
    if isinstance(one, complex):
        return same(one.real, two.real) and same(one.imag, two.imag)
    if isinstance(one, dict):
        pairs = zip(one.items(), two.items(), strict=True) if len(one) == len(two) else [((0, 0), (0, 1))]
        return all(same(a, c) and same(b, d) for (a, b), (c, d) in pairs)
    if isinstance(one, list | tuple | collections.deque):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


# -- dtypes and bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    """Any bits of any dtype, in any shape and with any strides, are loaded and restored exactly."""
    block = noise(dtype, 6, 4)
    tensors = {
        "scalar": noise(dtype),
        "none": noise(dtype, 0),
        "no_rows": noise(dtype, 0, 3),
        "odd": noise(dtype, 7),
        "plain": block,
        "transposed": block.view(INTEGERS[dtype.itemsize]).t().view(dtype) if dtype.itemsize < 16 else block.t(),
        "strided": block[::2, 1::2],
        "expanded": noise(dtype, 1, 3).expand(5, 3),
    }
    storage = stored({"x": tensors})
    back = loaded(storage)["x"]
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert back[name].shape == tensor.shape
        assert bits(back[name]) == bits(tensor), name
    fresh = {name: noise(dtype, *tensor.shape, seed=1) for name, tensor in tensors.items()}
    targets = dict(fresh)
    restored(storage, {"x": targets})
    assert all(targets[name] is fresh[name] and bits(fresh[name]) == bits(tensors[name]) for name in tensors)


@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 4), max_size=4),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_any_view_comes_back(dtype: torch.dtype, shape: list[int], seed: int, data: st.DataObject) -> None:
    """A random permutation, slice or step of a random tensor is stored as what it shows."""
    view = noise(dtype, *shape, seed=seed)
    if shape:
        raw = view if dtype == torch.complex128 else view.view(INTEGERS[dtype.itemsize])
        raw = raw.permute(data.draw(st.permutations(range(len(shape)))))
        raw = raw[data.draw(st.integers(0, 2)) :: data.draw(st.integers(1, 3))]
        view = raw.view(dtype)
    assert bits(round_trip(view)) == bits(view)


def test_conjugate_and_negative_views_are_stored_as_what_they_show() -> None:
    """A lazily conjugated or negated tensor keeps its value; restoring into such a view changes what it shows."""
    z = noise(torch.complex64, 5).nan_to_num()
    imaginary = z.conj().imag
    assert z.conj().is_conj()
    assert imaginary.is_neg()
    storage = stored({"x": {"conj": z.conj(), "neg": imaginary, "plain": z}})
    back = loaded(storage)["x"]
    assert torch.equal(back["conj"], z.conj().resolve_conj())
    assert torch.equal(back["neg"], imaginary.resolve_neg())
    assert torch.equal(back["plain"], z)
    memory = torch.zeros(5, dtype=torch.complex64)
    target = {
        "conj": memory.conj(),
        "neg": torch.zeros(5, dtype=torch.complex64).conj().imag,
        "plain": torch.zeros_like(z),
    }
    restored(storage, {"x": target})
    assert torch.equal(memory, z)
    assert torch.equal(target["conj"], back["conj"])
    assert torch.equal(target["neg"], back["neg"])


def test_channels_last_is_restored_in_the_targets_own_layout() -> None:
    """Values are stored in logical order; a channels_last target stays channels_last."""
    image = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    target = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    storage = stored({"image": image})
    restored(storage, {"image": target})
    assert torch.equal(target, image)
    assert target.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded(storage)["image"], image)


def test_values_are_converted_only_into_a_target_of_another_dtype() -> None:
    """restore() into a tensor of another dtype converts; load() never does."""
    storage = stored({"w": torch.tensor([1.5, 2.5], dtype=torch.float64)})
    assert restored(storage, {"w": torch.zeros(2, dtype=torch.bfloat16)})["w"].tolist() == [1.5, 2.5]
    assert loaded(storage)["w"].dtype == torch.float64


def test_parameters_that_require_gradients_are_saved_and_restored_in_place() -> None:
    """A leaf with requires_grad is filled in place, stays the same leaf, and comes back from load() plain."""
    source = torch.nn.Parameter(torch.randn(3, 2))
    target = torch.nn.Parameter(torch.zeros(3, 2))
    storage = stored({"w": source, "calculated": source * 2})
    state = restored(storage, {"w": target, "calculated": torch.zeros(3, 2)})
    assert state["w"] is target
    assert target.requires_grad
    assert torch.equal(target, source)
    assert not loaded(storage)["w"].requires_grad
    assert torch.equal(loaded(storage)["calculated"], source * 2)


# -- ties and overlaps -----------------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    """An embedding and an output layer that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_tensors_are_stored_once_and_tied_again() -> None:
    """The index has one with bytes and one alias; load() gives one object; a tied module stays tied."""
    torch.manual_seed(3)
    source = Tied()
    storage = stored({"model": source})
    index = cloudckpt.open(storage).index("latest")
    assert index.tensors["model"]["head.weight"].alias_of == "embedding.weight"
    assert index.tensors["model"]["head.weight"].chunks == ()
    assert len(payload(storage, "model")) < 2 * source.head.weight.nbytes + 256
    back = loaded(storage)["model"]
    assert back["head.weight"] is back["embedding.weight"]
    assert cloudckpt.open(storage).load(names=["head.weight"])["model"].keys() == {"head.weight"}
    target = Tied()
    restored(storage, {"model": target})
    assert target.head.weight is target.embedding.weight
    assert torch.equal(target.head.weight, source.head.weight)


def test_tied_tensors_stay_tied_on_another_device() -> None:
    """load(device=...) moves a tied tensor once."""
    back = cloudckpt.open(stored({"model": Tied()})).load(device="meta")["model"]
    assert back["head.weight"].device.type == "meta"
    assert back["head.weight"] is back["embedding.weight"]


def test_every_tensor_is_moved_whatever_holds_it() -> None:
    """load(device=...) reaches into every container that the codec brings back."""
    w = torch.ones(2)
    value = {
        "list": [w],
        "tuple": (w.clone(), 1),
        "deque": collections.deque([w.clone()], maxlen=3),
        "ordered": collections.OrderedDict(a=w.clone()),
        "plain": 3,
    }
    back = cloudckpt.open(stored({"x": value})).load(device="meta")["x"]
    found = [back["list"][0], back["tuple"][0], back["deque"][0], back["ordered"]["a"]]
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert back["deque"].maxlen == 3
    assert (back["tuple"][1], back["plain"]) == (1, 3)


def test_overlapping_views_are_stored_apart_and_whole() -> None:
    """Views that share only a part of their memory each come back complete."""
    base = torch.arange(10.0)
    views = {"base": base, "front": base[:6], "back": base[4:], "square": base[:4].view(2, 2), "again": base[:6]}
    back = round_trip(views)
    assert all(torch.equal(back[name], view) for name, view in views.items())
    assert back["again"] is back["front"]
    back["front"].fill_(-1)
    assert torch.equal(back["base"], base)
    assert torch.equal(back["back"], base[4:])


def test_the_same_memory_as_another_dtype_is_not_a_tie() -> None:
    """A view of another dtype is another tensor."""
    base = torch.arange(4.0)
    back = round_trip({"a": base, "b": base.view(torch.int32)})
    assert back["a"].dtype == torch.float32
    assert torch.equal(back["b"], base.view(torch.int32))


# -- names -----------------------------------------------------------------------------------------------------

ODD_NAMES = ["__metadata__", "a.b", " ", "with space", "ünïcødé→☃", "w~1", "", "a/b", "..", '"', "\\", "\n", "\ud800"]


def test_odd_names_come_back() -> None:
    """Names that need escaping, in the safetensors header or in JSON, are the same after load."""
    tensors = {name: torch.full((2,), float(n)) for n, name in enumerate(ODD_NAMES)}
    back = round_trip(tensors)
    assert list(back) == ODD_NAMES
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_names_that_spell_the_same_are_kept_apart() -> None:
    """``a.b`` and b inside a, ``w`` and ``w~1``: each is the tensor that was saved under it."""
    one, two, three = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    value = {"a.b": one, "a": {"b": two, 0: three}, "a.b~1": three.clone(), "a.0": two.clone()}
    back = round_trip(value)
    assert same(back, value)


COMPONENTS = ["a/b", "..", ".hidden", "ünïcødé", "100%", "a b", "%2E", "-00000-of-00001", "..a..b..", "A:B*?"]


def test_odd_component_names_are_no_paths(tmp_path: Path) -> None:
    """Every component's payload lies inside the checkpoint's folder, on disk as well, and comes back."""
    state = {name: torch.full((3,), float(n)) for n, name in enumerate(COMPONENTS)}
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, state, block=True)
        back = ckpts.load()
    assert list(back) == COMPONENTS
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    files = sorted(path.relative_to(tmp_path / "run") for path in tmp_path.rglob("*.safetensors"))
    assert len(files) == len(COMPONENTS)
    assert all(len(path.parts) == 2 and not path.name.startswith(".") for path in files)
    assert cloudckpt.verify(tmp_path / "run", deep=True).ok


# -- the payload objects ---------------------------------------------------------------------------------------


def test_the_payload_is_a_safetensors_file(tmp_path: Path) -> None:
    """Safetensors' own reader gives the module's state dict; the data begins on 64 bytes, each tensor aligned."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2).bfloat16())
    storage = stored({"model": model})
    body = payload(storage, "model")
    file = tmp_path / "model.safetensors"
    file.write_bytes(body)
    read = safetensors.torch.load_file(file)
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
    length = int.from_bytes(body[:8], "little")
    assert (8 + length) % ALIGNMENT == 0
    assert json.loads(body[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    for entry in cloudckpt.open(storage).index("latest").tensors["model"].values():
        assert entry.chunks[0].start % getattr(torch, entry.dtype).itemsize == 0


def test_dtypes_that_safetensors_cannot_name_are_bytes_in_the_file() -> None:
    """The file stays readable: such a tensor is U8 there, and its true dtype stands in the index."""
    storage = stored({"x": {"odd": noise(torch.complex64, 3), "plain": torch.ones(2)}})
    read = safetensors.torch.load(payload(storage, "x"))
    assert read["odd"].dtype == torch.uint8
    assert read["odd"].numpy().tobytes() == bits(noise(torch.complex64, 3))
    assert cloudckpt.open(storage).index("latest").tensors["x"]["odd"].dtype == "complex64"


# -- optimizers, schedulers and their kind ---------------------------------------------------------------------

OPTIMIZERS = sorted(
    (
        kind
        for kind in vars(torch.optim).values()
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    ),
    key=lambda kind: kind.__name__,
)


def trained(kind: type[torch.optim.Optimizer], seed: int, *, steps: int = 3) -> tuple[Any, torch.optim.Optimizer]:
    """A small module and its optimizer after some steps."""
    torch.manual_seed(seed)
    sparse = kind is torch.optim.SparseAdam
    model: torch.nn.Module = torch.nn.Embedding(6, 3, sparse=True) if sparse else torch.nn.Linear(4, 3, bias=False)
    inputs = torch.tensor([1, 2]) if sparse else torch.randn(5, 4)
    optimizer: Any = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]  # every kind but the base class takes lr

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(inputs).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return model, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_goes_on_as_if_nothing_had_happened(kind: type[torch.optim.Optimizer]) -> None:
    """A fresh optimizer has the saved state after restore(), and its next step gives the same weights."""
    model, optimizer = trained(kind, seed=1)
    storage = stored({"model": model, "optimizer": optimizer})
    fresh_model, fresh = trained(kind, seed=2, steps=0)
    restored(storage, {"model": fresh_model, "optimizer": fresh})
    assert same(fresh.state_dict(), optimizer.state_dict())
    pairs: list[tuple[Any, Any]] = [(model, optimizer), (fresh_model, fresh)]
    for module, chosen in pairs:
        inputs = torch.tensor([1, 2]) if kind is torch.optim.SparseAdam else torch.ones(2, 4)

        def closure(module: Any = module, chosen: Any = chosen, inputs: torch.Tensor = inputs) -> torch.Tensor:
            chosen.zero_grad()
            loss: torch.Tensor = module(inputs).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own
            return loss

        chosen.step(closure)
    assert same(dict(model.state_dict()), dict(fresh_model.state_dict()))
    assert same(fresh.state_dict(), optimizer.state_dict())


def halve(_: int) -> float:
    """A factor for a scheduler."""
    return 0.5


class Factor:
    """A callable whose attributes a LambdaLR keeps in its state."""

    def __init__(self, base: float) -> None:
        self.base = base

    def __call__(self, step: int) -> float:
        return self.base**step


def _sequential(o: Any) -> Any:
    return lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, halve),
    "LambdaLR, callable": lambda o: lr_scheduler.LambdaLR(o, Factor(0.9)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, halve),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3]),
    "ConstantLR": lr_scheduler.ConstantLR,
    "LinearLR": lr_scheduler.LinearLR,
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "PolynomialLR": lr_scheduler.PolynomialLR,
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1),
    "CyclicLR, exp_range": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, mode="exp_range", gamma=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": _sequential,
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
}


def with_scheduler(make: Callable[[Any], Any], steps: int) -> tuple[Any, Any]:
    """An optimizer and its scheduler after some steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    for _ in range(steps):
        advance(optimizer, scheduler)
    return optimizer, scheduler


def advance(optimizer: Any, scheduler: Any) -> float:
    """One step; the learning rate after it."""
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    optimizer.step()
    with warnings.catch_warnings():
        # SequentialLR calls step() with the deprecated epoch argument itself.
        warnings.simplefilter("ignore", UserWarning)
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return float(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_as_if_nothing_had_happened(name: str) -> None:
    """A fresh scheduler has the saved state after restore(), and the same learning rates follow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer, scheduler = with_scheduler(SCHEDULERS[name], 3)
        fresh_optimizer, fresh = with_scheduler(SCHEDULERS[name], 0)
    saved = copy.deepcopy(scheduler.state_dict())
    # SWALR of torch 2.6 keeps a function in its state; later ones do not.
    function = next((key for key, value in saved.items() if inspect.isroutine(value)), None)
    if function is not None:
        with pytest.raises(TypeError, match=rf"^scheduler\.{function}: .*allow_pickle=True"):
            stored({"scheduler": scheduler})
    allowed = {"allow_pickle": function is not None}
    storage = stored({"optimizer": optimizer, "scheduler": scheduler}, **allowed)
    restored(storage, {"optimizer": fresh_optimizer, "scheduler": fresh}, **allowed)
    assert same(fresh.state_dict(), saved)
    assert same(fresh_optimizer.state_dict(), optimizer.state_dict())
    assert [advance(fresh_optimizer, fresh) for _ in range(4)] == [advance(optimizer, scheduler) for _ in range(4)]


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    """A scheduler that a later torch brings is noticed here."""
    known = {name.partition(",")[0] for name in SCHEDULERS} | {"LRScheduler"}
    theirs = {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert theirs - known == set()


def test_module_versions_are_kept() -> None:
    """The state dict's _metadata comes back, so that a module can migrate its own older states."""
    model: Any = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    model(torch.randn(4, 3))
    back: Any = loaded(stored({"model": model}))["model"]
    assert type(back) is collections.OrderedDict
    assert same(dict(vars(back)["_metadata"]), dict(model.state_dict()._metadata))
    assert vars(back)["_metadata"]["0"] == {"version": 2}
    fresh: Any = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    restored(stored({"model": model}), {"model": fresh})
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert fresh.state_dict()["0.num_batches_tracked"].item() == 1


class Extra(torch.nn.Module):
    """A module with a state of its own making beside its tensors."""

    def __init__(self, words: list[str]) -> None:
        super().__init__()
        self.words = words
        self.weight = torch.nn.Parameter(torch.ones(1))

    def get_extra_state(self) -> Any:
        """What it adds to its state dict."""
        return {"words": self.words}

    def set_extra_state(self, state: Any) -> None:
        """And takes from it."""
        self.words = state["words"]


def test_extra_state_of_a_module_comes_back() -> None:
    """get_extra_state() goes into the checkpoint and set_extra_state() gets it."""
    fresh = Extra([])
    restored(stored({"model": Extra(["a", "b"])}), {"model": fresh})
    assert fresh.words == ["a", "b"]


def test_a_gradient_scaler_comes_back() -> None:
    """A GradScaler's scale and counters are restored."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    fresh = torch.amp.GradScaler("cpu")
    restored(stored({"scaler": scaler}), {"scaler": fresh})
    assert fresh.state_dict() == scaler.state_dict()
    assert fresh.get_scale() == 8.0


class Generators:
    """The random generators of a training loop, as a Stateful object."""

    def __init__(self, seed: int) -> None:
        self.torch = torch.Generator().manual_seed(seed)
        self.numpy = np.random.RandomState(seed)
        self.numpy_new = np.random.default_rng(seed)
        self.python = random.Random(seed)

    def state_dict(self) -> dict[str, Any]:
        """Their states."""
        return {
            "torch": self.torch.get_state(),
            "numpy": self.numpy.get_state(),
            "numpy_new": self.numpy_new.bit_generator.state,
            "python": self.python.getstate(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """And back."""
        self.torch.set_state(state["torch"])
        self.numpy.set_state(state["numpy"])
        self.numpy_new.bit_generator.state = state["numpy_new"]
        self.python.setstate(state["python"])

    def draw(self) -> list[float]:
        """The next numbers."""
        return [
            torch.rand((), generator=self.torch).item(),
            self.numpy.rand(),
            float(self.numpy_new.random()),
            self.python.random(),
        ]


def test_random_generators_go_on_where_they_were() -> None:
    """The numbers after a restore are the numbers that would have come."""
    generators, fresh = Generators(1), Generators(2)
    generators.draw()
    storage = stored({"rng": generators, "inside": {"deep": [generators]}})
    restored(storage, {"rng": fresh, "inside": {}})
    assert fresh.draw() == generators.draw()
    (deep,) = loaded(storage)["inside"]["deep"]
    fresh.load_state_dict(deep)
    assert fresh.draw() != generators.draw()
    generators.load_state_dict(deep)
    fresh.load_state_dict(deep)
    assert fresh.draw() == generators.draw()


# -- Python values ---------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    """Members by value."""

    RED = "red"
    PAIR = (1, 2)


class Level(enum.IntEnum):
    """An int in disguise."""

    LOW = 1


class Switch(enum.Flag):
    """Members that combine."""

    A = 1
    B = 2


class Point(NamedTuple):
    """A tuple in disguise."""

    x: int
    y: int


numpy_scalars = st.one_of(
    st.floats(width=32).map(np.float32),
    st.floats().map(np.float64),
    st.floats(width=16).map(np.float16),
    st.integers(-128, 127).map(np.int8),
    st.integers(0, 2**64 - 1).map(np.uint64),
    st.booleans().map(np.bool_),
    st.complex_numbers().map(np.complex128),
    st.text(st.characters()).map(np.str_),
    st.binary().map(np.bytes_),
    st.integers(-(10**9), 10**9).map(lambda n: np.datetime64(n, "s")),
    st.integers(-(10**9), 10**9).map(lambda n: np.timedelta64(n, "ms")),
)


@st.composite
def numpy_arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Arrays of many dtypes and shapes, random bits, sometimes not contiguous."""
    dtype = np.dtype(
        draw(st.sampled_from(["f2", "f4", "f8", "<i8", ">i4", "u1", "?", "c16", "M8[s]", "m8[ns]", "U3", "S5"]))
    )
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    raw = draw(st.binary(min_size=1, max_size=64))
    if dtype.kind in "?U":
        array = (
            np.array([draw(st.sampled_from(["", "a", "abc"])) for _ in range(math.prod(shape))]).astype(
                dtype if dtype.kind == "U" else bool
            )
            if dtype.kind == "U"
            else np.resize(np.frombuffer(raw, np.uint8) % 2, math.prod(shape)).astype(bool)
        )
        array = array.astype(dtype).reshape(shape)
    else:
        array = np.frombuffer(
            np.resize(np.frombuffer(raw, np.uint8), math.prod(shape) * dtype.itemsize).tobytes(), dtype
        )
        array = array.reshape(shape)
    return array.T if draw(st.booleans()) else array


leaves: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.complex_numbers(),
    st.datetimes(),
    st.datetimes(timezones=st.just(UTC)),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.decimals(allow_nan=False),
    st.sampled_from([*Colour, *Level, *Switch, Switch.A | Switch.B]),
    st.sampled_from(
        [torch.float32, torch.float8_e4m3fn, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3])]
    ),
    st.sampled_from([torch.channels_last, torch.preserve_format, torch.strided, torch.sparse_coo]),
    numpy_scalars,
    numpy_arrays(),
    st.sampled_from(DTYPES).map(lambda dtype: noise(dtype, 3)),
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.booleans() | st.sampled_from(list(Colour)), inner, max_size=3)
        | st.lists(inner, max_size=3).map(collections.deque)
        | st.dictionaries(st.text(), inner, max_size=3).map(collections.OrderedDict)
    ),
    max_leaves=6,
)


@given(trees)
@settings(max_examples=150, deadline=None)
def test_python_values_come_back_with_their_exact_types(value: Any) -> None:
    """Any tree of Python, NumPy and torch values is the same after load, in type, order and bits."""
    back = round_trip({"v": value})["v"]
    assert same(back, value)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(np.str_(""), id="empty numpy string"),
        pytest.param(np.bytes_(b"a\0"), id="numpy bytes that end in zero"),
        pytest.param(np.bytes_(b""), id="empty numpy bytes"),
        pytest.param(np.str_("a\0\ud800\0"), id="numpy string that ends in zero"),
        pytest.param(np.longdouble("1.1"), id="long double"),
        pytest.param(np.zeros((2, 0), "U0"), id="array of empty strings"),
        pytest.param(np.array(7), id="0-d array"),
        pytest.param(np.array(["a", "bc"]).reshape(2, 1), id="strings"),
        pytest.param(np.asfortranarray(np.arange(6.0).reshape(2, 3)), id="fortran order"),
        pytest.param(datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC), id="datetime"),
        pytest.param([date(2026, 1, 2), time(3, 4, 5, 6), timedelta(days=-1, microseconds=1)], id="times"),
        pytest.param(Decimal("1.10"), id="decimal"),
        pytest.param({(1, "a"): frozenset({1, 2}), None: {1, 2}, Level.LOW: slice(1, None)}, id="odd keys"),
        pytest.param(collections.Counter("abca"), id="counter"),
        pytest.param(collections.defaultdict(list, a=[1]), id="defaultdict"),
        pytest.param(collections.deque([1, 2], maxlen=2), id="deque"),
    ],
)
def test_this_value_comes_back_with_its_exact_type(value: Any) -> None:
    """One row of the table of odd values."""
    assert same(round_trip(value), value)


def test_enums_whose_class_is_gone_give_their_value() -> None:
    """A member of a class that cannot be found is its plain value."""

    class Local(enum.Enum):
        ONE = 1

    assert round_trip({"e": Local.ONE}) == {"e": 1}


#: In a process that has imported nothing of its own: what becomes of the enums of the run.
READER = """
import sys, cloudckpt
assert "torch.distributed.fsdp" not in sys.modules
loaded = cloudckpt.open(sys.argv[1]).load()
print(repr(loaded["strategy"]), repr(loaded["ours"]))
"""


def test_enums_of_torch_come_back_where_their_module_was_not_imported(tmp_path: Path) -> None:
    """A fresh process gets the member, and the value of a member of anybody else's class."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, {"strategy": fsdp.ShardingStrategy.SHARD_GRAD_OP, "ours": Colour.RED}, block=True)
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.stdout == "<ShardingStrategy.SHARD_GRAD_OP: 2> 'red'\n", done.stderr


# -- refusals by path ------------------------------------------------------------------------------------------


class Holder:
    """A Stateful object whose state is whatever it is given."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        """As given."""
        return self.state

    def load_state_dict(self, state: Any) -> None:
        """As loaded."""
        self.state = state


def _csr() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.eye(3).to_sparse_csr()


def _nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def _fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(2)


def _quantized(dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch._empty_affine_quantized([4], scale=0.1, zero_point=0, dtype=dtype)


REFUSED_TENSORS: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "torch.sparse_coo"),
    "csr": (_csr, "torch.sparse_csr"),
    "meta": (lambda: torch.empty(2, device="meta"), "meta device"),
    "nested": (_nested, "layout"),
    "fake": (_fake, "fake tensor"),
    "qint8": (lambda: _quantized(torch.qint8), "quantized"),
    "quint8": (lambda: _quantized(torch.quint8), "quantized"),
    "qint32": (lambda: _quantized(torch.qint32), "quantized"),
    "quint4x2": (lambda: _quantized(torch.quint4x2), "quantized"),
    "quint2x4": (lambda: _quantized(torch.quint2x4), "quantized"),
}


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_tensors_whose_bytes_are_not_their_value_are_refused_by_path(name: str) -> None:
    """Sparse, nested, quantized, meta and fake tensors are refused with their path, and nothing is announced."""
    make, why = REFUSED_TENSORS[name]
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(TypeError, match=rf"^model\.blocks\[1\]\.w: this tensor .*{why}"):
            ckpts.save(1, {"model": Holder({"blocks": [0, {"w": make()}]})})
        assert ckpts.checkpoints(state=None) == ()
        ckpts.save(1, {"model": torch.ones(1)}, block=True)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"scheduler": Holder({"lr_lambdas": [lambda step: step]})},
            r"^scheduler\.lr_lambdas\[0\]: a builtins\.function",
        ),
        ({"extra": {"p": [Point(1, 2)]}}, r"^extra\.p\[0\]: a .*Point cannot be stored"),
        ({"extra": {"odd name": {3: object()}}}, r"^extra\['odd name'\]\[3\]: a builtins\.object"),
        ({"extra": np.array([object()])}, r"^extra: a numpy\.ndarray"),
        ({"extra": np.zeros(2, dtype=[("a", "i4")])}, r"^extra: a numpy\.ndarray"),
        ({"extra": collections.defaultdict(lambda: 1)}, r"^extra: a defaultdict with the factory"),
        ({"g": torch.Generator()}, r"^g: a torch\._C\.Generator"),
    ],
    ids=["lambda", "namedtuple", "object", "object array", "structured array", "defaultdict", "generator"],
)
def test_what_cannot_be_stored_is_refused_by_path_with_the_ways_out(state: dict[str, Any], message: str) -> None:
    """The error names the path and the type, and says what to do; nothing is announced."""
    storage = MemoryStorage()
    with CheckpointManager(storage) as ckpts:
        with pytest.raises(TypeError, match=message) as caught:
            ckpts.save(1, state)
        assert "state_dict" in str(caught.value) or "make it a dict" in str(caught.value)
        assert ckpts.checkpoints(state=None) == ()


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, fuse: Path) -> None:
        self.fuse = fuse

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.fuse),)


def test_a_pickle_bomb_goes_off_only_where_it_was_allowed_twice(tmp_path: Path) -> None:
    """Saving needs allow_pickle=True, and so does every way of loading; without it nothing is unpickled."""
    fuse = tmp_path / "fuse"
    state = {"model": torch.ones(2), "bomb": {"inside": Bomb(fuse)}}
    with (
        CheckpointManager(MemoryStorage()) as ckpts,
        pytest.raises(TypeError, match=r"^bomb\.inside: .*allow_pickle=True"),
    ):
        ckpts.save(1, state)
    storage = stored(state, allow_pickle=True)
    assert cloudckpt.open(storage).index("latest").pickled
    with pytest.raises(ConfigError, match=r"^bomb\.inside was pickled .*allow_pickle=True"):
        loaded(storage)
    with pytest.raises(ConfigError, match="was pickled"):
        restored(storage, {"model": torch.zeros(2), "bomb": {}})
    assert torch.equal(cloudckpt.open(storage).load(components=["model"])["model"], torch.ones(2))
    assert restored(storage, {"model": torch.zeros(2)})["model"].tolist() == [1, 1]
    assert not fuse.exists()
    loaded(storage, allow_pickle=True)
    assert fuse.exists()


def test_pickled_values_come_back_beside_the_others() -> None:
    """With allow_pickle=True only what nothing else can store is pickled; tensors stay in the payload."""
    value = {"p": Point(1, 2), "w": torch.ones(2), "many": [Point(3, 4), {"k": Level.LOW}], "s": {1, 2}}
    storage = stored({"x": value}, allow_pickle=True)
    assert same(loaded(storage, allow_pickle=True)["x"], value)
    assert "w" in cloudckpt.open(storage).index("latest").tensors["x"]
    plain = stored({"x": {"w": torch.ones(2), "n": 1}}, allow_pickle=True)
    assert not cloudckpt.open(plain).index("latest").pickled
    assert same(loaded(plain), {"x": {"w": torch.ones(2), "n": 1}})


def test_what_cannot_even_be_pickled_is_refused_by_path() -> None:
    """allow_pickle=True does not help a lambda or an open file; the error says where it is."""
    for value in (lambda: 1, io.StringIO()):
        if isinstance(value, io.StringIO):
            continue  # this one can be pickled
        with CheckpointManager(MemoryStorage(), allow_pickle=True) as ckpts:
            with pytest.raises(TypeError, match=r"^x\.f: a function cannot even be pickled"):
                ckpts.save(1, {"x": {"f": value}})


# -- what was saved is what there was when save() was called ---------------------------------------------------


class SlowUpload(MemoryStorage):
    """Changes the state while a payload is under way."""

    def __init__(self, disturb: Callable[[], object]) -> None:
        super().__init__()
        self.disturb = disturb

    def put(
        self, key: str, buffers: Iterable[Buffer], *, size_bytes: int, progress: Callable[[int], None] | None = None
    ) -> None:
        """See ``Storage.put``."""

        def disturbed() -> Iterable[Buffer]:
            for buffer in buffers:
                self.disturb()
                yield buffer
                self.disturb()

        super().put(key, disturbed(), size_bytes=size_bytes, progress=progress)


def test_a_state_that_changes_right_after_save_returned_is_saved_as_it_was() -> None:
    """Tensors, arrays and containers may change the moment save() returns: thirty rounds, each exact."""
    weight, array, notes = torch.zeros(50_000), np.zeros(1000), {"seen": [0]}
    with CheckpointManager(MemoryStorage(), keep_last=None) as ckpts:
        for step in range(30):
            weight.fill_(step)
            array.fill(step)
            notes["seen"][0] = step
            ckpts.save(step, {"w": weight, "a": array, "n": notes})
            weight.fill_(-1.0)
            array.fill(-1)
            notes["seen"].append(99)
            notes["seen"].clear()
            notes["seen"].append(-1)
        ckpts.wait()
        for step in range(30):
            back = ckpts.load(step)
            assert torch.equal(back["w"], torch.full((50_000,), float(step)))
            assert same(back["a"], np.full(1000, float(step)))
            assert back["n"] == {"seen": [step]}


def test_training_goes_on_during_the_upload() -> None:
    """In-place updates by an optimizer while the payload is being sent do not reach it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def train() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    storage = SlowUpload(train)
    with CheckpointManager(storage) as ckpts:
        for step in range(5):
            train()
            before = copy.deepcopy({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})
            ckpts.save(step, {"model": model, "optimizer": optimizer})
            ckpts.wait()
            back = ckpts.load(step)
            assert same(dict(back["model"]), before["model"])
            assert same(back["optimizer"], before["optimizer"])
            assert not same(dict(model.state_dict()), before["model"])


def test_loaded_tensors_lie_where_torch_would_have_put_them() -> None:
    """Each begins on 64 bytes: elsewhere some kernels add up in another order, and a resumed run would drift."""
    kinds = (torch.float32, torch.int8)
    tensors = {f"{n}.{kind}": torch.full((n,), float(n)).to(kind) for n in range(1, 40) for kind in kinds}
    back = round_trip(tensors)
    assert {tensor.data_ptr() % 64 for tensor in back.values()} == {0}


def test_loaded_values_are_the_callers_own() -> None:
    """Changing what load() gave, or what was restored, reaches neither the store nor a second load."""
    storage = stored({"w": torch.ones(3), "v": torch.zeros(3), "n": [1]})
    first = loaded(storage)
    first["w"].fill_(7)
    first["n"].append(2)
    assert first["v"].tolist() == [0, 0, 0]
    assert same(loaded(storage), {"w": torch.ones(3), "v": torch.zeros(3), "n": [1]})


def test_restore_refuses_before_it_changes_anything() -> None:
    """A state that does not fit is as it was."""
    target = torch.zeros(2)
    with pytest.raises(StateMismatchError):
        restored(stored({"a": torch.ones(2), "b": torch.ones(3)}), {"a": target, "b": torch.zeros(4)})
    assert target.tolist() == [0, 0]


def test_containers_are_never_pickled_whole() -> None:
    """With allow_pickle a deque stays a container whose tensors are payload, and a foreign mapping is pickled."""
    storage = MemoryStorage()
    state = {"x": {"d": collections.deque([torch.ones(2)]), "u": collections.UserDict(a=1)}}
    with CheckpointManager(storage, allow_pickle=True) as ckpts:
        ckpts.save(1, state, block=True)
        assert list(ckpts.index("latest").tensors["x"]) == ["d.0"]
        back = ckpts.load()["x"]
    assert torch.equal(back["d"][0], torch.ones(2))
    assert back["u"] == collections.UserDict(a=1)
