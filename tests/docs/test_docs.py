"""What the documentation says is true: generated parts are fresh, and its Python and its commands run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudckpt.testing.servers import SeaweedFS, ServerMissing

ROOT = Path(__file__).parents[2]
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
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "tools" / "generate_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.check() == ""
    for part in module.GENERATED:
        assert any(f"generated: {part} " in page.read_text() for page in (ROOT / "docs").rglob("*.md")), part


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_runs(page: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In an empty folder the Python of a page runs from top to bottom, warnings as errors, and then its commands do.

    A page that names a bucket has a real S3 server of its own, with that bucket. The page of many ranks runs on two.
    Whatever a command asks is answered with no.
    """
    text = page.read_text(encoding="utf-8")
    code, lines = "\n".join(BLOCK.findall(text)), commands(text)
    with _surroundings("\n".join([code, *lines]), tmp_path_factory.mktemp("bin")) as environment:
        if code:
            _run_python(code, tmp_path, environment, many_ranks=page == MANY_RANKS)
        _run_commands(lines, tmp_path, environment)


@contextlib.contextmanager
def _surroundings(used: str, programs: Path) -> Iterator[dict[str, str]]:
    """The environment of a page: ``cloudckpt`` on the path, nobody's credentials, and the buckets that it uses."""
    program = programs / "cloudckpt"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m cloudckpt "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "CLOUDCKPT_")) and not name.lower().endswith("_proxy")
    }
    environment = {
        **kept,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with contextlib.ExitStack() as stack:
        if buckets := sorted(set(BUCKET.findall(used))):
            try:
                server = stack.enter_context(SeaweedFS())
            except ServerMissing as exc:
                if os.environ.get("CI"):
                    raise
                pytest.skip(str(exc))
            for bucket in buckets:
                server.create_bucket(bucket)
            environment |= server.environment()
        yield environment


def _run_python(code: str, folder: Path, environment: dict[str, str], *, many_ranks: bool) -> None:
    command = [sys.executable, "-W", "error", "-c", code]
    if many_ranks:
        folder.joinpath("page.py").write_text(code, encoding="utf-8")
        # Warnings are torchrun's and torch's own here.
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *AT_HOME, "page.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _run_commands(lines: list[str], folder: Path, environment: dict[str, str]) -> None:
    if roots := sorted(set(DEMO_ROOT.findall("\n".join(lines)))):
        made = subprocess.run(
            [sys.executable, "-c", DEMO, *roots],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert made.returncode == 0, made.stderr
    variables: list[str] = []
    for line in lines:
        if line.startswith("export "):
            variables.append(line)
            continue
        done = subprocess.run(
            ["bash", "-euc", "\n".join([*variables, line])],
            cwd=folder,
            env=environment,
            input="n\n",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


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
