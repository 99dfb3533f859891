"""Commands that bring checkpoints elsewhere: pull, cp, export, import."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cloudckpt.cli.common import DryRun, Json, Quiet, Root, Select, root_of, split, store_at
from cloudckpt.cli.render import as_json, output, print_json
from cloudckpt.cli.transfers import shown
from cloudckpt.copying import copy_checkpoint, copy_pulled, refuse_held
from cloudckpt.core.text import format_bytes
from cloudckpt.errors import ConfigError
from cloudckpt.exportable import plan_export
from cloudckpt.foreign import OURS, Imported, ImportPlan, check_given, plan_import

__all__ = ["copy", "export", "import_command", "pull"]

# Imported when they are used, so that the other commands start sooner.
# ruff: noqa: PLC0415

Components = Annotated[
    list[str] | None, typer.Option("--component", "-c", metavar="NAME", help="Only this component; may be repeated.")
]
Takeover = Annotated[
    bool, typer.Option("--takeover", help="Write although the target's last writer has not closed it; fences that one.")
]
Tags = Annotated[list[str] | None, typer.Option("--tag", metavar="NAME", help="A tag for it; may be repeated.")]
Pin = Annotated[bool, typer.Option("--pin", help="Exempt it from every rule.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Unpickle what needs it. This runs code from the file.")]


def pull(
    select: Select,
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The folder above; made if need be.")] = Path(),
    root: Root = None,
    component: Components = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring a checkpoint into DIR/checkpoint-STEP: verified, side by side; a pull that was broken off goes on.

    With --component model, one model.safetensors that load_file reads; without, everything as it is stored, which
    cloudckpt.open and cloudckpt import read; what was saved from a folder of files, as those files. -q prints the path.
    Example: cloudckpt pull best ./models -r s3://bucket/runs/demo --component model
    """
    from cloudckpt.pulling import pull_checkpoint

    place, selector = split(select, root)
    store = store_at(place)
    with shown(f"pulling {selector}", quiet=quiet or json or dry_run) as meter:
        found = pull_checkpoint(store, selector, folder, components=component, dry_run=dry_run, meter=meter)
    if found.opaque and not quiet:
        typer.echo(
            f"cloudckpt: safetensors has no name for the dtype of {', '.join(found.opaque[:5])}: plain bytes (U8) in "
            "the file",
            err=True,
        )
    if dry_run:
        line = f"would pull {found.checkpoint.url} ({format_bytes(found.size_bytes)}) into {found.folder}"
    else:
        came = f"{format_bytes(found.read_bytes)} of {format_bytes(found.size_bytes)} came from the store"
        line = f"{found.folder} ({came}, all of it verified)"
    _tell({"dry_run": dry_run, **as_json(found)}, line, json=json, quiet=quiet)


def _tell(document: dict[str, Any], line: str, *, json: bool, quiet: bool, word: str = "folder") -> None:
    if json:
        print_json(document)
    elif quiet:
        sys.stdout.write(f"{as_json(document[word])}\n")
    else:
        output().print(line, markup=False)


def copy(
    select: Select,
    target: Annotated[str, typer.Argument(metavar="URL", help="The root of the run to copy into.")],
    root: Root = None,
    tag: Tags = None,
    pin: Pin = False,
    takeover: Takeover = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy a checkpoint into another run, new or there already; by the store itself where both are on one.

    A new run keeps all that is copied into it. -q prints the copy's URL.
    Example: cloudckpt cp best s3://bucket/released -r s3://bucket/runs/demo --tag v1
    """
    place, selector = split(select, root)
    store, to = store_at(place), store_at(target)
    with shown(f"copying {selector}", quiet=quiet or json or dry_run) as meter:
        found = copy_checkpoint(
            store,
            selector,
            to,
            tags=tag or (),
            pin=pin,
            takeover="last_wins" if takeover else "refuse",
            dry_run=dry_run,
            meter=meter,
        )
    size = format_bytes(found.source.size_bytes)
    if dry_run:
        kind = "a new run" if found.new_run else "a run that is there"
        line = f"would copy {found.source.url} ({size}) into {to.storage.url}, {kind}"
    else:
        how = "by the store itself" if found.stored_bytes and not found.carried_bytes else "through this machine"
        line = f"{found.checkpoint.url} ({size}, {how})"
    if not json and not quiet:
        word = "would retire" if dry_run else "retired"
        for other in found.retired:
            output().print(f"{word}  {other.name}  by the policy there", markup=False)
    _tell({**as_json(found), "url": found.checkpoint.url}, line, json=json, quiet=quiet, word="url")


def export(
    select: Select,
    path: Annotated[
        Path | None, typer.Argument(metavar="[PATH]", help="The folder, or the file for torch; must not be there.")
    ] = None,
    root: Root = None,
    to: Annotated[str, typer.Option("--to", help="safetensors, torch, hf or dcp.")] = "safetensors",
    component: Components = None,
    allow_pickle: Pickle = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a checkpoint in another form: safetensors files, one file for torch.load, a Hugging Face folder, or DCP.

    Needs torch. -q prints the path. Example: cloudckpt export best ./model --to hf -r ./runs/demo
    """
    place, selector = split(select, root)
    store = store_at(place)
    plan = plan_export(store, selector, to=to, path=path, components=component)
    if dry_run:
        line = f"would export {plan.checkpoint.url} to {plan.path} ({to})"
        _tell({"dry_run": True, **as_json(plan)}, line, json=json, quiet=quiet, word="path")
        return
    from cloudckpt.cli import with_tensors

    with shown(f"exporting {plan.checkpoint.name}", quiet=quiet or json) as meter:
        found = with_tensors.export(store, plan, allow_pickle=allow_pickle, meter=meter)
    left_out = f"; without {', '.join(found.left_out)}: only values" if found.left_out else ""
    line = f"{found.path} ({len(found.files)} files{left_out})"
    _tell({"dry_run": False, **as_json(found)}, line, json=json, quiet=quiet, word="path")


def import_command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint folder, or a Lightning .ckpt file.")],
    place: Annotated[str | None, typer.Argument(metavar="[ROOT]", help="The run to bring it into.")] = None,
    root: Root = None,
    step: Annotated[int | None, typer.Option("--step", min=0, help="The training step, where PATH has none.")] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME=VALUE", help="A metric; may be repeated.")
    ] = None,
    tag: Tags = None,
    pin: Pin = False,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", metavar="NAME", help="A file to leave out; * and ? are wild.")
    ] = None,
    allow_pickle: Pickle = False,
    takeover: Takeover = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring a checkpoint of forgather, Hugging Face's Trainer, Lightning, or a plain or pulled folder into a run.

    Nothing is unpickled that could run code unless --allow-pickle says so. Needs torch, but for a
    pulled folder. -q prints the URL. Example: cloudckpt import ./output/checkpoint-500 ./runs/imported
    """
    target = root_of(place, root)
    plan = plan_import(path, skip=skip or ())
    metrics = _metrics(metric or [])
    check_given(plan, step=step, metrics=metrics)
    store = store_at(target)
    if not takeover:
        refuse_held(store.read(), store)
    if not json and not quiet:
        console = output()
        console.print(f"{plan.path}: {plan.kind}" + ("" if plan.step is None else f", step {plan.step}"), markup=False)
        for part in plan.parts:
            console.print(f"  {', '.join(part.files)} -> {part.component}", markup=False)
        for name, why in plan.left_out.items():
            console.print(f"  {name} is left out: {why}", markup=False)
    if dry_run:
        document = {"dry_run": True, "plan": plan, "root": target}
        _tell(document, "nothing was written", json=json, quiet=quiet, word="root")
        return
    found = _brought_in(
        plan,
        target,
        step=step,
        metrics=metrics,
        tags=tag or (),
        pin=pin,
        allow_pickle=allow_pickle,
        takeover="last_wins" if takeover else "refuse",
    )
    document = {"dry_run": False, **as_json(found), "url": found.checkpoint.url}
    line = f"{found.checkpoint.url}: {', '.join(found.components)}"
    _tell(document, line, json=json, quiet=quiet, word="url")


def _brought_in(plan: ImportPlan, root: str, **words: Any) -> Imported:
    if plan.kind == OURS:
        # Bytes as they are: no torch.
        labels = {name: words[name] for name in ("tags", "pin", "takeover")}
        copied, components = copy_pulled(store_at(str(plan.path)), store_at(root), **labels)
        return Imported(checkpoint=copied.checkpoint, plan=plan, components=components)
    from cloudckpt.cli import with_tensors

    return with_tensors.bring_in(plan, root, **words)


def _metrics(words: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for word in words:
        name, mark, value = word.rpartition("=")
        try:
            found[name] = float(value)
        except ValueError:
            mark = ""
        if not mark or not name:
            raise ConfigError(f"--metric {word!r}: write NAME=VALUE, such as val_loss=0.41")
    return found
