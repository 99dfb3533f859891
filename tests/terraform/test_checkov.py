"""checkov finds nothing in the modules but what is skipped with a reason beside it."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.terraform.iam import ROOT, tool

_SKIP = re.compile(r"#\s*checkov:skip=([^:\n]*):?(.*)")


def skips() -> Iterator[tuple[Path, str, str]]:
    """What the modules and examples skip: the file, the check, the reason."""
    for path in sorted((ROOT / "terraform").rglob("*.tf")):
        for check, reason in _SKIP.findall(path.read_text(encoding="utf-8")):
            yield path, check, reason


def test_every_skip_has_a_reason() -> None:
    """No check is skipped without a sentence, and no file skips by a list on the command line."""
    found = [*skips()]
    assert found
    assert [skip for skip in found if not re.fullmatch(r"CKV2?_[A-Z]+_\d+", skip[1]) or len(skip[2]) < 40] == []


@pytest.mark.slow
@pytest.mark.processes
def test_checkov_finds_nothing() -> None:
    """Every check passes that is not skipped beside the resource, every skip is of a check there is, the README says so."""
    if not (ROOT / ".venv-terraform" / "bin" / "checkov").exists() and shutil.which("checkov") is None:
        missing = "checkov is not installed: make .venv-terraform/.ready"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    said = tool().checkov()
    results, summary = said["results"], said["summary"]
    for check in results["skipped_checks"]:
        print(f"skipped  {check['check_id']} {check['resource']}: {check['check_result']['suppress_comment']}")
    passed = Counter(check["check_id"] for check in results["passed_checks"])
    for name, resources in sorted(passed.items()):
        print(f"passed   {name} on {resources} resources")
    print(f"checkov {summary['checkov_version']}: {summary['passed']} passed, {summary['skipped']} skipped")
    failed = [f"{check['check_id']} {check['resource']}: {check['check_name']}" for check in results["failed_checks"]]
    assert failed == []
    assert results["parsing_errors"] == []
    assert {check["check_id"] for check in results["skipped_checks"]} == {check for _, check, _ in skips()}
    # And the report that people read is this one.
    assert tool().check(said=said) == ""
    # Public access and the clean-up of uploads were looked at, and not left out with a file or a block.
    assert {"CKV_AWS_53", "CKV2_AWS_6", "CKV_AWS_300", "CKV_GCP_29", "CKV_GCP_114"} <= set(passed)
