"""Write the generated parts of ``terraform/`` anew, or check that they are what the code says.

    python tools/generate_terraform.py            exit 1 and a diff if something is stale
    python tools/generate_terraform.py --write    replace what is stale

Policies and permissions are made from the table in ``cloudckpt/core/rights.py``; Terraform reads the files as they are.
The tables of inputs and outputs in the READMEs are made from ``variables.tf`` and ``outputs.tf``. These are read as
``terraform fmt`` writes them (a test holds them to it): a block ends with a brace in the first column, and an argument
begins in the third.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from cloudckpt.core.rights import Role, Scope, aws_guard, aws_key_policy, aws_policy, gcp_permissions

ROOT = Path(__file__).resolve().parent.parent
AWS = Path("terraform/modules/aws")
GCP = Path("terraform/modules/gcp")
#: Folders with a README that has tables.
FOLDERS = (AWS, GCP, Path("terraform/examples/aws-spot"), Path("terraform/examples/gcp-gke"))

_BLOCK = re.compile(r'^(variable|output) "(\w+)" \{\n(.*?)^\}$', re.MULTILINE | re.DOTALL)
_ARGUMENT = re.compile(r"^  (\w+) += (.*?)(?=^  \w|\Z)", re.MULTILINE | re.DOTALL)
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


def stale(root: Path = ROOT) -> Iterator[tuple[Path, str, str]]:
    """The files that are not what the code says: path, text, what it should be."""
    wanted = {root / path: text for path, text in policies().items()}
    for folder in FOLDERS:
        path = root / folder / "README.md"
        wanted[path] = renewed(root / folder, path.read_text(encoding="utf-8"))
    for path, text in wanted.items():
        found = path.read_text(encoding="utf-8") if path.exists() else ""
        if found != text:
            yield path, found, text


def check(root: Path = ROOT) -> str:
    """A diff of everything that is stale; empty if nothing is."""
    return "".join(
        line
        for path, text, wanted in stale(root)
        for line in difflib.unified_diff(
            text.splitlines(keepends=True), wanted.splitlines(keepends=True), str(path), "as the code says"
        )
    )


def main() -> int:
    """Check, or write with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace what is stale")
    if parser.parse_args().write:
        for path, _, wanted in list(stale()):
            path.write_text(wanted, encoding="utf-8", newline="\n")
            print(f"wrote {path.relative_to(ROOT)}")
        return 0
    diff = check()
    sys.stdout.write(diff)
    return 1 if diff else 0


if __name__ == "__main__":
    sys.exit(main())
