"""checkov finds nothing in the modules but what is skipped with a reason beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from tests.terraform.iam import ROOT

#: It pins so much that it lives in an environment of its own: ``make terraform``.
_OWN = ROOT / ".venv-checkov" / "bin" / "checkov"
CHECKOV = str(_OWN) if _OWN.exists() else shutil.which("checkov")
_SKIP = re.compile(r"#\s*checkov:skip=([^:\n]*):?(.*)")


def test_every_skip_has_a_reason() -> None:
    """No check is skipped without a sentence, and no file skips by a list on the command line."""
    skips = [
        (path, *match)
        for path in sorted((ROOT / "terraform").rglob("*.tf"))
        for match in _SKIP.findall(path.read_text(encoding="utf-8"))
    ]
    assert skips
    assert [skip for skip in skips if not re.fullmatch(r"CKV2?_[A-Z]+_\d+", skip[1]) or len(skip[2]) < 40] == []


@pytest.mark.slow
@pytest.mark.processes
def test_checkov_finds_nothing() -> None:
    """Every check of checkov's that is not skipped beside the resource passes, and it could read every file."""
    if CHECKOV is None:
        pytest.skip("checkov is not installed: make terraform")
    command = [CHECKOV, "--directory", str(ROOT / "terraform"), "--framework", "terraform", "--skip-download"]
    done = subprocess.run([*command, "--output", "json", "--quiet"], capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)
    failed = [
        f"{check['check_id']} {check['resource']}: {check['check_name']}" for check in found["results"]["failed_checks"]
    ]
    assert failed == []
    assert found["summary"]["parsing_errors"] == 0
    assert found["summary"]["passed"] + found["summary"]["skipped"] > 0
