"""The table of rights: what the roles may, spelled out, and what no role may."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest

from cloudckpt.core import keys
from cloudckpt.core.rights import (
    NEEDS,
    PATTERNS,
    Grant,
    Provider,
    Role,
    Scope,
    Verb,
    aws_guard,
    aws_key_policy,
    aws_policy,
    gcp_permissions,
    grants,
    needs_of,
)

FOLDER = "checkpoint-1500.9f3ac2e1"
KEYS = {
    keys.Kind.MANIFEST: keys.MANIFEST,
    keys.Kind.COPY: keys.manifest_copy(480),
    keys.Kind.REPLACED: keys.replaced_manifest("9f3ac2e1"),
    keys.Kind.INDEX: keys.index_key(1500, "9f3ac2e1"),
    keys.Kind.PAYLOAD: keys.payload_key(1500, "9f3ac2e1", keys.payload_name("model", 0, 1)),
    keys.Kind.PROBE: f"{keys.PROBE_PREFIX}00c0ffee",
}


def reached(scope: Scope, key: str) -> bool:
    """Whether a scope has a key below the prefix, as IAM matches: ``*`` is anything, slashes too."""
    return any(fnmatchcase(key, pattern) for pattern in PATTERNS[scope])


@pytest.mark.parametrize(
    ("role", "actions"),
    [
        (
            Role.TRAINER,
            {
                Grant("s3:GetObject", Scope.PREFIX),
                Grant("s3:ListBucket", Scope.LISTING),
                Grant("s3:PutObject", Scope.MANIFESTS),
                Grant("s3:PutObject", Scope.CHECKPOINTS),
                Grant("s3:AbortMultipartUpload", Scope.CHECKPOINTS),
                Grant("s3:ListBucketMultipartUploads", Scope.BUCKET),
                Grant("s3:DeleteObject", Scope.EXPENDABLE),
                Grant("kms:Decrypt", Scope.KEY),
                Grant("kms:GenerateDataKey", Scope.KEY),
            },
        ),
        (
            Role.READER,
            {
                Grant("s3:GetObject", Scope.PREFIX),
                Grant("s3:ListBucket", Scope.LISTING),
                Grant("kms:Decrypt", Scope.KEY),
            },
        ),
        (
            Role.SWEEPER,
            {
                Grant("s3:GetObject", Scope.METADATA),
                Grant("s3:ListBucket", Scope.LISTING),
                Grant("s3:PutObject", Scope.MANIFESTS),
                Grant("s3:AbortMultipartUpload", Scope.CHECKPOINTS),
                Grant("s3:ListBucketMultipartUploads", Scope.BUCKET),
                Grant("s3:DeleteObject", Scope.EXPENDABLE),
                Grant("kms:Decrypt", Scope.KEY),
                Grant("kms:GenerateDataKey", Scope.KEY),
            },
        ),
    ],
)
def test_what_each_role_may_at_aws(role: Role, actions: set[Grant]) -> None:
    """These rights and no others: whoever adds one reads it here."""
    assert set(grants(role, Provider.AWS)) == actions


@pytest.mark.parametrize(
    ("role", "under_the_prefix", "anywhere"),
    [
        (
            Role.TRAINER,
            [
                "storage.multipartUploads.abort",
                "storage.multipartUploads.create",
                "storage.objects.create",
                "storage.objects.delete",
                "storage.objects.get",
                "storage.objects.list",
            ],
            ["storage.multipartUploads.list"],
        ),
        (Role.READER, ["storage.objects.get", "storage.objects.list"], []),
        (
            Role.SWEEPER,
            [
                "storage.multipartUploads.abort",
                "storage.objects.create",
                "storage.objects.delete",
                "storage.objects.get",
                "storage.objects.list",
            ],
            ["storage.multipartUploads.list"],
        ),
    ],
)
def test_what_each_role_may_at_google(role: Role, under_the_prefix: list[str], anywhere: list[str]) -> None:
    """These permissions and no others; one of them cannot be confined to a prefix."""
    assert gcp_permissions(role, Scope.PREFIX, Scope.LISTING) == under_the_prefix
    assert gcp_permissions(role, Scope.BUCKET) == anywhere


@pytest.mark.parametrize(
    ("scope", "kinds"),
    [
        (Scope.PREFIX, set(KEYS)),
        (Scope.METADATA, set(KEYS) - {keys.Kind.PAYLOAD}),
        (Scope.MANIFESTS, {keys.Kind.MANIFEST, keys.Kind.COPY, keys.Kind.REPLACED, keys.Kind.PROBE}),
        (Scope.CHECKPOINTS, {keys.Kind.INDEX, keys.Kind.PAYLOAD}),
        (Scope.EXPENDABLE, set(KEYS) - {keys.Kind.MANIFEST}),
    ],
)
@pytest.mark.parametrize("below", ["", "a run/"])
def test_a_scope_has_the_keys_of_the_grammar_it_says(scope: Scope, kinds: set[keys.Kind], below: str) -> None:
    """Every kind of key is in exactly the scopes that need it, in a run at the prefix and in one below it."""
    assert {keys.parse(key).kind for key in KEYS.values()} == set(KEYS)
    assert {kind for kind, key in KEYS.items() if reached(scope, below + key)} == kinds


def test_every_verb_has_one_row_for_each_role_that_needs_it() -> None:
    """No verb stands twice, each has a reason and code, and every role reads, in one way."""
    assert [need.verb for need in NEEDS] == [*Verb]
    assert all(need.why and need.code and need.roles for need in NEEDS)
    for role in Role:
        verbs = {need.verb for need in needs_of(role)}
        assert len(verbs & {Verb.READ, Verb.READ_METADATA}) == 1


@pytest.mark.parametrize("role", Role)
def test_a_policy_has_a_statement_for_each_need(role: Role) -> None:
    """Statements are named after the needs, those for a key stand apart, and who deletes is denied the manifest."""
    statements = aws_policy(role)["Statement"]
    allowed = [s for s in statements if s["Effect"] == "Allow"]
    denied = [s for s in statements if s["Effect"] == "Deny"]
    wanted = [need for need in needs_of(role) if need.aws[0].scope is not Scope.KEY]
    assert [s["Sid"] for s in allowed] == [need.verb.title().replace(" ", "") for need in wanted]
    assert [s["Action"] for s in allowed] == [[grant.action for grant in need.aws] for need in wanted]
    assert all(len({grant.scope for grant in need.aws}) == 1 for need in NEEDS)
    deletes = role is not Role.READER
    assert [s["Resource"] for s in denied] == ([["${bucket_arn}/${key_prefix}*manifest.json"]] if deletes else [])
    assert all(s["Resource"] == "${kms_key_arn}" for s in aws_key_policy(role)["Statement"])
    assert {a for s in aws_key_policy(role)["Statement"] for a in s["Action"]} == {
        grant.action for grant in grants(role, Provider.AWS) if grant.scope is Scope.KEY
    }


def test_a_listing_is_confined_to_the_prefix() -> None:
    """The statement that lists names the bucket, and a condition on what is asked for."""
    (listing,) = [s for s in aws_policy(Role.READER)["Statement"] if s["Sid"] == "List"]
    assert listing["Resource"] == "${bucket_arn}"
    assert listing["Condition"] == {"StringLike": {"s3:prefix": "${key_prefix}*"}}


def test_the_guard_denies_and_allows_nothing() -> None:
    """The bucket's own policy only takes away, from everybody: plain HTTP, old TLS, a bare PUT of a manifest."""
    guard = aws_guard()["Statement"]
    assert {s["Effect"] for s in guard} == {"Deny"}
    assert {s["Principal"] for s in guard} == {"*"}
    assert [s["Sid"] for s in guard] == ["OnlyOverTls", "NoOldTls", "ManifestOnlyConditionally"]
    assert guard[2]["Condition"] == {"Null": {"s3:if-match": "true", "s3:if-none-match": "true"}}


def test_no_role_may_what_nobody_needs() -> None:
    """No wildcard, no version of an object, no setting of the bucket, and no list of parts is granted to anybody."""
    actions = {grant.action for role in Role for provider in Provider for grant in grants(role, provider)}
    assert not [action for action in actions if "*" in action or "Version" in action]
    assert not [action for action in actions if action.startswith(("s3:Put", "s3:Delete")) and "Object" not in action]
    assert "s3:ListMultipartUploadParts" not in actions
    assert not [action for action in actions if action.startswith("storage.buckets.")]
