"""What the commands share: where the run comes from, how a question is asked, the options they have in common."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from cloudckpt.errors import ConfigError
from cloudckpt.storage import ManifestStore, open_store
from cloudckpt.view import RunView

__all__ = [
    "FINDINGS",
    "DryRun",
    "Json",
    "Place",
    "Quiet",
    "Root",
    "Select",
    "Yes",
    "agreed",
    "root_of",
    "split",
    "store_at",
    "view_at",
]

#: The exit code of a command that did its work and found something wrong.
FINDINGS = 3

_WORDS = ("latest", "best", "tag:")


class _Default(str):
    """A root from the environment: what stands on the command line goes before it."""

    __slots__ = ()


def _told_apart(ctx: typer.Context, param: typer.CallbackParam, value: str | None) -> str | None:
    source = ctx.get_parameter_source(param.name or "")
    # By its name: newer versions of typer bring a click of their own.
    return _Default(value) if value and source is not None and source.name == "ENVIRONMENT" else value


def _complete_select(incomplete: str) -> list[str]:
    return [word for word in _WORDS if word.startswith(incomplete)]


Place = Annotated[str | None, typer.Argument(metavar="[ROOT]", help="The run's folder or URL.")]
Root = Annotated[
    str | None,
    typer.Option("--root", "-r", envvar="CLOUDCKPT_ROOT", callback=_told_apart, help="The run's folder or URL."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only what a script needs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Only show what would be done.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Carry it out without asking.")]
Select = Annotated[
    str,
    typer.Argument(
        metavar="SELECT",
        help="latest, best, a step, tag:NAME, a save id; or ROOT#SELECT.",
        autocompletion=_complete_select,
    ),
]


def root_of(place: str | None, root: str | None) -> str:
    """The root that the command line gives, else that of the environment.

    Args:
        place: what an argument says, or a selector that carries a root.
        root: what ``Root`` says.

    Raises:
        ConfigError: there is none, or there are two; says what to give.
    """
    if not place and not root:
        raise ConfigError("which run? Give its root: cloudckpt ls ROOT, -r ROOT, or set CLOUDCKPT_ROOT")
    if place and root and not isinstance(root, _Default) and not _same(place, root):
        raise ConfigError(f"which run, {place} or {root} (-r)? They are two: give one of them")
    return str(place or root)


def _same(one: str, other: str) -> bool:
    """Whether two spellings, such as ``runs/demo`` and ``./runs/demo/``, are one place."""
    return one == other or store_at(one).storage.url == store_at(other).storage.url


def split(select: str, root: str | None) -> tuple[str, str]:
    """Root and selector: a selector may carry its root, ``s3://bucket/run#best``."""
    place, mark, selector = select.rpartition("#")
    if mark:
        return root_of(place, root), selector
    if not root and (os.sep in select or "://" in select):
        raise ConfigError(f"{select!r} is a root: say which checkpoint of it, as in {select}#latest")
    return root_of(None, root), select


def store_at(root: str) -> ManifestStore:
    """The store of a root."""
    return open_store(root)


def view_at(root: str) -> RunView:
    """The run at a root, to be read."""
    return RunView(open_store(root))


def agreed(question: str, *, yes: bool, dry_run: bool, unseen: bool) -> bool:
    """Whether to go on: ``--yes``, or a person who says so, having seen what it is about.

    Args:
        unseen: nothing was shown (``--json``, ``-q``), so nobody is asked: a program has to say ``--yes``.
    """
    if dry_run:
        return False
    return yes or (not unseen and typer.confirm(question, default=False))
