"""What is secret in ``storage_options`` and in the environment is sent to the store, and shown nowhere.

(Past 350 lines: each store is asked for everything, with the same secrets.)
"""

from __future__ import annotations

import json
import logging
import pickle
import subprocess
import sys
import traceback
import uuid
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import fsspec
import pytest
import torch
from google.oauth2.credentials import Credentials

import cloudckpt
from cloudckpt import CheckpointManager, CloudCkptError, Settings, StorageError
from cloudckpt.events import Event
from cloudckpt.storage import ManifestStore, open_storage
from cloudckpt.testing import BytesSource, FaultProxy
from cloudckpt.testing.servers import MotoServer
from cloudckpt.verifying import verify_run

QUICK = Settings(
    retry_base_s=0.01, retry_cap_s=0.05, manifest_deadline_s=0.3, storage_deadline_s=0.3, request_timeout_s=5
)

SECRET = "hunter2/SecretKey+of40characters0123456789"
TOKEN = "hunter2-session-token-" + "t" * 100
CUSTOMER = "hunter2-customer-key"
SECRETS = (SECRET, TOKEN, CUSTOMER)


class Seen:
    """Everything that a person, a log file or a colleague with the store could come to see."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def see(self, *things: object) -> None:
        """Note how things are printed."""
        self.texts += [f"{thing!s}\n{thing!r}" for thing in things]

    def event(self, event: Event) -> None:
        """Note an event, as a listener gets it."""
        self.see(event)

    def error(self, exc: BaseException) -> None:
        """Note an error with everything that was chained to it."""
        self.see(exc)
        self.texts.append("".join(traceback.format_exception(exc)))

    def secrets(self) -> list[str]:
        """The places where a secret is shown: a little of the text around each."""
        return [
            f"{text[max(text.find(secret) - 60, 0) : text.find(secret) + 20]!r}"
            for text in self.texts
            for secret in SECRETS
            if secret in text
        ]


@pytest.fixture
def seen(caplog: pytest.LogCaptureFixture) -> Seen:
    """Nothing so far; the log is at its most talkative."""
    caplog.set_level(logging.DEBUG, logger="cloudckpt")
    return Seen()


def state_of(step: int) -> dict[str, Any]:
    """A state whose every bit follows from its step."""
    return {"model": {"w": torch.full((50,), float(step))}}


def options(server: MotoServer, proxy: FaultProxy, **more: object) -> dict[str, object]:
    """What a user passes who has no better place for it."""
    return {
        **server.storage_options(),
        "endpoint_url": proxy.url,
        "key": "AKIAIOSFODNN7EXAMPLE",
        "secret": SECRET,
        "token": TOKEN,
        "s3_additional_kwargs": {"Metadata": {"note": "public"}},
        **more,
    }


def _body(code: str, text: str = "injected") -> bytes:
    return f"<Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()


#: What a server says that shows whoever asks what it was shown, and what it has no business to know.
_REPEATED = (
    f"no: {SECRET} {TOKEN} {quote(SECRET, safe='')} Authorization: Bearer {TOKEN} http://me:{SECRET}@proxy/ "
    f"?X-Amz-Security-Token={quote(TOKEN)}"
)

#: What the store does to every request from some moment on.
TROUBLES: dict[str, dict[str, Any]] = {
    "none": {},
    "403": {"action": "status", "status": 403},
    "403 that repeats the secret": {
        "action": "status",
        "status": 403,
        "body": _body("SignatureDoesNotMatch", _REPEATED),
    },
    "expired": {"action": "status", "status": 400, "body": _body("ExpiredToken")},
    "invalid key": {"action": "status", "status": 403, "body": _body("InvalidAccessKeyId")},
    "500 that repeats the secret": {"action": "status", "status": 500, "body": _body("InternalError", _REPEATED)},
    "501 that repeats the secret": {"action": "status", "status": 501, "body": _body(f"NotImplemented-{TOKEN}")},
    "503": {"action": "status", "status": 503},
    "501": {"action": "status", "status": 501},
    "301": {"action": "status", "status": 301, "body": _body("PermanentRedirect")},
    "no answer": {"action": "drop_before"},
    "cut short": {"action": "truncate"},
    "not XML": {"action": "status", "status": 500, "body": b"<html>"},
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_no_secret_is_shown_whatever_the_store_says(
    s3_server: MotoServer, s3_faults: FaultProxy, seen: Seen, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    """In no log line, event, error (with all that is chained), repr, nor object of the store."""
    bucket = f"secret-{uuid.uuid4().hex[:8]}"
    s3_server.create_bucket(bucket)
    root = f"s3://{bucket}/run"
    given = options(s3_server, s3_faults)
    with CheckpointManager(root, storage_options=given, settings=QUICK, listeners=[seen.event]) as ckpts:
        ckpts.save(1, state_of(1), block=True)
    ckpts = CheckpointManager(root, storage_options=given, settings=QUICK, listeners=[seen.event])
    run = cloudckpt.open(root, storage_options=given, settings=QUICK)
    storage = open_storage(root, storage_options=given, settings=QUICK)
    seen.see(ckpts, run, storage, ckpts.url)
    if words := dict(TROUBLES[trouble]):
        s3_faults.inject(words.pop("action"), times=None, **words)
    acts: list[Callable[[], object]] = [
        lambda: ckpts.restore(state_of(0)),
        lambda: seen.see(ckpts.save(2, state_of(2), block=True)),
        lambda: ckpts.pin(1),
        lambda: ckpts.report_metrics(1, {"loss": 1.0}),
        run.load,
        run.checkpoints,
        lambda: verify_run(ManifestStore(storage, QUICK)),
        lambda: seen.see(storage.describe()),  # type: ignore[attr-defined]  # S3Storage's
        lambda: storage.read("manifest.json", limit_bytes=10**6),
        lambda: storage.put("checkpoint-9.00000000/x", [b"x"], size_bytes=1),
        lambda: [*storage.list("")],
        lambda: storage.abort_uploads(""),
        ckpts.close,
    ]
    for act in acts:
        try:
            seen.see(act())
        except CloudCkptError as exc:
            seen.error(exc)
    storage.close()
    s3_faults.clear()
    plain = open_storage(root, storage_options=s3_server.storage_options())
    for item in plain.list(""):
        seen.texts.append(plain.read(item.key, limit_bytes=10**7).body.decode("latin-1"))
    plain.close()
    seen.texts += [caplog.text, *(f"{record.getMessage()} {record.args!r}" for record in caplog.records)]
    assert len(seen.texts) > 20
    assert seen.secrets() == []


@pytest.mark.parametrize("status", [400, 401, 403, 404, 412, 429, 501])
@pytest.mark.parametrize("shape", ["json", "xml", "text"])
def test_no_secret_is_shown_whatever_google_says(
    faulty_gcs_root: str, gcs_faults: FaultProxy, seen: Seen, caplog: pytest.LogCaptureFixture, status: int, shape: str
) -> None:
    """Of a bearer token, wherever the answer repeats it: by the session and by the lane, before the text is cut."""
    bearer = Credentials(token=TOKEN, expiry=datetime(2100, 1, 1))  # type: ignore[no-untyped-call]  # noqa: DTZ001 - google-auth wants it naive
    said = f"{'x' * 250} {TOKEN} Authorization: Bearer {TOKEN} {TOKEN}"
    body = {
        "json": json.dumps({"error": {"code": status, "message": said}}).encode(),
        "xml": _body("AccessDenied", said),
        "text": said.encode(),
    }[shape]
    given = {"token": bearer}
    with CheckpointManager(faulty_gcs_root, storage_options=given, settings=QUICK) as ckpts:
        ckpts.save(1, state_of(1), block=True)
    storage = open_storage(faulty_gcs_root, storage_options=given, settings=QUICK)
    name = next(item.key for item in storage.list("") if item.key != "manifest.json")
    gcs_faults.inject("status", times=None, status=status, body=body)
    run = cloudckpt.open(faulty_gcs_root, storage_options=given, settings=QUICK)
    acts: list[Callable[[], object]] = [
        run.load,
        lambda: CheckpointManager(faulty_gcs_root, storage_options=given, settings=QUICK).restore(state_of(0)),
        lambda: storage.put("checkpoint-9.00000000/x", [b"x"], size_bytes=1),
        lambda: storage.put("checkpoint-9.00000000/x", BytesSource(b"x"), size_bytes=1),
        lambda: storage.read_into(name, 0, memoryview(bytearray(1))),
        lambda: storage.create("manifest.json", b"{}"),
        lambda: storage.delete(["checkpoint-9.00000000/x"]),
        lambda: storage.abort_uploads(""),
        lambda: [*storage.list("")],
    ]
    for act in acts:
        try:
            seen.see(act())
        except CloudCkptError as exc:
            seen.error(exc)
    storage.close()
    gcs_faults.clear()
    seen.texts += [caplog.text]
    assert len(seen.texts) > 10
    assert seen.secrets() == []
    assert not any(TOKEN[:20] in text for text in seen.texts), "cut before it was hidden"


class Talkative(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Says what it was given, in errors of every make."""

    protocol: ClassVar[str] = "talkative"
    cachable = False
    error: ClassVar[Callable[[str], Exception]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.secret, self.nested = options["password"], options["client"]["api_token"]

    def _say(self, *_: Any, **__: Any) -> Any:
        try:
            raise RuntimeError(f"login with {self.nested}")
        except RuntimeError:
            raise type(self).error(f"refused {self.secret} of me:{self.secret}@host") from ValueError(self.nested)

    info = ls = cat_file = makedirs = put_file = mv = rm_file = _open = _rm = _say


class _ServerError(Exception):
    """A server's, with the text in a field."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def __str__(self) -> str:
        return self.text


class _Unchangeable(Exception):
    """Keeps what it says where nobody can change it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._say: Callable[[], str] = lambda: text

    def __str__(self) -> str:
        return self._say()


@pytest.mark.parametrize(
    "error",
    [
        OSError,
        PermissionError,
        FileNotFoundError,
        lambda text: OSError(5, text, text),
        _ServerError,
        _Unchangeable,
        lambda text: UnicodeDecodeError("ascii", b"x", 0, 1, text),
        lambda text: ExceptionGroup("two", [ValueError(text), _Unchangeable(text)]),
    ],
    ids=["OSError", "permission", "missing", "numbered", "field", "unchangeable", "decoding", "group"],
)
def test_no_secret_is_shown_whatever_a_filesystem_says(
    seen: Seen, error: Callable[[str], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any filesystem of fsspec: in its errors, and in all that they come from."""
    monkeypatch.setattr(Talkative, "error", staticmethod(error), raising=False)
    fsspec.register_implementation("talkative", Talkative, clobber=True)
    storage = open_storage("talkative://run", storage_options={"password": SECRET, "client": {"api_token": TOKEN}})
    acts: list[Callable[[], object]] = [
        lambda: storage.read("manifest.json", limit_bytes=10),
        lambda: storage.put("x", [b"x"], size_bytes=1),
        lambda: storage.read_into("x", 0, memoryview(bytearray(1))),
        lambda: storage.size("x"),
        lambda: storage.delete(["x"]),
        lambda: [*storage.list("")],
    ]
    for act in acts:
        try:
            seen.see(act())
        except CloudCkptError as exc:
            seen.error(exc)
    assert len(seen.texts) > 6
    assert seen.secrets() == []


def test_a_key_that_comes_from_a_profile_is_known_as_well(
    s3_server: MotoServer, s3_faults: FaultProxy, seen: Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What the client library finds by itself is no less secret than an option."""
    profile = tmp_path / "credentials"
    profile.write_text(
        f"[default]\naws_access_key_id = AKIAIOSFODNN7EXAMPLE\naws_secret_access_key = {SECRET}\n"
        f"aws_session_token = {TOKEN}\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"secret-{uuid.uuid4().hex[:8]}"
    s3_server.create_bucket(bucket)
    s3_faults.inject("status", times=None, status=403, body=_body("AccessDenied", f"not with {SECRET} and {TOKEN}"))
    storage = open_storage(f"s3://{bucket}/run", storage_options={"endpoint_url": s3_faults.url}, settings=QUICK)
    for act in (lambda: storage.read("x", limit_bytes=9), lambda: storage.put("x", BytesSource(b"x"), size_bytes=1)):
        with pytest.raises(StorageError, match=r"not with \*\*\* and \*\*\*") as refused:
            act()
        seen.error(refused.value)
    assert any("AccessDenied" in text for text in seen.texts)
    assert seen.secrets() == []
    storage.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"sercet": SECRET},
        {"client_kwargs": {"no_such": SECRET}},
        {"config_kwargs": {"no_such": TOKEN}},
        {"s3_additional_kwargs": {"SSECustomerKey": CUSTOMER, "SSECustomerAlgorithm": "AES256"}},
        {"anon": SECRET},
        {"endpoint_url": f"http://user:{TOKEN}@127.0.0.1:9/"},
    ],
    ids=lambda words: next(iter(words)),
)
def test_options_that_are_wrong_are_refused_without_their_values(
    s3_server: MotoServer, s3_faults: FaultProxy, seen: Seen, wrong: dict[str, Any]
) -> None:
    """The name of the option that s3fs does not take may be shown, and what it was set to is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ckpts = CheckpointManager(
            "s3://bucket/run", storage_options=options(s3_server, s3_faults, **wrong), settings=QUICK
        )
        acts: list[Callable[[], object]] = [
            lambda: ckpts.restore(state_of(0)),
            lambda: ckpts.save(1, state_of(1), block=True),
            ckpts.close,
        ]
        for act in acts:
            try:
                seen.see(act())
            except CloudCkptError as exc:
                seen.error(exc)
        seen.see(ckpts)
    assert seen.secrets() == []


#: Each command in a child of a process that has the program and its client of S3 loaded.
COMMANDS = """
import json, os, sys
import s3fs
import cloudckpt.cli.app
for arguments in json.loads(sys.argv[1]):
    print("asked for:", *arguments, flush=True)
    child = os.fork()
    if child == 0:
        sys.argv = ["cloudckpt", *arguments]
        cloudckpt.cli.main()
        sys.exit("the program came back")
    os.waitpid(child, 0)
"""


@pytest.mark.processes
def test_the_command_line_shows_no_secret_of_the_environment(
    s3_root: str, monkeypatch: pytest.MonkeyPatch, seen: Seen
) -> None:
    """Neither on standard output nor on standard error, with a run and without one."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    commands = [[*words, "-r", s3_root] for words in (["ls"], ["doctor"], ["show", "latest"], ["verify"])]
    for there in (False, True):
        if there:
            with CheckpointManager(s3_root, settings=QUICK) as ckpts:
                ckpts.save(1, state_of(1), block=True)
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, json.dumps(commands)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=240,
        )
        seen.texts.append(done.stdout)
        said = done.stdout.split("asked for: ")[1:]
        assert len(said) == len(commands)
        assert all(len(text.splitlines()) > 1 for text in said), done.stdout
    assert seen.secrets() == []


def test_what_is_printed_of_a_url_has_no_password() -> None:
    """Roots with a user and a password are refused, or shown without them."""
    for root in (
        f"s3://AKIA:{SECRET}@bucket/run",
        f"sftp://me:{TOKEN}@127.0.0.1:1/run",
        f"sftp://me:{SECRET}@127.0.0.1:1/run",
        f"https://me:{TOKEN}@127.0.0.1/run",
        f"nonsense://me:{TOKEN}@host/run",
        f"s3:/me:{TOKEN}@bucket/run",
        f"simplecache::s3://me:{TOKEN}@bucket/run",
    ):
        try:
            storage = open_storage(root)
            shown = f"{storage!r} {storage.url}"
        except CloudCkptError as exc:
            shown = f"{exc!s} {exc!r} {exc.__cause__!s}"
        assert not any(secret in shown for secret in SECRETS), shown


def test_nothing_that_can_be_pickled_carries_a_secret(tmp_path: Path) -> None:
    """What crosses processes are checkpoints and events: plain values without a storage in them."""
    with CheckpointManager(tmp_path / "run", storage_options={"secret": SECRET}) as ckpts:
        ckpts.save(1, state_of(1), block=True)
        found = ckpts.checkpoints()
    assert SECRET.encode() not in pickle.dumps(found)
    assert pickle.loads(pickle.dumps(found)) == found


def test_the_files_of_a_run_hold_no_variable_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest names host, pid and the scheduler's name of the job; no file has more of the environment."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("SOME_API_KEY", TOKEN)
    monkeypatch.setenv("SLURM_JOB_ID", "job-8123")
    with CheckpointManager(tmp_path / "run") as ckpts:
        ckpts.save(1, state_of(1), block=True)
    bodies = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(b"job-8123" in body for body in bodies)
    assert not [secret for secret in SECRETS for body in bodies if secret.encode() in body]
