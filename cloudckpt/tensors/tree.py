"""The caller's state taken apart: tensors by name for the payload, everything else as JSON for the index.

A *component* is a top-level key of the state. Names are the component's own state-dict names: the path inside
it, joined with dots. Tied tensors (the same memory seen the same way) are stored once per component, with
their other names as aliases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cloudckpt.core import keys
from cloudckpt.core.values import Codec, Handler, Path
from cloudckpt.errors import ConfigError, FormatError
from cloudckpt.tensors.leaves import (
    ArrayLeaf,
    EnumLeaf,
    PickleLeaf,
    ScalarLeaf,
    StatefulLeaf,
    TensorLeaf,
    TorchLeaf,
    has_state,
)
from cloudckpt.tensors.memory import PLAIN
from cloudckpt.tensors.per_rank import NoRankLeaf, PerRankLeaf
from cloudckpt.tensors.sharded import held_parts

__all__ = ["FlatState", "Identity", "check_components", "encode_value", "flatten", "identity_of", "unflatten"]

#: What makes two tensors the same memory seen the same way.
Identity = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class FlatState:
    """A state taken apart.

    Attributes:
        structure: component -> JSON node, tensors replaced by references.
        tensors: component -> name -> the tensor, each memory once.
        aliases: component -> name -> the name under which the tied tensor is stored.
        pickled: whether any leaf had to be pickled.
    """

    structure: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)
    pickled: bool = False


@dataclass(slots=True)
class _Component:
    name: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    seen: dict[int, list[str]] = field(default_factory=dict)

    def store(self, tensor: torch.Tensor, path: Path) -> str:
        wanted = path[1] if len(path) == 2 else ".".join(map(str, path[1:])) or self.name
        name = self._free_name(wanted if type(wanted) is str else str(wanted))
        first = self._tied_to(tensor, name) if 0 not in tensor.shape else None
        if first is None:
            self.tensors[name] = tensor
        else:
            self.aliases[name] = first
        return name

    def _tied_to(self, tensor: torch.Tensor, name: str) -> str | None:
        """The name of the same memory seen the same way. The address tells nearly all tensors apart, and is cheap."""
        held = held_parts(tensor) if type(tensor) not in PLAIN else (tensor,)
        address = held[0].data_ptr() if held else 0
        others = self.seen.get(address) if address else None
        if others is None:
            self.seen[address] = [name]
            return None
        identity = identity_of(tensor)
        for other in others:
            if identity_of(self.tensors[other]) == identity:
                return other
        others.append(name)
        return None

    def _free_name(self, wanted: str) -> str:
        # {"a": {"b": t}, "a.b": u} spells the same name twice; the structure refers to each by the name it got.
        if wanted not in self.tensors and wanted not in self.aliases:
            return wanted
        numbered = (f"{wanted}~{number}" for number in itertools.count(1))
        return next(name for name in numbered if name not in self.tensors and name not in self.aliases)


def identity_of(whole: torch.Tensor) -> Identity:
    """Equal for tied tensors: the same memory seen the same way. Of a sharded one, by the first part of it here."""
    (tensor, *_) = held_parts(whole)
    return (
        whole.shape,
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )


def flatten(state: Mapping[str, object], *, allow_pickle: bool = False, rank: int = 0) -> FlatState:
    """Take a state apart. Nothing is copied: the tensors are the caller's own.

    Args:
        state: component -> object with a state dict, tensor, or plain values, nested as they come.
        allow_pickle: pickle what nothing else can store, instead of refusing it.
        rank: whose state it is; what is declared ``PerRank`` is stored under this number.

    Raises:
        TypeError: something cannot be stored; names its path and the ways out.
        ConfigError: the state is empty, or a component's name cannot be used.
    """
    check_components(state)
    flat = FlatState()
    pickled: list[bool] = []
    for name, value in state.items():
        component = _Component(name)
        codec = _codec(
            component.store,
            _no_tensor,
            _no_tensor,
            allow_pickle=allow_pickle,
            note=lambda: pickled.append(True),
            per_rank=PerRankLeaf(rank),
        )
        own: object = value.state_dict() if has_state(value) else value  # type: ignore[attr-defined]  # has_state
        flat.structure[name] = codec.encode(own, (name,))
        flat.tensors[name] = component.tensors
        flat.aliases[name] = component.aliases
    return FlatState(flat.structure, flat.tensors, flat.aliases, pickled=bool(pickled))


def encode_value(
    value: object, path: Path, store: Callable[[torch.Tensor, Path], str], *, allow_pickle: bool
) -> tuple[Any, bool]:
    """The JSON node of one value out of a state, and whether anything in it had to be pickled.

    Args:
        path: where in the state it stands, the component first.
        store: takes each tensor and its path, gives the name it is stored under.

    Raises:
        TypeError: something in it cannot be stored; names its path and the ways out.
    """
    pickled: list[bool] = []
    codec = _codec(
        store,
        _no_tensor,
        _no_tensor,
        allow_pickle=allow_pickle,
        note=lambda: pickled.append(True),
        per_rank=NoRankLeaf(),
    )
    return codec.encode(value, path), bool(pickled)


def unflatten(
    structure: Mapping[str, Any],
    tensor: Callable[[str, str], torch.Tensor],
    array: Callable[[str, str], torch.Tensor],
    *,
    allow_pickle: bool = False,
    per_rank: PerRankLeaf | None = None,
) -> dict[str, Any]:
    """The state's values again.

    Args:
        structure: component -> JSON node, as ``flatten`` made it.
        tensor: gives the tensor of a component and a name. Nothing looks into it here.
        array: the same for an array's bytes: memory of its own, which may be filled later.
        allow_pickle: load pickled leaves, which runs code from the checkpoint.
        per_rank: whose part of what each rank has for itself; by default all ranks', in a list.

    Raises:
        FormatError: the structure is malformed.
        ConfigError: a leaf was pickled and ``allow_pickle`` is not set.
        StateMismatchError: it was saved by another number of ranks, and has parts that belong to one each.
    """
    values: dict[str, Any] = {}
    for name, node in structure.items():
        codec = _codec(
            _no_store,
            partial(tensor, name),
            partial(array, name),
            allow_pickle=allow_pickle,
            per_rank=per_rank or PerRankLeaf(None),
        )
        values[name] = codec.decode(node, (name,))
    return values


def _codec(
    store: Callable[[torch.Tensor, Path], str],
    tensor: Callable[[str], torch.Tensor],
    array: Callable[[str], torch.Tensor],
    *,
    allow_pickle: bool,
    per_rank: Handler,
    note: Callable[[], None] = lambda: None,
) -> Codec:
    plain: list[Handler] = [TorchLeaf(), ScalarLeaf(), EnumLeaf()]
    handlers: list[Handler] = [per_rank, ArrayLeaf(store, array), StatefulLeaf(), *plain]
    return Codec([*handlers, PickleLeaf(allow_pickle, note, Codec(plain))], leaves=[TensorLeaf(store, tensor)])


def _no_tensor(name: str) -> torch.Tensor:
    raise FormatError(f"{name!r}: no tensor is read while a state is taken apart")


def _no_store(tensor: torch.Tensor, path: Path) -> str:
    raise TypeError(tensor, path)


def check_components(state: Mapping[str, object]) -> None:
    """Refuse what cannot be the components of a checkpoint.

    Raises:
        ConfigError: there are none, or a name cannot be used.
    """
    if not isinstance(state, Mapping) or not state:
        raise ConfigError(
            'the state must be a mapping of names to objects, such as {"model": model, "optimizer": optimizer}; got '
            f"{'an empty one' if isinstance(state, Mapping) else type(state).__name__}"
        )
    folded: dict[str, str] = {}
    for name in state:
        if not isinstance(name, str):
            raise ConfigError(f"component {name!r}: a top-level key of the state must be a string")
        try:
            keys.payload_name(name, 0, 1)
        except (FormatError, UnicodeEncodeError) as exc:
            raise ConfigError(f"component {name!r} cannot be used as a name: {exc}") from exc
        other = folded.setdefault(name.casefold(), name)
        if other != name:
            raise ConfigError(
                f"components {other!r} and {name!r} differ only by case: a disk that ignores case would mix "
                "them. Rename one"
            )
