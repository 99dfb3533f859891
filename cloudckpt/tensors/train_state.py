"""The state of a training loop, named so that it fits any number of ranks.

An optimizer's own state dict numbers its parameters, and the numbers of a pipeline stage or of another grouping mean
other parameters. PyTorch's ``torch.distributed.checkpoint.state_dict`` names them as the model does, through FSDP, DDP,
``torch.compile`` and tensor parallelism; these classes put it behind ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from types import ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["ModelState", "OptimizerState", "RngState", "TrainState", "is_by_name", "rng_state"]


def _by_name() -> ModuleType:
    """DCP's part for states by name. To import it takes as long as the rest of torch: not if nobody asks for it."""
    from torch.distributed.checkpoint import state_dict  # noqa: PLC0415 - takes as long as importing torch

    return state_dict


class ModelState:
    """A model's parameters and buffers by their names in the plain model, whatever is wrapped around it."""

    def __init__(self, model: torch.nn.Module) -> None:
        _by_name()
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """The tensors themselves, not copies; sharded ones as DTensors."""
        found: dict[str, Any] = _by_name().get_model_state_dict(self.model)
        return found

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Copy into the model; ``strict``: whether the names must be exactly the model's."""
        options = _by_name().StateDictOptions(strict=strict)
        _by_name().set_model_state_dict(self.model, state, options=options)


class OptimizerState:
    """The state of one or several optimizers, by the names of the model's parameters."""

    def __init__(self, model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        _by_name()
        self.model = model
        self.optimizers = list(optimizers)

    def state_dict(self) -> dict[str, Any]:
        """Moments and options. An optimizer that has not stepped yet gets some here, until it steps."""
        fresh = [optimizer for optimizer in self.optimizers if not optimizer.state]
        found: dict[str, Any] = {"state": {}, "param_groups": []}
        if self.optimizers:  # a stage without parameters has none, and torch asks for one
            found = _by_name().get_optimizer_state_dict(self.model, self.optimizers)
        for optimizer in fresh:
            _forget_at_first_step(optimizer)
        return found

    def disagreements(self, state: Mapping[str, Any]) -> list[str]:
        """Parameters whose options were not saved, or that are in one group now and had different ones; sentences."""
        own, stored = _options_by_name(self.state_dict()), _options_by_name(state)
        lost = [name for name in own if name not in stored]
        found = [f"no options were saved for {', '.join(lost[:_NAMES_SHOWN])}"] if lost else []
        firsts: dict[int, tuple[str, Mapping[str, Any]]] = {}
        for name, group in own.items():
            if name in stored:
                first, options = firsts.setdefault(id(group), (name, stored[name]))
                if options is not stored[name] and (what := _first_difference(options, stored[name])):
                    found.append(f"{first} and {name} are in one group, and were saved with different {what}")
        return found

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Give it to the optimizers; ``strict=False`` leaves out what the model has no parameter for.

        Options come by the parameters' names, however these are grouped here.
        """
        if strict and (found := self.disagreements(state)):
            raise ValueError("; ".join(found))  # of options that are tensors, now that these have values
        options = _options_by_name(state)
        for optimizer in self.optimizers:
            self._load(optimizer, state["state"], options, strict=strict)

    def _load(
        self,
        optimizer: torch.optim.Optimizer,
        moments: Mapping[str, Any],
        options: Mapping[str, Mapping[str, Any]],
        *,
        strict: bool,
    ) -> None:
        own = OptimizerState(self.model, [optimizer]).state_dict()
        groups = [group for group in own["param_groups"] if group["params"]]
        listed: list[dict[str, Any]] = []
        for group in groups:
            saved = next((options[name] for name in group["params"] if name in options), {})
            # A copy for each: schedulers write into a learning rate that is a tensor. What was not saved stays.
            listed.append({**group, **copy.deepcopy(saved)})
        names = [name for group in groups for name in group["params"]]
        kept = {name: moments[name] for name in names if name in moments}
        # Older torch wants some for every parameter, whatever is allowed: those it has, to begin anew after that.
        anew = {
            name: own["state"][name] for name in names if not strict and name not in moments and name in own["state"]
        }
        holders = {
            id(value): parameter
            for parameter, held in optimizer.state.items()
            for value in held.values()
            if isinstance(value, torch.Tensor)
        }
        with _without_empty_groups(optimizer):
            _by_name().set_optimizer_state_dict(
                self.model,
                optimizer,
                {"state": kept | anew, "param_groups": listed},
                options=_by_name().StateDictOptions(strict=strict),
            )
        for value in (value for named in anew.values() for value in named.values()):
            if (parameter := holders.get(id(value))) is not None:
                optimizer.state.pop(parameter, None)


@contextlib.contextmanager
def _without_empty_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Nothing is stored by name for a group without parameters, and torch takes no more than one of them."""
    groups = optimizer.param_groups
    empty = [number for number, group in enumerate(groups) if not group["params"]]
    if empty:
        optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield
    finally:
        for number in empty:
            optimizer.param_groups.insert(number, groups[number])


#: More names than this say nothing new.
_NAMES_SHOWN = 10
#: What a group says of its parameters, beside its options.
_MEMBERS = frozenset({"params", "param_names"})


def is_by_name(stored: Any) -> bool:
    """Whether a loaded value is the state of optimizers by the names of parameters."""
    return (
        isinstance(stored, Mapping)
        and isinstance(stored.get("param_groups"), list)
        and isinstance(stored.get("state"), Mapping)
        and all(isinstance(moments, Mapping) for moments in stored["state"].values())
    )


def _options_by_name(state: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each parameter's options; those of one group are the same object."""
    by_name: dict[str, Mapping[str, Any]] = {}
    for group in state["param_groups"]:
        options = {key: value for key, value in group.items() if key not in _MEMBERS}
        by_name |= dict.fromkeys(group["params"], options)
    return by_name


def _first_difference(one: Mapping[str, Any], two: Mapping[str, Any]) -> str | None:
    for key in sorted({*one, *two}):
        a, b = one.get(key), two.get(key)
        same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        if not same:
            return key
    return None


def _forget_at_first_step(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer begin from nothing, unless it is given a state before its first step.

    torch makes a state by a step with gradients of zero. That counts as a step in Adam's bias correction, and weight
    decay gets into the moments: a training that has been looked at once would go another way than one that has not.
    """
    invented: list[object] = [optimizer.state]

    def forget(stepping: torch.optim.Optimizer, *_: object) -> None:
        # load_state_dict() puts another mapping in its place. The hook stays, since hooks are being called here.
        if invented and invented.pop() is stepping.state:
            stepping.state.clear()

    optimizer.register_step_pre_hook(forget)


class TrainState(MutableMapping[str, Any]):
    """A training loop's state, to be given to ``save`` and ``restore``: a mapping of components.

    ``TrainState(model, optimizer, scheduler=scheduler, rng=PerRank(rng_state()))`` has the components ``model``,
    ``optimizer``, ``scheduler`` and ``rng``. What it stores can be restored on any number of ranks.

    Args:
        model: wrapped in whatever way.
        optimizer: one, several, or None.
        others: further components, as ``save`` takes them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None = None,
        **others: Any,
    ) -> None:
        self._components: dict[str, Any] = {"model": ModelState(model)}
        if optimizer is not None:
            several = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
            self._components["optimizer"] = OptimizerState(model, several)
        self._components |= others

    def __getitem__(self, name: str) -> Any:
        return self._components[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._components[name] = value

    def __delitem__(self, name: str) -> None:
        del self._components[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)


class RngState:
    """The random generators of this process: Python's, NumPy's, torch's, and that of the current GPU."""

    def state_dict(self) -> dict[str, Any]:
        """All of them."""
        found: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - the global one is what people use
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's
            found["cuda"] = torch.cuda.get_rng_state()
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all of them. A GPU's state is left where there is none."""
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])  # noqa: NPY002 - as above
        torch.set_rng_state(state["torch"])
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])


def rng_state() -> RngState:
    """All random generators of this process, as a component: ``{"rng": PerRank(cloudckpt.rng_state())}``."""
    return RngState()
