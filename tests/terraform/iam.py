"""Judges requests by IAM documents: what moto leaves out of them, and the bucket's own policy.

moto enforces identity policies by action and resource, and takes every condition but StringEquals as fulfilled. Here
the conditions count as well ("IAM JSON policy elements: Condition operators", IAM User Guide). An operator that is not
known is an error: nothing is judged by half.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, unquote

from cloudckpt.core.rights import Role
from cloudckpt.testing.fault_proxy import Request
from tests.tooling import tool_module

ROOT = Path(__file__).parents[2]
MODULES = ROOT / "terraform" / "modules"

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request in the words of IAM."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)


def _many(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _like(patterns: str | list[str], value: str) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in _many(patterns))


def _holds(operator: str, key: str, wanted: str | list[str], context: Mapping[str, str]) -> bool:
    found = context.get(key)
    if operator == "Null":
        return (found is None) == (wanted == "true")
    if found is None:
        return False
    if operator == "StringLike":
        return _like(wanted, found)
    if operator == "Bool":
        return found == wanted
    if operator == "NumericLessThan":
        return float(found) < float(str(wanted))
    raise ValueError(f"the operator {operator} is not judged here")


def concerns(statement: Mapping[str, Any], asked: Asked) -> bool:
    """Whether a statement speaks of a request: action, resource, and every condition."""
    return (
        _like(statement["Action"], asked.action)
        and _like(statement["Resource"], asked.resource)
        and all(
            _holds(operator, key, wanted, asked.context)
            for operator, keys in statement.get("Condition", {}).items()
            for key, wanted in keys.items()
        )
    )


def decide(documents: Iterable[Document], asked: Asked) -> bool:
    """Whether a request is permitted: something allows it, and nothing denies it."""
    effects = {s["Effect"] for document in documents for s in document["Statement"] if concerns(s, asked)}
    return effects == {"Allow"}


def asked_of(request: Request) -> Asked:
    """What a request to S3, with the bucket in its path, asks for; as if it had come over TLS."""
    bucket, _, key = unquote(request.path).lstrip("/").partition("/")
    query = parse_qs(request.query, keep_blank_values=True)
    headers = {name.lower() for name in request.headers}
    context = {"aws:SecureTransport": "true", "s3:TlsVersion": "1.3"}
    if not key:
        context |= {"s3:prefix": query["prefix"][0]} if "prefix" in query else {}
        action = "s3:ListBucketMultipartUploads" if "uploads" in query else "s3:ListBucket"
        return Asked(action, f"arn:aws:s3:::{bucket}", context)
    context |= {f"s3:{name}": "" for name in ("if-match", "if-none-match") if name in headers}
    action = {
        "GET": "s3:GetObject",
        "HEAD": "s3:GetObject",
        "PUT": "s3:PutObject",
        "POST": "s3:PutObject",
        "DELETE": "s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject",
    }[request.method]
    return Asked(action, f"arn:aws:s3:::{bucket}/{key}", context)


def filled_in(name: str, *, bucket: str, key_prefix: str) -> dict[str, Any]:
    """A policy of the AWS module for a bucket and a prefix, as Terraform's ``templatefile`` fills it in."""
    text = (MODULES / "aws" / "policies" / f"{name}.json").read_text(encoding="utf-8")
    values = {"bucket_arn": f"arn:aws:s3:::{bucket}", "key_prefix": key_prefix, "kms_key_arn": "arn:aws:kms:::key/k"}
    for variable, value in values.items():
        text = text.replace(f"${{{variable}}}", value)
    found: dict[str, Any] = json.loads(text)
    return found


def without(document: Document, sid: str) -> dict[str, Any]:
    """A document that has lost one statement."""
    left = [s for s in document["Statement"] if s["Sid"] != sid]
    assert len(left) == len(document["Statement"]) - 1
    return {**document, "Statement": left}


def allowing(role: Role) -> list[str]:
    """The names of the statements by which a role's policy allows something."""
    statements = filled_in(role, bucket="b", key_prefix="")["Statement"]
    return [str(s["Sid"]) for s in statements if s["Effect"] == "Allow"]


def tool() -> ModuleType:
    """``tools/generate_terraform.py``, which is no package's module."""
    return tool_module("generate_terraform")
