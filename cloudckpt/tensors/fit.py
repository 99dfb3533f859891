"""What of a checkpoint fits into the caller's objects, found before anything moves.

A pipeline stage has some of the names that were saved, and each rank another part of them. So what this process has no
use for is only *unexpected* if no other one has a use for it either; either way it is not read here.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cloudckpt.core.values import SKIP, Path, render_path
from cloudckpt.tensors.leaves import has_state, is_optimizer
from cloudckpt.tensors.per_rank import PerRank
from cloudckpt.tensors.targets import group_sizes
from cloudckpt.tensors.train_state import ModelState, OptimizerState, is_by_name

__all__ = ["Findings", "in_common", "look", "sentences", "take_out"]

#: What has its bytes in payload objects.
Stored = torch.Tensor | np.ndarray[Any, Any]
#: More names than this say nothing new.
_NAMES_SHOWN = 10


@dataclass(slots=True)
class Findings:
    """What does not fit.

    Attributes:
        problems: missing and mis-shaped names and the like, one sentence each.
        unexpected: place in the state -> stored names that it has no use for; a place that fits is there as well.
        left_out: of which mapping, and which name in it: what is not needed here, for any of these reasons.
    """

    problems: list[str] = field(default_factory=list)
    unexpected: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[tuple[Path, str]] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """What other processes are asked about: the unexpected names."""
        return zlib.compress(json.dumps(self.unexpected, separators=(",", ":")).encode(), 1)


def in_common(words: Sequence[bytes]) -> dict[str, list[str]]:
    """The names that no process has a use for."""
    found: dict[str, set[str]] = {}
    for word in words:
        # A process that has nothing in a place has no say there.
        for here, names in json.loads(zlib.decompress(word)).items():
            found.setdefault(here, {*names}).intersection_update(names)
    return {here: sorted(names) for here, names in found.items() if names}


def sentences(unexpected: Mapping[str, Sequence[str]]) -> list[str]:
    """The same, for people."""
    return [f"{here}: unexpected: {_some(names)}" for here, names in unexpected.items() if names]


def look(state: Mapping[str, object], loaded: Mapping[str, Any]) -> Findings:
    """What of ``loaded`` does not fit into ``state``. Nothing is changed."""
    found = Findings()
    for name, target in state.items():
        if name not in loaded:
            found.problems.append(f"{name}: the checkpoint has no such component (it has {', '.join(sorted(loaded))})")
        else:
            _check(target, loaded[name], (name,), found)
    return found


def take_out(values: Any, left_out: Sequence[tuple[Path, str]], forget: Callable[[Stored], None]) -> None:
    """Drop what is not needed from freshly loaded values; ``forget`` is told of each tensor and array."""
    for path, name in left_out:
        node = values
        for key in path:
            node = node[key]
        for stored in _stored_in(node.pop(name)):
            forget(stored)


def _stored_in(value: object) -> Iterator[Stored]:
    if isinstance(value, torch.Tensor | np.ndarray):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _stored_in(inner)


def _check(target: object, stored: Any, path: Path, found: Findings) -> None:  # noqa: C901 - a table of kinds
    here = render_path(path)
    if isinstance(target, PerRank):
        if stored is not SKIP:  # nothing of this rank's was saved, and the caller has allowed that
            own = Findings()
            _check(target.value, stored, path, own)
            # No other process was given it, and none can have a use for it.
            found.problems += [*own.problems, *sentences(own.unexpected)]
            found.left_out += own.left_out
    elif isinstance(target, torch.nn.Module | ModelState):
        _check_named(target.state_dict(), stored, here, path, found)
    elif isinstance(target, OptimizerState):
        _check_moments(target, stored, path, found)
    elif is_optimizer(target):
        _check_optimizer(target, stored, here, found)
    elif has_state(target):
        return
    elif isinstance(target, torch.Tensor):
        if not isinstance(stored, torch.Tensor) or stored.shape != target.shape:
            found.problems.append(f"{here}: the state has {_kind(target)}, the checkpoint {_kind(stored)}")
    elif isinstance(target, MutableMapping) and isinstance(stored, Mapping):
        _check_mapping(target, stored, path, found)
    elif isinstance(target, list) and isinstance(stored, list) and len(target) == len(stored):
        for n, (inner, value) in enumerate(zip(target, stored, strict=True)):
            _check(inner, value, (*path, n), found)


def _check_mapping(target: MutableMapping[Any, Any], stored: Mapping[Any, Any], path: Path, found: Findings) -> None:
    for key in target:
        if key in stored:
            _check(target[key], stored[key], (*path, key), found)
        else:
            found.problems.append(f"{render_path((*path, key))}: missing in the checkpoint")


def _check_named(own: Mapping[str, object], stored: Any, here: str, path: Path, found: Findings) -> None:
    if not isinstance(stored, Mapping):
        found.problems.append(f"{here}: the state has a module, the checkpoint {_kind(stored)}")
        return
    missing = [name for name in own if name not in stored]
    unexpected = [name for name in stored if name not in own]
    others = [
        name
        for name in own
        if name in stored and isinstance(own[name], torch.Tensor) and not _same_shape(own[name], stored[name])
    ]
    if missing:
        found.problems.append(f"{here}: missing in the checkpoint: {_some(missing)}")
    if others:
        shown = [f"{name} ({_kind(own[name])} here, {_kind(stored[name])} in the checkpoint)" for name in others]
        found.problems.append(f"{here}: mis-shaped: {_some(shown)}")
    found.unexpected[here] = [*map(str, unexpected)]
    found.left_out += [(path, name) for name in (*unexpected, *others)]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{', '.join(map(str, names[:_NAMES_SHOWN]))}{more}"


def _check_moments(target: OptimizerState, stored: Any, path: Path, found: Findings) -> None:
    here, own = render_path(path), target.state_dict()["state"]
    if not is_by_name(stored):
        found.problems.append(
            f"{here}: the state has optimizers by parameter names, the checkpoint {_kind(stored)} without"
        )
        return
    kept = stored["state"]
    _check_named(own, kept, here, (*path, "state"), found)
    for name in own:
        inner = Findings()
        if name in kept:
            _check_named(own[name], kept[name], f"{here}.{name}", (), inner)
        if problems := [*inner.problems, *sentences(inner.unexpected)]:
            # With a part of its moments an optimizer cannot go on: without any, it begins anew.
            found.problems += problems
            found.left_out.append(((*path, "state"), name))
    found.problems += [f"{here}: {text}" for text in target.disagreements(stored)]


def _check_optimizer(target: torch.optim.Optimizer, stored: Any, here: str, found: Findings) -> None:
    counts, own = group_sizes(stored), group_sizes({"param_groups": target.param_groups})
    if counts is None:
        found.problems.append(f"{here}: the state has an optimizer, the checkpoint {_kind(stored)}")
    elif counts != own:
        found.problems.append(f"{here}: the optimizer has groups of {own} parameters, the checkpoint of {counts}")


def _same_shape(own: object, stored: object) -> bool:
    if not isinstance(own, torch.Tensor) or not isinstance(stored, torch.Tensor):
        return isinstance(own, torch.Tensor) == isinstance(stored, torch.Tensor)
    # A lazy module's parameters have no shape yet: they take the stored one's.
    return torch.nn.parameter.is_lazy(own) or own.shape == stored.shape


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
