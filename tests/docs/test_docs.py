"""What the documentation says is true: generated parts are fresh, and its Python and its commands run."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloudckpt.testing.servers import SeaweedFS
from tests.tooling import tool_module

ROOT = Path(__file__).parents[2]
FORKSERVER = Path(__file__).with_name("forkserver.py")
#: Decisions and the specification show what is no program.
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name not in {"adr", "spec"}),
]
MANY_RANKS = ROOT / "docs" / "guide" / "distributed.md"
#: On loopback, and on a free port.
AT_HOME = ["--local-addr", "127.0.0.1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
#: Blocks that are run. Those to be read only are written as ``py`` and ``bash``.
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
TO_READ = re.compile(r"```py\n(.*?)```", re.DOTALL)
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")
BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9-]+)")
#: Commands that end with Ctrl-C only; their own tests end them.
UNTIL_CTRL_C = {"ui", "watch"}
DEMO_ROOT = re.compile(r"(?:\.|s3://[a-z0-9-]+)/runs/demo\b")
#: What ``./runs/demo`` and ``s3://bucket/runs/demo`` are in the commands of a page that has not made them itself.
DEMO = """
import sys

import torch

import cloudckpt
from tests.tooling import tool_module

for root in sys.argv[1:]:
    if cloudckpt.open(root).latest() is not None:
        continue
    with cloudckpt.CheckpointManager(root, monitor="val_loss", mode="min", keep_best=2, keep_last=3) as ckpts:
        for step, loss in [(500, 0.53), (1000, 0.41), (1500, 0.45), (2000, 0.43)]:
            state = {"model": {"w": torch.full((4,), loss)}, "optimizer": {"moment": torch.zeros(4), "lr": 0.1}}
            ckpts.save(step, state, metrics={"val_loss": loss, "accuracy": 1 - loss}, block=True)
        ckpts.tag(1000, "release-1")
"""


def commands(text: str) -> list[str]:
    """The lines of a page's ``sh`` blocks that are run: those of ``cloudckpt``, and variables for them."""
    lines = "\n".join(SHELL.findall(text)).replace("\\\n", " ").splitlines()
    shown = [line for line in lines if line.startswith(("cloudckpt ", "export "))]
    return [line for line in shown if line.split()[1] not in UNTIL_CTRL_C]


RUNNABLE = [page for page in PAGES if BLOCK.search(text := page.read_text(encoding="utf-8")) or commands(text)]


def test_generated_parts_are_fresh() -> None:
    """The examples and tables made from the code are what the code says now; ``make spec`` writes them."""
    module = tool_module("generate_docs")
    assert module.check() == ""
    for part in module.GENERATED:
        assert any(f"generated: {part} " in page.read_text() for page in (ROOT / "docs").rglob("*.md")), part


@dataclass(frozen=True, slots=True)
class Programs:
    """How programs are started.

    Attributes:
        python: before Python code and its arguments; every warning is an error.
        cloudckpt: before the arguments of the command.
    """

    python: tuple[str, ...]
    cloudckpt: tuple[str, ...]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """A process each; on Linux each is forked from one that has torch loaded, which takes seconds every time."""
    if sys.platform != "linux":  # elsewhere a fork of a process with libraries like these is not safe
        yield Programs((sys.executable, "-W", "error", "-c"), (sys.executable, "-m", "cloudckpt"))
        return
    address = str(tmp_path_factory.mktemp("forkserver") / "socket")
    with subprocess.Popen(
        [sys.executable, str(FORKSERVER), "serve", address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            assert server.stdout.readline() == b"ready\n"
            client = (sys.executable, "-I", "-S", str(FORKSERVER), "run", address)
            yield Programs((*client, "code"), (*client, "cloudckpt"))
        finally:
            server.stdin.close()
    assert server.returncode == 0


def test_a_program_of_the_fork_server_is_a_program(programs: Programs, tmp_path: Path) -> None:
    """It has folder, environment, arguments and streams of whoever starts it, and its exit code and warnings are told."""
    code = "import os, sys; print(os.getcwd(), os.environ['A'], sys.argv[1:], sys.stdin.read(), __name__, end='')"
    done = subprocess.run(
        [*programs.python, code, "b c"],
        cwd=tmp_path,
        env={"A": "1", "PATH": os.environ["PATH"]},
        input="in",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path} 1 ['b c'] in __main__"
    for code, ends, said in (
        ("raise SystemExit(3)", 3, ""),
        ("import warnings; warnings.warn('old', FutureWarning)", 1, "FutureWarning: old"),
        ("import atexit; atexit.register(print, 'last'); 1 / 0", 1, "ZeroDivisionError"),
    ):
        done = subprocess.run([*programs.python, code], capture_output=True, text=True, check=False)
        assert done.returncode == ends
        assert said in done.stderr
    assert done.stdout == "last\n"
    asked = subprocess.run([*programs.cloudckpt, "ls", "nowhere"], cwd=tmp_path, capture_output=True, check=False)
    assert asked.returncode == 4
    assert b"nowhere" in asked.stderr


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_runs(
    page: Path,
    programs: Programs,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> None:
    """In an empty folder the Python of a page runs from top to bottom, warnings as errors, and then its commands do.

    A page that names a bucket has it, empty, on a real S3 server. The page of many ranks runs on two. Whatever a
    command asks is answered with no.
    """
    text = page.read_text(encoding="utf-8")
    code, lines = "\n".join(BLOCK.findall(text)), commands(text)
    environment = _surroundings(programs, tmp_path_factory.mktemp("bin"))
    if buckets := sorted(set(BUCKET.findall("\n".join([code, *lines])))):
        server: SeaweedFS = request.getfixturevalue("seaweedfs")
        for bucket in buckets:
            _make_empty(server, bucket)
        environment |= server.environment()
    if code and page == MANY_RANKS:
        tmp_path.joinpath("page.py").write_text(code, encoding="utf-8")
        # Warnings are torchrun's and torch's own here.
        many = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *AT_HOME)
        _run([*many, "page.py"], tmp_path, environment)
    elif code:
        _run([*programs.python, code], tmp_path, environment)
    if roots := sorted(set(DEMO_ROOT.findall("\n".join(lines)))):
        _run([*programs.python, DEMO, *roots], tmp_path, environment)
    variables: list[str] = []
    for line in lines:
        if line.startswith("export "):
            variables.append(line)
        else:
            _run(["bash", "-euc", "\n".join([*variables, line])], tmp_path, environment)


def test_the_loop_of_the_readme_has_nine_lines() -> None:
    """The block that shows what our lines are among the reader's: manager, restore, loop, save, and no other one."""
    before, loop = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(loop.splitlines()) == 9
    for call in ("CheckpointManager(", "ckpts.restore(state)", "for step in range(", "ckpts.save(step, state, "):
        assert call in loop
        assert call not in before


def _surroundings(programs: Programs, folder: Path) -> dict[str, str]:
    """The environment of a page: ``cloudckpt`` on the path, and nobody's credentials."""
    program = folder / "cloudckpt"
    program.write_text(f'#!/bin/sh\nexec {shlex.join(programs.cloudckpt)} "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "CLOUDCKPT_")) and not name.lower().endswith("_proxy")
    }
    return {
        **kept,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def _make_empty(server: SeaweedFS, bucket: str) -> None:
    """Make a bucket, or take away what another page has left in it."""
    server.create_bucket(bucket)
    client = server.client()
    try:
        for found in client.get_paginator("list_objects_v2").paginate(Bucket=bucket).search("Contents[].Key"):
            if found is not None:
                client.delete_object(Bucket=bucket, Key=found)
        for upload in client.list_multipart_uploads(Bucket=bucket).get("Uploads", ()):
            client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
    finally:
        client.close()


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    done = subprocess.run(
        command, cwd=folder, env=environment, input="n\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"


def _defined(module: str) -> set[str]:
    """The names that a module of ours defines or has from elsewhere, without importing what it needs."""
    place = ROOT.joinpath(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_blocks_that_are_not_run_are_python_and_name_what_there_is() -> None:
    """What needs a trainer, a bucket or the reader's own code parses, and what it takes from us is there."""
    blocks = [(page, block) for page in PAGES for block in TO_READ.findall(page.read_text(encoding="utf-8"))]
    assert blocks
    missing = []
    for page, block in blocks:
        for node in ast.walk(ast.parse(block, filename=page.name)):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("cloudckpt"):
                names = {alias.name for alias in node.names} - _defined(node.module)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cloudckpt":
                names = {node.attr} - _defined("cloudckpt")
            else:
                continue
            missing += [f"{page.name}: {name}" for name in sorted(names)]
    assert missing == []


def test_links_lead_somewhere() -> None:
    """Every relative link in the documentation names a file that exists."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in LINK.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []


def _names(node: object) -> set[str]:
    """The field names of the manifest's own objects; metrics have names of their own."""
    if isinstance(node, list):
        return set().union(*map(_names, node)) if node else set()
    if not isinstance(node, dict):
        return set()
    return set(node) | _names([value for name, value in node.items() if name != "metrics"])


def test_every_field_of_the_manifest_and_the_index_is_described() -> None:
    """Each field that a golden store has is named in the text of the specification, beside the examples."""
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / "spec" / "v1.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    golden = ROOT / "tests" / "format" / "golden" / "v1"
    fields = _names(json.loads((golden / "manifest.json").read_bytes()))
    for path in golden.glob("checkpoint-*/checkpoint.json"):
        index = json.loads(path.read_bytes())
        fields |= set(index) | _names(index["objects"]) | _names(index["policy"])
        fields |= {n for tensors in index["tensors"].values() for tensor in tensors.values() for n in _names(tensor)}
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []
