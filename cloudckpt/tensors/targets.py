"""Which of the caller's own tensors the stored bytes may be read into, found by the walk that ``fill`` will take.

For each tensor of the loaded values this says where ``fill`` is going to copy it. Where that copy would be the only
thing that ever happens to it, bit for bit into plain memory, the bytes can be read there in the first place. Everything
else (another dtype or layout, memory that two names share, a module that has its own way of loading) keeps its copy.

(Past 350 lines: the walk, the choice and the refusals look at the same uses.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch

from cloudckpt.core.values import Path, render_path
from cloudckpt.errors import StateMismatchError
from cloudckpt.tensors.leaves import has_state, is_optimizer
from cloudckpt.tensors.outline import Outline, Place
from cloudckpt.tensors.per_rank import PerRank
from cloudckpt.tensors.sharded import has_parts, held_parts, is_in_shards, is_many, like, local_boxes

__all__ = [
    "Homes",
    "Part",
    "Region",
    "Use",
    "choose_homes",
    "find_uses",
    "group_sizes",
    "note_changed",
    "same_groups",
    "same_memory",
    "unwritable",
]

#: The place of a tensor that its object will hold no longer, whatever is stored.
LET_GO: Place = ("\0", "")

#: Tensors of these types are their memory, and nothing else.
_PLAIN = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}


@dataclass(frozen=True, slots=True, order=True)
class Region:
    """Where a tensor's memory begins and ends, on one device."""

    device: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """One tensor of the loaded values, and what becomes of it.

    Attributes:
        place: where its bytes are stored, or ``LET_GO``.
        stored: the tensor itself, which has a shape and a dtype so far.
        target: the caller's tensor that it goes into or replaces; None if there is none.
        path: the place in the state, for messages.
        kept: whether the object will hold the loaded tensor itself, as optimizers do, rather than copy from it.
        device: where an object that keeps it will move it.
        direct: whether nothing but that happens to it on its way, so far as its object is concerned.
        region: the memory of ``target``.
        template: a distributed tensor, if this process needs only the part that it would have of one like it.
    """

    place: Place
    stored: torch.Tensor
    target: torch.Tensor | None
    path: str
    kept: bool = False
    device: torch.device = field(default=torch.device("cpu"))
    direct: bool = True
    region: Region | None = None
    template: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The box of a stored tensor that this process needs, and its memory.

    Attributes:
        value: the distributed tensor over that memory, as the state's object is given it.
        local: the memory, of the box's shape.
        offsets: where the box begins in the whole tensor, elements per dimension.
        in_place: whether the memory is that of the caller's own tensor.
    """

    value: torch.Tensor
    local: torch.Tensor
    offsets: tuple[int, ...]
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class Homes:
    """Where stored tensors get their memory. What is in none of these gets fresh host memory.

    Attributes:
        targets: the caller's own tensors that are read into.
        devices: where fresh memory is wanted elsewhere than on the host.
        parts: of which only a box is needed here.
        left_out: what is not needed here at all, as ``fit.take_out`` is given it.
        word: what of that the other processes are asked about.
    """

    targets: Mapping[Place, torch.Tensor] = field(default_factory=dict)
    devices: Mapping[Place, torch.device] = field(default_factory=dict)
    parts: Mapping[Place, Part] = field(default_factory=dict)
    left_out: Sequence[tuple[Path, str]] = ()
    word: bytes = b""


def find_uses(state: Mapping[str, object], values: Mapping[str, Any], outline: Outline) -> list[Use]:
    """Every tensor of ``values`` that ``fill(state, values)`` will copy into the state, or hand to an optimizer."""
    uses: list[Use] = []
    for name, target in state.items():
        if name in values:
            uses.extend(_walk(target, values[name], (name,), outline))
    return uses


def _walk(target: object, stored: Any, path: Path, outline: Outline) -> Iterator[Use]:  # noqa: C901 - a table of kinds
    if isinstance(target, PerRank):
        yield from _walk(target.value, stored, path, outline)
    elif isinstance(target, torch.nn.Module):
        yield from _of_module(target, stored, render_path(path), outline)
    elif is_optimizer(target):
        yield from _of_optimizer(target, stored, render_path(path), outline)
    elif has_state(target):
        if is_many():
            yield from _of_stateful(target, stored, path, outline)
    elif isinstance(target, torch.Tensor):
        yield from _pair(target, stored, render_path(path), outline)
    elif isinstance(target, MutableMapping) and isinstance(stored, Mapping):
        for key, value in stored.items():
            if key in target:
                yield from _walk(target[key], value, (*path, key), outline)
    elif isinstance(target, list) and isinstance(stored, list) and len(target) == len(stored):
        for n, (inner, value) in enumerate(zip(target, stored, strict=True)):
            yield from _walk(inner, value, (*path, n), outline)


def _pair(target: torch.Tensor, stored: Any, path: str, outline: Outline, *, direct: bool = True) -> Iterator[Use]:
    place = outline.place_of(stored) if isinstance(stored, torch.Tensor) else None
    if place is not None and not torch.nn.parameter.is_lazy(target) and stored.shape == target.shape:
        template = target if has_parts(target) else None
        held = [target] if template is None else held_parts(target)
        region = _region_of(held[0]) if held else None
        yield Use(place=place, stored=stored, target=target, path=path, direct=direct, region=region, template=template)


def _of_stateful(target: object, stored: Any, path: Path, outline: Outline) -> Iterator[Use]:
    """An object whose state dict may be a copy that it makes up gets fresh tensors, sharded as those in there are."""
    own: Any = target
    for use in _walk(own.state_dict(), stored, path, outline):
        yield replace(use, target=None, direct=False, region=None)


# -- modules ---------------------------------------------------------------------------------------------------


def _of_module(module: torch.nn.Module, stored: Any, here: str, outline: Outline) -> Iterator[Use]:
    if not isinstance(stored, Mapping):
        return
    own = dict(chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)))
    special = tuple(_special_prefixes(module))
    for name, value in stored.items():
        if (target := own.get(name)) is not None:
            yield from _pair(target, value, f"{here}.{name}", outline, direct=not name.startswith(special))


def _special_prefixes(module: torch.nn.Module) -> Iterator[str]:
    """Below which names a module does more, or something else, than to copy each tensor into its own."""
    if getattr(module.load_state_dict, "__func__", None) is not torch.nn.Module.load_state_dict:
        yield ""
    for name, inner in module.named_modules(remove_duplicate=False):
        kind = type(inner)
        # torch.nn's own overrides (the norms) add what old checkpoints lack, and change nothing.
        loads = next(base for base in kind.__mro__ if "_load_from_state_dict" in vars(base))
        plain = loads is torch.nn.Module or loads.__module__.startswith("torch.nn.modules.")
        if not plain or inner._load_state_dict_pre_hooks:  # noqa: SLF001 - torch has no public way to ask
            yield f"{name}." if name else ""


# -- optimizers ------------------------------------------------------------------------------------------------


def _of_optimizer(optimizer: torch.optim.Optimizer, stored: Any, here: str, outline: Outline) -> Iterator[Use]:
    """Its state: the tensors become the optimizer's own, on the device of their parameter, in place of all it had."""
    if not same_groups(optimizer, stored) or not isinstance(stored.get("state"), Mapping):
        return  # no optimizer's state, or another one's: that is for others to say
    ids = [number for group in stored["param_groups"] for number in group["params"]]
    parameters = dict(zip(ids, chain.from_iterable(g["params"] for g in optimizer.param_groups), strict=True))
    of_parameters = [(n, parameters[n], named) for n, named in stored["state"].items() if n in parameters]
    direct = _loads_plainly(optimizer)
    held = [named for named in optimizer.state.values() if isinstance(named, Mapping)]
    for tensor in (t for named in held for t in named.values() if isinstance(t, torch.Tensor)):
        yield Use(
            place=LET_GO, stored=tensor, target=tensor, path=here, kept=True, direct=False, region=_region_of(tensor)
        )
    for number, parameter, named in of_parameters:
        own: Any = optimizer.state.get(parameter)
        for name, value in named.items() if isinstance(named, Mapping) else ():
            place = outline.place_of(value) if isinstance(value, torch.Tensor) else None
            if place is None:
                continue
            # A step count stays where it is, unless the optimizer runs on the device: that is for it to know.
            device = torch.device("cpu") if name == "step" else parameter.device
            found = own.get(name) if isinstance(own, Mapping) else None
            target = template = None
            if isinstance(found, torch.Tensor) and (found.shape, found.device) == (value.shape, device):
                target = found
            if has_parts(parameter) and value.shape == parameter.shape:
                # Moments are sharded as their parameter is, also where the optimizer has none of them yet.
                target, template = None, parameter
            yield Use(
                place=place,
                stored=value,
                target=target,
                path=f"{here}.state[{number!r}].{name}",
                kept=True,
                device=device,
                direct=direct,
                region=_region_of(target) if target is not None else None,
                template=template,
            )


def group_sizes(stored: Any) -> list[int] | None:
    """How many parameters each group of an optimizer's state has; None if it is no optimizer's."""
    try:
        return [len(group["params"]) for group in stored["param_groups"]]
    except (TypeError, KeyError, IndexError):
        return None


def same_groups(optimizer: torch.optim.Optimizer, stored: Any) -> bool:
    """Whether a stored state is one of an optimizer with groups as large as this one's."""
    return isinstance(stored, Mapping) and group_sizes(stored) == group_sizes({"param_groups": optimizer.param_groups})


def _loads_plainly(optimizer: torch.optim.Optimizer) -> bool:
    kind, base = type(optimizer), torch.optim.Optimizer
    hooks = optimizer._optimizer_load_state_dict_pre_hooks  # noqa: SLF001 - torch has no public way to ask
    return kind.load_state_dict is base.load_state_dict and not hooks


# -- choosing --------------------------------------------------------------------------------------------------


def choose_homes(uses: Collection[Use], outline: Outline, *, in_place: bool) -> Homes:
    """Where each stored tensor gets its memory.

    A tensor is read into the caller's own memory only if that is all that ever becomes of it: every use of it is
    known, all of them mean the same memory, and no other tensor of the state lies on any part of that memory.

    Args:
        in_place: False gives no caller's tensor away.
    """
    by_place: dict[Place, list[Use]] = {}
    for use in uses:
        by_place.setdefault(use.place, []).append(use)
    targets: dict[Place, torch.Tensor] = {}
    devices: dict[Place, torch.device] = {}
    parts: dict[Place, Part] = {}
    shared = _on_shared_memory(uses) if in_place else set()
    for place, own in by_place.items():
        templates = [use.template for use in own if use.template is not None]
        # Also wanted as a plain tensor, it is read whole, and cut into parts afterwards.
        if templates and len(templates) == len(own):
            whole = in_place and len(own) == outline.uses[place] and place not in shared
            parts[place] = _part(templates[0], own, in_place=whole)
            continue
        if len(own) != outline.uses[place]:
            continue
        target = own[0].target
        if (
            in_place
            and target is not None
            and place not in shared
            and all(use.direct and use.target is not None and same_memory(use.target, target) for use in own)
            and (len(own) == 1 or not any(use.kept for use in own))
            and _takes_bits(target, own[0].stored)
        ):
            targets[place] = target
        elif own[0].device.type not in {"cpu", "meta"} and all(use.device == own[0].device for use in own):
            devices[place] = own[0].device
    return Homes(targets, devices, parts)


def _part(template: torch.Tensor, uses: Sequence[Use], *, in_place: bool) -> Part:
    """The box that this process has of ``template``: the template's own memory, if that is all that becomes of it."""
    parts, boxes = held_parts(template), local_boxes(template)
    held = parts[0] if parts else torch.empty((0,) * len(template.shape))
    offsets, lengths = boxes[0] if boxes else ((), ())
    if len(parts) > 1:
        raise StateMismatchError(
            f"{uses[0].path}: the state's tensor is sharded in several pieces on one rank, which cannot be restored"
        )
    target = uses[0].target
    own = held.detach()
    if (
        in_place
        and target is template
        and all(use.direct and use.target is target for use in uses)
        and own.is_contiguous()
        and own.dtype == uses[0].stored.dtype
        and own.device.type != "meta"
    ):
        return Part(value=like(template, own), local=own, offsets=offsets, in_place=True)
    fresh = torch.empty(lengths if own.numel() else own.shape, dtype=uses[0].stored.dtype, device=own.device)
    return Part(value=like(template, fresh), local=fresh, offsets=offsets)


def _takes_bits(target: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether the stored bytes, laid down one after the other in the target's memory, are its value."""
    return (
        _is_memory(target)
        and target.dtype == stored.dtype
        and target.device.type != "meta"
        and not (target.is_conj() or target.is_neg())
        and target.is_contiguous()
    )


def _is_memory(target: torch.Tensor) -> bool:
    """Whether a tensor is its elements in some memory, and nothing else."""
    return type(target) in _PLAIN and target.layout == torch.strided and not (target.is_nested or target.is_quantized)


def _region_of(tensor: torch.Tensor) -> Region | None:
    """The memory that a plain tensor shows any part of; None if it has none to speak of."""
    if tensor.device.type == "meta" or not _is_memory(tensor) or not tensor.numel():
        return None
    elements = tensor.numel()
    if not tensor.is_contiguous():
        elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return Region(str(tensor.device), start, start + elements * tensor.dtype.itemsize)


def _on_shared_memory(uses: Iterable[Use]) -> set[Place]:
    """The places whose targets have any memory in common with the target of another place."""
    regions = sorted((u.region, u.place) for u in uses if u.region is not None and u.place != LET_GO)
    shared: set[Place] = set()
    furthest, owner = Region("", 0, 0), ("", "")
    for region, place in regions:
        if region.device != furthest.device or region.start >= furthest.end:
            furthest, owner = region, place
            continue
        if place != owner:
            shared |= {place, owner}
        # What reaches further is what the next one is compared with; if they differ, both are in already.
        if region.end > furthest.end:
            furthest, owner = region, place
    return shared


def same_memory(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether both show the same elements of the same memory in the same way."""
    if one is two:
        return True
    if has_parts(one) or has_parts(two):  # whose own address is none
        if not (has_parts(one) and has_parts(two)):
            return False
        held, other = held_parts(one), held_parts(two)
        pairs = zip(held, other, strict=False)
        return (one.shape, len(held)) == (two.shape, len(other)) and all(
            a.numel() and same_memory(a, b) for a, b in pairs
        )
    return (
        (one.device, one.dtype, one.shape, one.layout) == (two.device, two.dtype, two.shape, two.layout)
        and one.layout == torch.strided
        and one.device.type != "meta"
        and not (one.is_nested or two.is_nested)
        and one.stride() == two.stride()
        and (one.is_conj(), one.is_neg()) == (two.is_conj(), two.is_neg())
        and one.data_ptr() == two.data_ptr()
    )


# -- refusing --------------------------------------------------------------------------------------------------


def unwritable(uses: Iterable[Use]) -> list[str]:
    """The caller's tensors that nothing can be written into, one sentence each."""
    return [
        f"{use.path}: the state's tensor {problem}"
        for use in uses
        if use.target is not None and use.direct and not use.kept
        for part in (held_parts(use.target) if is_in_shards(use.target) else [use.target])
        if (problem := _problem(part)) is not None
    ]


def _problem(target: torch.Tensor) -> str | None:
    if target.device.type != "meta" and _is_memory(target) and not target.is_inference() and target.is_contiguous():
        return None
    problems = {
        "is a fake tensor and has no memory: build the state outside of FakeTensorMode": isinstance(
            target,
            torch._subclasses.FakeTensor,  # noqa: SLF001 - its only name
        ),
        "is on the meta device and has no memory: give it some first, with to_empty(device=...)": (
            target.device.type == "meta"
        ),
        "is quantized, and the stored one is not: restore into int_repr() and its parameters": target.is_quantized,
        f"has layout {target.layout}, and the stored one is dense: restore into a dense tensor": (
            target.layout != torch.strided or target.is_nested
        ),
        "was made under torch.inference_mode(), and torch refuses to write into it: pass a clone() of it": (
            target.is_inference() and not torch.is_inference_mode_enabled()
        ),
        "shows one element in several places (expand): pass its contiguous() form": _repeats(target),
    }
    return next((text for text, true in problems.items() if true), None)


def _repeats(target: torch.Tensor) -> bool:
    if target.layout != torch.strided or target.is_nested:
        return False
    return any(size > 1 and stride == 0 for size, stride in zip(target.shape, target.stride(), strict=True))


def note_changed(homes: Homes) -> None:
    """Tell autograd that the caller's tensors have changed, as any write of torch's own would."""
    changed = (part.local if is_in_shards(part.value) else part.value for part in homes.parts.values())
    for target in (*homes.targets.values(), *changed):
        if not target.is_inference():
            torch.autograd.graph.increment_version(target)
