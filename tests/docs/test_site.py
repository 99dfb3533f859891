"""The documentation site builds without a warning, and everything in it leads somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import cloudckpt
from tests.tooling import tool_module

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


class Document(HTMLParser):
    """What a page can be linked to by, what it links to, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value for name, value in attrs if value}
        self.anchors.update(found[name] for name in ("id", "name") if name in found)
        self.links += [found[name] for name in ("href", "src") if name in found]
        if "src" in found or (tag == "link" and "href" in found):
            self.loads.append(found["src"] if "src" in found else found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors: a page that is in no menu, a link or an anchor that is not there."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def documents(site: Path) -> dict[Path, Document]:
    """The pages of the site, parsed."""
    found: dict[Path, Document] = {}
    for path in sorted(site.rglob("*.html")):
        found[path] = Document()
        found[path].feed(path.read_text(encoding="utf-8"))
    return found


def _broken(page: Path, link: str, site: Path, documents: dict[Path, Document]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return False
    path, anchor = unquote(parts.path), unquote(parts.fragment)
    # The page for what is not found has links from the top: it is shown in any folder.
    target = site / path.lstrip("/") if path.startswith("/") else page.parent / path if path else page
    target = target.resolve()
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return True
    return bool(anchor) and target in documents and anchor not in documents[target].anchors


def test_every_link_and_anchor_is_there(site: Path, documents: dict[Path, Document]) -> None:
    """Every link within the site names a file of it, and every anchor is on the page that it names."""
    resolved = {path.resolve(): document for path, document in documents.items()}
    broken = [
        f"{page.relative_to(site)}: {link}"
        for page, document in documents.items()
        for link in document.links
        if _broken(page, link, site.resolve(), resolved)
    ]
    assert broken == []
    assert len(documents) > 40


def test_nothing_is_loaded_from_elsewhere(documents: dict[Path, Document]) -> None:
    """The site can be read offline: no font, script, style or picture comes from another host."""
    assert {load for document in documents.values() for load in document.loads if urlsplit(load).netloc} == set()


def _public(module: str) -> list[str]:
    """The names in a module's ``__all__``, without importing what the module needs."""
    place = ROOT.joinpath(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


def _is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.is_dir() or place.with_suffix(".py").is_file()


def test_the_reference_has_every_public_name() -> None:
    """Each name of ``cloudckpt`` and of its public modules is on a page of the reference."""
    text = "".join(page.read_text(encoding="utf-8") for page in sorted(REFERENCE.glob("*.md")))
    shown = set(DIRECTIVE.findall(text)) | set(re.findall(r"`(cloudckpt\.\w+)`", text))
    shown |= {f"cloudckpt.{name}" for name in _public("cloudckpt.errors") if "cloudckpt.errors" in shown}
    wanted = {f"cloudckpt.{name}" for name in cloudckpt.__all__ if name != "__version__"}
    for module in ("cloudckpt.dcp", "cloudckpt.testing", "cloudckpt.testing.servers"):
        wanted |= {f"{module}.{name}" for name in _public(module)}
    assert wanted - shown == set()


def test_the_reference_has_public_names_only() -> None:
    """Each name on a page of the reference is a public module's, or such a module itself."""
    for page in sorted(REFERENCE.glob("*.md")):
        for name in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            module, _, attribute = name.rpartition(".")
            assert _public(name) if _is_module(name) else attribute in _public(module), f"{page.name}: {name}"


# -- tools/site_hooks.py ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    """The hooks of the site."""
    return tool_module("site_hooks")


def test_a_pattern_names_the_pages_that_nothing_else_names(hooks: ModuleType) -> None:
    """A pattern stays within its folder, leaves out what is named elsewhere, and keeps the order of the alphabet."""
    pages = ["a.md", "b.md", "index.md", "guide/one.md", "guide/two.md", "guide/deep/three.md"]
    nav = ["index.md", {"Guide": ["guide/two.md", "guide/*.md"]}, {"More": [{"B": "b.md"}, "*.md"]}]
    assert hooks.expanded(nav, pages) == [
        "index.md",
        {"Guide": ["guide/two.md", "guide/one.md"]},
        {"More": [{"B": "b.md"}, "a.md"]},
    ]


def test_a_link_out_of_the_documents_leads_into_the_site(hooks: ModuleType) -> None:
    """Links out of ``docs/`` and back are led to the place in the site; links within it, and others, stay as they are."""
    led = hooks.led
    assert led("[x](../../examples/train.py)", "docs/guide/a.md") == "[x](../repository/examples/train.py)"
    assert led("[x](../CHANGELOG.md#unreleased)", "docs/index.md") == "[x](repository/CHANGELOG.md#unreleased)"
    assert led("[x](docs/design.md)", "CONTRIBUTING.md") == "[x](../design.md)"
    assert led("[x](examples)", "README.md") == "[x](examples/index.md)"
    for same in ("[x](../design.md)", "[x](https://example.com/a.md)", "[x](#below)", "[x](../../no/such.py)"):
        assert led(same, "docs/guide/a.md") == same


def test_what_lies_outside_is_found(hooks: ModuleType) -> None:
    """Files and folders outside of ``docs/`` that are there are found, each once."""
    text = "[a](../../examples/train.py) [b](../../examples/train.py#x) [c](../design.md) [d](../../no/such.py)"
    assert hooks.outside(text, "docs/guide/a.md") == ["examples/train.py"]
