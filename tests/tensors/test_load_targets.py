"""Into place: which of the caller's own tensors are read into, and that the outcome never depends on it.

(Past 350 lines: which tensors are read into, and which are not, is one table.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cloudckpt import CheckpointManager, Settings, StateMismatchError
from cloudckpt.storage import MemoryStorage


class Watched(MemoryStorage):
    """Remembers at which addresses payload bytes arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived: dict[int, int] = {}

    def read_into(self, key: str, start: int, *targets: memoryview) -> None:
        """See ``Storage.read_into``."""
        for target in targets:
            self.arrived[np.frombuffer(target, np.uint8).ctypes.data] = len(target)
        super().read_into(key, start, *targets)


def saved(state: dict[str, Any]) -> Watched:
    """A run with this state as its one checkpoint."""
    storage = Watched()
    with CheckpointManager(storage) as ckpts:
        ckpts.save(1, state, block=True)
    return storage


def restored(storage: Watched, state: dict[str, Any], *, in_place: bool = True, strict: bool = True) -> dict[str, Any]:
    """The state after ``restore()``."""
    storage.arrived.clear()
    with CheckpointManager(storage, settings=Settings(read_in_place=in_place)) as ckpts:
        ckpts.restore(state, strict=strict)
    return state


def direct(storage: Watched, tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes were read straight to where it is."""
    return storage.arrived.get(tensor.data_ptr()) == tensor.nbytes


def net(*, bias: bool = True) -> nn.Sequential:
    """A module with parameters, buffers, and something tied."""
    made = nn.Sequential(nn.Linear(5, 4, bias=bias), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False))
    made.append(nn.Linear(4, 5, bias=False))
    made[3].weight = made[2].weight
    return made


def stepped(model: nn.Module, kind: Any = torch.optim.AdamW) -> torch.optim.Optimizer:
    """An optimizer of the model after one step."""
    optimizer: torch.optim.Optimizer = kind(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


# -- what is read in place -------------------------------------------------------------------------------------


def test_a_module_is_read_into() -> None:
    """Every parameter and buffer of a module gets its bytes from the store, stays the same tensor, and is noticed."""
    source, target = net(), net()
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    storage = saved({"model": source})
    before = {name: (tensor, tensor._version) for name, tensor in target.state_dict(keep_vars=True).items()}
    restored(storage, {"model": target})
    assert len(before) == 9
    for name, tensor in target.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert direct(storage, tensor), name
        assert tensor._version > before[name][1], "autograd must see the change"
        assert torch.equal(tensor, source.state_dict()[name])
    assert target[2].weight is target[3].weight
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in target.parameters())


def compiled(module: nn.Module) -> Any:
    """As torch.compile() wraps it, whatever it compiles with."""
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled], ids=["DataParallel", "compile"])
def test_wrapped_modules_are_read_into_by_the_names_they_have(wrap: Callable[[nn.Module], Any]) -> None:
    """A prefix that a wrapper puts before each name is part of the name."""
    source, target = wrap(net()), wrap(net())
    storage = saved({"model": source})
    restored(storage, {"model": target})
    assert all(direct(storage, tensor) for tensor in target.state_dict().values())
    assert all(torch.equal(t, source.state_dict()[name]) for name, t in target.state_dict().items())


def test_an_optimizers_state_is_read_into_or_made() -> None:
    """Moments that are there already are read into; a fresh optimizer gets new ones, which it then owns."""
    model = net()
    source = stepped(model)
    storage = saved({"optimizer": source})
    other = net()
    warm, cold = stepped(other), torch.optim.AdamW(other.parameters(), lr=1.0)
    moments = [named["exp_avg"] for named in warm.state.values()]
    restored(storage, {"optimizer": warm})
    assert all(direct(storage, moment) for moment in moments)
    assert [named["exp_avg"].data_ptr() for named in warm.state.values()] == [m.data_ptr() for m in moments]
    restored(storage, {"optimizer": cold})
    for optimizer in (warm, cold):
        for own, theirs in zip(optimizer.state.values(), source.state.values(), strict=True):
            assert own.keys() == theirs.keys()
            assert all(torch.equal(own[name], theirs[name]) for name in own)
            assert direct(storage, own["exp_avg"]) or optimizer is warm
        assert optimizer.param_groups[0]["lr"] == 0.1


def test_tensors_in_containers_are_read_into() -> None:
    """At the top, in dicts and in lists; scalars and tensors that require gradients too."""
    value: dict[str, Any] = {
        "t": torch.randn(3),
        "l": [torch.randn(2, 2), 1],
        "s": torch.tensor(4),
        "p": torch.randn(2),
    }
    storage = saved({"x": value, "top": torch.ones(5)})
    target: dict[str, Any] = {
        "t": torch.zeros(3),
        "l": [torch.zeros(2, 2), 0],
        "s": torch.tensor(0),
        "p": nn.Parameter(torch.zeros(2)),
    }
    top = torch.zeros(5)
    restored(storage, {"x": target, "top": top})
    tensors = [target["t"], target["l"][0], target["s"], target["p"], top]
    assert all(direct(storage, tensor) for tensor in tensors)
    assert [t.tolist() for t in tensors] == [
        v.tolist() for v in (value["t"], value["l"][0], value["s"], value["p"], torch.ones(5))
    ]


def test_views_of_larger_memory_are_read_into_where_they_are() -> None:
    """A contiguous slice of somebody's buffer, and a tensor over a NumPy array, are filled without touching the rest."""
    buffer, array = torch.zeros(10), np.zeros(4, dtype=np.float32)
    storage = saved({"x": {"slice": torch.ones(4), "array": torch.full((4,), 2.0)}})
    target = {"slice": buffer[3:7], "array": torch.from_numpy(array)}
    restored(storage, {"x": target})
    assert all(direct(storage, tensor) for tensor in target.values())
    assert buffer.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    assert array.tolist() == [2, 2, 2, 2]


def test_read_only_arrays_are_written_as_torch_writes_them() -> None:
    """NumPy's flag says nothing to torch: such a tensor is filled, as its own copy_() would fill it."""
    array = np.zeros(4, dtype=np.float32)
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of exactly this
        target = torch.from_numpy(array)
    restored(saved({"t": torch.ones(4)}), {"t": target})
    assert target.tolist() == [1, 1, 1, 1]


# -- what is not -----------------------------------------------------------------------------------------------


class Prefixing(nn.Module):
    """A module that turns its weight round when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(3, 3)
        self.turned = nn.Linear(3, 3)
        hooked: Any = self.turned
        hooked.register_load_state_dict_pre_hook(self._turn)

    @staticmethod
    def _turn(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        state[f"{prefix}weight"] = state[f"{prefix}weight"].t()


class Overriding(nn.Module):
    """A module that loads twice what was stored."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(2 * state[f"{prefix}weight"])


class Own(nn.Module):
    """A module with a load_state_dict() of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
        """Loads the difference."""
        with torch.no_grad():
            self.weight.sub_(state["weight"])


def test_hooks_of_a_module_see_what_was_stored() -> None:
    """What a pre-hook, an override or a load_state_dict() of its own makes of the stored values is what counts."""
    source, target = Prefixing(), Prefixing()
    storage = saved({"m": source, "o": Overriding(), "own": Own()})
    overriding, own = Overriding(), Own()
    restored(storage, {"m": target, "o": overriding, "own": own})
    assert torch.equal(target.turned.weight, source.turned.weight.t())
    assert torch.equal(target.plain.weight, source.plain.weight)
    assert direct(storage, target.plain.weight)
    assert not direct(storage, target.turned.weight)
    assert overriding.weight.tolist() == [2, 2, 2]
    assert own.weight.tolist() == [0, 0, 0]


class Copied:
    """A Stateful object whose state dict is made up, and which keeps what it is given."""

    def __init__(self, value: float) -> None:
        self.tensor = torch.full((3,), value)
        self.given: Any = None

    def state_dict(self) -> dict[str, Any]:
        """Its memory itself."""
        return {"t": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps it."""
        self.given = state["t"]


def test_other_stateful_objects_get_fresh_tensors() -> None:
    """Their state dict may be a copy: what they own is left for them to change."""
    storage = saved({"x": Copied(1.0), "deep": {"in": [Copied(2.0)]}})
    top, deep = Copied(0.0), Copied(0.0)
    restored(storage, {"x": top, "deep": {"in": [deep]}})
    for held, value in ((top, 1.0), (deep, 2.0)):
        assert held.tensor.tolist() == [0, 0, 0]
        assert held.given.tolist() == [value] * 3
        assert held.given.data_ptr() != held.tensor.data_ptr()


def _shared_by_two() -> tuple[dict[str, Any], dict[str, Any]]:
    memory = torch.zeros(4)
    return {"a": torch.ones(4), "b": torch.full((4,), 2.0)}, {"a": memory, "b": memory}


def _partly_shared() -> tuple[dict[str, Any], dict[str, Any]]:
    memory = torch.zeros(9)
    state = {"a": torch.ones(4), "b": torch.full((4,), 2.0), "c": torch.full((3,), 3.0), "far": torch.ones(2)}
    return state, {"a": memory[:4], "b": memory[2:6], "c": memory[5:8], "far": torch.zeros(2)}


def _one_inside_another() -> tuple[dict[str, Any], dict[str, Any]]:
    memory = torch.zeros(9)
    state = {"a": torch.ones(9), "b": torch.full((1,), 2.0), "c": torch.full((2,), 3.0)}
    return state, {"a": memory, "b": memory[2:3], "c": memory[7:]}


def _interleaved() -> tuple[dict[str, Any], dict[str, Any]]:
    memory = torch.zeros(8)
    return {"a": torch.ones(4), "b": torch.full((4,), 2.0)}, {"a": memory[::2], "b": memory[1::2]}


def _untied() -> tuple[dict[str, Any], dict[str, Any]]:
    one = torch.randn(3)
    return {"a": one, "b": one}, {"a": torch.zeros(3), "b": torch.zeros(3)}


def _missing_in_the_target() -> tuple[dict[str, Any], dict[str, Any]]:
    one = torch.randn(3)
    return {"a": one, "b": one}, {"a": torch.zeros(3)}


def _layouts() -> tuple[dict[str, Any], dict[str, Any]]:
    state = {
        "last": torch.randn(2, 3, 4, 5), "t": torch.randn(3, 4), "half": torch.randn(5), "conj": torch.randn(3) + 1j,
        "long": torch.arange(3), "zero": torch.empty(0, 3), "scalar": torch.tensor(3.0),
    }  # fmt: skip
    target = {
        "last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), "t": torch.zeros(4, 3).t(),
        "half": torch.zeros(5, dtype=torch.float16), "conj": torch.zeros(3, dtype=torch.complex64).conj(),
        "long": torch.zeros(3, dtype=torch.int32), "zero": torch.empty(0, 3), "scalar": torch.tensor(0.0),
    }  # fmt: skip
    return state, target


class Mine(torch.Tensor):
    """Somebody's own kind of tensor."""


def _subclass() -> tuple[dict[str, Any], dict[str, Any]]:
    return {"a": torch.ones(3)}, {"a": torch.zeros(3).as_subclass(Mine)}


def _tied_to_what_is_kept() -> tuple[dict[str, Any], dict[str, Any]]:
    one = torch.randn(3)
    holder, other = Copied(0.0), Copied(0.0)
    holder.tensor = one
    return {"a": one, "held": holder}, {"a": torch.zeros(3), "held": other}


AWKWARD = [
    _shared_by_two, _partly_shared, _one_inside_another, _interleaved, _untied, _missing_in_the_target, _layouts,
    _subclass, _tied_to_what_is_kept,
]  # fmt: skip


def shown(value: Any) -> Any:
    """Everything that can be seen of a value."""
    if isinstance(value, dict):
        return {key: shown(item) for key, item in value.items()}
    if isinstance(value, Copied):
        return value.tensor.tolist(), value.given.tolist()
    return type(value), value.dtype, value.stride(), value.tolist(), value.is_conj()


@pytest.mark.parametrize("make", AWKWARD, ids=lambda make: make.__name__)
def test_the_outcome_is_that_of_reading_first_and_copying_then(make: Callable[[], Any]) -> None:
    """Shared and overlapping memory, other layouts and dtypes, ties on one side only: in place or not is the same."""
    outcomes = []
    for in_place in (True, False):
        torch.manual_seed(1)
        state, target = make()
        storage = saved({"x": state})
        restored(storage, {"x": target}, in_place=in_place)
        outcomes.append(shown(target))
        # Nothing that was handed out may hang on memory that something else was filled from.
        for tensor in (t for t in target.values() if isinstance(t, torch.Tensor) and t.numel()):
            tensor.zero_()
        outcomes.append(shown(target))
    assert outcomes[:2] == outcomes[2:]


def test_memory_that_two_components_share_is_written_in_order() -> None:
    """The same module under two names, saved with two values: the later component wins, as it always has."""
    storage = saved({"one": {"w": torch.ones(3)}, "two": {"w": torch.full((3,), 2.0)}})
    for in_place in (True, False):
        memory = torch.zeros(3)
        restored(storage, {"two": {"w": memory}, "one": {"w": memory}}, in_place=in_place)
        assert memory.tolist() == [1, 1, 1]
        assert not direct(storage, memory)


def test_without_strict_what_does_not_fit_is_left_as_it_is() -> None:
    """Tensors of another shape, and the state of an optimizer with other groups, are not touched by any read."""
    model: Any = net()
    storage = saved({"model": model, "optimizer": stepped(model, torch.optim.SGD), "t": torch.ones(3)})
    other: Any = net(bias=False)
    optimizer = torch.optim.SGD(
        [{"params": list(other.parameters())[:2]}, {"params": list(other.parameters())[2:]}], momentum=0.5
    )
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [named["momentum_buffer"] for named in optimizer.state.values()]
    tensor = torch.zeros(2)
    restored(storage, {"model": other, "optimizer": optimizer, "t": tensor}, strict=False)
    assert tensor.tolist() == [0, 0]
    assert all(torch.equal(moment, torch.ones_like(moment)) for moment in moments)
    assert direct(storage, other[0].weight)
    assert torch.equal(other[0].weight, model[0].weight)


# -- refused before anything moves -----------------------------------------------------------------------------


def _meta() -> Any:
    return torch.zeros(3, device="meta")


def _meta_module() -> Any:
    with torch.device("meta"):
        return nn.Linear(3, 1, bias=False)


def _fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(3)


def _quantized() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch._empty_affine_quantized([3], scale=0.1, zero_point=0, dtype=torch.qint8)


def _inference() -> Any:
    with torch.inference_mode():
        return torch.zeros(3)


UNWRITABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "meta": (_meta, "x: the state's tensor is on the meta device and has no memory"),
    "meta module": (_meta_module, r"x\.weight: the state's tensor is on the meta device"),
    "fake": (_fake, "x: the state's tensor is a fake tensor"),
    "sparse": (lambda: torch.zeros(3).to_sparse(), r"x: the state's tensor has layout torch\.sparse_coo"),
    "quantized": (_quantized, "x: the state's tensor is quantized"),
    "inference": (_inference, r"x: the state's tensor was made under torch\.inference_mode"),
    "expanded": (lambda: torch.zeros(1).expand(3), "x: the state's tensor shows one element in several places"),
}


@pytest.fixture(params=[True, False], ids=["strict", "not strict"])
def strict(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Either way."""
    return request.param  # type: ignore[no-any-return]  # of the params above


@pytest.mark.parametrize("name", UNWRITABLE)
def test_tensors_that_cannot_be_written_are_refused_by_name(name: str, strict: bool) -> None:
    """Meta, fake, sparse, quantized, inference and expanded targets: an error with the path, and no byte has moved."""
    make, message = UNWRITABLE[name]
    target = make()
    stored: Any = nn.Linear(3, 1, bias=False) if isinstance(target, nn.Module) else torch.ones(3)
    storage = saved({"first": torch.ones(2), "x": stored})
    first = torch.zeros(2)
    with pytest.raises(StateMismatchError, match=rf"nothing was changed:\n  {message}"):
        restored(storage, {"first": first, "x": target}, strict=strict)
    assert storage.arrived == {}
    assert first.tolist() == [0, 0]


def test_inference_tensors_are_restored_inside_inference_mode() -> None:
    """Where torch itself may write into them, so may a restore."""
    storage = saved({"x": torch.ones(3), "m": nn.Linear(2, 2)})
    with torch.inference_mode():
        target, module = torch.zeros(3), nn.Linear(2, 2)
        restored(storage, {"x": target, "m": module})
    assert target.tolist() == [1, 1, 1]
    assert direct(storage, target)


def test_a_lazy_module_takes_its_shape_from_the_checkpoint() -> None:
    """Parameters that do not exist yet are made by the module itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says that lazy modules are new
        lazy = nn.LazyLinear(4)
    source = nn.Linear(3, 4)
    storage = saved({"m": source})
    restored(storage, {"m": lazy})
    assert torch.equal(lazy.weight, source.weight)
    assert torch.equal(lazy.bias, source.bias)
