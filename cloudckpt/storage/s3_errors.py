"""What S3 and its client libraries answer, sorted into what a caller can do about it.

Codes and statuses are those of the S3 API reference, "Error responses", and of the servers this was run against.
"""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import Mapping
from typing import Any

from cloudckpt.errors import ObjectNotFoundError, StorageError

__all__ = [
    "AnsweredError",
    "ExpiredCredentialsError",
    "code_of",
    "explained",
    "is_condition_failed",
    "is_unsupported",
    "status_of",
]

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
#: Waiting helps: throttling, and a server in trouble.
_RETRYABLE_CODES = {
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "OperationAborted",
    "XAmzContentSHA256Mismatch",
    "XMinioServerNotInitialized",
}
_RETRYABLE_STATUSES = {408, 409, 429, 500, 502, 503, 504}
_UNSUPPORTED = {"NotImplemented", "InvalidRequest", "InvalidArgument", "MissingContentMD5", "MethodNotAllowed"}

_ADVICE = {
    "InvalidAccessKeyId": "the store does not know this access key: look at AWS_ACCESS_KEY_ID, the profile, and "
    "whether the endpoint is the one the key was made for",
    "SignatureDoesNotMatch": "the secret key does not fit the access key (or a proxy changed the request): look at "
    "AWS_SECRET_ACCESS_KEY",
    "InvalidToken": "the session token does not fit: look at AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it, S3 accepts 15 minutes",
    "InvalidObjectState": "the object is in a cold storage class (Glacier, Deep Archive, an archive tier): restore it "
    "with `aws s3api restore-object` and come back, and keep lifecycle transitions away from this prefix",
    "KMS.DisabledException": "the KMS key is disabled",
    "KMS.NotFoundException": "the KMS key does not exist in the bucket's region",
    "QuotaExceeded": "the bucket's quota is used up",
    "XMinioStorageFull": "the server's disk is full",
    "AllAccessDisabled": "the bucket's owner has disabled it",
}


class ExpiredCredentialsError(StorageError):
    """The credentials were good and are not any more; reading them again may help."""


class AnsweredError(Exception):
    """An error that the store answered a request of our own with, in the shape of botocore's."""

    def __init__(self, response: Mapping[str, Any]) -> None:
        super().__init__(str(response["Error"]))
        self.response = dict(response)

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str], body: bytes) -> AnsweredError:
        """The error in an answer: its code and message from the XML body, if there is one."""
        found = {tag: _inside(tag, body) for tag in ("Code", "Message", "Region")}
        if not found["Code"]:
            found["Code"] = str(status)
        return cls({"Error": found, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": dict(headers)}})


def _inside(tag: str, body: bytes) -> str:
    match = re.search(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
    return html.unescape(match[1].decode("utf-8", "replace")) if match else ""


def _response(exc: BaseException) -> Mapping[str, Any]:
    response = getattr(exc, "response", None)
    return response if isinstance(response, dict) else {}


def code_of(exc: BaseException) -> str:
    """The store's error code, such as ``NoSuchKey``; the bare status for an answer without a body."""
    return str(_response(exc).get("Error", {}).get("Code", ""))


def status_of(exc: BaseException) -> int:
    """The HTTP status of the answer; 0 if there was none."""
    return int(_response(exc).get("ResponseMetadata", {}).get("HTTPStatusCode", 0) or 0)


def is_condition_failed(exc: BaseException) -> bool:
    """Whether a conditional write was refused because its condition did not hold.

    412 PreconditionFailed; 409 ConditionalRequestConflict when another write was under way; 404 NoSuchKey for an
    ``If-Match`` on an object that is gone (S3 User Guide, "Conditional writes").
    """
    status, code = status_of(exc), code_of(exc)
    return status == 412 or (status == 409 and code != "OperationAborted") or (status == 404 and code == "NoSuchKey")


def is_unsupported(exc: BaseException) -> bool:
    """Whether the server says that it does not know a header or an operation."""
    return status_of(exc) == 501 or (status_of(exc) == 400 and code_of(exc) in _UNSUPPORTED)


def explained(exc: BaseException, what: str, *, bucket: str) -> StorageError:  # noqa: PLR0911 - a table of codes
    """The error as one of ours, in the store's own words: whoever shows it takes out what is secret.

    Args:
        what: the request in words, with the object's URL: "reading s3://b/run/manifest.json".
    """
    if isinstance(exc, StorageError):
        return exc
    status, code = status_of(exc), code_of(exc)
    if not status:
        return _without_answer(exc, what)
    said = str(_response(exc).get("Error", {}).get("Message", "")).strip()
    detail = f"{what}: {status} {code}" + (f" ({said})" if said and said != code else "")
    if code == "NoSuchBucket":
        return StorageError(f"{detail}: bucket {bucket!r} does not exist at this endpoint: create it, or fix the URL")
    if status == 404 or code in {"NoSuchKey", "NoSuchVersion"}:
        return ObjectNotFoundError(f"{what}: the object does not exist")
    if code in _EXPIRED:
        return ExpiredCredentialsError(
            f"{detail}: the credentials have expired: renew them (the same profile or file is read again)",
            retryable=True,
        )
    if code in _ADVICE:
        return StorageError(f"{detail}: {_ADVICE[code]}")
    if code in {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"} or (
        status in {301, 307}
    ):
        region = _response(exc).get("Error", {}).get("Region") or _response(exc).get("ResponseMetadata", {}).get(
            "HTTPHeaders", {}
        ).get("x-amz-bucket-region")
        wanted = repr(region) if region else "the bucket's own region"
        return StorageError(f"{detail}: the region is wrong: set AWS_DEFAULT_REGION to {wanted}")
    if code in _RETRYABLE_CODES or status in _RETRYABLE_STATUSES:
        return StorageError(detail, retryable=True)
    if status == 403:
        return StorageError(
            f"{detail}: no permission. For an object that does not exist S3 says the same to whoever may not list the "
            f"bucket, so grant s3:ListBucket on {bucket!r} as well; `cloudckpt doctor` tells which right is missing"
        )
    return StorageError(detail)


def _without_answer(exc: BaseException, what: str) -> StorageError:  # noqa: PLR0911 - a table of kinds
    from botocore import exceptions as known  # noqa: PLC0415 - the extra is there if such an error is

    name, said = type(exc).__name__, str(exc) or "no reason given"
    if isinstance(exc, known.NoCredentialsError | known.PartialCredentialsError | known.TokenRetrievalError):
        return StorageError(
            f"{what}: there are no usable credentials ({said}): set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_PROFILE, or give the machine a role; for a public bucket pass storage_options={'anon': True}"
        )
    if isinstance(exc, known.CredentialRetrievalError | known.MetadataRetrievalError):
        # The role's endpoint or the helper program failed; they do, for a moment.
        return ExpiredCredentialsError(f"{what}: the credentials could not be fetched ({said})", retryable=True)
    if isinstance(exc, known.ProfileNotFound | known.NoRegionError | known.InvalidRegionError):
        return StorageError(f"{what}: {said}: look at AWS_PROFILE and AWS_DEFAULT_REGION")
    if isinstance(exc, known.ParamValidationError | known.InvalidConfigError | known.UnsupportedS3ConfigurationError):
        return StorageError(f"{what}: {said}")
    broken = known.HTTPClientError | known.ConnectionError | known.IncompleteReadError | known.FlexibleChecksumError
    if isinstance(exc, broken):
        return StorageError(f"{what}: {said}", retryable=True)
    if isinstance(exc, OSError | EOFError | asyncio.TimeoutError) or type(exc).__module__.startswith("aiohttp"):
        return StorageError(f"{what}: {name}: {said}", retryable=True)
    return StorageError(f"{what}: {name}: {said}")
