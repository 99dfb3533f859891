"""What the documentation says is true: generated parts are fresh, and its Python runs."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md"))]
MANY_RANKS = ROOT / "docs" / "guide" / "distributed.md"
#: On loopback, and on a free port.
AT_HOME = ["--local-addr", "127.0.0.1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")


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


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.name)
def test_every_python_block_runs(page: Path, tmp_path: Path) -> None:
    """The Python of a page runs from top to bottom in an empty folder, warnings as errors; that of many ranks on two."""
    code = "\n".join(BLOCK.findall(page.read_text()))
    command = [sys.executable, "-W", "error", "-c", code]
    if page == MANY_RANKS:
        tmp_path.joinpath("page.py").write_text(code)
        # Warnings are torchrun's and torch's own here.
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *AT_HOME, "page.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
