"""pull, cp, export, import: as a person and as a script give them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import cloudckpt
from cloudckpt.storage import LocalStorage

#: What ``transformers.trainer_utils.get_last_checkpoint`` takes for a checkpoint.
HUGGING_FACE = re.compile(r"^checkpoint\-(\d+)$")


def test_pull_q_is_made_for_command_substitution(cli: Any, root: str, tmp_path: Path) -> None:
    """-q prints the folder and nothing else; its name is exactly what a Trainer looks for."""
    result = cli("pull", "best", str(tmp_path), "-q", "-r", root)
    folder = Path(result.out.strip())
    assert folder == tmp_path / "checkpoint-2"
    assert HUGGING_FACE.match(folder.name)
    assert torch.equal(cloudckpt.open(folder).load()["model"]["w"], torch.full((9,), 2.0))
    assert result.err == ""


def test_pull_of_a_component(cli: Any, root: str, tmp_path: Path) -> None:
    """--component model is a file that load_file reads; the line says what came and that it is verified."""
    result = cli("pull", f"{root}#tag:release", str(tmp_path), "--component", "model")
    assert result.code == 0
    assert "came from the store, all of it verified" in result.out
    loaded = safetensors.torch.load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert torch.equal(loaded["w"], torch.full((9,), 2.0))
    again = cli("pull", f"{root}#tag:release", str(tmp_path), "--component", "model")
    assert again.out.split("(")[1].startswith("0 B of ")


def test_pull_dry_run_and_refusals(cli: Any, root: str, tmp_path: Path) -> None:
    """A dry run makes no folder and refuses what the pull refuses: what is in the way is exit 2, what is not there 4."""
    assert "would pull" in cli("pull", "best", str(tmp_path / "new"), "-n", "-r", root).out
    assert not (tmp_path / "new").exists()
    (tmp_path / "checkpoint-2").mkdir()
    for also in ((), ("-n",)):
        assert cli("pull", "best", str(tmp_path), "-r", root, *also).code == 2
        assert cli("pull", "99", str(tmp_path), "-r", root, *also).code == 4
        assert cli("pull", "best", str(tmp_path / "x"), "-c", "nope", "-r", root, *also).code == 2
    planned = cli("pull", "best", str(tmp_path / "new"), "-c", "model", "-n", "--json", "-r", root).json
    done = cli("pull", "best", str(tmp_path / "new"), "-c", "model", "--json", "-r", root).json
    assert {**planned, "dry_run": False, "read_bytes": done["read_bytes"]} == done


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_pull_is_finished_by_the_next(
    cli: Any, root: str, tmp_path: Path, number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C or SIGTERM in the middle: its own exit code, no folder of that name, and the same command again is enough."""
    plain = LocalStorage.read_into

    def interrupted(self: LocalStorage, key: str, start: int, *targets: memoryview) -> None:
        plain(self, key, start, *targets)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "read_into", interrupted)
        broken = cli("pull", "best", str(tmp_path), "-r", root)
    assert broken.code == code
    assert "Traceback" not in broken.err
    assert not (tmp_path / "checkpoint-2").exists()
    assert cli("pull", "best", str(tmp_path), "-r", root).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_cp_makes_a_run_of_its_own(cli: Any, root: str, tmp_path: Path) -> None:
    """-q prints the copy's URL; the target can be listed, and a second copy joins it."""
    target = str(tmp_path / "released")
    planned = cli("cp", "best", target, "--dry-run", "-r", root)
    assert "a new run" in planned.out
    assert not Path(target).exists()
    url = cli("cp", "best", target, "-q", "--tag", "v1", "-r", root).out.strip()
    assert url.startswith(f"{target}/checkpoint-2.")
    assert cli("cp", "4", target, "--pin", "-r", root).code == 0
    assert [c.step for c in cloudckpt.open(target).checkpoints()] == [2, 4]
    assert cli("show", "tag:v1", "-q", "-r", target).out.strip() == url
    assert cli("cp", "best", root, "-r", root).code == 2


@pytest.mark.parametrize(
    ("form", "reads"), [("torch", "all.pt"), ("hf", "model"), ("safetensors", "st"), ("dcp", "dcp")]
)
def test_export(cli: Any, root: str, tmp_path: Path, form: str, reads: str) -> None:
    """Each form is written where it was asked for, -q prints the path; a dry run says and refuses the same."""
    path = tmp_path / reads
    assert "would export" in cli("export", "best", str(path), "--to", form, "-n", "-r", root).out
    assert not path.exists()
    assert cli("export", "best", str(path), "--to", form, "-q", "-r", root).out == f"{path}\n"
    if form == "torch":
        assert torch.equal(torch.load(path)["model"]["w"], torch.full((9,), 2.0))
    elif form == "dcp":
        assert (path / ".metadata").exists()
    else:
        assert torch.equal(safetensors.torch.load_file(path / "model.safetensors")["w"], torch.full((9,), 2.0))
    for also in ((), ("-n",)):
        assert cli("export", "best", str(path), "--to", form, "-r", root, *also).code == 2
        assert cli("export", "best", str(tmp_path / "x"), "--to", "onnx", "-r", root, *also).code == 2
        assert cli("export", "best", str(tmp_path / "x"), "--to", form, "-c", "no", "-r", root, *also).code == 2
    planned = cli("export", "best", str(tmp_path / "y"), "--to", form, "--json", "-n", "-r", root).json
    done = cli("export", "best", str(tmp_path / "y"), "--to", form, "--json", "-r", root).json
    assert {**planned, "dry_run": False, "files": done["files"]} == done


def test_import_of_a_plain_folder(cli: Any, tmp_path: Path) -> None:
    """The plan is shown, then carried out; metrics can be given; what needs pickle is exit 2 and names the option."""
    place = tmp_path / "checkpoint-7"
    place.mkdir()
    torch.save({"w": torch.ones(2)}, place / "model.pt")
    (place / "notes.txt").write_text("mine")
    run = str(tmp_path / "run")
    planned = cli("import", str(place), run, "--dry-run")
    assert "model.pt -> model" in planned.out
    assert "notes.txt is left out" in planned.out
    assert not Path(run).exists()
    url = cli("import", str(place), run, "-q", "--metric", "loss=0.5", "--tag", "old").out.strip()
    assert url.startswith(f"{run}/checkpoint-7.")
    found = cloudckpt.open(run).select("tag:old")
    assert found.metrics == {"loss": 0.5}
    assert cli("import", str(place), run, "--metric", "loss").code == 2
    torch.save({"x": Path("a")}, place / "extra.pt")
    refused = cli("import", str(place), run)
    assert refused.code == 2
    assert "--allow-pickle" in refused.err
    assert cli("import", str(place), run, "--skip", "extra.pt", "--step", "8").code == 0
    assert [c.step for c in cloudckpt.open(run).checkpoints()] == [7, 8]


def test_import_of_a_component_that_was_pulled(cli: Any, root: str, tmp_path: Path) -> None:
    """What pull noted beside it is no component: it tells step and metrics."""
    cli("pull", "best", str(tmp_path), "-c", "model", "-r", root)
    folder = (tmp_path / "checkpoint-2").rename(tmp_path / "weights")
    run = str(tmp_path / "run")
    done = cli("import", str(folder), run, "--json").json
    assert (done["components"], done["checkpoint"]["step"]) == (["model"], 2)
    assert done["checkpoint"]["metrics"] == {"acc": 0.2, "loss": 0.1}
    (folder / "pulled.json").write_text('{"mine": 1}')
    again = cli("import", str(folder), run, "--step", "3", "--json").json
    assert again["components"] == ["model", "pulled"]


def test_import_of_what_was_pulled(cli: Any, root: str, tmp_path: Path) -> None:
    """A pulled folder goes back into a run, with metrics and tags."""
    cli("pull", "best", str(tmp_path), "-r", root)
    run = str(tmp_path / "run")
    assert cli("import", str(tmp_path / "checkpoint-2"), "-r", run).code == 0
    found = cloudckpt.open(run).select("tag:release")
    assert found.metrics == {"acc": 0.2, "loss": 0.1}
    assert cli("ls", str(tmp_path / "checkpoint-2"), "-q").out.startswith("checkpoint-2.")
    assert "verdict: ready" in cli("doctor", str(tmp_path / "checkpoint-2")).out
    for also in ((), ("-n",)):
        assert cli("import", str(tmp_path / "checkpoint-2"), run, "--step", "3", *also).code == 2


def test_a_run_in_use_is_exit_5(cli: Any, root: str, tmp_path: Path) -> None:
    """Copying into a run that a trainer holds is a conflict, and disturbs nothing; --takeover is a decision."""
    run = str(tmp_path / "run")
    cli("pull", "best", str(tmp_path), "-r", root)
    with cloudckpt.CheckpointManager(run, keep_last=1) as ckpts:
        ckpts.save(1, {"w": torch.zeros(1)}, block=True)
        refused = cli("cp", "best", run, "-r", root)
        assert refused.code == 5
        assert "--takeover" in refused.err
        for also in ((), ("-n",)):
            assert cli("import", str(tmp_path / "checkpoint-2"), run, *also).code == 5
        ckpts.save(2, {"w": torch.zeros(1)}, block=True)
    # Closed, it takes the copy, and its policy lets the one before go: said first, and then done.
    assert "would retire  checkpoint-2." in cli("cp", "best", run, "-n", "-r", root).out
    assert "retired  checkpoint-2." in cli("cp", "best", run, "-r", root).out
    assert len(cloudckpt.open(run).checkpoints()) == 1


def test_without_torch_the_message_says_so(root: str, tmp_path: Path) -> None:
    """A command that needs torch, on a laptop that has none: one line and exit 2."""
    block = "import sys; sys.modules['torch'] = None; "
    arguments = ["export", "best", str(tmp_path / "x"), "-r", root]
    code = f"{block}sys.argv = ['cloudckpt', *{arguments!r}]; from cloudckpt.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs torch" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_url_without_its_extra_says_what_to_install(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """s3:// where s3fs is not installed: the pip command, exit 2."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = cli("ls", "s3://bucket/run")
    assert result.code == 2
    assert 'pip install "cloudckpt[s3]"' in result.err


def test_a_long_listing_into_a_pipe_that_closes_early(root: str, tmp_path: Path) -> None:
    """``cloudckpt log | head -1`` is no failure: exit 0 and nothing on standard error."""
    run = shutil.copytree(root, tmp_path / "run")
    for command in (["log", str(run)], ["show", "best", "--json", "-r", str(run)]):
        with subprocess.Popen(
            [sys.executable, "-m", "cloudckpt", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as done:
            assert done.stdout is not None
            assert done.stderr is not None
            done.stdout.close()
            assert done.stderr.read() == b""
        assert done.returncode == 0
