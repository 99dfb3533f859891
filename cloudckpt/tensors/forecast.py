"""How much a state will grow at the first optimizer step, so that its memory is made before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from cloudckpt.tensors.planning import Look
from cloudckpt.tensors.train_state import OptimizerState

__all__ = ["expected_share", "optimizer_growth_bytes"]

#: Optimizer class -> how many tensors like the parameter its state holds; what depends on options is in ``_factor``.
_FACTORS = {
    "ASGD": 1, "Adadelta": 2, "Adafactor": 0, "Adagrad": 1, "Adam": 2, "AdamW": 2, "Adamax": 2, "LBFGS": 0, "Lion": 1,
    "Muon": 1, "NAdam": 2, "RAdam": 2, "RMSprop": 1, "Rprop": 2, "SGD": 0, "SparseAdam": 2,
}  # fmt: skip

#: Of an unknown optimizer: most are kin to Adam. What was too much is given back at the first save.
_UNKNOWN = 2

#: What no optimizer is in, looked at first: a state may hold a hundred thousand of them.
_LEAVES = (torch.Tensor, str, int, float)

#: What a small tensor beside them, and three entries in a header, take for each parameter.
_EACH_BYTES = 1024


def optimizer_growth_bytes(state: Mapping[str, object]) -> int:
    """Bytes that the optimizers in a state will add once they have stepped; 0 for those that have."""
    growth = 0
    seen: set[int] = set()
    for optimizer in _optimizers(state, seen):
        # A wrapper may have neither: it passes its state dict on, and has nothing of its own that could grow.
        held: Mapping[Any, Any] = getattr(optimizer, "state", {})
        for group in getattr(optimizer, "param_groups", ()):
            factor = _factor(type(optimizer), group)
            for parameter in group["params"]:
                if factor and parameter.requires_grad and not held.get(parameter):
                    growth += factor * parameter.numel() * parameter.element_size() + _EACH_BYTES
    return growth


def _optimizers(value: object, seen: set[int]) -> Iterator[torch.optim.Optimizer]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.optim.Optimizer):
        yield value
    elif isinstance(value, OptimizerState):
        yield from value.optimizers
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            if not isinstance(inner, _LEAVES):
                yield from _optimizers(inner, seen)


def _factor(kind: type, group: Mapping[str, Any]) -> int:
    known = next((_FACTORS[base.__name__] for base in kind.__mro__ if base.__name__ in _FACTORS), _UNKNOWN)
    return known + sum(bool(group.get(option)) for option in ("amsgrad", "momentum", "centered") if _adds(kind, option))


def _adds(kind: type, option: str) -> bool:
    # Muon, for one, has a momentum that is already counted.
    names = {base.__name__ for base in kind.__mro__}
    return bool(names & ({"SGD", "RMSprop"} if option in {"momentum", "centered"} else {"Adam", "AdamW"}))


def expected_share(look: Look, world_size: int) -> tuple[int, bool]:
    """About how many bytes one rank of many will write of what it has, and whether any of it is on a GPU.

    What is sharded is its own; what every rank has whole is spread over them.
    """
    own = spread = 0
    on_gpu = False
    for component, tensors in look.data.items():
        for number, tensor in enumerate(tensors):
            size = tensor.numel() * tensor.element_size() + _EACH_BYTES
            on_gpu = on_gpu or tensor.is_cuda
            if look.boxes is None or look.boxes[component][number].lengths == look.boxes[component][number].shape:
                spread += size
            else:
                own += size
    return own + -(-spread // world_size), on_gpu
