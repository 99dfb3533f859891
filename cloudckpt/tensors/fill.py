"""Loaded values into the caller's own objects, in place; everything is checked before anything changes."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from cloudckpt.core.values import SKIP, Path, render_path
from cloudckpt.errors import StateMismatchError
from cloudckpt.tensors.leaves import has_state, is_optimizer
from cloudckpt.tensors.memory import copy_bits
from cloudckpt.tensors.per_rank import PerRank
from cloudckpt.tensors.sharded import has_parts
from cloudckpt.tensors.targets import group_sizes, same_groups, same_memory
from cloudckpt.tensors.train_state import ModelState, OptimizerState

__all__ = ["check_fits", "fill"]

#: More names than this say nothing new.
_NAMES_SHOWN = 10


def check_fits(state: Mapping[str, object], loaded: Mapping[str, Any], *, strict: bool, where: str) -> list[str]:
    """What of ``loaded`` does not fit into ``state``; with ``strict`` any of it is refused.

    Args:
        where: the checkpoint's URL, for messages.

    Returns:
        what does not fit, one sentence each: with ``strict=False`` these are warnings.

    Raises:
        StateMismatchError: lists missing, unexpected and mis-shaped names. Nothing was changed.
    """
    problems: list[str] = []
    for name, target in state.items():
        if name not in loaded:
            problems.append(f"{name}: the checkpoint has no such component (it has {', '.join(sorted(loaded))})")
        else:
            _check(target, loaded[name], (name,), problems)
    if problems and strict:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise StateMismatchError(
            f"the state does not fit {where}; nothing was changed:{listed}\nFix the state, name fewer components="
            "[...], or pass strict=False to restore what fits"
        )
    return problems


def _check(target: object, stored: Any, path: Path, problems: list[str]) -> None:  # noqa: C901 - a table of kinds
    here = render_path(path)
    if isinstance(target, PerRank):
        if stored is not SKIP:  # nothing of this rank's was saved, and the caller has allowed that
            _check(target.value, stored, path, problems)
    elif isinstance(target, torch.nn.Module | ModelState):
        _check_named(target.state_dict(), stored, here, problems)
    elif isinstance(target, OptimizerState):
        _check_moments(target, stored, here, problems)
    elif is_optimizer(target):
        _check_optimizer(target, stored, here, problems)
    elif has_state(target):
        return
    elif isinstance(target, torch.Tensor):
        if not isinstance(stored, torch.Tensor) or stored.shape != target.shape:
            problems.append(f"{here}: the state has {_kind(target)}, the checkpoint {_kind(stored)}")
    elif isinstance(target, MutableMapping) and isinstance(stored, Mapping):
        _check_mapping(target, stored, path, problems)
    elif isinstance(target, list) and isinstance(stored, list) and len(target) == len(stored):
        for n, (inner, value) in enumerate(zip(target, stored, strict=True)):
            _check(inner, value, (*path, n), problems)


def _check_mapping(
    target: MutableMapping[Any, Any], stored: Mapping[Any, Any], path: Path, problems: list[str]
) -> None:
    for key in target:
        if key in stored:
            _check(target[key], stored[key], (*path, key), problems)
        else:
            problems.append(f"{render_path((*path, key))}: missing in the checkpoint")


def _check_named(own: Mapping[str, object], stored: Any, here: str, problems: list[str]) -> None:
    if not isinstance(stored, Mapping):
        problems.append(f"{here}: the state has a module, the checkpoint {_kind(stored)}")
        return
    missing = [name for name in own if name not in stored]
    unexpected = [name for name in stored if name not in own]
    other = [
        f"{name} ({_kind(own[name])} here, {_kind(stored[name])} in the checkpoint)"
        for name in own
        if name in stored and isinstance(own[name], torch.Tensor) and not _same_shape(own[name], stored[name])
    ]
    for what, names in (("missing in the checkpoint", missing), ("unexpected", unexpected), ("mis-shaped", other)):
        if names:
            more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
            problems.append(f"{here}: {what}: {', '.join(map(str, names[:_NAMES_SHOWN]))}{more}")


def _check_moments(target: OptimizerState, stored: Any, here: str, problems: list[str]) -> None:
    own = target.state_dict()["state"]
    found = stored.get("state") if isinstance(stored, Mapping) else None
    if not isinstance(found, Mapping) or not all(isinstance(value, Mapping) for value in found.values()):
        problems.append(f"{here}: the state has optimizers by parameter names, the checkpoint {_kind(stored)} without")
        return
    _check_named(own, found, here, problems)
    for name in own:
        if name in found:
            _check_named(own[name], found[name], f"{here}.{name}", problems)


def _check_optimizer(target: torch.optim.Optimizer, stored: Any, here: str, problems: list[str]) -> None:
    counts, own = group_sizes(stored), group_sizes({"param_groups": target.param_groups})
    if counts is None:
        problems.append(f"{here}: the state has an optimizer, the checkpoint {_kind(stored)}")
    elif counts != own:
        problems.append(f"{here}: the optimizer has groups of {own} parameters, the checkpoint of {counts}")


def _same_shape(own: object, stored: object) -> bool:
    if not isinstance(own, torch.Tensor) or not isinstance(stored, torch.Tensor):
        return isinstance(own, torch.Tensor) == isinstance(stored, torch.Tensor)
    # A lazy module's parameters have no shape yet: they take the stored one's.
    return torch.nn.parameter.is_lazy(own) or own.shape == stored.shape


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def fill(state: Mapping[str, object], loaded: Mapping[str, Any], *, strict: bool) -> None:
    """Fill every component of ``state`` that ``loaded`` has, in place. ``check_fits`` comes first.

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
    if isinstance(target, torch.nn.Module | ModelState):
        target.load_state_dict(stored if strict else _fitting(target, stored), strict=strict)
        return target
    if isinstance(target, OptimizerState):
        target.load_state_dict(stored, strict=strict)
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


def _fill_tensor(target: torch.Tensor, stored: Any) -> torch.Tensor:
    if not isinstance(stored, torch.Tensor) or target.shape != stored.shape:
        return target  # strict=False: it was warned about
    if same_memory(target, stored):
        return target  # read in place
    with torch.no_grad():
        if target.dtype == stored.dtype and not has_parts(target):
            copy_bits(target, stored)
        else:
            target.copy_(stored)
    return target


def _fitting(module: torch.nn.Module | ModelState, stored: Any) -> dict[str, Any]:
    own = module.state_dict()
    if not isinstance(stored, Mapping):
        return {}
    return {name: value for name, value in stored.items() if name in own and _same_shape(own[name], value)}
