"""What is secret is replaced by ``***`` in texts and in errors, however it is spelled and however deep it lies."""

from __future__ import annotations

import base64
import json
import traceback
from typing import Any
from urllib.parse import quote

import pytest

from cloudckpt.storage.redacting import Redactor

SECRET = "wJalr/XUtnFEMI+K7MDENG&bPxRfiCY"
TOKEN = "hunter2-session-token"


def chain(exc: BaseException) -> str:
    """What Python prints of an error and of all that is chained to it."""
    return "".join(traceback.format_exception(exc))


@pytest.mark.parametrize(
    "options",
    [
        {"secret": SECRET},
        {"client_kwargs": {"aws_secret_access_key": SECRET}},
        {"s3_additional_kwargs": {"SSECustomerKey": SECRET}},
        {"token": {"type": "service_account", "private_key": SECRET}},
        {"passwords": [SECRET]},
        {"secret": SECRET.encode()},
        {"auth": ("me", SECRET)},
        {"endpoint_url": f"http://me:{quote(SECRET, safe='')}@127.0.0.1:9/"},
        {"config_kwargs": {"proxies": {"https": f"http://me:{quote(SECRET, safe='')}@proxy:1"}}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_secret_of_the_options_is_hidden(options: dict[str, object]) -> None:
    """Under any name that means one, nested ones and users in URLs too, in each of its spellings."""
    redactor = Redactor(options)
    for spelled in (SECRET, quote(SECRET), quote(SECRET, safe=""), SECRET.replace("&", "&amp;")):
        assert redactor.hide(f"the store said {spelled} to it") == "the store said *** to it"


def test_what_is_no_secret_stays() -> None:
    """Hosts, names, and values so short that they would take every message apart."""
    options = {"host": "files.example.org", "username": "trainer", "password": "me", "token": "google_default"}
    said = "trainer at files.example.org told me: try google_default"
    assert Redactor(options).hide(said) == said


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("http://me:pass@host:9/x", "http://***@host:9/x"),
        ("GET /b/k?X-Amz-Signature=ab12&partNumber=3", "GET /b/k?X-Amz-Signature=***&partNumber=3"),
        ("?x-amz-credential=AKIA%2F2026&b", "?x-amz-credential=***&b"),
        ("X-Amz-Security-Token: FwoGZX/+= is old", "X-Amz-Security-Token: *** is old"),
        ("Authorization: Bearer ab.cd-ef, and", "Authorization: ***, and"),
        ("{'Authorization': b'Basic bWU6cGFzcw=='}", "{'Authorization': b'***'}"),
        ('{"proxy-authorization": "Basic bWU6cGFzcw=="}', '{"proxy-authorization": "***"}'),
        ("the token ya29.a0Af-x_y is bad", "the token *** is bad"),
        ("bearer abcdefghijklmnop was refused", "bearer *** was refused"),
        ("/token?access_token=abc&x=1", "/token?access_token=***&x=1"),
        ("?sv=2024&sig=abc%3D&se=1", "?sv=2024&sig=***&se=1"),
        (
            "AWS4-HMAC-SHA256 Credential=AKIA/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=ab12",
            "AWS4-HMAC-SHA256 Credential=***, SignedHeaders=host, Signature=***",
        ),
        ("the authorization header is malformed; the region is wrong", None),
        ("the signature is another one: look at AWS_SECRET_ACCESS_KEY", None),
        ("SignatureDoesNotMatch", None),
        ("no basic authentication", None),
    ],
)
def test_what_is_secret_wherever_it_stands(said: str, shown: str | None) -> None:
    """Signatures, tokens and users in URLs are known by their place, and plain words are left; twice is as once."""
    redactor = Redactor({})
    hidden = redactor.hide(said)
    assert hidden == (said if shown is None else shown)
    assert redactor.hide(hidden) == hidden


def test_what_is_learned_later() -> None:
    """Tokens in headers, credentials as they are renewed, a proxy's password and what is sent for it."""

    class Credentials:
        def __init__(self) -> None:
            self._secret_key, self._token = SECRET, None

        @property
        def token(self) -> str:
            raise AssertionError("asked for: this may send a request")

    held: Any = Credentials()
    redactor = Redactor({"token": held})
    assert redactor.hide(SECRET) == "***"
    held._token = TOKEN
    assert redactor.hide(TOKEN) == "***"
    redactor.learn_headers(
        {"X-Amz-Security-Token": b"another-token", "AUTHORIZATION": "Bearer opaque-one", "Host": "hostname"}
    )
    redactor.learn_url("http://me:proxy-password@proxy:1", None)
    basic = base64.b64encode(b"me:proxy-password").decode()
    assert redactor.hide(f"another-token opaque-one hostname proxy-password {basic}") == "*** *** hostname *** ***"


def test_the_latest_of_many_tokens_are_known() -> None:
    """A run of weeks learns token after token, and forgets the oldest."""
    redactor = Redactor({"secret": SECRET})
    for number in range(3000):
        redactor.learn(f"session-token-{number:06}")
    assert redactor.hide(f"{SECRET} session-token-002999") == "*** ***"
    assert len(redactor._learned) <= 1000


def test_a_private_key_is_known_by_its_lines() -> None:
    """What is shown of a key with line ends is one of its lines, or all of it in one."""
    pem = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0\n-----END PRIVATE KEY-----\n"
    redactor = Redactor({"token": {"private_key": pem}})
    assert redactor.hide("bad line: MIIEvQIBADANBgkqhkiG9w0") == "bad line: ***"
    assert redactor.hide(json.dumps({"k": pem})) == '{"k": "***"}'


def test_an_error_is_changed_where_it_stands() -> None:
    """Its text, its fields, its notes, and all that is chained to it; the same object can be chained."""
    redactor = Redactor({"secret": SECRET})
    try:
        try:
            raise OSError(13, f"refused {SECRET}", f"/x/{SECRET}")
        except OSError:
            raise KeyError(f"of {SECRET}") from ValueError({"said": [SECRET]})
    except KeyError as exc:
        problem: Any = exc
    problem.response = {"Error": {"Message": f"not {SECRET}", "Code": "No"}, "status": 403}
    problem.add_note(f"see {SECRET}")
    problem.body = SECRET.encode()
    cleaned: Any = redactor.clean(problem)
    assert cleaned is problem
    assert problem.response == {"Error": {"Message": "not ***", "Code": "No"}, "status": 403}
    assert problem.body == b"***"
    assert SECRET not in chain(problem)
    assert SECRET not in f"{problem.__context__} {problem.__context__!r} {problem.__cause__!r}"


def test_an_error_that_cannot_be_changed_is_not_chained() -> None:
    """At the top it is left out; further down another one stands in its place, and the chain goes on behind it."""
    redactor = Redactor({"secret": SECRET})

    class Stubborn(Exception):
        def __str__(self) -> str:
            return SECRET

    assert redactor.clean(Stubborn()) is None
    try:
        try:
            try:
                raise ValueError(f"first {SECRET}")
            except ValueError as exc:
                raise Stubborn from exc
        except Stubborn as exc:
            raise RuntimeError("last") from exc
    except RuntimeError as exc:
        problem = exc
    assert redactor.clean(problem) is problem
    shown = chain(problem)
    assert SECRET not in shown
    assert "first ***" in shown
    assert "Stubborn: what it says has a secret in it" in shown
    assert redactor.clean(ExceptionGroup("several", [Stubborn()])) is None
    assert redactor.clean(ExceptionGroup("several", [ValueError(SECRET)])) is not None


def test_a_chain_that_bites_its_tail_ends() -> None:
    """Two errors, each the cause of the other."""
    one, other = ValueError(SECRET), ValueError(SECRET)
    one.__cause__, other.__cause__ = other, one
    assert Redactor({"secret": SECRET}).clean(one) is one
    assert SECRET not in f"{one} {other}"
