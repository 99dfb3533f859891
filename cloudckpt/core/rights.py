"""Which rights each role needs, and which code needs them: the table behind policies, documents and the doctor.

A row is something the program does to a store: the roles that do it, the code that does it, and what a provider calls
the right to it. The policies of ``terraform/``, the table in ``docs/guide/rights.md`` and the probes of
``cloudckpt doctor --role`` are made from these rows, so that none of them can say something else.

(Past 350 lines: most of them are the table, and it is one table.)

Sources: Service Authorization Reference, "Actions, resources, and condition keys for Amazon S3"; S3 User Guide,
"Enforce conditional writes on Amazon S3 buckets"; Cloud Storage documentation, "IAM permissions for JSON methods" and
"… for XML methods"; IAM documentation, "Attribute reference for IAM Conditions".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cloudckpt.core import keys

__all__ = [
    "NEEDS",
    "PATTERNS",
    "Grant",
    "Need",
    "Provider",
    "Role",
    "Scope",
    "Verb",
    "aws_guard",
    "aws_key_policy",
    "aws_policy",
    "gcp_permissions",
    "grants",
    "needs_of",
]


class Role(StrEnum):
    """Who uses a run.

    Attributes:
        TRAINER: the training job: saves, restores, retires and deletes its own checkpoints.
        READER: whoever loads, serves or evaluates, and a person who looks.
        SWEEPER: a timer or a person with ``prune``, ``rm``, ``gc``, ``repair``, ``pin``, ``tag``; reads no tensor.
    """

    TRAINER = "trainer"
    READER = "reader"
    SWEEPER = "sweeper"


class Provider(StrEnum):
    """Whose words a right is named in."""

    AWS = "aws"
    GCP = "gcp"


class Scope(StrEnum):
    """What a right reaches. Google's conditions do not match patterns: there it is the prefix or the bucket.

    Attributes:
        PREFIX: every key under the prefix.
        METADATA: manifests, their copies, indexes, and probes of the doctor.
        MANIFESTS: manifests, their copies, and probes.
        CHECKPOINTS: what lies in checkpoints' folders.
        EXPENDABLE: what may be deleted: checkpoints, copies of manifests, probes; never a manifest.
        LISTING: the bucket, asked for keys under the prefix.
        BUCKET: the bucket, asked for anything: what names no prefix cannot be confined to one.
        KEY: the key that the bucket is encrypted with, where that is a key of one's own.
    """

    PREFIX = "every key under the prefix"
    METADATA = "manifests, copies, indexes"
    MANIFESTS = "manifests and copies"
    CHECKPOINTS = "checkpoints' folders"
    EXPENDABLE = "checkpoints and copies, never a manifest"
    LISTING = "the bucket, for keys under the prefix"
    BUCKET = "the bucket"
    KEY = "the encryption key, if it is your own"


class Verb(StrEnum):
    """What the program does. The doctor has a probe for each but the last two, which every read and write asks for."""

    READ = "read"
    READ_METADATA = "read manifests and indexes"
    LIST = "list"
    WRITE_MANIFEST = "write the manifest"
    WRITE_CHECKPOINT = "write a checkpoint"
    ABORT_UPLOAD = "abort an upload"
    LIST_UPLOADS = "list unfinished uploads"
    DELETE = "delete checkpoints"
    DECRYPT = "decrypt"
    ENCRYPT = "encrypt"


@dataclass(frozen=True, slots=True)
class Grant:
    """One right: what a provider calls the action, and what it reaches."""

    action: str
    scope: Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One thing that is done to a store.

    Attributes:
        verb: what.
        why: what for, and what fails without it.
        roles: who does it.
        code: the functions that do it, as ``module:name``; a test looks each of them up.
        aws: the rights to it at AWS.
        gcp: the same at Google Cloud.
    """

    verb: Verb
    why: str
    roles: tuple[Role, ...]
    code: tuple[str, ...]
    aws: tuple[Grant, ...]
    gcp: tuple[Grant, ...]

    def at(self, provider: Provider) -> tuple[Grant, ...]:
        """The rights in the words of one provider."""
        return self.aws if provider is Provider.AWS else self.gcp


#: Scope -> the keys it reaches, below the prefix. ``*`` stands for anything, slashes too: a run may lie deeper.
PATTERNS: Mapping[Scope, tuple[str, ...]] = {
    Scope.PREFIX: ("*",),
    Scope.METADATA: (
        f"*{keys.MANIFEST}",
        "*manifest-*.json",
        f"*/{keys.INDEX_NAME}",
        f"*{keys.PROBE_PREFIX}*",
    ),
    Scope.MANIFESTS: (f"*{keys.MANIFEST}", "*manifest-*.json", f"*{keys.PROBE_PREFIX}*"),
    Scope.CHECKPOINTS: ("*checkpoint-*",),
    Scope.EXPENDABLE: ("*checkpoint-*", "*manifest-*.json", f"*{keys.PROBE_PREFIX}*"),
}

_EVERYBODY = (Role.TRAINER, Role.READER, Role.SWEEPER)
_WRITERS = (Role.TRAINER, Role.SWEEPER)
_S3 = "cloudckpt.storage.s3:S3Storage"
_GCS = "cloudckpt.storage.gcs:GCSStorage"
_STORE = "cloudckpt.storage.manifest_store:ManifestStore"

NEEDS: tuple[Need, ...] = (
    Need(
        verb=Verb.READ,
        why="the manifest, the index, and ranges of tensors; a size is asked by HEAD, which is the same right",
        roles=(Role.TRAINER, Role.READER),
        code=(
            f"{_S3}._read",
            f"{_S3}.size",
            "cloudckpt.storage.s3_lane:S3Lane.receive",
            f"{_GCS}._read",
            f"{_GCS}.size",
            "cloudckpt.storage.gcs_lane:GCSLane.receive",
            f"{_STORE}.read",
            "cloudckpt.view:read_index_body",
        ),
        aws=(Grant("s3:GetObject", Scope.PREFIX),),
        gcp=(Grant("storage.objects.get", Scope.PREFIX),),
    ),
    Need(
        verb=Verb.READ_METADATA,
        why="what is committed and what each folder holds; a sweeper has no business with tensors",
        roles=(Role.SWEEPER,),
        code=(
            f"{_STORE}.read",
            "cloudckpt.sweeping:_look_into_indexes",
            "cloudckpt.repairing:_basis",
            "cloudckpt.repairing:_judged",
        ),
        aws=(Grant("s3:GetObject", Scope.METADATA),),
        gcp=(Grant("storage.objects.get", Scope.PREFIX),),
    ),
    Need(
        verb=Verb.LIST,
        why="a new run is told from one whose manifest was deleted, a killed save is looked into, gc finds what no "
        "entry names; and without it S3 answers 403 for what does not exist, so damage looks like a missing right",
        roles=_EVERYBODY,
        code=(
            f"{_S3}.list",
            f"{_GCS}.list",
            f"{_STORE}._refuse_leftovers",
            "cloudckpt.sealed:settlement_of",
            "cloudckpt.sweeping:gc_run",
            "cloudckpt.repairing:repair_run",
        ),
        aws=(Grant("s3:ListBucket", Scope.LISTING),),
        gcp=(Grant("storage.objects.list", Scope.LISTING),),
    ),
    Need(
        verb=Verb.WRITE_MANIFEST,
        why="claim, announce, commit, pin, gc: each is one conditional write; every 20th revision is copied. S3 "
        "asks for s3:GetObject too where a write has If-Match; Google counts an overwrite as a create and a delete",
        roles=_WRITERS,
        code=(
            f"{_S3}._write",
            f"{_GCS}._write",
            f"{_STORE}.transact",
            f"{_STORE}._landed",
            f"{_STORE}.rebuild",
            "cloudckpt.storage.probe:probe",
        ),
        aws=(Grant("s3:PutObject", Scope.MANIFESTS),),
        gcp=(Grant("storage.objects.create", Scope.PREFIX), Grant("storage.objects.delete", Scope.PREFIX)),
    ),
    Need(
        verb=Verb.WRITE_CHECKPOINT,
        why="payload objects, whole or in parts, then the index; S3 has one right for all requests of an upload",
        roles=(Role.TRAINER,),
        code=(
            "cloudckpt.storage.s3_lane:S3Lane._put",
            f"{_S3}._send_whole",
            "cloudckpt.storage.s3_upload:S3Uploads.begin",
            "cloudckpt.storage.s3_upload:S3Uploads.complete",
            "cloudckpt.storage.gcs_lane:GCSLane._put",
            "cloudckpt.storage.gcs_xml:XmlUploads.begin",
            "cloudckpt.storage.gcs_xml:XmlUploads.complete",
            f"{_GCS}._send_whole",
        ),
        aws=(Grant("s3:PutObject", Scope.CHECKPOINTS),),
        gcp=(
            Grant("storage.objects.create", Scope.PREFIX),
            Grant("storage.multipartUploads.create", Scope.PREFIX),
        ),
    ),
    Need(
        verb=Verb.ABORT_UPLOAD,
        why="a save that fails or is killed leaves no parts that are billed and that no listing shows",
        roles=_WRITERS,
        code=(
            "cloudckpt.storage.multipart:UploadInParts._abort",
            "cloudckpt.storage.s3_upload:S3Uploads.abort",
            f"{_S3}._abort_each",
            "cloudckpt.storage.gcs_xml:XmlUploads.abort",
            "cloudckpt.claiming:_abort_uploads",
            "cloudckpt.sweeping:gc_run",
        ),
        aws=(Grant("s3:AbortMultipartUpload", Scope.CHECKPOINTS),),
        gcp=(Grant("storage.multipartUploads.abort", Scope.PREFIX),),
    ),
    Need(
        verb=Verb.LIST_UPLOADS,
        why="the uploads of a killed process are found by nothing else. Neither provider can confine this to a "
        "prefix: it shows the keys of unfinished uploads in the whole bucket",
        roles=_WRITERS,
        code=(
            f"{_S3}._list_uploads",
            "cloudckpt.storage.gcs_xml:XmlUploads.find",
            "cloudckpt.claiming:_abort_uploads",
            "cloudckpt.sweeping:gc_run",
        ),
        aws=(Grant("s3:ListBucketMultipartUploads", Scope.BUCKET),),
        gcp=(Grant("storage.multipartUploads.list", Scope.BUCKET),),
    ),
    Need(
        verb=Verb.DELETE,
        why="bytes of retired checkpoints, copies of the manifest but for the last two, and the probe's object",
        roles=_WRITERS,
        code=(
            f"{_S3}.delete",
            f"{_GCS}.delete",
            "cloudckpt.sweeping:delete_bytes",
            "cloudckpt.sweeping:gc_run",
            f"{_STORE}._landed",
            "cloudckpt.storage.probe:probe",
        ),
        aws=(Grant("s3:DeleteObject", Scope.EXPENDABLE),),
        gcp=(Grant("storage.objects.delete", Scope.PREFIX),),
    ),
    Need(
        verb=Verb.DECRYPT,
        why="S3 decrypts with the right of whoever reads, and the parts when an upload is completed",
        roles=_EVERYBODY,
        code=(
            f"{_S3}._read",
            "cloudckpt.storage.s3_lane:S3Lane.receive",
            "cloudckpt.storage.s3_upload:S3Uploads.complete",
        ),
        aws=(Grant("kms:Decrypt", Scope.KEY),),
        gcp=(),  # the bucket's service agent has the right to the key, not whoever reads
    ),
    Need(
        verb=Verb.ENCRYPT,
        why="S3 asks for a data key in the writer's name",
        roles=_WRITERS,
        code=(f"{_S3}._write", f"{_S3}._send_whole", "cloudckpt.storage.s3_upload:S3Uploads.begin"),
        aws=(Grant("kms:GenerateDataKey", Scope.KEY),),
        gcp=(),
    ),
)


def needs_of(role: Role) -> tuple[Need, ...]:
    """What a role does, in the table's order."""
    return tuple(need for need in NEEDS if role in need.roles)


def grants(role: Role, provider: Provider) -> tuple[Grant, ...]:
    """The rights of a role, each once, in the table's order."""
    return tuple(dict.fromkeys(grant for need in needs_of(role) for grant in need.at(provider)))


def gcp_permissions(role: Role, *scopes: Scope) -> list[str]:
    """The permissions of a role's custom role at Google Cloud that have one of these scopes, sorted."""
    return sorted({grant.action for grant in grants(role, Provider.GCP) if grant.scope in scopes})


# What stands between ${ and } is filled in by Terraform: the bucket's ARN, the prefix and its slash, the key.


def aws_policy(role: Role) -> dict[str, Any]:
    """A role's identity policy for S3, as a template: one statement for each need."""
    statements = [_statement(need) for need in needs_of(role) if need.aws[0].scope is not Scope.KEY]
    if any(need.verb is Verb.DELETE for need in needs_of(role)):
        statements.append(
            {
                "Sid": "NeverDeleteTheManifest",
                "Effect": "Deny",
                "Action": ["s3:DeleteObject", "s3:DeleteObjectVersion"],
                "Resource": _objects([f"*{keys.MANIFEST}"]),
            }
        )
    return _document(statements)


def aws_key_policy(role: Role) -> dict[str, Any]:
    """What a role needs beside that where the bucket is encrypted with a key of one's own, as a template."""
    return _document(_statement(need) for need in needs_of(role) if need.aws[0].scope is Scope.KEY)


def aws_guard() -> dict[str, Any]:
    """The bucket's own policy, as a template: what nobody may, whatever their role says.

    A bare PUT of a manifest is refused: both keys stand in one ``Null`` block, so both headers must be missing. An
    upload in parts carries no condition when it begins, so a manifest cannot be uploaded that way either.
    """
    everything = ["${bucket_arn}", "${bucket_arn}/*"]
    return _document(
        [
            _denial("OnlyOverTls", "s3:*", everything, {"Bool": {"aws:SecureTransport": "false"}}),
            _denial("NoOldTls", "s3:*", everything, {"NumericLessThan": {"s3:TlsVersion": "1.2"}}),
            _denial(
                "ManifestOnlyConditionally",
                "s3:PutObject",
                _objects([f"*{keys.MANIFEST}"]),
                {"Null": {"s3:if-match": "true", "s3:if-none-match": "true"}},
            ),
        ]
    )


def _document(statements: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": [*statements]}


def _denial(sid: str, action: str, resources: list[str], condition: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "Sid": sid,
        "Effect": "Deny",
        "Principal": "*",
        "Action": action,
        "Resource": resources,
        "Condition": condition,
    }


def _statement(need: Need) -> dict[str, Any]:
    """One need has one scope at AWS."""
    scope = need.aws[0].scope
    statement: dict[str, Any] = {
        "Sid": need.verb.value.title().replace(" ", ""),
        "Effect": "Allow",
        "Action": [grant.action for grant in need.aws],
    }
    if scope is Scope.KEY:
        return statement | {"Resource": "${kms_key_arn}"}
    if scope is Scope.BUCKET:
        return statement | {"Resource": "${bucket_arn}"}
    if scope is Scope.LISTING:
        return statement | {
            "Resource": "${bucket_arn}",
            "Condition": {"StringLike": {"s3:prefix": "${key_prefix}*"}},
        }
    return statement | {"Resource": _objects(PATTERNS[scope])}


def _objects(patterns: Iterable[str]) -> list[str]:
    return ["${bucket_arn}/${key_prefix}" + pattern for pattern in patterns]
