"""Our signatures are those that botocore makes for the same request."""

from __future__ import annotations

import string
from datetime import UTC, datetime

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials as Theirs
from hypothesis import given
from hypothesis import strategies as st

from cloudckpt.storage.direct.sigv4 import Credentials, quoted_path, quoted_query, signed

keys = st.text(st.characters(codec="utf-8", exclude_characters="\0?#"), min_size=1, max_size=40)
plain = st.text(string.ascii_letters + string.digits + "-_.~/+= ", min_size=1, max_size=30)


@given(
    key=keys,
    query=st.dictionaries(st.sampled_from(["partNumber", "uploadId", "x-id", "uploads"]), plain, max_size=3),
    headers=st.dictionaries(
        st.sampled_from(["x-amz-checksum-crc32c", "Range", "x-amz-request-payer"]), plain, max_size=3
    ),
    token=st.none() | st.text(string.ascii_letters + "+/=", min_size=1, max_size=30),
    method=st.sampled_from(["GET", "PUT", "POST", "DELETE"]),
)
def test_a_signature_is_botocores(
    key: str, query: dict[str, str], headers: dict[str, str], token: str | None, method: str
) -> None:
    """Whatever key, query, headers and token a request has, both sign it alike."""
    path, asked = quoted_path(f"/bucket/{key}"), quoted_query(query)
    url = f"https://s3.example.com{path}" + (f"?{asked}" if asked else "")
    theirs = AWSRequest(method=method, url=url, headers={"Host": "s3.example.com", **headers})
    theirs.context.update(client_config=Config(s3={"payload_signing_enabled": False}), has_streaming_input=True)
    S3SigV4Auth(Theirs("AKID", "secret", token), "s3", "eu-west-1").add_auth(theirs)
    at = datetime.strptime(theirs.headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)

    ours = signed(
        method,
        path,
        asked,
        {"Host": "s3.example.com", **headers},
        credentials=Credentials("AKID", "secret", token),
        region="eu-west-1",
        service="s3",
        now=at,
    )

    assert ours["authorization"] == theirs.headers["Authorization"]
    assert ours["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"


def test_what_is_secret_is_not_shown() -> None:
    """Neither secret key nor token appear where credentials are printed."""
    shown = repr(Credentials("AKID", "very-secret", "token-of-it"))
    assert "AKID" in shown
    assert "secret" not in shown.replace("secret_key", "")
    assert "token-of-it" not in shown
