"""What a case is, and the table of all of them."""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from benchmarks.state import State

__all__ = ["CASES", "Case", "Handle", "Kind", "Place", "StallCase", "case", "kinds_of", "peer", "s3_options"]

#: group -> case name -> how to make it.
CASES: dict[str, dict[str, Callable[[Place], Case | StallCase]]] = {}
#: group -> case name -> what it is.
_KINDS: dict[str, dict[str, str]] = {}
Kind = str  # "floor", "ours", "peer", or "client": a bare client that is fed the tensors' own bytes
_FAMILIES = ("cloudckpt", "discovery", "floors", "frameworks", "lanes", "pytorch", "s3_clients", "s3_connector")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a case works.

    Attributes:
        path: a fresh folder, or ``bucket/prefix`` on the S3 server that the environment names.
    """

    path: str

    @property
    def bucket(self) -> str:
        """The path's first component."""
        return self.path.partition("/")[0]

    @property
    def key(self) -> str:
        """The rest of it."""
        return self.path.partition("/")[2]

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.path}/{name}")


class Case(ABC):
    """A save or a load that is timed from its call to its return.

    Attributes:
        children: whether other processes hold memory for it.
    """

    children: ClassVar[bool] = False

    def __init__(self, place: Place) -> None:
        self.place = place

    def prepare(self, state: State) -> None:
        """What a user has done before; not timed."""

    @abstractmethod
    def run(self, state: State, repetition: int) -> State | None:
        """Save ``state``; or load it: into ``state`` (and return None), or as what is returned."""

    def settle(self) -> None:
        """Wait for what goes on in the background after ``run``; not timed."""

    def close(self) -> None:
        """Let go of everything."""


class Handle(Protocol):
    """A save that goes on beside training."""

    def done(self) -> bool: ...
    def result(self) -> object: ...


class StallCase(ABC):
    """A save beside a training loop."""

    children: ClassVar[bool] = False

    def __init__(self, place: Place) -> None:
        self.place = place

    def prepare(self, state: State) -> None:
        """What a user calls before training; not timed."""

    @abstractmethod
    def save(self, state: State, repetition: int) -> Handle:
        """Return when training may go on."""

    def close(self) -> None:
        """Let go of everything."""


def case(group: str, kind: Kind, *, name: str = "") -> Callable[[Any], Any]:
    """Enter a class, or a function of state and place, into the table. The function's place is fresh each time."""

    def enter(what: Any) -> Any:
        called = name or what.__name__
        make = what if isinstance(what, type) else _of_function(what, fixed_place=group.startswith("load"))
        CASES.setdefault(group, {})[called] = make
        _KINDS.setdefault(group, {})[called] = kind
        return what

    return enter


def _of_function(function: Callable[[State, Place], State | None], *, fixed_place: bool) -> type[Case]:
    class FunctionCase(Case):
        def run(self, state: State, repetition: int) -> State | None:
            return function(state, self.place if fixed_place else self.place / str(repetition))

    return FunctionCase


def kinds_of(group: str) -> dict[str, Kind]:
    """Every case of a group, in the order they are run, with its kind: floors, ours, bare clients, peers."""
    for family in _FAMILIES:
        importlib.import_module(f"benchmarks.cases.{family}")
    order = ["floor", "ours", "client", "peer"]
    return dict(sorted(_KINDS[group].items(), key=lambda item: order.index(item[1])))


def peer(module: str) -> Any:
    """A peer's module, imported when it is needed: one that is missing stops only its own case."""
    return importlib.import_module(module)


def s3_options() -> dict[str, Any]:
    """For s3fs: the certificate of a sink that speaks TLS."""
    certificate = os.environ.get("BENCH_CERTIFICATE")
    return {"client_kwargs": {"verify": certificate}} if certificate else {}
