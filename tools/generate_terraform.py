"""Write the generated parts of ``terraform/`` anew, or check that they are what the code says.

    python tools/generate_terraform.py            exit 1 and a diff if something is stale
    python tools/generate_terraform.py --write    replace what is stale

Policies and permissions are made from the table in ``cloudckpt/core/rights.py``; Terraform reads the files as they are.
The tables of inputs and outputs in the READMEs are made from ``variables.tf`` and ``outputs.tf``. These are read as
``terraform fmt`` writes them (a test holds them to it): a block ends with a brace in the first column, and an argument
begins in the third.

What checkov found is written into ``terraform/README.md``, from a run of it. It lives in an environment of its own
(``make .venv-terraform/.ready``); where there is none, that part is left as it is.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cloudckpt.core.rights import Role, Scope, aws_guard, aws_key_policy, aws_policy, gcp_permissions

ROOT = Path(__file__).resolve().parent.parent
AWS = Path("terraform/modules/aws")
GCP = Path("terraform/modules/gcp")
#: Folders with a README that has tables.
FOLDERS = (AWS, GCP, Path("terraform/examples/aws-spot"), Path("terraform/examples/gcp-gke"))

_BLOCK = re.compile(r'^(variable|output) "(\w+)" \{\n(.*?)^\}$', re.MULTILINE | re.DOTALL)
_ARGUMENT = re.compile(r"^  (\w+) += (.*?)(?=^  \w|\Z)", re.MULTILINE | re.DOTALL)
#: The page with checkov's report.
REPORT = Path("terraform/README.md")
_REPORT_PART = re.compile(r"(<!-- generated: checkov -->\n)(.*?)(<!-- /generated -->)", re.DOTALL)
_PART = re.compile(r"(<!-- generated: (inputs|outputs) -->\n)(.*?)(<!-- /generated -->)", re.DOTALL)


def _json(document: object) -> str:
    return json.dumps(document, indent=2) + "\n"


def policies() -> dict[Path, str]:
    """The files of policies and permissions, by path below the repository's root."""
    found = {AWS / "policies" / "guard.json": _json(aws_guard())}
    for role in Role:
        found[AWS / "policies" / f"{role}.json"] = _json(aws_policy(role))
        found[AWS / "policies" / f"{role}-key.json"] = _json(aws_key_policy(role))
    permissions = {
        role.value: {
            "prefix": gcp_permissions(role, Scope.PREFIX, Scope.LISTING),
            "bucket": gcp_permissions(role, Scope.BUCKET),
        }
        for role in Role
    }
    return {**found, GCP / "permissions.json": _json(permissions)}


def rendered(text: str, values: Mapping[str, str]) -> str:
    """What Terraform's ``templatefile`` makes of a policy: every ``${name}`` is replaced.

    Raises:
        KeyError: a name has no value.
    """
    return re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text)


def blocks(text: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Variables and outputs of a formatted file: kind, name, and the source of each argument."""
    for kind, name, body in _BLOCK.findall(text):
        # Without the blocks inside (validation), whose arguments are indented further.
        yield kind, name, {found[0]: found[1].strip() for found in _ARGUMENT.findall(body)}


def _cell(source: str) -> str:
    """Source on one line of a table."""
    return re.sub(r"\s+", " ", source).replace("|", "\\|")


def _text(source: str) -> str:
    """A string of HCL without its quotes."""
    return _cell(source.removeprefix('"').removesuffix('"').replace('\\"', '"'))


def table(folder: Path, kind: str) -> str:
    """The table of a folder's inputs or outputs."""
    wanted = "variable" if kind == "inputs" else "output"
    files = sorted(folder.glob("*.tf"))
    found = [block for path in files for block in blocks(path.read_text(encoding="utf-8")) if block[0] == wanted]
    if missing := [name for _, name, arguments in found if "description" not in arguments]:
        raise ValueError(f"{folder}: {', '.join(missing)} without a description")
    if kind == "outputs":
        rows = [f"| `{name}` | {_text(arguments['description'])} |\n" for _, name, arguments in found]
        return "| output | |\n| --- | --- |\n" + "".join(rows)
    rows = [
        f"| `{name}` | {_text(arguments['description'])} | `{_cell(arguments['type'])}` | "
        + (f"`{_cell(arguments['default'])}` |\n" if "default" in arguments else "required |\n")
        for _, name, arguments in found
    ]
    return "| input | | type | default |\n| --- | --- | --- | --- |\n" + "".join(rows)


def renewed(folder: Path, text: str) -> str:
    """A README with its tables made anew."""
    return _PART.sub(lambda match: f"{match[1]}\n{table(folder, match[2])}\n{match[4]}", text)


def checkov(root: Path = ROOT) -> dict[str, Any] | None:
    """What checkov says of ``terraform/``; None where it is not installed.

    Raises:
        RuntimeError: it said nothing.
    """
    own = root / ".venv-terraform" / "bin" / "checkov"
    program = str(own) if own.exists() else shutil.which("checkov")
    if program is None:
        return None
    command = [program, "--directory", "terraform", "--framework", "terraform", "--skip-download", "--output", "json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise RuntimeError(f"checkov ended with {done.returncode} and no report: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def report(found: Mapping[str, Any]) -> str:
    """The numbers of a report of checkov's by folder, what failed, and what is skipped and why."""
    kinds = ("passed", "failed", "skipped")
    checks = [(kind, check) for kind in kinds for check in found["results"][f"{kind}_checks"]]

    def count(kind: str, folder: Path) -> int:
        place = f"/{folder.relative_to('terraform')}/"
        return sum(1 for one, check in checks if one == kind and check["file_path"].startswith(place))

    rows = "".join(
        f"| `{folder.relative_to('terraform')}` | " + " | ".join(str(count(kind, folder)) for kind in kinds) + " |\n"
        for folder in FOLDERS
    )
    text = (
        f"checkov {found['summary']['checkov_version']}, framework terraform, every check that it has:\n\n"
        f"| | passed | failed | skipped |\n| --- | --- | --- | --- |\n{rows}"
    )
    # What is said of a module in each example that uses it is written once.
    skipped = sorted(
        {
            (c["file_path"][1:], c["check_id"], _address(c["resource"]), c["check_name"], why)
            for kind, c in checks
            for why in [c["check_result"].get("suppress_comment")]
            if kind == "skipped"
        }
    )
    failed = sorted({(c["file_path"][1:], c["check_id"], c["check_name"]) for kind, c in checks if kind == "failed"})
    if failed:
        text += "\n| failed | file | |\n| --- | --- | --- |\n"
        text += "".join(f"| {check} | [{path}]({path}) | {_cell(name)} |\n" for path, check, name in failed)
    if skipped:
        text += "\n| skipped | of | because |\n| --- | --- | --- |\n"
        text += "".join(
            f"| {check}: {_cell(name)} | `{resource}` in [{path}]({path}) | {_cell(why)} |\n"
            for path, check, resource, name, why in skipped
        )
    return text


def _address(resource: str) -> str:
    """A resource's address within its module."""
    return re.sub(r"^(?:module\.[\w-]+\.)+", "", resource)


def reported(text: str, found: Mapping[str, Any]) -> str:
    """A page with its report of checkov's made anew."""
    return _REPORT_PART.sub(lambda match: f"{match[1]}\n{report(found)}\n{match[3]}", text)


def stale(root: Path = ROOT, *, said: Mapping[str, Any] | None = None) -> Iterator[tuple[Path, str, str]]:
    """The files that are not what the code says, and with what checkov said: path, text, what it should be."""
    wanted = {root / path: text for path, text in policies().items()}
    for folder in FOLDERS:
        path = root / folder / "README.md"
        wanted[path] = renewed(root / folder, path.read_text(encoding="utf-8"))
    if said is not None:
        wanted[root / REPORT] = reported((root / REPORT).read_text(encoding="utf-8"), said)
    for path, text in wanted.items():
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        if found != text:
            yield path, found, text


def check(root: Path = ROOT, *, said: Mapping[str, Any] | None = None) -> str:
    """A diff of everything that is stale; empty if nothing is."""
    return "".join(
        line
        for path, text, wanted in stale(root, said=said)
        for line in difflib.unified_diff(
            text.splitlines(keepends=True), wanted.splitlines(keepends=True), str(path), "as the code says"
        )
    )


def main() -> int:
    """Check, or write with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace what is stale")
    is_writing = parser.parse_args().write
    if (said := checkov()) is None:
        print("checkov is not installed: its report is left as it is", file=sys.stderr)
    if is_writing:
        for path, _, wanted in list(stale(said=said)):
            path.write_text(wanted, encoding="utf-8", newline="\n")
            print(f"wrote {path.relative_to(ROOT)}")
        return 0
    diff = check(said=said)
    sys.stdout.write(diff)
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
