"""latest, diff, several runs, uploads in flight, near misses, and the JSON of every command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager
from cloudckpt.cli.app import COMMANDS
from cloudckpt.cli.schema import OBJECTS, SCHEMAS
from cloudckpt.core import keys
from cloudckpt.core import manifest as transitions
from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.storage import ManifestStore
from cloudckpt.tools import open_store
from tests.cli.documents import kind_of, wrong

#: Each field of each document, with its type. A line may be added, and none may be changed.
PROMISED = Path(__file__).with_name("documents.tsv")


def announce(store: ManifestStore, step: int, *, size_bytes: int) -> Checkpoint:
    """A save in flight, as a laptop sees it; its writer is the one that is known to the manifest."""
    entry = Checkpoint(
        id=store.token(8),
        step=step,
        seq=0,
        state=State.PENDING,
        writer_epoch=1,
        announced_at=store.clock(),
        size_bytes=size_bytes,
        object_count=2,
    )

    def change(current: Manifest, _: None) -> Manifest:
        epoch = current.writer_epoch
        return transitions.announce(
            current, replace(entry, writer_epoch=epoch), writer_epoch=epoch, settlements={}, gone=(), at=store.clock()
        )

    found = store.transact(change, prepare=lambda _: None).find(entry.id)
    assert found is not None
    return found


def test_latest_is_what_a_restart_goes_on_from(cli: Any, root: str) -> None:
    """The newest usable one: as a line, as its URL alone, as JSON; exit 4 where nothing was ever saved."""
    assert cli("latest", root).out.startswith(f"{root}/checkpoint-4.")
    assert "loss=0.4000" in cli("latest", root).out
    assert cli("latest", "-q", root).out.strip().startswith(f"{root}/checkpoint-4.")
    assert cli("latest", "--json", root).json["checkpoint"]["step"] == 4
    assert cli("latest", f"{root}-nowhere").code == 4


def test_diff_names_what_differs(cli: Any, root: str, tmp_path: Path) -> None:
    """Metrics, and the tensor whose bytes differ, from two indexes; nothing differs from itself."""
    out = cli("diff", "2", "4", "-r", root).out
    assert "loss: 0.1000 -> 0.4000" in out
    assert "values   model.w" in out
    assert "1 tensors differ, 0 have the same bytes" in out
    same = cli("diff", "2", "best", "-r", root, "--json").json
    assert same["same"] is True
    assert same["same_tensors"] == 1
    assert same["by_how_much"] is None
    assert cli("diff", "2", "4", "-q", "-r", root).out == "model.w\n"
    other = str(tmp_path / "other")
    with CheckpointManager(other) as ckpts:
        ckpts.save(1, {"model": {"w": torch.zeros(3), "v": torch.ones(2)}, "extra": 5}, block=True)
    across = cli("diff", f"{root}#2", f"{other}#1", "--json").json
    assert {(t["name"], t["kind"]) for t in across["tensors"]} == {("model.w", "shape"), ("model.v", "added")}
    assert [c["name"] for c in across["components"]] == ["extra"]


def test_diff_by_values_says_by_how_much(cli: Any, tmp_path: Path) -> None:
    """--values reads the tensors that differ, and no others, and tells how many elements differ and by how much."""
    run = str(tmp_path / "run")
    with CheckpointManager(run, keep_last=None) as ckpts:
        first = {"a": torch.ones(4), "b": torch.arange(3), "c": torch.tensor([1.0, float("nan")])}
        ckpts.save(1, {"model": first}, block=True)
        second = {**first, "a": torch.tensor([1.0, 1.0, 1.5, 1.0]), "b": torch.tensor([0, 1, 9])}
        ckpts.save(2, {"model": second}, block=True)
    document = cli("diff", "1", "2", "--values", "-r", run, "--json").json
    assert {c["name"]: (c["changed"], c["elements"], c["largest"]) for c in document["by_how_much"]} == {
        "model.a": (1, 4, 0.5),
        "model.b": (1, 3, 7.0),
    }
    assert "1 of 4 elements, at most 0.5, relative 0.25" in cli("diff", "1", "2", "--values", "-r", run).out


def test_a_prefix_with_runs_lists_them(cli: Any, root: str, tmp_path: Path) -> None:
    """A root that is no run lists the runs below it: newest, best, and the one that cannot be read as such."""
    shutil.copytree(root, tmp_path / "runs" / "a")
    shutil.copytree(root, tmp_path / "runs" / "deep" / "b")
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "manifest.json").write_text("{")
    out = cli("ls", str(tmp_path / "runs")).out.splitlines()
    assert out[0].split() == ["RUN", "CHECKPOINTS", "SIZE", "LATEST", "AGE", "BEST", "STATE"]
    assert [line.split()[0] for line in out[1:]] == ["a", "broken", "deep/b"]
    assert "2 (loss=0.1000)" in out[1]
    assert "closed" in out[1]
    assert "not valid JSON" in out[2]
    document = cli("ls", "--json", str(tmp_path / "runs")).json
    assert document.keys() == SCHEMAS["ls PREFIX"].keys()
    assert wrong(document["runs"][0], OBJECTS["run"], "run") == []
    assert document["runs"][0]["best"]["step"] == 2
    assert cli("ls", "-q", str(tmp_path / "runs")).out.splitlines()[2] == str(tmp_path / "runs" / "deep" / "b")
    assert cli("ls", str(tmp_path / "runs" / "nothing")).code == 4


def test_an_upload_in_flight_is_listed_with_its_progress(cli: Any, root: str, tmp_path: Path) -> None:
    """From a laptop: the save that is announced and not committed, and how much of it is in place."""
    run = shutil.copytree(root, tmp_path / "run")
    store = open_store(str(run))
    entry = announce(store, 5, size_bytes=1000)
    assert "uploading 0 %" in cli("ls", str(run)).out
    store.storage.put(keys.payload_key(5, entry.id, keys.payload_name("model", 0, 1)), [bytes(430)], size_bytes=430)
    assert "uploading 43 %" in cli("ls", str(run)).out
    assert cli("ls", "--json", str(run)).json["uploaded_bytes"] == {entry.id: 430}
    assert cli("latest", "--json", str(run)).json["checkpoint"]["step"] == 4


@pytest.mark.parametrize(
    ("select", "code", "message"),
    [
        ("lates", 2, "did you mean latest?"),
        ("tag:releas", 4, "did you mean tag:release?"),
        ("77", 4, "the nearest are 2, 3, 4"),
        ("ffffffff", 4, "the nearest are "),
    ],
)
def test_near_misses_are_shown(cli: Any, root: str, select: str, code: int, message: str) -> None:
    """What matches nothing is exit 4, what is no selector exit 2, and both say what would have been one."""
    result = cli("show", select, "-r", root)
    assert (result.code, result.out) == (code, "")
    assert message in result.err


def test_two_roots_confused_are_told_apart(cli: Any, root: str) -> None:
    """A root where a selector belongs is answered with how to write both."""
    result = cli("show", root)
    assert result.code == 2
    assert f"{root}#latest" in result.err


def test_every_document_is_as_documented(cli: Any, root: str, tmp_path: Path) -> None:
    """The JSON of each command has exactly the documented fields and types; whatever is left out is said to be."""
    run = str(shutil.copytree(root, tmp_path / "run"))
    documents = {
        "ls": cli("ls", "--json", run),
        "show": cli("show", "best", "--json", "-r", run),
        "best": cli("best", "--json", run),
        "latest": cli("latest", "--json", run),
        "plot": cli("plot", "--json", run),
        "log": cli("log", "--json", run),
        "diff": cli("diff", "2", "4", "--json", "-r", run),
        "cost": cli("cost", run, "--every", "600", "--json"),
        "pin, unpin, tag, mark, release": cli("pin", "best", "--json", "-r", run),
        "pull": cli("pull", "best", str(tmp_path / "pulled"), "--json", "-r", run),
        "cp": cli("cp", "best", str(tmp_path / "copy"), "--json", "-r", run),
        "prune": cli("prune", run, "--json"),
        "gc": cli("gc", run, "--json"),
        "rm": cli("rm", "4", "--json", "-r", run),
        "verify": cli("verify", run, "--json"),
        "doctor": cli("doctor", run, "--json"),
        "repair": cli("repair", run, "--json"),
        "export": cli("export", "best", str(tmp_path / "exported"), "--json", "-r", run),
    }
    for command, result in documents.items():
        assert result.code == 0, (command, result.err)
        assert wrong(result.json, SCHEMAS[command], command) == []
    by_values = cli("diff", "2", "3", "--values", "--json", "-r", root).json
    assert by_values["by_how_much"] != []
    assert wrong(by_values, SCHEMAS["diff"], "diff --values") == []
    imported = cli("import", str(tmp_path / "pulled" / "checkpoint-2"), str(tmp_path / "imported"), "--json")
    made = {name: said for name, said in SCHEMAS["import"].items() if name != "root"}
    assert wrong(imported.json, made, "import") == []
    planned = cli("import", str(tmp_path / "pulled" / "checkpoint-2"), str(tmp_path / "x"), "--json", "--dry-run")
    assert planned.json.keys() == {"dry_run", "plan", "root"}


def test_no_field_is_ever_taken_away() -> None:
    """Programs rely on names and types: all that are written down in ``documents.tsv`` are there, and no other one is."""
    tables = {**SCHEMAS, **OBJECTS}
    promised = [tuple(line.split("\t")) for line in PROMISED.read_text(encoding="utf-8").splitlines()]
    assert promised == [(name, field, kind_of(said)) for name, table in tables.items() for field, said in table.items()]


def test_every_command_is_documented_with_an_example(cli: Any) -> None:
    """--help of each command shows an example; the documents of all are in the table."""
    for commands in COMMANDS.values():
        for name in commands:
            helped = cli(name, "--help")
            assert helped.code == 0
            assert "Example" in helped.out, name
            assert any(name in key.replace(",", "").split() for key in SCHEMAS), name


def test_help_fits_forty_columns_without_colour() -> None:
    """The help of everything, on a terminal of 40 columns with NO_COLOR, is plain and no wider."""
    done = subprocess.run(
        [sys.executable, "-m", "cloudckpt", "--help"],
        capture_output=True,
        text=True,
        check=False,
        env={"COLUMNS": "40", "TERMINAL_WIDTH": "40", "NO_COLOR": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 40
