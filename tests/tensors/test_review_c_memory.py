"""Tensors that have no memory of their own to save from: an error by name, never a crash and never whatever lay there."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import pytest

#: Each in a process of its own, because what goes wrong here takes the process along; all are forked from one that has
#: imported torch and done nothing with it yet. A line of JSON for each: kind, way, how it ended, and what it said.
SCRIPT = """
import json
import os
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

def save(kind, way):
    tensor = {
        "freed": lambda: freed(1000),
        "freed and large": lambda: freed(100_000),
        "cut": lambda: cut(1000),
        "zeros without memory": lambda: torch._efficientzerotensor(1000),
        "wrapper": lambda: Wrapped(torch.ones(1000)),
    }[kind]()
    size_bytes = None if kind in {"zeros without memory", "wrapper"} else tensor.untyped_storage().nbytes()
    storage = MemoryStorage()
    said = []
    with CheckpointManager(storage) as ckpts:
        try:
            ckpts.save(1, {"model": {"layer": {"weight": tensor}}}, block=way == "block")
        except TypeError as exc:
            said.append(f"refused: {exc}")
        else:
            said.append("saved")
    if size_bytes is not None:
        kept = tensor.untyped_storage().nbytes() == size_bytes
        said.append("its memory: " + ("as it was" if kept else "made up"))
    return "; ".join(said)

for kind, way in json.loads(sys.argv[1]):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.write(writing, save(kind, way).encode())
            code = 0
        except BaseException as exc:
            os.write(writing, repr(exc).encode())
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, "rb") as answer:
        said = answer.read().decode()
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([kind, way, ended, said]), flush=True)
"""

KINDS = ["freed", "freed and large", "cut", "zeros without memory", "wrapper"]
WAYS = ["copy", "block"]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[int, str]]:
    """How each process ended, and what it said."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([*itertools.product(KINDS, WAYS)])],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=tmp_path_factory.mktemp("memory"),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {(kind, way): (code, said) for kind, way, code, said in lines}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_without_memory_is_refused_by_name(
    kind: str, way: str, ended: dict[tuple[str, str], tuple[int, str]]
) -> None:
    """Storage that was freed (FSDP and offloading do that) or cut, zeros that torch never made, wrappers: a TypeError."""
    code, said = ended[kind, way]
    assert code == 0, said
    assert said.startswith("refused: model.layer.weight: this tensor")
    assert "made up" not in said
