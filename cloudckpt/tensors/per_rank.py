"""State that every rank has for itself: random generators, data loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cloudckpt.core.merging import PER_RANK
from cloudckpt.core.values import SKIP, Codec, Path, render_path
from cloudckpt.errors import FormatError, StateMismatchError
from cloudckpt.tensors.leaves import has_state

__all__ = ["NoRankLeaf", "PerRank", "PerRankLeaf"]


class PerRank:
    """Declares that an object differs from rank to rank: each saves its own, and restores its own.

    ``{"rng": PerRank(cloudckpt.rng_state()), "data": PerRank(loader)}``. Everything that is not declared so counts as
    the same on all ranks, or as sharded where its tensors say so.

    Attributes:
        value: the object, with or without a state dict. Plain values are replaced here by a restore.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"PerRank({self.value!r})"


@dataclass(frozen=True, slots=True)
class PerRankLeaf:
    """Stores the own part under the rank's number.

    Args:
        rank: whose part; None gives all of them, in a list by rank.
        world_size: how many ranks there must be; None for as many as there are.
    """

    rank: int | None
    world_size: int | None = None
    tag: str = PER_RANK[1:]

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        """See ``Handler.encode``."""
        if not isinstance(value, PerRank):
            return SKIP
        own = value.value
        inner = own.state_dict() if has_state(own) else own
        return {str(self.rank): codec.encode(inner, (*path, f"rank-{self.rank}"))}

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        """See ``Handler.decode``."""
        if not isinstance(payload, dict) or {*payload} != {str(n) for n in range(len(payload))}:
            raise FormatError(f"{render_path(path)}: expected a part of each rank")
        if self.rank is None:
            return [codec.decode(payload[str(n)], (*path, f"rank-{n}")) for n in range(len(payload))]
        if self.world_size is not None and self.world_size != len(payload):
            raise StateMismatchError(
                f"{render_path(path)} was saved by {len(payload)} ranks, each its own, and there are {self.world_size} "
                "now. restore(..., strict_world_size=False) gives each rank its own where there is one; or leave the "
                "component out with components=[...]"
            )
        own = payload.get(str(self.rank))
        return SKIP if own is None else codec.decode(own, (*path, f"rank-{self.rank}"))


@dataclass(frozen=True, slots=True)
class NoRankLeaf:
    """Refuses what each rank has for itself, where one rank's value is taken for all."""

    tag: str = PER_RANK[1:]

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        """See ``Handler.encode``."""
        del codec
        if not isinstance(value, PerRank):
            return SKIP
        raise TypeError(
            f"{render_path(path)}: PerRank() is a CheckpointManager's: PyTorch's distributed checkpoint stores one "
            "rank's value for all. Save it with a CheckpointManager, or under a key of its own for each rank"
        )

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        """Nothing is read here."""
        raise TypeError(payload, path, codec)
