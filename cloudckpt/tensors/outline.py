"""The tensors of a checkpoint before their bytes are read: shape and dtype at once, memory when it is known where.

The state's values are built over these, compared with the caller's objects while nothing has moved yet, and get their
memory last: the caller's own, or fresh memory of the right device.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from cloudckpt.core.model import Checkpoint, Index, PayloadObject, TensorEntry
from cloudckpt.errors import CorruptCheckpointError
from cloudckpt.tensors.landing import blank
from cloudckpt.tensors.memory import dtype_named

__all__ = ["Outline", "Place"]

#: Which stored tensor: its component, and the name under which its bytes are stored.
Place = tuple[str, str]

#: One element of any dtype, which every tensor without memory of its own shows over and over.
_HOST = torch.device("cpu")  # said everywhere: without it torch takes the default device
_STAND_IN_STORAGE = torch.zeros(16, dtype=torch.uint8, device=_HOST).untyped_storage()


class Outline:
    """The tensors that somebody has asked for, each once however many names it has.

    Attributes:
        checkpoint: the checkpoint they are in.
        entries: what the index says of each.
        uses: how often each was asked for.
        arrays: the memory of those that are NumPy arrays.

    Args:
        checkpoint: the checkpoint they are in.
        index: its index.
        shapes_only: they stay without memory, on torch's meta device.
    """

    def __init__(self, checkpoint: Checkpoint, index: Index, *, shapes_only: bool = False) -> None:
        self.checkpoint = checkpoint
        self.entries: dict[Place, TensorEntry] = {}
        self.uses: Counter[Place] = Counter()
        self.arrays: dict[Place, torch.Tensor] = {}
        self._index = index
        self._shapes_only = shapes_only
        self._tensors: dict[Place, torch.Tensor] = {}
        self._places: dict[int, Place] = {}
        self._by_address: dict[int, Place] = {}

    @property
    def objects(self) -> Sequence[PayloadObject]:
        """The payload objects that the tensors lie in."""
        return self._index.objects

    def tensor(self, component: str, name: str) -> torch.Tensor:
        """The tensor of a name, tied ones the very same. It has its shape and dtype; its elements mean nothing yet.

        Raises:
            CorruptCheckpointError: the index does not list it, or what it lists cannot be.
        """
        place = self._place(component, name)
        found = self._tensors.get(place)
        if found is None:
            entry = self.entries[place]
            try:
                found = self._tensors[place] = self._outlined(entry)
            except (RuntimeError, OverflowError) as exc:
                # Sizes whose product is small, or zero, and that no tensor can have all the same.
                said = str(exc).partition("\n")[0]
                raise self._corrupt(f"{component}.{name}: no tensor has the shape {entry.shape}: {said}") from exc
            self._places[id(found)] = place
        return found

    def _outlined(self, entry: TensorEntry) -> torch.Tensor:
        dtype = dtype_named(entry.dtype)
        if self._shapes_only:
            return blank(dtype, entry.shape, torch.device("meta"))
        with torch.inference_mode(mode=False):
            # Of half-precision complex numbers torch warns, and only when it makes them itself.
            nothing = (
                blank(dtype, (0,), _HOST) if dtype == torch.complex32 else torch.empty(0, dtype=dtype, device=_HOST)
            )
            # Not an expanded view: all of them would share one version counter, and stay tied to their base.
            return nothing.set_(_STAND_IN_STORAGE, 0, entry.shape, (0,) * len(entry.shape))

    def array(self, component: str, name: str) -> torch.Tensor:
        """Memory for the bytes of a NumPy array, which is filled with all the others.

        Raises:
            CorruptCheckpointError: as for ``tensor``, or it is no array's.
        """
        place = self._place(component, name)
        entry = self.entries[place]
        if entry.dtype != "uint8" or len(entry.shape) != 1:
            raise self._corrupt(f"{component}.{name} is referred to as an array's bytes, and is no row of bytes")
        if place not in self.arrays:
            self.arrays[place] = torch.empty(entry.shape, dtype=torch.uint8, device=_HOST)
            self._by_address[self.arrays[place].data_ptr()] = place
        return self.arrays[place]

    def place_of(self, tensor: torch.Tensor) -> Place | None:
        """Where the bytes of a tensor that ``tensor`` gave are stored; None for any other."""
        return self._places.get(id(tensor))

    def forget(self, value: torch.Tensor | np.ndarray[Any, Any]) -> None:
        """One use less of a tensor, or of an array over memory, that this gave; with the last, no bytes are wanted."""
        place = self.place_of(value) if isinstance(value, torch.Tensor) else self._by_address.get(value.ctypes.data)
        if place is not None:
            self.uses[place] -= 1
            if not self.uses[place]:
                del self.entries[place]
                self.arrays.pop(place, None)

    def settle(self, place: Place, memory: torch.Tensor) -> None:
        """Give the tensor that was handed out the memory of another, of the same dtype and shape, on any device."""
        if (found := self._tensors.get(place)) is not None:
            found.data = memory

    def wanted(self) -> Iterator[tuple[Place, TensorEntry]]:
        """Everything that needs bytes, in the order of the names."""
        everything = sorted(self.entries.items(), key=lambda item: item[0])
        return ((place, entry) for place, entry in everything if place in self.arrays or not self._shapes_only)

    def _place(self, component: str, name: str) -> Place:
        named = self._index.tensors.get(component, {})
        entry = named.get(name)
        place = component, entry.alias_of or name if entry else name
        if entry is not None and entry.alias_of:
            entry = named.get(entry.alias_of)
        if entry is None:
            raise self._corrupt(f"the index refers to {component}.{name}, which it does not list")
        if place not in self.entries:
            self._check(entry, ".".join(place))
            self.entries[place] = entry
        self.uses[place] += 1
        return place

    def _check(self, entry: TensorEntry, name: str) -> None:
        item_size = dtype_named(entry.dtype).itemsize
        covered = 0
        for chunk in entry.chunks:
            if chunk.length != math.prod(chunk.lengths) * item_size or chunk.start % item_size:
                raise self._corrupt(
                    f"{name}: a chunk of shape {chunk.lengths} of {entry.dtype} cannot lie at bytes "
                    f"{chunk.start}..{chunk.start + chunk.length}"
                )
            covered += math.prod(chunk.lengths)
        if covered != math.prod(entry.shape):
            raise self._corrupt(f"{name}: its chunks hold {covered} of {math.prod(entry.shape)} elements")

    def _corrupt(self, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self.checkpoint.url}: {what}", checkpoint_id=self.checkpoint.id)
