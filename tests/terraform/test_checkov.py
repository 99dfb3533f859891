"""checkov finds nothing in the modules but what is skipped with a reason beside it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.terraform.iam import ROOT

#: It pins so much that it lives in an environment of its own: ``make terraform``.
_OWN = ROOT / ".venv-terraform" / "bin" / "checkov"
CHECKOV = str(_OWN) if _OWN.exists() else shutil.which("checkov")
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
    """Every check passes that is not skipped beside the resource, every skip is of a check there is, every file is read."""
    if CHECKOV is None:
        missing = "checkov is not installed: make .venv-terraform/.ready"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    done = subprocess.run(
        [CHECKOV, "--directory", "terraform", "--framework", "terraform", "--skip-download", "--output", "json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    results, summary = found["results"], found["summary"]
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
    # Public access and the clean-up of uploads were looked at, and not left out with a file or a block.
    assert {"CKV_AWS_53", "CKV2_AWS_6", "CKV_AWS_300", "CKV_GCP_29", "CKV_GCP_114"} <= set(passed)
