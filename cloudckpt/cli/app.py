"""The command line: what there is, how it ends. The commands themselves are in the modules beside this one."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer

from cloudckpt._version import __version__
from cloudckpt.cli import checking, cleaning, labelling, looking, moving, picturing
from cloudckpt.cli.common import FINDINGS
from cloudckpt.cli.render import errors
from cloudckpt.cli.ui.command import ui
from cloudckpt.errors import CloudCkptError

__all__ = ["COMMANDS", "FINDINGS", "app", "run"]

app = typer.Typer(
    name="cloudckpt",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Look at, check, mend, move and clean up the checkpoints of a training run.\n\nThe run comes from the "
    "argument, from -r/--root, or from CLOUDCKPT_ROOT. Exit codes: 0 fine, 1 failure, 2 usage, 3 findings, "
    "4 nothing matches, 5 conflict, 130 interrupted, 143 terminated.",
)

#: Panel of the help -> name -> command.
COMMANDS: dict[str, dict[str, Callable[..., Any]]] = {
    "Look": {
        "ls": looking.list_checkpoints,
        "show": looking.show,
        "best": looking.best,
        "latest": looking.latest,
        "log": looking.log,
        "diff": looking.diff,
        "plot": picturing.plot,
        "watch": picturing.watch,
        "ui": ui,
        "cost": picturing.cost,
    },
    "Label": {
        "pin": labelling.pin,
        "unpin": labelling.unpin,
        "tag": labelling.tag,
        "mark": labelling.mark,
        "release": labelling.release,
    },
    "Move": {
        "pull": moving.pull,
        "cp": moving.copy,
        "export": moving.export,
        "import": moving.import_command,
    },
    "Clean up": {
        "prune": cleaning.prune_command,
        "gc": cleaning.gc,
        "rm": cleaning.rm,
    },
    "Check": {
        "verify": checking.verify_command,
        "doctor": checking.doctor,
        "repair": checking.repair_command,
    },
}

for _panel, _commands in COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, rich_help_panel=_panel)(_command)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.", envvar="CLOUDCKPT_DEBUG")] = False,
) -> None:
    global _debug  # noqa: PLW0603 - one process runs one command
    _debug = debug
    if version:
        sys.stdout.write(f"cloudckpt {__version__}\n")
        raise typer.Exit


_debug = False

#: What click puts in place of a standard output whose reader has left, before it ends the process with code 1.
_CLOSED_PIPE = "PacifyFlushWrapper"


def _guarded(command: Callable[[], object]) -> int:
    try:
        command()
    except CloudCkptError as exc:
        if _debug:
            raise
        errors().print(f"cloudckpt: {exc}", markup=False)
        return exc.exit_code
    except TypeError as exc:
        # What the saving half says of a value that cannot be stored is for the user; any other one is ours.
        if _debug or "cannot be stored" not in str(exc):
            raise
        errors().print(f"cloudckpt: {exc}", markup=False)
        return 2
    except BrokenPipeError:
        _let_go_of_output()
        return 0
    except SystemExit as exc:
        if type(sys.stdout).__name__ == _CLOSED_PIPE:
            return 0
        return exc.code if isinstance(exc.code, int) else 0
    return 0


def _let_go_of_output() -> None:
    """The reader of the pipe has seen enough; keep the interpreter from complaining at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's shape
    # 130 and 143, as shells say it; nothing here is half-done that the next call does not finish.
    raise SystemExit(128 + number)


def run() -> None:
    """Run the command line and exit with its code; 130 after Ctrl-C, 143 after SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    code = _guarded(functools.partial(app, standalone_mode=True))
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _let_go_of_output()
    sys.exit(code)
