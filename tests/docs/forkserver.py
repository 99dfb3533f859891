"""A process that has torch and cloudckpt loaded, and forks a child for each program: a process each, without the wait.

``forkserver.py serve SOCKET`` loads, prints a line, and serves until its standard input ends. ``forkserver.py run SOCKET
KIND ARGUMENTS`` hands its folder, environment and standard streams to a child of that process, and ends as the child
does: of KIND ``code`` as ``python -W error -c ARGUMENTS``, of KIND ``cloudckpt`` as ``cloudckpt ARGUMENTS``. The second
one needs nothing that takes time to import, so ``python -I -S`` is enough for it.

A program ends after its threads and what it registered for its exit, as any other does; only taking torch apart again,
piece by piece in memory of its own, is left out: that takes longer than most commands.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import socket
import sys
import threading
import types
import warnings
from typing import Any

_LENGTH = 4
#: How ``run`` ends if the server is gone, as sysexits.h has it for an error of the system's software.
_NO_ANSWER = 70


def run(address: str, kind: str, arguments: list[str]) -> int:
    """Have a program run, and give its exit code."""
    folder = os.getcwd()  # noqa: PTH109 - pathlib takes longer to import than all of this
    job = {"kind": kind, "arguments": arguments, "folder": folder, "environment": dict(os.environ)}
    body = json.dumps(job).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        socket.send_fds(line, [b"!"], [0, 1, 2])
        line.sendall(len(body).to_bytes(_LENGTH, "big") + body)
        answer = _received(line, _LENGTH)
    return int.from_bytes(answer, "big", signed=True) if len(answer) == _LENGTH else _NO_ANSWER


def _received(line: socket.socket, count: int) -> bytes:
    """That many bytes, or less at the end of the line."""
    found = b""
    while len(found) < count and (more := line.recv(count - len(found))):
        found += more
    return found


def serve(address: str) -> dict[str, Any] | None:
    """Serve until standard input ends; returns None then, and in a child its job."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            _reap()
            if sys.stdin in ready:
                return None
            line, _ = listener.accept()
            with line:
                if _fork() == 0:
                    return _taken(line)


def _reap() -> None:
    """Let go of the children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns where there are threads: those of the libraries for numbers are asleep, and know of forks.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _taken(line: socket.socket) -> dict[str, Any]:
    """In a child of the server: fork the program itself, which returns its job, and tell how it ended."""
    _, streams, _, _ = socket.recv_fds(line, 1, 3)
    length = int.from_bytes(_received(line, _LENGTH), "big")
    job: dict[str, Any] = json.loads(_received(line, length))
    program = _fork()
    if program == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return job
    for stream in streams:
        os.close(stream)
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    line.sendall(code.to_bytes(_LENGTH, "big", signed=True))
    os._exit(0)


def end(job: dict[str, Any]) -> int:
    """Be the program to its end, and give its exit code."""
    code = 0
    try:
        become(job)
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
        if isinstance(exc.code, str):
            print(exc.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    # What an interpreter does at its end, in its order, under the names that it has for that.
    threading._shutdown()  # type: ignore[attr-defined]  # what Python itself calls at its end; it has no public name
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code & 0xFF


def become(job: dict[str, Any]) -> None:
    """Be the program."""
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.path[0] = ""
    if job["kind"] == "cloudckpt":
        from cloudckpt.cli import main

        sys.argv = ["cloudckpt", *job["arguments"]]
        main()
        return
    code, *arguments = job["arguments"]
    sys.argv = ["-c", *arguments]
    warnings.simplefilter("error")
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), module.__dict__)


def load() -> None:
    """Import what programs need; a warning is an error, as it is to the code of the pages."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("torch", "cloudckpt.manager", "cloudckpt.run", "cloudckpt.tools", "cloudckpt.exporting"):
            importlib.import_module(name)
        # An optimizer's first step imports the latter of them, for more than a second.
        for name in ("s3fs", "torch._dynamo"):
            with contextlib.suppress(ImportError, Warning):
                importlib.import_module(name)
    app = importlib.import_module("cloudckpt.cli.app")
    for commands in app.COMMANDS.values():
        for place in commands.values():
            app.function_of(place)
    for name in ("rich.table", "rich.progress"):
        importlib.import_module(name)
    # A collection in a child would write to all that it shares with this process, and so copy it.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    if sys.argv[1] == "run":
        sys.exit(run(sys.argv[2], sys.argv[3], sys.argv[4:]))
    load()
    taken = serve(sys.argv[2])
    if taken is not None:
        os._exit(end(taken))
