"""Which run a command means, where the command line and the environment say several things; and what all commands have."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager, CheckpointNotFoundError
from cloudckpt.cli.app import COMMANDS
from cloudckpt.cli.schema import SCHEMAS

NAMES = [name for commands in COMMANDS.values() for name in commands]
#: Commands with an argument for the root, and what else they need.
WITH_PLACE: dict[str, list[str]] = {
    name: []
    for name in (
        "ls",
        "best",
        "latest",
        "log",
        "plot",
        "watch",
        "ui",
        "cost",
        "prune",
        "gc",
        "verify",
        "doctor",
        "repair",
    )
} | {"import": ["folder"]}
#: Commands with a selector, and what else they need.
WITH_SELECTOR: dict[str, list[str]] = {
    **{name: [] for name in ("show", "pin", "unpin", "release", "pull", "export", "rm")},
    "tag": ["name"],
    "mark": ["label"],
    "cp": ["c"],
    "diff": ["latest"],
}


@pytest.fixture
def two(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with runs ``a`` (steps to 4) and ``b`` (step 7), where commands are given."""
    shutil.copytree(root, tmp_path / "a")
    with CheckpointManager(tmp_path / "b") as ckpts:
        ckpts.save(7, {"w": torch.zeros(1)}, block=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_takes_a_root_as_one_of_these() -> None:
    """The two tests below leave no command out."""
    assert sorted(NAMES) == sorted({**WITH_PLACE, **WITH_SELECTOR})


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("name", WITH_PLACE)
def test_an_argument_and_an_option_that_contradict(cli: Any, name: str) -> None:
    """Nothing is done to either run; the error has both."""
    result = cli(name, *WITH_PLACE[name], "a", "-r", "b")
    assert (result.code, result.out) == (2, "")
    assert result.err == "cloudckpt: which run, a or b (-r)? They are two: give one of them\n"


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("name", WITH_SELECTOR)
def test_a_selector_and_an_option_that_contradict(cli: Any, name: str) -> None:
    """The same, where the root is before the mark of a selector."""
    result = cli(name, "a#best", *WITH_SELECTOR[name], "--root", "b")
    assert (result.code, result.out) == (2, "")
    assert result.err == "cloudckpt: which run, a or b (-r)? They are two: give one of them\n"


def test_one_root_that_is_given_twice(cli: Any, two: Path) -> None:
    """Also where it is spelled in two ways."""
    for other in ("a", "./a/", str(two / "a"), (two / "a").as_uri()):
        assert cli("ls", "-q", "a", "-r", other).out.count("checkpoint-") == 3
        assert cli("show", "-q", "a#2", "-r", other).code == 0
    assert cli("verify", "a", "-r", "./a").code == 0


@pytest.mark.usefixtures("two")
def test_the_command_line_goes_before_the_environment(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment is what holds where nothing is said: argument, option and selector win, without a word."""
    monkeypatch.setenv("CLOUDCKPT_ROOT", "b")
    assert cli("ls", "-q").out.startswith("checkpoint-7.")
    for arguments in (["ls", "-q", "a"], ["ls", "-q", "-r", "a"], ["show", "-q", "a#4"], ["verify", "a#4"]):
        result = cli(*arguments)
        assert (result.code, result.err) == (0, ""), arguments
        assert "checkpoint-7" not in result.out
    assert cli("gc", "a", "-r", "b").code == 2
    assert cli("gc", "a", "-r", "a", "--dry-run").code == 0


def test_verify_takes_a_root_whatever_the_environment_says(
    cli: Any, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A word is a selector if it selects something, else a root if a run is there; the error names both readings."""
    monkeypatch.setenv("CLOUDCKPT_ROOT", "b")
    assert [c["step"] for c in cli("verify", "--json").json["checkpoints"]] == [7]
    assert [c["step"] for c in cli("verify", "a", "--json").json["checkpoints"]] == [2, 3, 4]
    assert [c["step"] for c in cli("verify", str(two / "a"), "--json").json["checkpoints"]] == [2, 3, 4]
    # Both a step of the one run and the folder of another.
    shutil.copytree("a", "7")
    shutil.copytree("a", "8")
    assert [c["step"] for c in cli("verify", "7", "--json").json["checkpoints"]] == [7]
    assert [c["step"] for c in cli("verify", "8", "--json").json["checkpoints"]] == [2, 3, 4]
    for word, code, reading in (
        ("nowhere", 2, "write latest, best"),
        ("9", 4, "no committed checkpoint of step 9"),
        ("tag:x/y", 4, "nothing has the tag 'x/y'"),
    ):
        result = cli("verify", word)
        assert result.code == code
        assert f"{word!r} is neither a selector nor a root. As a selector: " in result.err
        assert reading in result.err
        assert "As a root: " in result.err
        assert f"{word} holds no run" in result.err
    contradicts = cli("verify", "a", "-r", "b")
    assert contradicts.code == 2
    assert "a or b (-r)" in contradicts.err
    # What is wrong with a run that is meant is said of that run.
    (two / "a" / "manifest.json").write_text("{")
    broken = cli("verify", "a")
    assert broken.code == 1
    assert "cloudckpt repair" in broken.err
    # A run that the environment names and that is not there is in nobody's way.
    monkeypatch.setenv("CLOUDCKPT_ROOT", "gone")
    assert cli("verify", "8").code == 0
    monkeypatch.delenv("CLOUDCKPT_ROOT")
    assert cli("verify", "8").code == 0
    assert cli("verify", "nowhere").code == 4


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_the_options_of_all(cli: Any, name: str) -> None:
    """-q, --debug, and --json, whose document is in the table."""
    helped = cli(name, "--help").out
    for option in ("--quiet", "-q", "--debug", "--json", "--root", "-r"):
        assert option in helped.split(), option
    assert any(name in key.replace(",", "").split() for key in SCHEMAS)


def test_repair_for_scripts(cli: Any, two: Path) -> None:
    """-q prints the names of what is admitted, and like every -q changes nothing without --yes."""
    manifest = two / "a" / "manifest.json"
    manifest.unlink()
    listed = cli("repair", "a", "-q")
    assert listed.code == 0
    assert [line.split(".")[0] for line in listed.out.splitlines()] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert not manifest.exists()
    assert cli("repair", "a", "-q", "--yes").out == listed.out
    assert manifest.exists()


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("before", [True, False])
def test_debug_works_on_both_sides_of_the_command(cli: Any, before: bool) -> None:
    """The error comes as the exception that it is; without --debug as a line."""
    arguments = ["show", "99", "-r", "a"]
    assert cli(*arguments).code == 4
    with pytest.raises(CheckpointNotFoundError):
        cli(*(["--debug", *arguments] if before else [*arguments, "--debug"]))
    assert cli(*arguments).code == 4, "and it is over with the command"
