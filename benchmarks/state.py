"""What is saved: a GPT's state dict with its AdamW state, or as many tensors, or as many bytes, as a name asks for."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["GIB", "State", "expected_bytes", "make_state", "size_bytes", "tensors", "view"]

State = dict[str, Any]
GIB = 1 << 30
_MIB = 1 << 20
#: name -> layers, width, vocabulary, context. In fp32 with two moments, 45m is 0.5 GiB and 180m is 2 GiB.
_GPT = {"tiny": (1, 64, 512, 64), "45m": (6, 512, 50304, 1024), "180m": (14, 896, 50304, 1024)}
_LARGE_BYTES = 64 * _MIB


def make_state(size: str, *, empty: bool = False) -> State:
    """The state of a name: ``tiny``, ``45m``, ``180m``, ``bytes-512`` (MiB), ``tensors-1000``, ``flat-1000``.

    ``tensors-N`` are N tensors of 1-64 KiB, drawn log-uniformly by a fixed seed; ``flat-N`` is the same number of
    bytes in tensors of 64 MiB. Values are the same in every process, and no page is all zeros unless ``empty``.
    """
    noise = torch.randn(_MIB, generator=torch.Generator().manual_seed(0))

    def tensor(*shape: int) -> torch.Tensor:
        made = torch.empty(shape)
        if empty:
            return made.zero_()
        flat = made.view(-1)
        for start in range(0, flat.numel(), noise.numel()):
            count = min(noise.numel(), flat.numel() - start)
            flat[start : start + count] = noise[:count]
        return made

    if size in _GPT:
        shapes = dict(_gpt_shapes(*_GPT[size]))
        moments = {
            at: {"step": torch.tensor(0.0 if empty else 1000.0), "exp_avg": tensor(*s), "exp_avg_sq": tensor(*s)}
            for at, s in enumerate(shapes.values())
        }
        groups = [
            {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": list(range(len(shapes)))}
        ]
        model = {name: tensor(*shape) for name, shape in shapes.items()}
        return {"model": model, "optimizer": {"state": moments, "param_groups": groups}, "step": 1000}
    lengths = _lengths(size)
    return {"model": {f"layer.{at}.weight": tensor(length // 4) for at, length in enumerate(lengths)}, "step": 1000}


def expected_bytes(size: str) -> int:
    """How large the state of a name is, without making it.

    Raises:
        ValueError: nothing is called so.
    """
    if size in _GPT:
        return 12 * sum(math.prod(shape) for _, shape in _gpt_shapes(*_GPT[size]))  # fp32, and two moments
    return sum(_lengths(size))


def _gpt_shapes(layers: int, width: int, vocabulary: int, context: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "wte.weight", (vocabulary, width)
    yield "wpe.weight", (context, width)
    blocks = {"attn.c_attn": (3 * width, width), "attn.c_proj": (width, width), "mlp.c_fc": (4 * width, width)}
    blocks["mlp.c_proj"] = (width, 4 * width)
    for layer in range(layers):
        for norm in ("ln_1", "ln_2"):
            yield f"h.{layer}.{norm}.weight", (width,)
            yield f"h.{layer}.{norm}.bias", (width,)
        for name, shape in blocks.items():
            yield f"h.{layer}.{name}.weight", shape
            yield f"h.{layer}.{name}.bias", (shape[0],)
    yield "ln_f.weight", (width,)
    yield "ln_f.bias", (width,)


def _lengths(size: str) -> list[int]:
    asked = re.fullmatch(r"(bytes|tensors|flat)-(\d+)", size)
    if asked is None:
        known = ", ".join(_GPT)
        raise ValueError(f"size {size!r}: write one of {known}, bytes-MIB, tensors-COUNT or flat-COUNT")
    kind, number = asked[1], int(asked[2])
    if kind == "bytes":
        return _cut(number * _MIB, min(_LARGE_BYTES, max(number * _MIB // 8, _MIB)))
    draw = random.Random(0)
    small = [int(1024 * 64 ** draw.random()) // 4 * 4 for _ in range(number)]
    return small if kind == "tensors" else _cut(sum(small), _LARGE_BYTES)


def _cut(total: int, at_most: int) -> list[int]:
    return [min(at_most, total - start) for start in range(0, total, at_most)]


def tensors(state: State, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of a state by its dotted name."""
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= tensors(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            found[f"{prefix}{name}"] = value
    return found


def view(tensor: torch.Tensor) -> memoryview:
    """The tensor's own bytes, no copy."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def size_bytes(state: State) -> int:
    """Bytes in all tensors of a state."""
    return sum(found.numel() * found.element_size() for found in tensors(state).values())
