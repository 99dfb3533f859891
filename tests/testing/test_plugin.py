"""The plugin as another project's tests see it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

THEIR_TESTS = """
import fsspec, pytest, torch
from cloudckpt import CheckpointManager, SaveError, open

@pytest.fixture(params=["local_root", "memory_root", "s3_root", "gcs_root"])
def root(request):
    return request.getfixturevalue(request.param)

def test_it_resumes(root):
    state = {"w": torch.arange(8.0)}
    with CheckpointManager(root) as ckpts:
        ckpts.save(1, state)
    fresh = {"w": torch.zeros(8)}
    with CheckpointManager(root) as ckpts:
        assert ckpts.restore(fresh).step == 1
    assert torch.equal(fresh["w"], state["w"])

def test_each_test_has_a_root_of_its_own(root):
    assert open(root).checkpoints() == ()

def test_a_lost_answer_does_no_harm(faulty_s3_root, s3_faults):
    with CheckpointManager(faulty_s3_root) as ckpts:
        ckpts.save(1, {"w": 1}, block=True)
        lost = s3_faults.inject("drop_after", method="PUT", match="manifest.json")
        ckpts.save(2, {"w": 2}, block=True)
    assert lost.hits == 1
    assert [c.step for c in open(faulty_s3_root).checkpoints()] == [1, 2]

def test_an_outage_is_an_error_of_the_save_and_no_more(faulty_gcs_root, gcs_faults):
    with CheckpointManager(faulty_gcs_root) as ckpts:
        ckpts.save(1, {"w": 1}, block=True)
        gcs_faults.inject("status", status=403, method="POST")
        with pytest.raises(SaveError):
            ckpts.save(2, {"w": 2}, block=True)
        ckpts.save(3, {"w": 3}, block=True)
    assert [c.step for c in open(faulty_gcs_root).checkpoints()] == [1, 3]
"""

THEIR_BACKEND = """
import pytest
from cloudckpt.storage import MemoryStorage
from cloudckpt.testing import StorageContract

class TestMine(StorageContract):
    @pytest.fixture
    def storage(self):
        return MemoryStorage()
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Pytest in another project's folder, warnings as errors."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.processes
def test_another_projects_tests_use_the_fixtures(tmp_path: Path) -> None:
    """Every root works with nothing but its fixture's name; faults are injected by one line."""
    (tmp_path / "test_theirs.py").write_text(THEIR_TESTS)
    done = run(tmp_path)
    assert "10 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.processes
def test_another_projects_backend_inherits_the_contract(tmp_path: Path) -> None:
    """A storage of one's own is held to every promise by one class and one fixture."""
    (tmp_path / "test_mine.py").write_text(THEIR_BACKEND)
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "69 passed" in done.stdout


@pytest.mark.processes
def test_the_plugin_costs_nothing_until_it_is_used(tmp_path: Path) -> None:
    """A project that uses no fixture of it loads neither torch nor moto nor a filesystem."""
    (tmp_path / "test_nothing.py").write_text(
        "import sys\n"
        "def test_nothing():\n"
        "    heavy = {'torch', 'moto', 's3fs', 'gcsfs', 'aiohttp', 'botocore'}\n"
        "    assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = run(tmp_path)
    assert "1 passed" in done.stdout, done.stdout


@pytest.mark.processes
def test_the_fixtures_are_listed_with_their_descriptions(tmp_path: Path) -> None:
    """`pytest --fixtures` tells what there is."""
    done = run(tmp_path, "--fixtures")
    for name in ("s3_root", "gcs_root", "local_root", "memory_root", "faulty_s3_root", "s3_faults"):
        assert f"{name} --" in done.stdout or f"{name} [" in done.stdout, name
