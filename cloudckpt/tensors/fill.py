"""Loaded values into the caller's own objects, in place; what does not fit was left out before (see ``fit``)."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from cloudckpt.core.values import SKIP
from cloudckpt.errors import StateMismatchError
from cloudckpt.tensors.extents import narrowed
from cloudckpt.tensors.leaves import has_state, is_optimizer
from cloudckpt.tensors.memory import copy_bits
from cloudckpt.tensors.per_rank import PerRank
from cloudckpt.tensors.sharded import has_parts, held_parts, is_in_shards, is_many, like, local_boxes
from cloudckpt.tensors.targets import same_groups, same_memory
from cloudckpt.tensors.train_state import ModelState, OptimizerState, is_by_name

__all__ = ["fill"]


def fill(state: Mapping[str, object], loaded: Mapping[str, Any], *, strict: bool) -> None:
    """Fill every component of ``state`` that ``loaded`` has, in place. What does not fit is not in there any more.

    Tensors of ``loaded`` that already have the memory of the tensor they are for cost nothing: torch itself copies
    nothing onto the same memory, so that ``load_state_dict`` runs with all of its hooks and moves no byte.

    Raises:
        StateMismatchError: an object refused its state; says which components were already filled.
    """
    filled: list[str] = []
    for name, target in state.items():
        if name not in loaded:
            continue
        try:
            if _lacks_own_part(target, loaded[name]):
                continue
            value = _fill(target, loaded[name], strict=strict)
        except (StateMismatchError, TypeError, ValueError, KeyError, RuntimeError, AttributeError) as exc:
            raise StateMismatchError(
                f"{name} refused the state that was saved for it: {exc}. Already restored: "
                f"{', '.join(filled) or 'nothing'}; start again from fresh objects"
            ) from exc
        if value is not target:
            if not isinstance(state, MutableMapping):
                raise StateMismatchError(f"{name} is a plain value, and the state is read-only: pass a dict")
            state[name] = value
        filled.append(name)


def _lacks_own_part(target: object, stored: Any) -> bool:
    """Whether something in it was saved for each rank and not for this one, and the object takes it only as a whole."""
    if isinstance(target, PerRank) or (
        isinstance(target, MutableMapping | list) and isinstance(stored, Mapping | list)
    ):
        return False
    return _has_gap(stored)


def _has_gap(stored: Any) -> bool:
    if isinstance(stored, Mapping):
        return any(map(_has_gap, stored.values()))
    if isinstance(stored, list | tuple):
        return any(map(_has_gap, stored))
    return stored is SKIP


def _fill(target: Any, stored: Any, *, strict: bool) -> Any:  # noqa: C901, PLR0911 - a table of kinds
    if isinstance(target, PerRank):
        if stored is not SKIP:
            target.value = _fill(target.value, stored, strict=strict)
        return target
    if isinstance(target, torch.nn.Module | ModelState | OptimizerState):
        _load(target, stored, strict=strict)
        return target
    if has_state(target):
        if strict or not is_optimizer(target) or same_groups(target, stored):
            target.load_state_dict(stored)  # otherwise it was warned about
        return target
    if isinstance(target, torch.Tensor):
        return _fill_tensor(target, stored)
    if isinstance(target, MutableMapping) and isinstance(stored, Mapping):
        for key, value in stored.items():
            own = target.get(key)
            if not _lacks_own_part(own, value):
                target[key] = _fill(own, value, strict=strict) if key in target else value
        return target
    if isinstance(target, list) and isinstance(stored, list):
        same = len(target) == len(stored)
        target[:] = [_fill(t, s, strict=strict) for t, s in zip(target, stored, strict=True)] if same else stored
        return target
    return stored


def _load(target: torch.nn.Module | ModelState | OptimizerState, stored: Any, *, strict: bool) -> None:
    """With ``strict=False`` something of another kind was warned about, and is left."""
    if isinstance(target, OptimizerState):
        if is_by_name(stored):
            target.load_state_dict(stored, strict=strict)
    elif isinstance(stored, Mapping):
        target.load_state_dict(_in_parts(target, stored), strict=strict)


def _fill_tensor(target: torch.Tensor, stored: Any) -> torch.Tensor:
    if not isinstance(stored, torch.Tensor) or target.shape != stored.shape:
        return target  # strict=False: it was warned about
    if same_memory(target, stored):
        return target  # read in place
    with torch.no_grad():
        if has_parts(target) and not has_parts(stored):
            _cut(stored, target, held_parts(target))
        elif is_in_shards(target):
            for own, new in zip(held_parts(target), held_parts(stored), strict=True):
                own.copy_(new)
        elif target.dtype == stored.dtype and not has_parts(target):
            copy_bits(target, stored)
        else:
            target.copy_(stored)
    return target


def _in_parts(module: torch.nn.Module | ModelState, stored: Any) -> dict[str, Any]:
    """A state dict with distributed tensors wherever the module has some: torch copies between none of the two kinds.

    Whole ones come of a stored tensor that is wanted both ways. torch's own kind of mapping keeps its ``_metadata``.
    """
    own = module.state_dict() if is_many() else {}
    for name, target in own.items():
        value = stored.get(name)
        if not isinstance(target, torch.Tensor) or not isinstance(value, torch.Tensor):
            continue
        if has_parts(target) and not has_parts(value):
            parts = [torch.empty_like(part, dtype=value.dtype) for part in held_parts(target)]
            _cut(value, target, parts)
            stored[name] = like(target, parts[0] if parts else value[:0])
    found: dict[str, Any] = stored
    return found


def _cut(whole: torch.Tensor, target: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
    # A DTensor without elements here has memory for none, and no box.
    for part, (offsets, lengths) in zip(parts, local_boxes(target), strict=False):
        part.copy_(narrowed(whole, offsets, lengths))
