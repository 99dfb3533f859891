"""The command line: what there is, how it ends. The commands themselves are in the modules beside this one."""

from __future__ import annotations

import contextlib
import functools
import importlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

from cloudckpt._version import __version__
from cloudckpt.cli.pipes import readers_may_leave
from cloudckpt.errors import CloudCkptError

__all__ = ["COMMANDS", "app", "function_of", "run"]

#: Panel of the help -> name -> module and function of the command.
COMMANDS: Mapping[str, Mapping[str, str]] = {
    "Look": {
        "ls": "looking:list_checkpoints",
        "show": "looking:show",
        "best": "looking:best",
        "latest": "looking:latest",
        "log": "looking:log",
        "diff": "looking:diff",
        "plot": "picturing:plot",
        "watch": "picturing:watch",
        "ui": "ui.command:ui",
        "cost": "picturing:cost",
    },
    "Label": {
        "pin": "labelling:pin",
        "unpin": "labelling:unpin",
        "tag": "labelling:tag",
        "mark": "labelling:mark",
        "release": "labelling:release",
    },
    "Move": {
        "pull": "moving:pull",
        "cp": "moving:copy",
        "export": "moving:export",
        "import": "moving:import_command",
    },
    "Clean up": {
        "prune": "cleaning:prune_command",
        "gc": "cleaning:gc",
        "rm": "cleaning:rm",
    },
    "Check": {
        "verify": "checking:verify_command",
        "doctor": "checking:doctor",
        "repair": "checking:repair_command",
    },
}


def function_of(place: str) -> Callable[..., Any]:
    """The function of a command, from its place in ``COMMANDS``; its module is imported now."""
    module, _, name = place.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(f"cloudckpt.cli.{module}"), name)
    return function


_debug = False
_DEBUG_HELP = "Show tracebacks."


def _debug_too(ctx: Any, param: Any, value: bool) -> None:  # noqa: ARG001 - the shape of a callback
    global _debug  # noqa: PLW0603 - one process runs one command
    _debug = _debug or value


class _WhenAsked(Mapping[str, Any]):
    """Name -> command, made when it is asked for: no command waits for the modules of another one."""

    def __init__(self) -> None:
        self._places = {name: (panel, place) for panel, found in COMMANDS.items() for name, place in found.items()}

    def __getitem__(self, name: str) -> Any:
        panel, place = self._places[name]
        one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        one.command(name, rich_help_panel=panel)(function_of(place))
        command: Any = get_command(one)
        # Whoever has just seen an error adds it at the end of the line.
        command.params.append(
            TyperOption(
                param_decls=["--debug"], is_flag=True, expose_value=False, callback=_debug_too, help=_DEBUG_HELP
            )
        )
        return command

    def get(self, name: str, default: Any = None) -> Any:
        # Mapping's own takes a KeyError while a command's module is imported for a command that is not there.
        return default if name not in self._places else self[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Commands(TyperGroup):
    """All of the commands."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = cast("Any", _WhenAsked())


app = typer.Typer(
    name="cloudckpt",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Look at, check, mend, move and clean up the checkpoints of a training run.\n\nThe run comes from the "
    "argument, from -r/--root, or from CLOUDCKPT_ROOT. Exit codes: 0 fine, 1 failure, 2 usage, 3 findings, "
    "4 nothing matches, 5 conflict, 130 interrupted, 143 terminated.",
)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help=_DEBUG_HELP, envvar="CLOUDCKPT_DEBUG")] = False,
) -> None:
    global _debug  # noqa: PLW0603 - one process runs one command
    _debug = debug
    if version:
        sys.stdout.write(f"cloudckpt {__version__}\n")
        raise typer.Exit


def _say(problem: Exception) -> None:
    from cloudckpt.cli.render import errors  # noqa: PLC0415 - rich and the tables, when there is something to say

    errors().print(f"cloudckpt: {problem}", markup=False)


def _guarded(command: Callable[[], object]) -> int:
    try:
        command()
    except CloudCkptError as exc:
        if _debug:
            raise
        _say(exc)
        return exc.exit_code
    except TypeError as exc:
        # What the saving half says of a value that cannot be stored is for the user; any other one is ours.
        if _debug or "cannot be stored" not in str(exc):
            raise
        _say(exc)
        return 2
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 0
    return 0


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - a signal handler's shape
    # 130 and 143, as shells say it; nothing here is half-done that the next call does not finish.
    raise SystemExit(128 + number)


def run() -> None:
    """Run the command line and exit with its code; 130 after Ctrl-C, 143 after SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    with readers_may_leave():
        code = _guarded(functools.partial(app, standalone_mode=True))
        with contextlib.suppress(SystemExit):  # it has ended, with this code
            sys.stdout.flush()
    sys.exit(code)
