"""Story 2: one load. Choose once, read the index, fetch what is asked for, prove it, hand it over.

What is restored is compared with the caller's objects while nothing has moved yet, and then read straight into their
own memory where it can be. It falls back to an earlier checkpoint only on *proven damage*: the manifest, read again,
still says committed, and an object is missing, too short, or its checksum differs. A 403, a 503, a time-out, a state
that does not fit: raised at once. Training is never rolled back by a fault of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cloudckpt.core.model import Checkpoint, Index, Manifest, State
from cloudckpt.core.selection import Selector, select
from cloudckpt.errors import (
    CheckpointNotFoundError,
    CloudCkptError,
    ConfigError,
    CorruptCheckpointError,
    StateMismatchError,
)
from cloudckpt.storage import LocalStorage, ManifestStore, RetryingStorage
from cloudckpt.tensors.fetch import fetch
from cloudckpt.tensors.fill import check_fits, fill
from cloudckpt.tensors.mapped import map_files
from cloudckpt.tensors.outline import Outline
from cloudckpt.tensors.targets import (
    Homes,
    Region,
    choose_homes,
    find_uses,
    note_changed,
    unwritable,
)
from cloudckpt.tensors.tree import unflatten
from cloudckpt.view import placed, read_index

__all__ = ["LoadRequest", "Loaded", "load_chosen", "restore_chosen"]

#: What everybody has to know whose tensors were being read into when something went wrong.
_PARTLY = "The objects you passed are partly overwritten: build fresh ones before you go on"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """What to load.

    Attributes:
        selector: which checkpoint.
        components: which top-level keys; None for all.
        optional: like ``components``, but those that the checkpoint does not have are left out.
        names: which tensors of them, by their names in the component; None for the whole components.
        allow_pickle: whether pickled leaves may be loaded, which runs code from the checkpoint.
        device: where tensors get their memory; None for the host.
        mmap: tensors over the files of a local root, paged in as they are touched.
        verify: with ``mmap``, whether all pages are read and their checksums compared now.
    """

    selector: Selector
    components: Collection[str] | None = None
    optional: Collection[str] | None = None
    names: Collection[str] | None = None
    allow_pickle: bool = False
    device: torch.device | None = None
    mmap: bool = False
    verify: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint's values. ``values`` are plain: state dicts, tensors, Python values."""

    checkpoint: Checkpoint
    index: Index
    values: dict[str, Any]


def load_chosen(
    store: ManifestStore,
    manifest: Manifest,
    request: LoadRequest,
    *,
    on_damage: Callable[[Checkpoint, CorruptCheckpointError], None],
    find_homes: Callable[[Outline, Mapping[str, Any]], Homes] | None = None,
) -> Loaded:
    """Load the checkpoint that the request selects, or the one before it where damage is proven.

    Args:
        manifest: the manifest to choose from; read once more only after trouble.
        on_damage: told of each checkpoint that is proven damaged, before the next one is tried.
        find_homes: asked, before any byte moves, where the tensors of these values get their memory. Fresh memory by
            default.

    Raises:
        CheckpointNotFoundError: nothing matches, or nothing is left.
        CorruptCheckpointError: the named checkpoint is damaged, or too many are.
        ConfigError: a component or name that is not there, or a pickled leaf without permission.
        StorageError: the store refused.
    """
    damaged: set[str] = set()
    last: CorruptCheckpointError | None = None
    for _ in range(store.settings.max_fallbacks):
        try:
            chosen = select(_without(manifest, damaged), request.selector)
        except CheckpointNotFoundError as exc:
            raise (last or exc) from exc
        try:
            return _load(store, chosen, request, find_homes)
        except CorruptCheckpointError as exc:
            manifest = store.read() or manifest
            now = manifest.find(chosen.id)
            if now is None or now.state is not State.COMMITTED:
                # Retired while it was being read: choose again, unless this very one was asked for.
                if request.selector.named:
                    raise CheckpointNotFoundError(
                        f"{placed(chosen, store.storage.url).url} was retired while it was being read"
                    ) from exc
                continue
            on_damage(placed(now, store.storage.url), exc)
            if request.selector.named:
                raise
            damaged.add(chosen.id)
            last = exc
    raise last or CheckpointNotFoundError(
        f"{store.storage.url}: checkpoints were retired faster than they could be read"
    )


@dataclass(slots=True)
class _Target:
    """The caller's objects, and what has happened to them.

    Attributes:
        state: component -> object.
        strict: whether names and shapes must match exactly.
        in_place: whether bytes may be read into the objects' own tensors.
        problems: what of the checkpoint at hand does not fit.
        overwritten: the memory that was read into, and where in the state it is.
    """

    state: Mapping[str, object]
    strict: bool
    in_place: bool
    problems: list[str] = field(default_factory=list)
    overwritten: dict[Region, str] = field(default_factory=dict)
    homes: Homes = field(default_factory=Homes)

    def find_homes(self, outline: Outline, values: Mapping[str, Any]) -> Homes:
        """Where this checkpoint's tensors go. What cannot be restored is refused here, before any byte moves.

        Raises:
            StateMismatchError: the state does not fit, or has tensors that cannot be written; or this one stands in for
                a damaged one, and would leave some of that in the state.
        """
        where = outline.checkpoint.url
        self.problems = check_fits(self.state, values, strict=self.strict, where=where)
        uses = find_uses(self.state, values, outline)
        if refused := unwritable(uses):
            listed = "".join(f"\n  {problem}" for problem in refused)
            raise StateMismatchError(f"{where} cannot be restored into this state; nothing was changed:{listed}")
        self.homes = choose_homes(uses, outline, in_place=self.in_place)
        note_changed(self.homes)  # now, since from here on it may happen at any moment
        written = {use.region for use in uses}
        if left := [path for region, path in self.overwritten.items() if region not in written]:
            # No damage: nothing is wrong with this checkpoint, and other objects can be restored from it.
            raise StateMismatchError(
                f"{where} has nothing for {', '.join(left[:10])}, overwritten from a damaged checkpoint that was tried "
                "before: restoring it would leave a mixture of both"
            )
        for use in uses:
            if use.region is not None and use.place in self.homes.targets:
                self.overwritten[use.region] = use.path
        return self.homes


def restore_chosen(
    store: ManifestStore,
    manifest: Manifest,
    request: LoadRequest,
    state: Mapping[str, object],
    *,
    strict: bool,
    on_damage: Callable[[Checkpoint, CorruptCheckpointError], None],
    on_problem: Callable[[str], None],
) -> Loaded:
    """Load the selected checkpoint into the objects of ``state``, in place. See ``load_chosen``.

    Args:
        on_problem: told of what does not fit, with ``strict=False``.

    Raises:
        StateMismatchError: the state does not fit; nothing was changed. Or an object refused what it was given.
        CloudCkptError: as for ``load_chosen``; says so if the state may be partly overwritten by then.
    """
    target = _Target(state, strict, store.settings.read_in_place)
    try:
        loaded = load_chosen(store, manifest, request, on_damage=on_damage, find_homes=target.find_homes)
    except BaseException as exc:
        if target.homes.targets or target.overwritten:
            _say_so(exc)
        raise
    for problem in target.problems:
        on_problem(problem)
    fill(state, loaded.values, strict=strict)
    return loaded


def _say_so(error: BaseException) -> None:
    if isinstance(error, CloudCkptError) and error.args:
        text = str(error.args[0]).replace("; nothing was changed:", ":")
        error.args = (f"{text}. {_PARTLY}", *error.args[1:])
    else:
        error.add_note(_PARTLY)


def _without(manifest: Manifest, ids: Collection[str]) -> Manifest:
    return replace(manifest, entries=tuple(e for e in manifest.entries if e.id not in ids)) if ids else manifest


def _load(
    store: ManifestStore,
    chosen: Checkpoint,
    request: LoadRequest,
    find_homes: Callable[[Outline, Mapping[str, Any]], Homes] | None,
) -> Loaded:
    checkpoint = placed(chosen, store.storage.url)
    index = read_index(store.storage, checkpoint)
    components = _components(index, request, checkpoint)
    shapes_only = request.device is not None and request.device.type == "meta"
    outline = Outline(checkpoint, index, shapes_only=shapes_only)
    values: dict[str, Any]
    if request.names is None:
        structure = {c: index.structure[c] for c in components}
        values = unflatten(structure, outline.tensor, outline.array, allow_pickle=request.allow_pickle)
    else:
        _check_names(index, components, request.names, checkpoint)
        names = frozenset(request.names)
        asked = {c: [n for n in index.tensors.get(c, {}) if n in names] for c in components}
        values = {c: {n: outline.tensor(c, n) for n in own} for c, own in asked.items()}
    if find_homes is not None:
        homes = find_homes(outline, values)
    else:
        homes = Homes(devices=dict.fromkeys(outline.entries, request.device) if request.device is not None else {})
    done = map_files(_folder(store), outline, store.settings, verify=request.verify) if request.mmap else set()
    fetch(store.storage, outline, homes, store.settings, done=done)
    return Loaded(checkpoint=checkpoint, index=index, values=values)


def _folder(store: ManifestStore) -> Path:
    """Where the files are.

    Raises:
        ConfigError: the root is no local folder.
    """
    storage = store.storage
    while isinstance(storage, RetryingStorage):
        storage = storage.inner
    if not isinstance(storage, LocalStorage):
        raise ConfigError(f"{storage.url}: mmap=True needs files on a local disk; leave it out, or pull the run first")
    return Path(storage.url)


def _components(index: Index, request: LoadRequest, checkpoint: Checkpoint) -> list[str]:
    if request.optional is not None:
        return [c for c in request.optional if c in index.structure]
    if request.components is None:
        return list(index.structure)
    if isinstance(request.components, str):
        raise ConfigError(f"components={request.components!r}: expected a list, write [{request.components!r}]")
    unknown = [c for c in request.components if c not in index.structure]
    if unknown:
        raise ConfigError(
            f"{checkpoint.url} has no component {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(map(repr, index.structure))}"
        )
    return list(request.components)


def _check_names(index: Index, components: list[str], names: Collection[str], checkpoint: Checkpoint) -> None:
    if isinstance(names, str):
        raise ConfigError(f"names={names!r}: expected a list, write [{names!r}]")
    known = {n for c in components for n in index.tensors.get(c, {})}
    if unknown := [n for n in names if n not in known]:
        raise ConfigError(
            f"{checkpoint.url} has no tensor {', '.join(map(repr, unknown[:10]))} in {', '.join(components)}; "
            f"it has {len(known)}, such as {', '.join(map(repr, sorted(known)[:5]))}"
        )
