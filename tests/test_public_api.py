"""The public surface, written down."""

from __future__ import annotations

import subprocess
import sys

import cloudckpt


def test_the_public_names_are_these() -> None:
    """``cloudckpt`` has exactly these public names, and each can be had."""
    assert cloudckpt.__all__ == [
        "Best",
        "Checkpoint",
        "CheckpointManager",
        "CheckpointNotFoundError",
        "CloudCkptError",
        "CommitUnknownError",
        "ConfigError",
        "ConflictError",
        "CorruptCheckpointError",
        "Decision",
        "DivergenceDetector",
        "FencedError",
        "Finding",
        "FormatError",
        "KeepBest",
        "KeepEvery",
        "KeepLast",
        "KeepWithin",
        "ObjectNotFoundError",
        "PendingSave",
        "PerRank",
        "Policy",
        "PreemptionGuard",
        "Progress",
        "PrunePlan",
        "RankError",
        "RepairPlan",
        "Run",
        "SaveError",
        "Settings",
        "State",
        "StateMismatchError",
        "Storage",
        "StorageError",
        "SweepReport",
        "TrainState",
        "UnsafeStorageError",
        "VerifyReport",
        "__version__",
        "copy",
        "diff",
        "export",
        "gc",
        "import_folder",
        "open",
        "pull",
        "repair",
        "rng_state",
        "runs",
        "sweep",
        "verify",
    ]
    for name in cloudckpt.__all__:
        assert getattr(cloudckpt, name) is not None
    assert set(dir(cloudckpt)) == set(cloudckpt.__all__)


def test_a_submodule_never_hides_a_public_function() -> None:
    """After everything was imported, ``cloudckpt.verify`` and its siblings are still functions."""
    import cloudckpt.manager
    import cloudckpt.tools

    for name in ("copy", "diff", "export", "gc", "import_folder", "open", "pull", "repair", "runs", "sweep", "verify"):
        assert callable(getattr(cloudckpt, name)), name


def test_the_storage_for_pytorchs_own_checkpoints_is_a_module_of_its_own() -> None:
    """``import cloudckpt.dcp`` gives a writer and a reader, and DCP takes them for its own."""
    from torch.distributed.checkpoint import storage

    import cloudckpt.dcp

    assert cloudckpt.dcp.__all__ == ["StorageReader", "StorageWriter"]
    assert issubclass(cloudckpt.dcp.StorageReader, storage.StorageReader)
    assert issubclass(cloudckpt.dcp.StorageWriter, storage.StorageWriter)


def test_importing_the_package_and_the_command_line_loads_no_torch() -> None:
    """``import cloudckpt``, its metadata half and its command line load neither torch nor NumPy."""
    code = (
        "import sys, cloudckpt, cloudckpt.cli.app, cloudckpt.view, cloudckpt.testing; "
        "cloudckpt.verify, cloudckpt.Settings, cloudckpt.FencedError; "
        "sys.exit(sorted({'torch', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


#: What a fresh process has of ``cloudckpt.storage`` after importing it, and nothing of it, alone.
OF_STORAGE = """
import sys, cloudckpt.storage as storage
assert dir(storage) == sorted(storage.__all__), dir(storage)
assert "cloudckpt.storage.retry" not in sys.modules
for name in ("s3", "retry", "manifest_store"):
    assert getattr(storage, name) is sys.modules[f"cloudckpt.storage.{name}"]
for name in ("nothing", "_hidden", "no.name", ""):
    assert not hasattr(storage, name), name
for name in storage.__all__:
    assert getattr(storage, name) is not None
"""


def test_the_storage_package_names_what_it_has() -> None:
    """``dir()`` has its public names, though none was imported yet, and its modules are its attributes."""
    done = subprocess.run([sys.executable, "-c", OF_STORAGE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
