"""The command line as a person, and as a script, meets it.

(Past 350 lines: one test for each thing that holds of every command.)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cloudckpt
from cloudckpt import CheckpointManager, ConflictError
from cloudckpt.cli import app as program
from cloudckpt.cli import checking
from cloudckpt.cli.pipes import readers_may_leave
from cloudckpt.cli.schema import SCHEMAS


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cloudckpt", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**{name: value for name, value in os.environ.items() if name != "COLUMNS"}, **environment},
    )


def test_ls_says_why_each_is_kept(cli: Any, root: str) -> None:
    """The listing has a row per checkpoint, newest first, with metrics and the reasons it is kept."""
    result = cli("ls", root)
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0].split() == ["STEP", "AGE", "SIZE", "acc", "loss", "KEPT", "BECAUSE", "STATE"]
    assert [line.split()[0] for line in lines[1:4]] == ["4", "3", "2"]
    assert "last #2, pinned" in lines[2]
    assert "best #1" in lines[3]
    assert "tag:release" in lines[3]
    assert lines[4].startswith("3 checkpoints, ")
    assert "policy: last 2, best 1 by loss (min)" in lines[4]


def test_ls_for_scripts(cli: Any, root: str) -> None:
    """-q prints names only; --json is one document with everything the table says."""
    names = cli("ls", "-q", "-r", root).out.split()
    assert [name.split(".")[0] for name in names] == ["checkpoint-4", "checkpoint-3", "checkpoint-2"]
    document = cli("ls", "--json", root).json
    assert document.keys() == SCHEMAS["ls"].keys()
    assert [c["step"] for c in document["checkpoints"]] == [2, 3, 4]
    best = document["checkpoints"][0]
    assert best["kept_because"] == ["best #1"]
    assert best["state"] == "committed"
    assert best["url"].startswith(root)
    assert best["metrics"] == {"acc": 0.2, "loss": 0.1}


def test_the_root_comes_from_three_places(cli: Any, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument, -r, CLOUDCKPT_ROOT, or within the selector; without any, exit 2 says how to give it."""
    assert cli("best", "-q", root).out == cli("best", "-q", "-r", root).out
    assert cli("show", f"{root}#best").code == 0
    missing = cli("ls")
    assert missing.code == 2
    assert "set CLOUDCKPT_ROOT" in missing.err
    monkeypatch.setenv("CLOUDCKPT_ROOT", root)
    assert cli("best", "-q").out.startswith(f"{root}/checkpoint-2.")
    assert cli("show", "latest").code == 0


def test_show_tells_what_is_inside(cli: Any, root: str) -> None:
    """Show prints facts and objects of one checkpoint; --json adds every tensor with its place."""
    result = cli("show", "tag:release", "-r", root)
    assert "model (1 tensors)" in result.out
    assert "model-00000-of-00001.safetensors" in result.out
    document = cli("show", "2", "-r", root, "--json").json
    assert document["checkpoint"]["step"] == 2
    assert document["index"]["tensors"]["model"]["w"]["shape"] == [9]


def test_best_by_any_metric(cli: Any, root: str) -> None:
    """Best ranks by the monitor, or by any metric with a direction; a metric nobody has is exit 4."""
    assert cli("best", root).out.strip().endswith("loss=0.1000")
    by_acc = cli("best", root, "--metric", "acc", "--mode", "max", "--json").json
    assert (by_acc["metric"], by_acc["value"], by_acc["checkpoint"]["step"]) == ("acc", 0.4, 4)
    assert cli("best", root, "--metric", "acc").code == 2
    nobody = cli("best", root, "--metric", "bleu", "--mode", "max")
    assert nobody.code == 4
    assert "acc, loss" in nobody.err or "bleu" in nobody.err


def test_log_prints_the_journal(cli: Any, root: str) -> None:
    """Log prints the last events, newest last, in text, for scripts and as JSON."""
    lines = cli("log", root, "-n", "3").out.splitlines()
    assert [line.split()[2] for line in lines][-3:] == ["tag", "pin", "close:"]
    events = [event["event"] for event in cli("log", root, "--json").json["events"]]
    assert events[0] == "claim"
    short = cli("log", root, "-q").out.splitlines()
    assert [line.split()[0] for line in short] == events[-30:]
    assert any(line.startswith("commit checkpoint-4.") for line in short)
    assert {"announce", "commit", "retire", "delete"} <= set(events)


def copy_of(root: str, place: Path) -> Path:
    """A run of one's own to damage."""
    return Path(shutil.copytree(root, place))


def test_verify_names_object_and_range(cli: Any, root: str, tmp_path: Path) -> None:
    """Sizes are right and a byte is not: verify is content, verify --deep exits 3 and names object and bytes."""
    run = copy_of(root, tmp_path / "run")
    assert cli("verify", str(run), "--deep").code == 0
    payload = next(run.glob("checkpoint-2.*/model-*.safetensors"))
    body = bytearray(payload.read_bytes())
    body[-1] ^= 1
    payload.write_bytes(body)
    assert cli("verify", str(run)).code == 0
    damaged = cli("verify", str(run), "--deep")
    assert damaged.code == 3
    assert f"DAMAGED {payload} bytes {len(body) - 36}..{len(body)}: model.w: checksum" in damaged.out
    assert cli("verify", "latest", "-r", str(run), "--deep").code == 0
    document = cli("verify", f"{run}#2", "--deep", "--json")
    assert document.code == 3
    assert document.json["ok"] is False
    assert document.json["findings"][0]["length"] == 36
    payload.unlink()
    assert cli("verify", str(run)).code == 3


def test_repair_proposes_first(cli: Any, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a manifest ls names repair; --dry-run and a "no" change nothing; --yes brings the run back."""
    run = copy_of(root, tmp_path / "run")
    (run / "manifest.json").unlink()
    lost = cli("ls", str(run))
    assert lost.code == 1
    assert f"cloudckpt repair {run}" in lost.err
    proposal = cli("repair", str(run), "--dry-run")
    assert proposal.code == 0
    assert "3 checkpoints are whole" in proposal.out
    assert "could not know" in proposal.out or "manifest-" in proposal.out
    assert not (run / "manifest.json").exists()
    monkeypatch.setattr("typer.confirm", lambda *_, **__: False)
    assert "nothing was changed" in cli("repair", str(run)).out
    assert not (run / "manifest.json").exists()
    assert cli("repair", str(run), "--yes").code == 0
    assert "held" in cli("ls", str(run)).out
    assert torch.equal(cloudckpt.open(str(run)).load("best")["model"]["w"], torch.full((9,), 2.0))


def test_repair_says_what_is_damaged_and_what_gc_would_delete(cli: Any, root: str, tmp_path: Path) -> None:
    """A lost payload object is named by repair, ls, show and verify; what is refused, with what becomes of it."""
    run = copy_of(root, tmp_path / "run")
    for manifest in run.glob("manifest*.json"):
        manifest.unlink()
    damaged, unsealed, garbled = (next(run.glob(f"checkpoint-{step}.*")) for step in (2, 3, 4))
    lost = next(damaged.glob("model-*.safetensors"))
    lost.unlink()
    (unsealed / "checkpoint.json").unlink()
    (garbled / "checkpoint.json").write_bytes(b"{}")
    proposal = cli("repair", str(run), "--dry-run")
    assert "0 checkpoints are whole and 1 damaged: they would be admitted and held" in proposal.out
    assert f"{damaged.name} is damaged ({lost.name} is missing)" in proposal.out
    assert f"not admitted: {unsealed.name}: it was never sealed: no index\n" in proposal.out
    assert f"gc would delete {unsealed.name}: to keep it, copy it out of {run} first\n" in proposal.out
    assert f"gc would delete {garbled.name}" not in proposal.out
    document = cli("repair", str(run), "--yes", "--json").json
    assert [c["damaged"] for c in document["admitted"]] == [f"{lost.name} is missing"]
    assert {*document["refused"]} == {unsealed.name, garbled.name}
    assert document["gc_deletes"] == [unsealed.name]
    assert "damaged" in cli("ls", str(run)).out
    assert f"{lost.name} is missing" in cli("show", "2", "-r", str(run)).out
    found = cli("verify", str(run))
    assert found.code == 3
    assert f"{lost.name}: missing" in found.out
    cleaned = cli("gc", str(run), "--yes")
    assert cleaned.code == 3, "what it left to a person is a finding"
    assert f"could not delete {garbled.name}/checkpoint.json" in cleaned.out
    assert [path.is_dir() and any(path.iterdir()) for path in (damaged, unsealed, garbled)] == [True, False, True]
    assert cli("rm", "2", "-r", str(run), "--force", "--yes").code == 0
    assert not damaged.is_dir() or not any(damaged.iterdir())


def test_doctor(cli: Any, root: str, tmp_path: Path) -> None:
    """Doctor says ready, or what is wrong with exit 1; it leaves nothing behind."""
    run = copy_of(root, tmp_path / "run")
    before = sorted(p.name for p in run.rglob("*"))
    ready = cli("doctor", str(run))
    assert ready.code == 0
    assert "verdict: ready" in ready.out
    assert "closed by pid" in ready.out
    assert sorted(p.name for p in run.rglob("*") if p.name != ".cloudckpt.lock") == [
        name for name in before if name != ".cloudckpt.lock"
    ]
    new = cli("doctor", str(tmp_path / "new"))
    assert new.code == 0
    assert "can be made" in new.out
    assert not (tmp_path / "new").exists()
    (run / "manifest.json").write_text("{")
    broken = cli("doctor", str(run), "--json")
    assert broken.code == 1
    assert broken.json["ok"] is False
    file = tmp_path / "file"
    file.touch()
    assert cli("doctor", str(file)).code == 1
    elsewhere = cli("doctor", str(run), "--role", "trainer")
    assert elsewhere.code == 2
    assert "leave --role out" in elsewhere.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "99"], 4, "no committed checkpoint of step 99; the nearest are 2, 3, 4"),
        (["show", "nonsense!"], 2, "selects nothing: write latest, best"),
        (["show", "tag:none"], 4, "the tags there are: release"),
    ],
)
def test_errors_are_sentences(cli: Any, root: str, arguments: list[str], code: int, message: str) -> None:
    """A user's mistake is one line on standard error and an exit code, never a traceback."""
    result = cli(*arguments, "-r", root)
    assert result.code == code
    assert message in result.err
    assert "Traceback" not in result.err + result.out
    assert result.out == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_with_its_own_code(
    cli: Any, root: str, number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C gives 130 and SIGTERM 143, without a traceback."""
    monkeypatch.setattr(checking, "verify", lambda *_, **__: signal.raise_signal(number))
    result = cli("verify", root)
    assert result.code == code
    assert "Traceback" not in result.err


def test_debug_shows_the_traceback(root: str) -> None:
    """--debug is for those who want one; an unknown option is usage, exit 2."""
    done = process("--debug", "show", "99", "-r", root)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert process("ls", "--nonsense").returncode == 2
    assert process("--version").stdout == f"cloudckpt {cloudckpt.__version__}\n"


def test_a_narrow_terminal_without_colour(root: str) -> None:
    """40 columns and NO_COLOR give plain text that folds and still has everything in it; a pipe folds nothing."""
    done = process("ls", root, COLUMNS="40", NO_COLOR="1")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    *lines, summary = done.stdout.splitlines()
    assert max(map(len, lines)) <= 40
    assert not re.search(r"\d{5}|…", done.stdout)
    assert summary.endswith("policy: last 2, best 1 by loss (min)")
    blocks = re.split(r"^(?=STEP)", "\n".join(lines), flags=re.MULTILINE)[1:]
    size = re.search(r"SIZE (\S+ \S+)", blocks[0])
    assert size is not None
    for block, (step, loss, kept, state) in zip(
        blocks,
        [
            (4, 0.4, "last #1", "committed"),
            (3, 0.5, "last #2, pinned", "committed"),
            (2, 0.1, "best #1", "committed, tag:release"),
        ],
        strict=True,
    ):
        words = " ".join(block.split())
        assert re.fullmatch(
            rf"STEP {step} AGE \S+ \S+ SIZE {re.escape(size[1])} acc {step / 10:.4f} loss {loss:.4f} "
            rf"KEPT BECAUSE {kept} STATE {state}",
            words,
        ), block
    piped = process("ls", root).stdout
    assert "last #2, pinned" in piped
    assert "committed, tag:release" in piped


def test_a_reader_that_leaves_early_is_no_error(root: str) -> None:
    """A closed pipe ends the command in silence."""
    with subprocess.Popen(
        [sys.executable, "-m", "cloudckpt", "ls", "--json", root], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as done:
        assert done.stdout is not None
        assert done.stderr is not None
        done.stdout.close()
        assert b"Traceback" not in done.stderr.read()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["ls", "--help"], 0),
        (["--version"], 0),
        (["ls", "ROOT"], 0),
        (["show", "99", "-r", "ROOT"], 4),
        (["ls", "--nonsense"], 2),
        (["nonsense"], 2),
        (["ls", "nosuch://place"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
@pytest.mark.parametrize("lines", [0, 1])
def test_the_code_is_the_command_s_own_whoever_reads(root: str, arguments: list[str], code: int, lines: int) -> None:
    """``cloudckpt … 2>&1 | true`` and ``| head -1``: nobody who stops reading turns a success or a failure into another."""
    program = [sys.executable, "-m", "cloudckpt", *(root if word == "ROOT" else word for word in arguments)]
    reader, writer = os.pipe()
    with subprocess.Popen(program, stdout=writer, stderr=writer) as done:
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as heard:
            first = [heard.readline() for _ in range(lines)]
        assert done.wait(60) == code
    assert b"Traceback" not in b"".join(first)


def test_messages_that_nobody_reads_are_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """With standard error closed a command goes on with its work; with standard output closed it has none."""
    for name in ("stdout", "stderr"):
        reader, writer = os.pipe()
        os.close(reader)
        with monkeypatch.context() as patch, os.fdopen(writer, "w") as stream:
            patch.setattr(sys, name, stream)
            ends = pytest.raises(SystemExit, match=r"^0$") if name == "stdout" else contextlib.nullcontext()
            with ends, readers_may_leave():
                for _ in range(2):
                    print("unread", file=getattr(sys, name), flush=True)
            assert getattr(sys, name) is stream


def test_a_command_whose_module_fails_is_no_missing_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyError while the module of a command is imported is raised, and not "no such command"."""

    def broken(place: str) -> Any:
        raise KeyError(place)

    monkeypatch.setattr(program, "function_of", broken)
    commands = program._WhenAsked()
    assert "ls" in commands
    assert commands.get("nonsense") is None
    with pytest.raises(KeyError, match="looking:list_checkpoints"):
        commands.get("ls")


#: Each command in a child of a process that has the program loaded, and ends as the program does.
WITHOUT_TORCH = """
import json, os, sys
sys.modules["torch"] = sys.modules["numpy"] = None
import cloudckpt.cli.app
for arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        sys.argv = ["cloudckpt", *arguments]
        cloudckpt.cli.main()
        sys.exit("the program came back")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        sys.exit(f"{arguments} ended with {code}")
    print("fine", file=sys.stderr)
"""


def test_no_command_loads_torch(root: str, tmp_path: Path) -> None:
    """Every command works where torch cannot be imported at all."""
    commands = [
        ["ls", root],
        ["show", "best", "-r", root],
        ["verify", root, "--deep"],
        ["doctor", root],
        ["log", root],
        ["latest", root],
        ["diff", "best", "latest", "-r", root],
        ["prune", root, "--dry-run"],
        ["gc", root, "--dry-run"],
        ["pin", "best", "--dry-run", "-r", root],
        ["pull", "best", str(tmp_path), "-r", root],
        ["pull", "best", str(tmp_path / "model"), "-r", root, "-c", "model"],
        ["cp", "best", str(tmp_path / "copy"), "-r", root],
        ["export", "best", "--dry-run", "-r", root],
        ["import", str(tmp_path / "checkpoint-2"), str(tmp_path / "new")],
        ["cost", root, "--every", "60"],
        ["watch", root, "--count", "1"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines().count("fine") == len(commands)


#: What takes long to load or belongs to an extra: no command loads it before it is asked for.
HEAVY = {
    *("torch", "numpy", "pandas", "matplotlib", "plotext", "pydantic"),
    *("fsspec", "s3fs", "gcsfs", "asyncio", "aiohttp", "aiobotocore", "botocore"),
}


def test_the_program_starts_without_what_takes_long(root: str) -> None:
    """The program itself loads no command; ls of a folder no client of a store, no picture and no tensor library."""
    code = (
        "import sys; sys.argv = ['cloudckpt', 'ls', sys.argv[1]]\n"
        "import cloudckpt.cli.app\n"
        "assert not {'cloudckpt.storage', 'cloudckpt.cli.looking', 'cloudckpt.cli.moving'} & {*sys.modules}\n"
        "print(*sys.modules, file=sys.stderr)\n"
        "try: cloudckpt.cli.main()\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert loaded >= {"cloudckpt", "typer", "rich"}
    assert loaded & HEAVY == set()


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["cloudckpt", "p"], {"pin", "plot", "prune", "pull"}),
        (["cloudckpt", "ver"], {"verify"}),
        (["cloudckpt", "show", "be"], {"best"}),
        (["cloudckpt", "gc", "--dry"], {"--dry-run"}),
    ],
)
def test_a_shell_completes_commands_options_and_selectors(typed: list[str], offered: set[str]) -> None:
    """What bash asks of the program that ``--install-completion`` has taught it, when somebody presses Tab."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['cloudckpt']; from cloudckpt.cli import main; main()"],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "_CLOUDCKPT_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(typed),
            "COMP_CWORD": str(len(typed) - 1),
        },
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == offered


def test_brackets_are_shown_as_they_were_written(cli: Any, tmp_path: Path) -> None:
    """Metrics, tags and marks with square brackets are text, whatever rich would make of them."""
    run = str(tmp_path / "[run]")
    with CheckpointManager(run, monitor="loss[/x]", mode="min") as ckpts:
        ckpts.save(1, {"a[/b]": torch.ones(1)}, metrics={"loss[/x]": 1.0}, tags=["[/bold]", "[red]x"], block=True)
        ckpts.save(2, {"a[/b]": torch.ones(1)}, metrics={"loss[/x]": 2.0}, block=True)
        ckpts.mark(2, "[/m]")
    listed = cli("ls", run).out
    for text in ("loss[/x]", "tag:[/bold]", "tag:[red]x", "marked [/m]", "best 1 by loss[/x] (min)"):
        assert text in listed
    shown = cli("show", "1", "-r", run).out
    for text in ("[/bold], [red]x", "loss[/x]=1.0000", "a[/b] (1 tensors)"):
        assert text in shown
    for command in (["best", run], ["log", run], ["doctor", run], ["verify", run], ["repair", "-n", run]):
        assert cli(*command).code == 0, command


def test_the_exit_code_says_what_kind_of_trouble(
    cli: Any, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 fine, 1 failure, 2 usage, 3 findings, 4 nothing matches, 5 conflict: as --help says."""
    run = copy_of(root, tmp_path / "run")
    assert cli("ls", str(run)).code == 0
    assert cli("ls", str(tmp_path / "empty")).code == 4
    assert cli("ls", "--nonsense").code == 2
    assert cli("show", "#best", "-r", str(run)).code == 0
    (next(run.glob("checkpoint-2.*")) / "checkpoint.json").unlink()
    missing = cli("show", "2", "-r", str(run))
    assert missing.code == 3
    assert "checkpoint.json is missing" in missing.err
    (run / "manifest.json").write_text("{")
    assert cli("ls", str(run)).code == 1

    def race(*_: object, **__: object) -> None:
        raise ConflictError("somebody else wrote the manifest")

    monkeypatch.setattr(checking, "repair", race)
    conflict = cli("repair", str(run), "--yes")
    assert (conflict.code, conflict.err) == (5, "cloudckpt: somebody else wrote the manifest\n")
    helped = cli("--help")
    assert helped.code == 0
    assert "5 conflict" in " ".join(helped.out.split()).replace("│ ", "")
