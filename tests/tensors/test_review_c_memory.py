"""Tensors that have no memory of their own to save from: an error by name, never a crash and never whatever lay there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

#: Each in a process of its own: what goes wrong here takes the process along.
SCRIPT = """
import sys
import torch
import torch.utils._pytree as tree
from cloudckpt import CheckpointManager
from cloudckpt.storage import MemoryStorage

class Wrapped(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree.tree_map(lambda a: a.inner if isinstance(a, cls) else a, (args, kwargs or {}))
        return function(*args, **kwargs)

def freed(count):
    tensor = torch.ones(count)
    tensor.untyped_storage().resize_(0)
    return tensor

def cut(count):
    tensor = torch.ones(count)
    tensor.untyped_storage().resize_(64)
    return tensor

tensor = {
    "freed": lambda: freed(1000),
    "freed and large": lambda: freed(100_000),
    "cut": lambda: cut(1000),
    "zeros without memory": lambda: torch._efficientzerotensor(1000),
    "wrapper": lambda: Wrapped(torch.ones(1000)),
}[sys.argv[1]]()
size_bytes = None if sys.argv[1] in {"zeros without memory", "wrapper"} else tensor.untyped_storage().nbytes()
storage = MemoryStorage()
with CheckpointManager(storage) as ckpts:
    try:
        ckpts.save(1, {"model": {"layer": {"weight": tensor}}}, block=sys.argv[2] == "block")
    except TypeError as exc:
        print("refused:", exc)
    else:
        print("saved")
if size_bytes is not None:
    print("its memory:", "as it was" if tensor.untyped_storage().nbytes() == size_bytes else "made up")
"""

KINDS = ["freed", "freed and large", "cut", "zeros without memory", "wrapper"]


@pytest.mark.parametrize("way", ["copy", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_without_memory_is_refused_by_name(kind: str, way: str, tmp_path: Path) -> None:
    """Storage that was freed (FSDP and offloading do that) or cut, zeros that torch never made, wrappers: a TypeError."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, way],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "refused: model.layer.weight: this tensor" in done.stdout
    assert "made up" not in done.stdout
