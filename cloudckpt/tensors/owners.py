"""Which memory an optimizer's step writes to, and whether its step can be seen coming."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch.optim.optimizer import Optimizer

__all__ = ["captured_steps", "covered", "is_capturing", "storages", "why_not"]

#: By far the most tensors are one of these, and made of one piece of memory.
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})

#: Optimizers whose step was seen to be captured in a CUDA graph: a replay calls no hook and moves no counter.
captured_steps: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def storages(tensor: torch.Tensor) -> list[int]:
    """Names of the memory behind a tensor; of its parts, if it is made of several (DTensor and its kind)."""
    if tensor.layout != torch.strided:
        return []
    if type(tensor) not in _PLAIN and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        parts = [getattr(tensor, name) for name in names]
        return [key for part in parts if isinstance(part, torch.Tensor) for key in storages(part)]
    return [tensor.untyped_storage()._cdata]  # noqa: SLF001 - unlike data_ptr(), also of empty ones


def covered(optimizers: Iterable[Optimizer]) -> dict[int, list[torch.Tensor]]:
    """Storage -> the tensors over it that these optimizers hold as parameters and in their state.

    A group's other tensors, such as a learning rate on the device, belong to schedulers: they change at any time.
    """
    found: dict[int, list[torch.Tensor]] = {}
    for optimizer in optimizers:
        for tensor in _tensors([[group["params"] for group in optimizer.param_groups], optimizer.state]):
            if not tensor.is_inference():
                for key in storages(tensor):
                    found.setdefault(key, []).append(tensor)
    return found


def is_capturing() -> bool:
    """Whether this thread's work is being recorded into a CUDA graph instead of run."""
    started: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch's own
    return started and torch.cuda.is_current_stream_capturing()


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in (*value.keys(), *value.values()):
            yield from _tensors(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _tensors(inner)


def why_not(optimizers: Sequence[object], tensors: Iterable[torch.Tensor]) -> str | None:
    """Why a state must be copied at once instead of beside training; ``None`` if it need not.

    Args:
        optimizers: whatever in the state optimizes.
        tensors: what is to be copied.
    """
    if not optimizers:
        return "the state holds no torch optimizer, and nothing else tells when the weights change"
    for optimizer in optimizers:
        reason = _why_not_seen(optimizer)
        if reason is not None:
            return reason
    for device in {tensor.device for tensor in tensors}:
        if device.type not in {"cpu", "cuda"}:
            return f"the state holds tensors on {device}, and only copies from the CPU and CUDA devices can overlap"
    if is_capturing():
        return "a CUDA graph is being captured"
    return None


def _why_not_seen(optimizer: object) -> str | None:
    kind = type(optimizer).__qualname__
    if not isinstance(optimizer, Optimizer):
        return f"{kind} is no torch.optim.Optimizer: its steps call no hook"
    if not _calls_hooks(optimizer):
        return f"the step of {kind} was replaced by one that does not go through torch's step hooks"
    if optimizer in captured_steps or any(group.get("capturable") for group in optimizer.param_groups):
        return (
            f"the step of {kind} can be (or was) captured in a CUDA graph (capturable=True), and replays call no hook"
        )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                return (
                    f"a parameter of {kind} has a post-accumulate-grad hook, which may step in the middle of backward: "
                    "there is nothing to overlap with"
                )
    return None


def _calls_hooks(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step(...)`` ends in the class's step, wrapped by torch to call the hooks.

    An instance may have a ``step`` of its own: LR schedulers and ``torch.compile`` wrap it and say what they wrap.
    """
    hooked = type(optimizer).step
    if not getattr(hooked, "hooked", False):
        return False
    step: object = optimizer.step
    while step is not None:
        if getattr(step, "__func__", step) is hooked:
            return True
        step = getattr(step, "__wrapped__", None)
    return False
