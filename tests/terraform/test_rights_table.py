"""The table of rights, the files made from it, and the judge of the tests: each says the same."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

from cloudckpt.core.rights import NEEDS, Need, Provider, Role, grants
from tests.terraform.iam import MODULES, ROOT, Asked, decide, filled_in, tool

BUCKET = "arn:aws:s3:::b"
MANIFEST = f"{BUCKET}/team/run/manifest.json"
COPY = f"{BUCKET}/team/run/manifest-000480.json"
INDEX = f"{BUCKET}/team/run/checkpoint-1500.9f3ac2e1/checkpoint.json"
PAYLOAD = f"{BUCKET}/team/run/checkpoint-1500.9f3ac2e1/model-00000-of-00001.safetensors"
TLS = {"aws:SecureTransport": "true", "s3:TlsVersion": "1.3"}


def test_generated_files_are_fresh() -> None:
    """Policies, permissions and the READMEs' tables are what the code says; ``make terraform-docs`` writes them."""
    assert tool().check() == ""


def test_the_tool_reads_what_terraform_fmt_writes() -> None:
    """Variables and outputs with nested types, validations and strings are read to their ends."""
    text = (
        'variable "a" {\n  description = "One \\"a\\"."\n  type = object({\n    b = optional(number, 1)\n  })\n'
        '  default = {}\n\n  validation {\n    condition     = var.a.b >= 1\n    error_message = "No."\n  }\n}\n\n'
        'output "c" {\n  description = "Two."\n  value       = var.a\n}\n'
    )
    assert [*tool().blocks(text)] == [
        (
            "variable",
            "a",
            {
                "description": '"One \\"a\\"."',
                "type": "object({\n    b = optional(number, 1)\n  })",
                "default": "{}",
            },
        ),
        ("output", "c", {"description": '"Two."', "value": "var.a"}),
    ]


@pytest.mark.parametrize("need", NEEDS, ids=lambda need: need.verb.value)
def test_the_code_that_needs_a_right_is_there(need: Need) -> None:
    """Every function that the table names exists, so a reviewer gets from a right to the line that uses it."""
    for place in need.code:
        module, _, name = place.partition(":")
        found: object = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), place


def test_every_action_leads_to_the_lines_that_need_it() -> None:
    """The page has, for each action of a policy, links to lines inside of the functions that they name."""
    page = ROOT / "docs" / "guide" / "rights.md"
    rows = re.findall(r"^\| `([\w:.]+)` \|.*\| (\[.*) \|$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {action for action, _ in rows} == {
        grant.action for need in NEEDS for provider in Provider for grant in need.at(provider)
    }
    requested: set[str] = set()
    for action, cell in rows:
        links = re.findall(r"\[`([\w.]+)`\]\(\.\./\.\./([\w/]+)\.py#L(\d+)\)", cell)
        assert len(links) == cell.count("](")
        own = "gcs" if action.startswith("storage.") else "s3"
        requested |= {action for _, path, _ in links if path.startswith(f"cloudckpt/storage/{own}")}
        for name, path, line in links:
            found: object = importlib.import_module(path.replace("/", "."))
            for part in name.split("."):
                found = getattr(found, part)
            lines, first = inspect.getsourcelines(found)  # type: ignore[arg-type]  # looked up by name: an object, to mypy
            assert first < int(line) < first + len(lines), f"{action}: {path}:{line} is not in {name}"
    # A request to the provider itself, not only the code that has it made.
    assert requested == {action for action, _ in rows}


def test_terraform_reads_the_generated_files_and_writes_no_right_itself() -> None:
    """No action and no permission stands in HCL but the bucket's guard rails' names: there is nothing to drift."""
    # Whatever follows the colon, s3:Get* as well as s3:*, but for the slashes of a URL.
    found = (("aws", r'"(?:s3|kms):(?!//)'), ("gcp", r'"storage\.(?:objects|multipartUploads|buckets)\.'))
    for module, actions in found:
        for path in sorted((MODULES / module).glob("*.tf")):
            assert re.findall(actions, path.read_text(encoding="utf-8")) == [], path
    iam = (MODULES / "aws" / "iam.tf").read_text(encoding="utf-8")
    assert "policies/${role}.json" in iam
    assert "policies/${role}-key.json" in iam
    assert "policies/guard.json" in iam
    assert "permissions.json" in (MODULES / "gcp" / "iam.tf").read_text(encoding="utf-8")


def test_every_action_of_a_policy_is_a_right_of_the_table() -> None:
    """What the JSON files allow is what the table grants, role by role."""
    for role in Role:
        allowed = {
            action
            for name in (role.value, f"{role}-key")
            for statement in filled_in(name, bucket="b", key_prefix="")["Statement"]
            if statement["Effect"] == "Allow"
            for action in statement["Action"]
        }
        assert allowed == {grant.action for grant in grants(role, Provider.AWS)}
    permissions = json.loads((MODULES / "gcp" / "permissions.json").read_text(encoding="utf-8"))
    for role in Role:
        found = {*permissions[role]["prefix"], *permissions[role]["bucket"]}
        assert found == {grant.action for grant in grants(role, Provider.GCP)}


@pytest.mark.parametrize(
    ("role", "action", "resource", "context", "permitted"),
    [
        (Role.TRAINER, "s3:GetObject", PAYLOAD, {}, True),
        (Role.TRAINER, "s3:PutObject", PAYLOAD, {}, True),
        (Role.TRAINER, "s3:PutObject", MANIFEST, {"s3:if-match": ""}, True),
        (Role.TRAINER, "s3:PutObject", MANIFEST, {"s3:if-none-match": ""}, True),
        (Role.TRAINER, "s3:PutObject", MANIFEST, {}, False),
        (Role.TRAINER, "s3:PutObject", f"{BUCKET}/team/run/notes.txt", {}, False),
        (Role.TRAINER, "s3:DeleteObject", PAYLOAD, {}, True),
        (Role.TRAINER, "s3:DeleteObject", COPY, {}, True),
        (Role.TRAINER, "s3:DeleteObject", MANIFEST, {}, False),
        (Role.TRAINER, "s3:DeleteObjectVersion", PAYLOAD, {}, False),
        (Role.TRAINER, "s3:GetObject", f"{BUCKET}/teammate/run/manifest.json", {}, False),
        (Role.TRAINER, "s3:ListBucket", BUCKET, {"s3:prefix": "team/run/"}, True),
        (Role.TRAINER, "s3:ListBucket", BUCKET, {"s3:prefix": "teammate/"}, False),
        (Role.TRAINER, "s3:ListBucket", BUCKET, {"s3:prefix": ""}, False),
        (Role.TRAINER, "s3:ListBucket", BUCKET, {}, False),
        (Role.TRAINER, "s3:ListBucketMultipartUploads", BUCKET, {}, True),
        (Role.TRAINER, "s3:DeleteBucket", BUCKET, {}, False),
        (Role.TRAINER, "s3:PutLifecycleConfiguration", BUCKET, {}, False),
        (Role.READER, "s3:GetObject", PAYLOAD, {}, True),
        (Role.READER, "s3:PutObject", MANIFEST, {"s3:if-match": ""}, False),
        (Role.READER, "s3:DeleteObject", PAYLOAD, {}, False),
        (Role.READER, "s3:AbortMultipartUpload", PAYLOAD, {}, False),
        (Role.SWEEPER, "s3:GetObject", INDEX, {}, True),
        (Role.SWEEPER, "s3:GetObject", PAYLOAD, {}, False),
        (Role.SWEEPER, "s3:PutObject", PAYLOAD, {}, False),
        (Role.SWEEPER, "s3:PutObject", MANIFEST, {"s3:if-match": ""}, True),
        (Role.SWEEPER, "s3:DeleteObject", PAYLOAD, {}, True),
        (Role.SWEEPER, "s3:DeleteObject", MANIFEST, {}, False),
        (Role.TRAINER, "s3:GetObject", PAYLOAD, {"aws:SecureTransport": "false"}, False),
        (Role.TRAINER, "s3:GetObject", PAYLOAD, {"s3:TlsVersion": "1.1"}, False),
    ],
)
def test_what_the_documents_mean(
    role: Role, action: str, resource: str, context: dict[str, str], permitted: bool
) -> None:
    """Role policy and bucket policy together permit this and refuse that, conditions included."""
    documents = [filled_in(name, bucket="b", key_prefix="team/") for name in (role.value, "guard")]
    assert decide(documents, Asked(action, resource, {**TLS, **context})) is permitted


def test_an_operator_that_is_not_known_is_no_verdict() -> None:
    """The judge refuses to judge what it does not understand."""
    document = {
        "Statement": [
            {"Effect": "Allow", "Action": "*", "Resource": "*", "Condition": {"IpAddress": {"aws:SourceIp": "::1"}}}
        ]
    }
    with pytest.raises(ValueError, match="IpAddress"):
        decide([document], Asked("s3:GetObject", PAYLOAD, {"aws:SourceIp": "::1"}))


def test_the_documents_have_no_name_left_to_fill_in() -> None:
    """The templates use the three names that Terraform gives them, and no others."""
    names: set[str] = set()
    for path in sorted(Path(MODULES / "aws" / "policies").glob("*.json")):
        names |= set(re.findall(r"\$\{(\w+)\}", path.read_text(encoding="utf-8")))
    assert names == {"bucket_arn", "key_prefix", "kms_key_arn"}


def test_links_of_the_readmes_lead_somewhere() -> None:
    """Every relative link in the READMEs below ``terraform/`` names a file that exists."""
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in sorted((ROOT / "terraform").rglob("*.md"))
        for target in re.findall(r"\]\(([^)#:]+)[^)]*\)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert broken == []
