"""Commands that say something about a checkpoint: pin, unpin, tag, mark, release. None disturbs a running trainer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from cloudckpt import editing
from cloudckpt.cli.common import DryRun, Json, Quiet, Root, Select, split, store_at
from cloudckpt.cli.render import output, print_json
from cloudckpt.core.model import Checkpoint
from cloudckpt.errors import ConfigError
from cloudckpt.storage import ManifestStore

__all__ = ["mark", "pin", "release", "tag", "unpin"]


def _label(
    select: str,
    root: str | None,
    act: Callable[[ManifestStore, str], Checkpoint],
    *,
    words: str,
    dry_run: bool,
    json: bool,
    quiet: bool,
) -> None:
    place, selector = split(select, root)
    store = store_at(place)
    changed = editing.find(store, selector)
    if not dry_run:
        changed = act(store, selector)
    if json:
        print_json({"dry_run": dry_run, "checkpoint": changed})
    elif quiet:
        sys.stdout.write(f"{changed.url}\n")
    else:
        would = "would be " if dry_run else ""
        output().print(f"{changed.url}: {would}{words}", markup=False)


def pin(select: Select, root: Root = None, dry_run: DryRun = False, json: Json = False, quiet: Quiet = False) -> None:
    """Pin a checkpoint: no rule retires it until it is unpinned.

    Example: cloudckpt pin best -r ./runs/demo
    """
    _label(select, root, editing.pin, words="pinned", dry_run=dry_run, json=json, quiet=quiet)


def unpin(select: Select, root: Root = None, dry_run: DryRun = False, json: Json = False, quiet: Quiet = False) -> None:
    """Give a pinned checkpoint back to the rules; the next commit, or prune, may let it go.

    Example: cloudckpt unpin 1500 -r ./runs/demo
    """

    def act(store: ManifestStore, selector: str) -> Checkpoint:
        return editing.pin(store, selector, pinned=False)

    _label(select, root, act, words="unpinned", dry_run=dry_run, json=json, quiet=quiet)


def tag(
    select: Select,
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Tags to give it.")] = None,
    root: Root = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", metavar="NAME", help="A tag to take away.")] = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give a checkpoint tags, or take some away; tag:NAME then selects the newest that carries one.

    Example: cloudckpt tag best release-1 -r ./runs/demo
    """
    add, fewer = names or [], remove or []
    if not add and not fewer:
        raise ConfigError("which tag? Write its name, or --remove NAME")

    def act(store: ManifestStore, selector: str) -> Checkpoint:
        return editing.tag(store, selector, add=add, remove=fewer)

    words = ", ".join([*(f"tagged {name}" for name in add), *(f"no longer tagged {name}" for name in fewer)])
    _label(select, root, act, words=words, dry_run=dry_run, json=json, quiet=quiet)


def mark(
    select: Select,
    label: Annotated[str | None, typer.Argument(metavar="[LABEL]", help="Such as diverged.")] = None,
    root: Root = None,
    clear: Annotated[bool, typer.Option("--clear", help="Take its marks away.")] = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Mark a checkpoint, as diverged for example: latest and best skip it, and no rule keeps it unless it is pinned.

    Example: cloudckpt mark 1500 diverged -r ./runs/demo
    """
    if (label is None) is not clear:
        raise ConfigError("write a label, or --clear to take the marks away")

    def act(store: ManifestStore, selector: str) -> Checkpoint:
        return editing.mark(store, selector, label)

    words = f"marked {label}" if label is not None else "no longer marked"
    _label(select, root, act, words=words, dry_run=dry_run, json=json, quiet=quiet)


def release(
    select: Select, root: Root = None, dry_run: DryRun = False, json: Json = False, quiet: Quiet = False
) -> None:
    """Release a checkpoint that repair holds: rules may retire it from now on.

    Example: cloudckpt release 1500 -r ./runs/demo
    """
    _label(select, root, editing.release, words="released", dry_run=dry_run, json=json, quiet=quiet)
