"""``cloudckpt ui`` as a process: what it prints, how a browser is opened, how it ends."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cloudckpt.cli.schema import SCHEMAS

pytestmark = pytest.mark.processes

#: The command in an interpreter in which torch cannot be imported.
_WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = None; sys.modules['numpy'] = None; "
    "sys.argv = ['cloudckpt', *sys.argv[1:]]; from cloudckpt.cli import main; main()"
)


@contextmanager
def started(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process, which is gone afterwards."""
    command = [sys.executable, "-c", _WITHOUT_TORCH, "ui", *arguments]
    bare = {name: value for name, value in os.environ.items() if name not in {"DISPLAY", "WAYLAND_DISPLAY", "BROWSER"}}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**bare, **environment}
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that a process prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def status_of(url: str) -> int:
    """What a GET of an address is answered with; no redirect is followed."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.netloc, timeout=60)
    try:
        connection.request("GET", place.path)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_its_own_code(run: str, number: signal.Signals, code: int) -> None:
    """-q prints the address alone, where the page is until Ctrl-C (130) or SIGTERM (143), silently; without torch."""
    with started(run, "--no-browser", "-q") as process:
        url = line_of(process)
        assert status_of(url) == 200
        assert status_of(f"{url}api/ls") == 200
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", "")


def test_the_address_for_programs(run: str) -> None:
    """--json prints one document, as documented, before it serves."""
    with started(run, "--json") as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        document = json.loads("".join(lines))
        assert document.keys() == SCHEMAS["ui"].keys()
        assert document["root"] == run
        assert status_of(document["url"]) == 200


def test_the_address_for_people(run: str) -> None:
    """Without a screen it says where the page is, and how it ends."""
    with started(run) as process:
        assert line_of(process) == f"{run} is shown at"
        assert line_of(process) == ""
        assert status_of(line_of(process)) == 200
        assert line_of(process) == ""
        assert "Ctrl-C ends it" in line_of(process)


def test_the_browser_gets_a_link_that_works_once(run: str, tmp_path: Path) -> None:
    """What stands in the browser's command line leads it to the page, and nobody else afterwards."""
    seen, script = tmp_path / "seen", tmp_path / "browser.py"
    os.mkfifo(seen)
    script.write_text(
        "import sys, urllib.request\n"
        "plain = urllib.request.build_opener(urllib.request.ProxyHandler({}))\n"
        "with plain.open(sys.argv[1]) as page:\n"
        "    found = '<title>cloudckpt</title>' in page.read().decode()\n"
        f"with open({str(seen)!r}, 'w') as out:\n"
        "    print(sys.argv[1], page.url, found, file=out)\n"
    )
    with started(run, "-q", BROWSER=f"{sys.executable} {script} %s") as process:
        url = line_of(process)
        link, where, found = seen.read_text().split()
        assert (where, found) == (url, "True")
        assert urlsplit(url).path.strip("/") not in link
        assert status_of(link) == 404
        assert status_of(url) == 200


def test_mistakes_are_sentences(run: str) -> None:
    """A port that is taken is exit 2 and says what to write; so is a command without a root."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with started(run, "--port", str(port), "--no-browser") as process:
            out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert f"port {port} of 127.0.0.1 cannot be used" in err
    with started("--no-browser", CLOUDCKPT_ROOT="") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "which run?" in err
