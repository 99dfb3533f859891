"""How much memory a load takes beside the tensors themselves, measured by the kernel in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

#: Large enough that a second copy, or a quarter of one, cannot hide in the noise of an interpreter.
STATE_MIB = 256
#: What issue C allows is 64 MiB and two pieces a thread; into memory that exists, files need next to nothing.
SPARE_MIB = 64

SAVE = f"""
import sys, torch
from cloudckpt import CheckpointManager
weights = {{f"w{{n}}": torch.full(({STATE_MIB} * 2**20 // 4 // 8,), float(n)) for n in range(8)}}
with CheckpointManager(sys.argv[1]) as ckpts:
    ckpts.save(1, {{"model": weights}}, block=True)
"""

MEASURED = """
import sys, torch, cloudckpt
from cloudckpt import CheckpointManager, Settings

def peak_mib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

def forget_the_peak():
    open("/proc/self/clear_refs", "w").write("5")
"""

RESTORE = f"""{MEASURED}
weights = {{f"w{{n}}": torch.full(({STATE_MIB} * 2**20 // 4 // 8,), -1.0) for n in range(8)}}
# A limit that no state fits into: the memory for the first save, made in the background, is not what is measured.
with CheckpointManager(sys.argv[1], settings=Settings(staging_limit_bytes=4096)) as ckpts:
    ckpts.restore({{"model": {{"w0": weights["w0"]}}}}, strict=False)  # everything is imported, the threads have run
    forget_the_peak()
    before = peak_mib()
    ckpts.restore({{"model": weights}})
    print(peak_mib() - before)
assert all(tensor.eq(float(name[1:])).all() for name, tensor in weights.items())
"""

LOAD = f"""{MEASURED}
run = cloudckpt.open(sys.argv[1])
run.load(names=["w0"])
forget_the_peak()
before = peak_mib()
loaded = run.load()
print(peak_mib() - before - {STATE_MIB})
assert all(tensor.eq(float(name[1:])).all() for name, tensor in loaded["model"].items())
"""

MAP = f"""{MEASURED}
run = cloudckpt.open(sys.argv[1])
run.load(names=["w0"], mmap=True, verify=False)
forget_the_peak()
before = peak_mib()
loaded = run.load(mmap=True, verify=False)
print(peak_mib() - before)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local run of 256 MiB, written by another process."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("Linux tells the peak of a process, and forgets it on demand")
    place = tmp_path_factory.mktemp("memory") / "run"
    subprocess.run([sys.executable, "-c", SAVE, str(place)], check=True)
    return place


@pytest.mark.processes
@pytest.mark.parametrize(
    "script",
    [pytest.param(RESTORE, id="restore"), pytest.param(LOAD, id="load"), pytest.param(MAP, id="mmap")],
)
def test_a_load_takes_little_beside_the_tensors(root: Path, script: str) -> None:
    """Restored into what exists, loaded fresh, or mapped: at most 64 MiB beyond the tensors' own memory."""
    done = subprocess.run([sys.executable, "-c", script, str(root)], check=True, capture_output=True, text=True)
    assert float(done.stdout.split()[-1]) <= SPARE_MIB
