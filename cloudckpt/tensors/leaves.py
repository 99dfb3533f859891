"""The leaves that only torch and NumPy know: how the codec stores tensors, dtypes, scalars, arrays, enums."""

# ruff: noqa: ARG002 - every leaf has the shape of a handler, whatever it looks at

from __future__ import annotations

import base64
import enum
import importlib
import io
import pickle
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import torch

from cloudckpt.core.values import SKIP, Codec, Path, render_path
from cloudckpt.errors import ConfigError, FormatError
from cloudckpt.tensors.memory import check_storable, dtype_name, dtype_named, is_plain
from cloudckpt.tensors.sharded import held_parts, why_not_stored

__all__ = [
    "ArrayLeaf",
    "EnumLeaf",
    "PickleLeaf",
    "ScalarLeaf",
    "StatefulLeaf",
    "TensorLeaf",
    "TorchLeaf",
    "has_state",
    "is_optimizer",
]


def is_optimizer(value: object) -> TypeGuard[torch.optim.Optimizer]:
    """Whether it is a torch optimizer with groups of its own; a wrapper may lack them, and passes its state dict on."""
    return isinstance(value, torch.optim.Optimizer) and hasattr(value, "param_groups")


def has_state(value: object) -> bool:
    """Whether the object speaks for itself: it has ``state_dict`` and ``load_state_dict``."""
    return (
        callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
        and not isinstance(value, type)
    )


@dataclass(frozen=True, slots=True)
class TensorLeaf:
    """Tensors leave the tree for the payload; a reference by name stays.

    Args:
        store: takes the tensor and its path, gives the name it is stored under.
        fetch: gives the tensor of a name.
    """

    store: Callable[[torch.Tensor, Path], str]
    fetch: Callable[[str], torch.Tensor]
    tag: str = "tensor"

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        """See ``Handler.encode``."""
        if not isinstance(value, torch.Tensor):
            return SKIP
        if not is_plain(value):
            if (problem := why_not_stored(value)) is not None:
                raise TypeError(f"{render_path(path)}: this tensor {problem}")
            for part in held_parts(value):
                check_storable(part, render_path(path))
        return self.store(value, path)

    def decode(self, payload: Any, path: Path, codec: Codec) -> torch.Tensor:
        """See ``Handler.decode``."""
        if not isinstance(payload, str):
            raise FormatError(f"{render_path(path)}: a tensor is referred to by name")
        return self.fetch(payload)


@dataclass(frozen=True, slots=True)
class StatefulLeaf:
    """An object with a state dict of its own, deep inside the state: its state dict stands for it."""

    tag: str = "state"

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        """See ``Handler.encode``."""
        return codec.encode(value.state_dict(), path) if has_state(value) else SKIP  # type: ignore[attr-defined]  # has_state

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        """See ``Handler.decode``: the state dict."""
        return codec.decode(payload, path)


@dataclass(frozen=True, slots=True)
class TorchLeaf:
    """``torch.Size``, ``torch.dtype``, ``torch.device`` and memory formats."""

    tag: str = "torch"

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        """See ``Handler.encode``."""
        match value:
            case torch.Size():
                return {"size": list(value)}
            case torch.dtype():
                return {"dtype": dtype_name(value)}
            case torch.device():
                return {"device": str(value)}
            case torch.memory_format() | torch.layout():
                return {"constant": str(value).removeprefix("torch.")}
        return SKIP

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        """See ``Handler.decode``."""
        ((kind, value),) = payload.items()
        match kind:
            case "size":
                return torch.Size(value)
            case "dtype":
                return dtype_named(value)
            case "device":
                return _device(value, path)
            case "constant" if isinstance(getattr(torch, value, None), torch.memory_format | torch.layout):
                return getattr(torch, value)
        raise FormatError(f"{render_path(path)}: torch has no {kind!s:.60} {value!r:.60}")


def _device(name: str, path: Path) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as exc:
        # Torch answers with all the names there are.
        raise FormatError(f"{render_path(path)}: torch has no device {name!r:.60}") from exc


@dataclass(frozen=True, slots=True)
class ScalarLeaf:
    """NumPy scalars, with their type."""

    tag: str = "numpy"

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        """See ``Handler.encode``."""
        if not isinstance(value, np.generic) or value.dtype.hasobject or isinstance(value, np.void):
            return SKIP
        return {"dtype": value.dtype.str, "bytes": base64.b64encode(value.tobytes()).decode("ascii")}

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        """See ``Handler.decode``."""
        raw, dtype = base64.b64decode(payload["bytes"], validate=True), _plain(payload["dtype"], path)
        # NumPy's own way back takes zeros off the end of a text, and knows no text of length zero.
        if dtype.kind == "S":
            return np.bytes_(raw[: dtype.itemsize])
        if dtype.kind == "U":
            order = "utf-32-be" if dtype.str.startswith(">") else "utf-32-le"
            return np.str_(raw[: dtype.itemsize].decode(order, "surrogatepass"))
        return np.frombuffer(raw, dtype=dtype)[0]


@dataclass(frozen=True, slots=True)
class ArrayLeaf:
    """NumPy arrays: their bytes are stored as a tensor, dtype and shape beside it.

    Args:
        store: as for ``TensorLeaf``.
        fetch: gives the bytes of a name, in memory that is the array's own from now on and may be filled later.
    """

    store: Callable[[torch.Tensor, Path], str]
    fetch: Callable[[str], torch.Tensor]
    tag: str = "ndarray"

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        """See ``Handler.encode``."""
        if type(value) is not np.ndarray or value.dtype.hasobject or value.dtype.names is not None:
            return SKIP
        raw = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        tensor = torch.from_numpy(raw.copy())
        return {"tensor": self.store(tensor, path), "dtype": value.dtype.str, "shape": list(value.shape)}

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        """See ``Handler.decode``."""
        raw = self.fetch(payload["tensor"]).numpy()
        return raw.view(_plain(payload["dtype"], path)).reshape(payload["shape"])


def _plain(name: str, path: Path) -> np.dtype[Any]:
    dtype = np.dtype(name)
    if dtype.hasobject:
        raise FormatError(f"{render_path(path)}: an array of objects is never loaded")
    return dtype


@dataclass(frozen=True, slots=True)
class EnumLeaf:
    """Members of an enum, by value.

    Loading imports public modules of torch and nothing else by a file's word: those are installed wherever this runs,
    and torch imports many of them only when they are asked for. An enum of any other module that is not imported gives
    its value.
    """

    tag: str = "enum"

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        """See ``Handler.encode``."""
        if not isinstance(value, enum.Enum):
            return SKIP
        # Through int or str first: an IntEnum's value is of the enum's own base type.
        return {
            "class": f"{type(value).__module__}:{type(value).__qualname__}",
            "value": codec.encode(value.value, path),
        }

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        """See ``Handler.decode``."""
        value = codec.decode(payload["value"], path)
        module, _, qualname = payload["class"].partition(":")
        found: Any = _module_of_enum(module)
        for name in qualname.split("."):
            found = getattr(found, name, None)
        return found(value) if isinstance(found, enum.EnumMeta) else value


def _module_of_enum(name: str) -> object:
    """The module if it is imported, or of torch's own; None for any other."""
    first, *others = name.split(".")
    # Private modules of torch do things when they are imported: one sets variables of the environment, and a __main__
    # ends the process.
    if name not in sys.modules and first == "torch" and not any(part.startswith("_") for part in others):
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 - whatever another version of torch says to the name: the value is there
            return None
    return sys.modules.get(name)


#: Containers that the codec itself stores, whatever is in them.
_CONTAINERS = {dict, list, tuple, set, frozenset, OrderedDict, Counter, defaultdict, deque}


@dataclass(frozen=True, slots=True)
class PickleLeaf:
    """The last resort, asked only after everything else refused and only with ``allow_pickle=True``."""

    allowed: bool
    note: Callable[[], None]
    known: Codec
    tag: str = "pickle"

    def encode(self, value: object, path: Path, codec: Codec) -> Any:
        """See ``Handler.encode``."""
        if not self.allowed or self._can_be_stored(value):
            return SKIP
        try:
            body = pickle.dumps(value, protocol=4)
        except Exception as exc:
            raise TypeError(
                f"{render_path(path)}: a {type(value).__qualname__} cannot even be pickled ({exc}). Give the object "
                "that holds it a state_dict() and load_state_dict() without it"
            ) from exc
        self.note()
        return base64.b64encode(body).decode("ascii")

    def _can_be_stored(self, value: object) -> bool:
        if type(value) in _CONTAINERS:
            return True  # what is inside is asked about in its turn
        try:
            self.known.encode(value)
        except TypeError:
            return False
        return True

    def decode(self, payload: Any, path: Path, codec: Codec) -> object:
        """See ``Handler.decode``."""
        if not self.allowed:
            raise ConfigError(
                f"{render_path(path)} was pickled when it was saved. Loading it runs code from the checkpoint: pass "
                "allow_pickle=True if you trust everybody who can write to this run"
            )
        return pickle.load(io.BytesIO(base64.b64decode(payload, validate=True)))  # noqa: S301 - only with allow_pickle=True
