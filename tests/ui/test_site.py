"""What the page's server answers, to whom, and what that costs the store. Real HTTP over loopback.

(Past 350 lines: one server, asked for each of its documents and by each kind of stranger.)
"""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cloudckpt import CheckpointManager, editing
from cloudckpt.cli.schema import SCHEMAS
from cloudckpt.cli.ui import documents, reading
from cloudckpt.cli.ui.server import PageServer
from cloudckpt.core.manifest_json import MANIFEST_LIMIT_BYTES
from cloudckpt.errors import ConfigError
from cloudckpt.storage import Storage
from cloudckpt.testing.scripted import Fault, ScriptedStorage
from cloudckpt.tools import open_store

Serve = Callable[..., Any]

ADDRESS = re.compile(r"""(?:[a-z]+:|["'(=])//[^\s"')]+""")


def printed(*arguments: str) -> Any:
    """The document that a command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "cloudckpt", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "words", "command"),
    [
        ("ls", {}, ["ls", "--all"]),
        ("log", {}, ["log", "-n", "100"]),
        ("plot", {}, ["plot"]),
        ("plot", {"metric": "acc"}, ["plot", "--metric", "acc"]),
        ("prune", {}, ["prune", "--dry-run"]),
        ("prune", {"keep_last": "2"}, ["prune", "--dry-run", "--keep-last", "2"]),
        ("prune", {"keep_last": "1", "keep_best": "2"}, ["prune", "--dry-run", "--keep-last", "1", "--keep-best", "2"]),
        (
            "prune",
            {"keep_last": "1", "keep_every": "2"},
            ["prune", "--dry-run", "--keep-last", "1", "--keep-every", "2"],
        ),
    ],
)
def test_each_document_is_what_the_command_line_prints(
    page_of: Serve, run: str, name: str, words: dict[str, str], command: list[str]
) -> None:
    """The page is given the documented JSON of the commands, to the letter."""
    answer = page_of(run).api(name, **words)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json == printed(*command, run)
    assert answer.json.keys() == SCHEMAS[name].keys()


def test_the_runs_below_a_prefix(page_of: Serve, made: Path, tmp_path: Path) -> None:
    """A prefix gives the document of ls PREFIX, and each run by its name; no other name becomes a path."""
    prefix = tmp_path / "runs"
    shutil.copytree(made, prefix / "a")
    shutil.copytree(made, prefix / "deep" / "b")
    shutil.copytree(made, tmp_path / "outside")
    page = page_of(f"{prefix}/")
    assert page.api("ls", run="a").status == 404
    assert page.api("runs").json == printed("ls", str(prefix))
    assert page.api("ls", run="deep/b").json == printed("ls", "--all", str(prefix / "deep" / "b"))
    refused = page.api("ls", run="../outside")
    assert refused.status == 404
    assert "list the runs again" in refused.json["error"]


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        ({}, []),
        ({"keep_last": "2"}, [1]),
        ({"keep_last": "1"}, [1, 4]),
        ({"keep_last": "1", "keep_best": "0"}, [1, 2, 4]),
        ({"keep_last": "1", "keep_best": "none"}, []),
        ({"keep_last": "1", "keep_every": "none"}, [1, 4]),
        ({"keep_last": "1", "keep_within_s": "1e6"}, []),
        ({"keep_last": "none", "keep_best": "0"}, []),
    ],
)
def test_a_preview_follows_its_words(page_of: Serve, run: str, words: dict[str, str], gone: list[int]) -> None:
    """Words that are given stand in for the stored ones, ``none`` takes a rule away; the best, the pinned one stay."""
    plan = page_of(run).api("prune", **words).json
    assert [d["checkpoint"]["step"] for d in plan["decisions"] if not d["keep"]] == gone
    assert all(d["reasons"] for d in plan["decisions"])
    assert plan["size_bytes"] == sum(d["checkpoint"]["size_bytes"] for d in plan["decisions"] if not d["keep"])


def test_a_look_is_one_get_and_the_rest_is_free(page_of: Serve, run: str, announce: Callable[..., str]) -> None:
    """A look reads the manifest once and lists nothing, but each upload in flight; everything else is from the last look."""
    page = page_of(run)
    assert page.api("ls").status == 200
    assert page.asked() == ["read"]
    for name in ("log", "plot", "prune"):
        assert page.api(name).status == 200
    assert page.asked() == []
    # The root is a run: what is below it is not listed.
    assert page.api("runs").json["runs"] == []
    assert page.asked() == ["read"]
    announce(run, 6, size_bytes=1000, arrived=430)
    assert [*page.api("ls").json["uploaded_bytes"].values()] == [430]
    assert page.asked() == ["read", "list"]


def test_what_has_not_changed_is_not_sent_again(page_of: Serve, run: str) -> None:
    """With the etag of the last answer there is no body, until something has changed in the run."""
    page = page_of(run)
    first = page.api("ls")
    etag = first.headers["etag"]
    again = page.get("api/ls?", **{"If-None-Match": etag})
    assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
    done = subprocess.run([sys.executable, "-m", "cloudckpt", "pin", "5", "-r", run], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    changed = page.get("api/ls?", **{"If-None-Match": etag})
    assert changed.status == 200
    assert changed.json["revision"] == first.json["revision"] + 1


def test_nothing_is_ever_written(page_of: Serve, run: str) -> None:
    """Whatever is asked, the page's stores get reads and lists alone, and every byte of the run stays as it was."""

    def bytes_of_the_run() -> dict[str, str]:
        files = (path for path in Path(run).rglob("*") if path.is_file())
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = bytes_of_the_run()
    page = page_of(run)
    for name in ("runs", "ls", "log", "plot", "prune"):
        assert page.api(name, keep_last="1").status == 200
    assert set(page.asked()) <= {"read", "list"}
    assert bytes_of_the_run() == before


@pytest.mark.parametrize(
    ("name", "words", "status", "said"),
    [
        ("prune", {"keep_last": "few"}, 400, "expected a number, or none"),
        ("prune", {"keep_last": "0"}, 400, "keep_last=1"),
        ("prune", {"keep_within_s": "nan"}, 400, "keep_within"),
        ("plot", {"metric": "bleu"}, 404, "the metrics there are: acc, loss"),
        ("ls", {"run": "elsewhere"}, 404, "there is no run 'elsewhere'"),
        ("secrets", {}, 400, "there is no document"),
    ],
)
def test_what_cannot_be_answered_is_said_plainly(
    page_of: Serve, run: str, name: str, words: dict[str, str], status: int, said: str
) -> None:
    """An error is a sentence, the class of the error, and a status that says whose fault it is."""
    answer = page_of(run).api(name, **words)
    assert answer.status == status
    assert said in answer.json["error"]
    assert answer.json["kind"] in {"ConfigError", "CheckpointNotFoundError"}


def test_a_run_in_trouble(page_of: Serve, run: str, tmp_path: Path) -> None:
    """What the store says of a run is passed on with its advice; what was seen before can still be had."""
    page = page_of(run)
    assert page.api("ls").status == 200
    manifest = Path(run) / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_text("{")
    broken = page.api("ls")
    assert broken.status == 502
    assert "cloudckpt repair" in broken.json["error"]
    manifest.unlink()
    assert "it was deleted" in page.api("ls").json["error"]
    assert page.api("log").status == 200
    manifest.write_bytes(whole)
    assert page.api("ls").status == 200
    empty = page_of(str(tmp_path / "nothing")).api("ls")
    assert empty.status == 404
    assert "nothing was ever saved there" in empty.json["error"]


def test_a_store_that_refuses(page_of: Serve, run: str) -> None:
    """A refusal is passed on as one, never as an empty run; what was seen can still be had, and the next look is one."""
    page = page_of(run, ScriptedStorage(open_store(run).unretried, at=1, fault=Fault.REFUSED))
    assert page.api("ls").status == 200
    refused = page.api("ls")
    assert (refused.status, refused.json["kind"]) == (502, "StorageError")
    assert page.api("log").status == 200
    assert page.api("ls").status == 200


def test_a_list_that_is_refused_hides_nothing(page_of: Serve, made: Path, tmp_path: Path) -> None:
    """Where what lies below may not be listed, what is wrong with the root itself is said as well."""
    prefix = tmp_path / "runs"
    shutil.copytree(made, prefix / "a")
    honest = page_of(str(prefix))
    assert [found["name"] for found in honest.api("runs").json["runs"]] == ["a"]
    verbs = honest.asked()
    last_list = max(number for number, verb in enumerate(verbs) if verb == "list")
    page = page_of(str(prefix), ScriptedStorage(open_store(str(prefix)).unretried, at=last_list, fault=Fault.REFUSED))
    refused = page.api("runs")
    assert refused.status == 502
    assert "holds no run of ours" in refused.json["error"]
    assert "cannot be listed" in refused.json["error"]
    assert page.api("runs").status == 200


def test_a_run_that_is_refused_hides_no_other(page_of: Serve, made: Path, tmp_path: Path) -> None:
    """A manifest that the store does not give is the problem of that run; the others are listed, and can be shown."""
    prefix = tmp_path / "runs"
    shutil.copytree(made, prefix / "a")
    (prefix / "b").mkdir()
    manifest = prefix / "b" / "manifest.json"
    manifest.touch()
    os.truncate(manifest, MANIFEST_LIMIT_BYTES + 1)
    page = page_of(str(prefix))
    problems = {found["name"]: found["problem"] for found in page.api("runs").json["runs"]}
    assert problems["a"] is None
    assert "more than" in problems["b"]
    assert page.api("ls", run="a").status == 200
    assert page.api("ls", run="b").status == 502


def test_a_fault_of_ours_is_an_answer_too(
    page_of: Serve, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that nobody foresaw is told to the page, leaves a traceback for us, and the server goes on."""
    page = page_of(run)

    def fail(_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(documents, "listing", fail)
    with caplog.at_level(logging.ERROR, logger="cloudckpt"):
        answer = page.api("ls")
    assert answer.status == 500
    assert answer.json["error"] == "cloudckpt itself failed: a bug"
    assert "RuntimeError" in caplog.text
    assert page.api("log").status == 200


def test_a_look_that_failed_half_way_is_had_again(
    page_of: Serve, run: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A change that was read, and then could not be answered, is in the next answer."""
    page = page_of(run)
    before = page.api("ls").json
    editing.pin(open_store(run), 3, pinned=False)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    with caplog.at_level(logging.ERROR, logger="cloudckpt"), monkeypatch.context() as patched:
        patched.setattr(reading, "arrived_bytes", fail)
        assert page.api("ls").status == 500
    after = page.api("ls").json
    assert [c["step"] for c in before["checkpoints"] if c["pinned"]] == [3]
    assert [c["step"] for c in after["checkpoints"] if c["pinned"]] == []


# -- who is let in ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:9999", 200),
        ("LOCALHOST:8765", 200),
        ("[::1]:1", 200),
        ("rebound.example", 403),
        ("rebound.example:80", 403),
        ("127.0.0.1.rebound.example", 403),
        ("localhost@rebound.example", 403),
        ("localhost:80:80", 403),
        ("", 403),
    ],
)
def test_a_foreign_name_is_refused(page_of: Serve, run: str, host: str, status: int) -> None:
    """Only names of this machine are answered, with any port (it may be forwarded): no rebound name gets in."""
    assert page_of(run).get("api/ls", Host=host).status == status


def test_two_names_are_refused(page_of: Serve, run: str) -> None:
    """A request that says two hosts is none of a browser's."""
    page = page_of(run)
    connection = http.client.HTTPConnection("127.0.0.1", page.server.server_port, timeout=60)
    try:
        connection.putrequest("GET", page.site.path, skip_host=True)
        connection.putheader("Host", "localhost")
        connection.putheader("Host", "rebound.example")
        connection.endheaders()
        assert connection.getresponse().status == 403
    finally:
        connection.close()


@pytest.mark.parametrize("path", ["/", "/index.html", "/api/ls", "/x/", "/x/api/ls", "//api/ls", "/%00"])
def test_nobody_gets_in_without_the_token(page_of: Serve, run: str, path: str) -> None:
    """Every path but the random one is refused, without a word about it."""
    page = page_of(run)
    answer = page.send("GET", path)
    assert answer.status == 404
    assert page.site.path.strip("/") not in answer.body.decode()


@pytest.mark.parametrize("target", ["", "*", "http://localhost/", "/\xe9/", "\x00", "/open/\xe9"])
def test_a_target_that_is_no_path_of_ours(page_of: Serve, run: str, target: str) -> None:
    """Whatever stands in the request line is answered, and lets nobody in."""
    assert page_of(run).site.answer(target, hosts=["localhost"]).status == 404


@pytest.mark.parametrize(
    "said", [b"\r\n", b"NONSENSE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n", b""]
)
def test_what_is_no_request_at_all(page_of: Serve, run: str, said: bytes) -> None:
    """Whatever somebody writes to the port gets nothing of ours, and the page goes on."""
    page = page_of(run)
    with socket.create_connection(("127.0.0.1", page.server.server_port), timeout=60) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert page.site.path.strip("/").encode() not in answer
    assert page.api("ls").status == 200


def test_the_token_belongs_to_one_server(page_of: Serve, run: str) -> None:
    """Each server makes its own; one that is long enough not to be guessed."""
    one, other = page_of(run), page_of(run)
    assert len(one.site.path) > 30
    assert other.send("GET", one.site.path).status == 404
    assert other.send("GET", other.site.path).status == 200


@pytest.mark.parametrize("name", ["../site.py", "%2e%2e/site.py", "..%2fsite.py", "static/index.html", "/etc/passwd"])
def test_no_other_file_is_served(page_of: Serve, run: str, name: str) -> None:
    """The page's own files by their names, and no way to another one."""
    assert page_of(run).get(name).status == 404


def test_the_link_for_the_browser_works_once(page_of: Serve, run: str) -> None:
    """It leads to the page, and to nothing for whoever reads it in a list of processes afterwards."""
    page = page_of(run)
    first = page.send("GET", page.site.opening)
    assert (first.status, first.headers["location"]) == (303, page.site.path)
    assert page.send("GET", "/open/None").status == 404
    again = page.send("GET", page.site.opening)
    assert again.status == 404
    assert b"this link has been used" in again.body


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_there_is_nothing_but_get(page_of: Serve, run: str, method: str) -> None:
    """No other method is known."""
    page = page_of(run)
    assert page.send(method, f"{page.site.path}api/ls").status == 501


def test_every_answer_forbids_what_it_can(page_of: Serve, run: str) -> None:
    """Pages, documents, errors and refusals: no script but ours, no frame, no embedding, no copy, no referrer."""
    page = page_of(run)
    answers = [
        page.get(),
        page.get("app.js"),
        page.api("ls"),
        page.api("prune", keep_last="x"),
        page.send("GET", "/"),
        page.send("POST", page.site.path),
        page.get("", Host="rebound.example"),
    ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["server"] == "cloudckpt"


def test_the_page_names_no_other_place(page_of: Serve, run: str) -> None:
    """Its files hold no address but the name of the SVG language, no inline script or style, and no way to parse HTML."""
    page = page_of(run)
    for name in page.site._files:
        answer = page.get(name)
        assert answer.status == 200, name
        text = answer.body.decode()
        assert set(ADDRESS.findall(text)) <= {"http://www.w3.org/2000/svg"}, name
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " style=", "onclick="):
            assert word not in text, (name, word)
    assert page.send("GET", page.site.path.rstrip("/")).headers["location"] == page.site.path


def test_a_port_that_is_taken(page_of: Serve, run: str) -> None:
    """The error names the port and the way out."""
    page = page_of(run)
    with pytest.raises(ConfigError, match=f"port {page.server.server_port} of 127.0.0.1 cannot be used .* --port"):
        PageServer(page.site, port=page.server.server_port)


def test_a_manifest_that_is_the_same_is_not_decoded_again(page_of: Serve, run: str) -> None:
    """Two looks that find the same are one, which is spelled once; a new version is another one."""
    page = page_of(run)
    watched = page.site._place.run()
    first = watched.look()
    assert watched.look() is first
    editing.pin(open_store(run), 3, pinned=False)
    assert watched.look().seen is not first.seen


@pytest.mark.parametrize("kind", ["memory", "moto", "gcs"])
def test_on_object_stores(page_of: Serve, new_storage: Callable[[str], Storage], kind: str) -> None:
    """The same page of a run in a bucket: one GET a look, and what has not changed is known by its version."""
    storage = new_storage(kind)
    ckpts = CheckpointManager(storage, monitor="loss", mode="min")
    ckpts.save(1, {"w": torch.ones(3)}, metrics={"loss": 0.5}, block=True)
    page = page_of(storage.url, storage)
    first = page.api("ls")
    assert [c["metrics"] for c in first.json["checkpoints"]] == [{"loss": 0.5}]
    watched = page.site._place.run()
    seen = watched.seen().seen
    assert page.get("api/ls", **{"If-None-Match": first.headers["etag"]}).status == 304
    assert watched.seen().seen is seen
    assert page.asked() == ["read", "read"]
    ckpts.save(2, {"w": torch.ones(3)}, metrics={"loss": 0.4}, block=True)
    assert page.api("ls").json["best"][0]["ids"][0] == page.api("plot").json["points"][1]["name"].partition(".")[2]
    ckpts.close()


def test_a_pulled_folder_is_a_run_of_one(page_of: Serve, run: str, tmp_path: Path) -> None:
    """What ``pull`` made can be looked at as well."""
    done = subprocess.run(
        [sys.executable, "-m", "cloudckpt", "pull", "best", str(tmp_path), "-r", run], capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    listed = page_of(str(tmp_path / "checkpoint-2")).api("ls").json
    assert [(c["step"], c["tags"]) for c in listed["checkpoints"]] == [(2, ["release"])]
