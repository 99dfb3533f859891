"""The audit of the dependencies runs offline, and finds what it is there for."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.version import Version

from tests.tooling import tool_module

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """``tools/audit.py``."""
    return tool_module("audit")


def test_what_is_installed_and_what_is_allowed_has_no_known_hole(tool: ModuleType) -> None:
    """Against the advisories that are kept here: the environment of this test, and the floors of pyproject.toml."""
    wrong, open_ = tool.audit()
    assert wrong == []
    assert open_ == []


def test_the_closure_of_the_package_is_found(tool: ModuleType) -> None:
    """What is needed, and what that needs in turn, with its versions."""
    found = tool.closure("cloudckpt", ["s3", "test"])
    assert {"cloudckpt", "torch", "fsspec", "filelock", "s3fs", "aiobotocore", "aiohttp", "pytest"} <= found.keys()


def test_an_old_version_is_found(tool: ModuleType) -> None:
    """Installed, or allowed: both are said, with the version that is fixed."""
    advisory = tool.Advisory(id="X-1", package="Some_Thing", fixed="2.0", reaches_us=True, what="it burns", source="")
    harmless = tool.Advisory(id="X-2", package="other", fixed="9", reaches_us=False, what="not here", source="")
    old, new = {"some-thing": Version("1.9"), "other": Version("1")}, {"some-thing": Version("2.0")}
    assert [line for line in tool.installed(old, [advisory, harmless]) if "X-1, fixed in 2.0" in line]
    assert [*tool.installed(new, [advisory, harmless])] == []
    assert len([*tool.floors(["some-thing>=1.5", "other"], [advisory, harmless])]) == 1
    assert len([*tool.floors(["some.thing"], [advisory])]) == 1
    assert [*tool.floors(["some-thing>=2.1,<3"], [advisory])] == []


def test_a_tool_that_is_not_pinned_is_found(tool: ModuleType) -> None:
    """Developers get the same tools today and tomorrow."""
    assert [line.split(" ")[0] for line in tool.unpinned(["ruff==0.1", "mypy>=1"])] == ["mypy>=1"]


def test_an_export_of_osv_is_read(tool: ModuleType, tmp_path: Path) -> None:
    """By listed versions, and by ranges with their ends; other ecosystems and other packages are passed over."""
    records: list[tuple[str, str, dict[str, Any]]] = [
        ("PyPI", "thing", {"versions": ["1.0"]}),
        ("PyPI", "thing", {"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.1"}]}]}),
        ("PyPI", "thing", {"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "0.9"}]}]}),
        ("PyPI", "thing", {"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "1"}, {"last_affected": "1"}]}]}),
        ("PyPI", "thing", {"ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}]}),
        ("npm", "thing", {"versions": ["1.0"]}),
        ("PyPI", "another", {"versions": ["1.0"]}),
    ]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for number, (ecosystem, name, affected) in enumerate(records):
            record = {
                "id": f"OSV-{number}",
                "aliases": [f"CVE-{number}"],
                "affected": [{"package": {"ecosystem": ecosystem, "name": name}, **affected}],
            }
            archive.writestr(f"OSV-{number}.json", json.dumps(record))
    lines = [*tool.of_osv(tmp_path / "all.zip", {"thing": Version("1.0")})]
    assert [line.split(": ")[1] for line in lines] == ["OSV-0, CVE-0", "OSV-1, CVE-1", "OSV-3, CVE-3"]
