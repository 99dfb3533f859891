"""Is what every rank has really the same everywhere? Digests of it, to be compared, before one of them is stored.

Only one rank's copy of a replicated tensor is written. If the copies have drifted apart (a model that was not
broadcast, a buffer that each rank updates for itself), the others are lost without a word: so a few bytes of some of
them are summed at every save, or all bytes of all.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import crc32c
import torch

from cloudckpt.tensors.memory import byte_view

__all__ = ["Replica", "differing", "digest_of", "sums_of"]

#: How many tensors are looked at in one save, each time other ones, and how many elements of each.
_TENSORS = 16
_ELEMENTS = 64
#: More than this says nothing new.
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A tensor that several ranks have whole, or the same box of.

    Attributes:
        name: component and name, which is the same on all of them.
        tensor: this rank's copy.
    """

    name: str
    tensor: torch.Tensor


def sums_of(replicas: Sequence[Replica], how: str, turn: int) -> dict[str, int]:
    """The sums of some elements of some tensors ("sample"), or of all bytes of all ("full"), by name.

    Args:
        how: "sample" or "full".
        turn: which of them a sample looks at: the same number on every rank, another one for each save.
    """
    if how == "full":
        # One after the other: together they may be more than the host holds.
        return {replica.name: _sums([replica.tensor])[0] for replica in replicas}
    chosen = sorted(replicas, key=lambda replica: _shuffled(replica.name, turn))[:_TENSORS]
    return dict(zip((r.name for r in chosen), _sums([_sample(r.tensor) for r in chosen]), strict=True))


def _shuffled(name: str, turn: int) -> bytes:
    # By name, not by place: ranks that have different sets of replicas must agree about those that they share.
    return hashlib.blake2b(f"{turn}/{name}".encode(), digest_size=8).digest()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach()
    if flat.numel() <= _ELEMENTS:
        return flat
    # Spread over the whole, the last one included: a rank that has drifted has drifted everywhere.
    places = torch.linspace(0, flat.numel() - 1, _ELEMENTS, dtype=torch.float64).long().to(flat.device)
    return flat.reshape(-1)[places] if flat.is_contiguous() else flat.flatten()[places]


def _sums(tensors: Sequence[torch.Tensor]) -> list[int]:
    """The sum of each tensor's bytes. One copy from each device for all of them."""
    flat = [_bytes(tensor) for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for number, own in enumerate(flat):
        by_device.setdefault(own.device, []).append(number)
    found = [0] * len(flat)
    for numbers in by_device.values():
        view, start = byte_view(torch.cat([flat[n] for n in numbers]).cpu()), 0
        for number in numbers:
            end = start + flat[number].numel()
            found[number] = crc32c.crc32c(view[start:end])
            start = end
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8)


def digest_of(sums: Mapping[str, int]) -> bytes:
    """Sixteen digits that stand for all of them."""
    text = "\n".join(f"{name} {value}" for name, value in sorted(sums.items()))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest().encode()


def differing(sums: Sequence[Mapping[str, int]]) -> list[str]:
    """Which tensors differ, and on which ranks: those that are not as most of them have it.

    Args:
        sums: by rank.
    """
    found: list[str] = []
    for name in dict.fromkeys(name for own in sums for name in own):
        values = {rank: own[name] for rank, own in enumerate(sums) if name in own}
        if len(set(values.values())) > 1:
            usual, _ = Counter(values.values()).most_common(1)[0]
            odd = [rank for rank, value in values.items() if value != usual]
            found.append(f"{name} on {'rank' if len(odd) == 1 else 'ranks'} {', '.join(map(str, odd))}")
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return found[:_SHOWN] + more
