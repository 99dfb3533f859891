"""Story 2: one load. Choose once, read the index, fetch what is asked for, prove it, hand it over.

It falls back to an earlier checkpoint only on *proven damage*: the manifest, read again, still says committed,
and an object is missing, too short, or its checksum differs. A 403, a 503, a time-out, a state that does not
fit: raised at once. Training is never rolled back by a fault of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from cloudckpt.core.model import Checkpoint, Index, Manifest, State
from cloudckpt.core.selection import Selector, select
from cloudckpt.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from cloudckpt.storage import ManifestStore
from cloudckpt.tensors.fetch import fetch
from cloudckpt.tensors.tree import unflatten
from cloudckpt.view import placed, read_index

__all__ = ["LoadRequest", "Loaded", "load_chosen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """What to load.

    Attributes:
        selector: which checkpoint.
        components: which top-level keys; None for all.
        optional: like ``components``, but those that the checkpoint does not have are left out.
        names: which tensors of them, by their names in the component; None for the whole components.
        allow_pickle: whether pickled leaves may be loaded, which runs code from the checkpoint.
    """

    selector: Selector
    components: Collection[str] | None = None
    optional: Collection[str] | None = None
    names: Collection[str] | None = None
    allow_pickle: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint's values. ``values`` are plain: state dicts, tensors on the CPU, Python values."""

    checkpoint: Checkpoint
    index: Index
    values: dict[str, Any]


def load_chosen(
    store: ManifestStore,
    manifest: Manifest,
    request: LoadRequest,
    *,
    on_damage: Callable[[Checkpoint, CorruptCheckpointError], None],
) -> Loaded:
    """Load the checkpoint that the request selects, or the one before it where damage is proven.

    Args:
        manifest: the manifest to choose from; read once more only after trouble.
        on_damage: told of each checkpoint that is proven damaged, before the next one is tried.

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
            return _load(store, chosen, request)
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


def _without(manifest: Manifest, ids: Collection[str]) -> Manifest:
    return replace(manifest, entries=tuple(e for e in manifest.entries if e.id not in ids)) if ids else manifest


def _load(store: ManifestStore, chosen: Checkpoint, request: LoadRequest) -> Loaded:
    checkpoint = placed(chosen, store.storage.url)
    index = read_index(store.storage, checkpoint)
    components = _components(index, request, checkpoint)
    wanted = [(c, n) for c in components for n in index.tensors.get(c, {}) if _asked(n, request.names)]
    if request.names is not None:
        _check_names(index, components, request.names, checkpoint)
    fetched = fetch(store.storage, checkpoint, index, wanted, store.settings)
    values: dict[str, Any]
    if request.names is None:
        structure = {c: index.structure[c] for c in components}
        values = unflatten(structure, fetched, allow_pickle=request.allow_pickle)
    else:
        values = {c: {n: fetched(c, n) for component, n in wanted if component == c} for c in components}
    return Loaded(checkpoint=checkpoint, index=index, values=values)


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


def _asked(name: str, names: Collection[str] | None) -> bool:
    return names is None or name in names


def _check_names(index: Index, components: list[str], names: Collection[str], checkpoint: Checkpoint) -> None:
    if isinstance(names, str):
        raise ConfigError(f"names={names!r}: expected a list, write [{names!r}]")
    known = {n for c in components for n in index.tensors.get(c, {})}
    if unknown := [n for n in names if n not in known]:
        raise ConfigError(
            f"{checkpoint.url} has no tensor {', '.join(map(repr, unknown[:10]))} in {', '.join(components)}; "
            f"it has {len(known)}, such as {', '.join(map(repr, sorted(known)[:5]))}"
        )
