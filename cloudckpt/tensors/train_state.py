"""The state of a training loop, named so that it fits any number of ranks.

An optimizer's own state dict numbers its parameters, and the numbers of a pipeline stage or of another grouping mean
other parameters. PyTorch's ``torch.distributed.checkpoint.state_dict`` names them as the model does, through FSDP, DDP,
``torch.compile`` and tensor parallelism; these classes put it behind ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import state_dict as dcp_state

__all__ = ["ModelState", "OptimizerState", "RngState", "TrainState", "rng_state"]


class ModelState:
    """A model's parameters and buffers by their names in the plain model, whatever is wrapped around it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        """The tensors themselves, not copies; sharded ones as DTensors."""
        return dcp_state.get_model_state_dict(self.model)

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Copy into the model; ``strict``: whether the names must be exactly the model's."""
        dcp_state.set_model_state_dict(self.model, state, options=dcp_state.StateDictOptions(strict=strict))


class OptimizerState:
    """The state of one or several optimizers, by the names of the model's parameters."""

    def __init__(self, model: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.model = model
        self.optimizers = list(optimizers)

    def state_dict(self) -> dict[str, Any]:
        """Moments and options. An optimizer that has not stepped yet gets some here, until it steps."""
        fresh = [optimizer for optimizer in self.optimizers if not optimizer.state]
        found = dcp_state.get_optimizer_state_dict(self.model, self.optimizers)
        for optimizer in fresh:
            _forget_at_first_step(optimizer)
        return found

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Give it to the optimizers; ``strict=False`` leaves out what the model has no parameter for."""
        if not strict:
            own = {*self.state_dict()["state"]}
            kept = {name: value for name, value in state["state"].items() if name in own}
            groups = [
                {**group, "params": [name for name in group["params"] if name in own]}
                for group in state["param_groups"]
            ]
            state = {"state": kept, "param_groups": groups}
        options = dcp_state.StateDictOptions(strict=strict)
        dcp_state.set_optimizer_state_dict(self.model, self.optimizers, state, options=options)


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
