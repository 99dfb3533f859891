"""Story 2: one load. Choose once, read the index, fetch what is asked for, prove it, hand it over.

What is restored is compared with the caller's objects while nothing has moved yet, and then read straight into their
own memory where it can be. It falls back to an earlier checkpoint only on *proven damage*: the manifest, read again,
still says committed, and an object is missing, too short, or its checksum differs. A 403, a 503, a time-out, a state
that does not fit: raised at once. Training is never rolled back by a fault of the network.

(Past 350 lines: one load from its choice to the values, for one rank and for many.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cloudckpt.choosing import DONE, Chooser, FindHomes, Fitting, FoundDamaged, OnAgreed
from cloudckpt.coordination import Coordinator
from cloudckpt.core.manifest_json import entry_from_bytes
from cloudckpt.core.model import Checkpoint, Index, Manifest
from cloudckpt.core.selection import Selector
from cloudckpt.errors import (
    CheckpointNotFoundError,
    CloudCkptError,
    ConfigError,
    CorruptCheckpointError,
    StateMismatchError,
)
from cloudckpt.events import Listener, Listeners
from cloudckpt.progress import Meter, watched
from cloudckpt.storage import LocalStorage, ManifestStore, RetryingStorage
from cloudckpt.tensors.fetch import fetch
from cloudckpt.tensors.fill import fill
from cloudckpt.tensors.fit import Findings, look, sentences, take_out
from cloudckpt.tensors.mapped import map_files
from cloudckpt.tensors.outline import Outline
from cloudckpt.tensors.per_rank import PerRankLeaf
from cloudckpt.tensors.targets import (
    Homes,
    Region,
    Use,
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
        per_rank: whose part of what each rank has for itself; None gives all ranks', in a list.
        device: where tensors get their memory; None for the host.
        mmap: tensors over the files of a local root, paged in as they are touched.
        verify: with ``mmap``, whether all pages are read and their checksums compared now.
        listener: told how far it is, where it takes long.
        rank: of this process, for those words.
        meter: counts the bytes, where somebody else looks at it as well.
    """

    selector: Selector
    components: Collection[str] | None = None
    optional: Collection[str] | None = None
    names: Collection[str] | None = None
    allow_pickle: bool = False
    per_rank: PerRankLeaf | None = None
    device: torch.device | None = None
    mmap: bool = False
    verify: bool = True
    listener: Listener | None = None
    rank: int = 0
    meter: Meter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint's values. ``values`` are plain: state dicts, tensors, Python values."""

    checkpoint: Checkpoint
    index: Index
    values: dict[str, Any]


def load_chosen(
    store: ManifestStore,
    manifest: Manifest | None,
    request: LoadRequest,
    *,
    coordinator: Coordinator,
    on_damage: Callable[[Checkpoint, CorruptCheckpointError], None],
    find_homes: FindHomes | None = None,
    on_agreed: OnAgreed = lambda *_: None,
) -> Loaded:
    """Load the checkpoint that the request selects, or the one before it where damage is proven.

    Args:
        manifest: the manifest to choose from, on rank zero; read once more only after trouble.
        coordinator: the ranks that load together: the choice is made once.
        on_damage: told of each checkpoint that is proven damaged, before the next one is tried.
        find_homes: asked, before any byte moves, where the tensors of these values get their memory. Fresh memory by
            default.
        on_agreed: told that every rank has found its homes: from here on bytes are read into them, unless it raises.

    Raises:
        CheckpointNotFoundError: nothing matches, or nothing is left.
        CorruptCheckpointError: the named checkpoint is damaged, or too many are.
        ConfigError: a component or name that is not there, or a pickled leaf without permission.
        StorageError: the store refused.
    """
    chooser = Chooser(store, manifest, request.selector, on_damage)
    for attempt in range(store.settings.max_fallbacks):
        chosen = entry_from_bytes(coordinator.exchange(f"choice-{attempt}", b"", chooser.choose))
        word: bytes | BaseException = b""
        loaded: Loaded | None = None
        fitting = Fitting(find_homes, on_agreed, coordinator, attempt)
        try:
            loaded = _load(store, chosen, request, fitting.find_homes if find_homes is not None else None)
        except FoundDamaged:
            pass  # whoever found it says so below
        except CorruptCheckpointError as exc:
            chooser.note(exc)
            word = fitting.stand_by(None) or str(exc).encode()
        except BaseException as exc:  # noqa: BLE001 - raised on every rank by the exchange
            word = fitting.stand_by(exc) or exc
        said = coordinator.exchange(f"loaded-{attempt}", word, chooser.judge, patient=True)
        if said == DONE and loaded is not None:
            return loaded
    raise CheckpointNotFoundError(f"{store.storage.url}: checkpoints were retired faster than they could be read")


@dataclass(slots=True)
class _Target:
    """The caller's objects, and what has happened to them.

    Attributes:
        state: component -> object.
        strict: whether names and shapes must match exactly.
        in_place: whether bytes may be read into the objects' own tensors.
        where: the checkpoint at hand.
        findings: what of it does not fit here.
        problems: what of it does not fit, seen from all ranks.
        overwritten: the memory that was read into, and where in the state it is.
        uses: where the checkpoint at hand is wanted in the state.
        begun: whether bytes may have been read into the objects' own memory.
    """

    state: Mapping[str, object]
    strict: bool
    in_place: bool
    where: str = ""
    findings: Findings = field(default_factory=Findings)
    problems: Sequence[str] = ()
    overwritten: dict[Region, str] = field(default_factory=dict)
    uses: Sequence[Use] = ()
    begun: bool = False

    def find_homes(self, outline: Outline, values: Mapping[str, Any]) -> Homes:
        """Where this checkpoint's tensors go. What cannot be restored is refused here, before any byte moves.

        Raises:
            StateMismatchError: the state does not fit, or has tensors that cannot be written; or this one stands in for
                a damaged one, and would leave some of that in the state.
        """
        where = self.where = outline.checkpoint.url
        found = self.findings = look(self.state, values)
        if self.strict and found.problems:
            raise self._refused([*found.problems, *sentences(found.unexpected)])
        take_out(values, found.left_out, outline.forget)
        uses = find_uses(self.state, values, outline)
        if refused := unwritable(uses):
            listed = "".join(f"\n  {problem}" for problem in refused)
            raise StateMismatchError(f"{where} cannot be restored into this state; nothing was changed:{listed}")
        written = {use.region for use in uses}
        if left := [path for region, path in self.overwritten.items() if region not in written]:
            # No damage: nothing is wrong with this checkpoint, and other objects can be restored from it.
            raise StateMismatchError(
                f"{where} has nothing for {', '.join(left[:10])}, overwritten from a damaged checkpoint that was tried "
                "before: restoring it would leave a mixture of both"
            )
        self.uses = uses
        homes = choose_homes(uses, outline, in_place=self.in_place)
        return replace(homes, left_out=found.left_out, word=found.to_bytes())

    def begin(self, homes: Homes, unexpected: Mapping[str, Sequence[str]]) -> None:
        """Bytes are read into these from here on, at any moment.

        Raises:
            StateMismatchError: some stored names have a place in no rank's state.
        """
        if self.strict and unexpected:
            raise self._refused(sentences(unexpected))
        self.problems = [*self.findings.problems, *sentences(unexpected)]
        note_changed(homes)
        for use in self.uses:
            if use.region is not None and use.place in homes.targets:
                self.overwritten[use.region] = use.path
        self.begun = self.begun or bool(homes.targets) or any(part.in_place for part in homes.parts.values())

    def _refused(self, problems: Sequence[str]) -> StateMismatchError:
        listed = "".join(f"\n  {problem}" for problem in problems)
        return StateMismatchError(
            f"the state does not fit {self.where}; nothing was changed:{listed}\nFix the state, name fewer components="
            "[...], or pass strict=False to restore what fits"
        )


def restore_chosen(
    store: ManifestStore,
    manifest: Manifest | None,
    request: LoadRequest,
    state: Mapping[str, object],
    *,
    coordinator: Coordinator,
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
        loaded = load_chosen(
            store,
            manifest,
            request,
            coordinator=coordinator,
            on_damage=on_damage,
            find_homes=target.find_homes,
            on_agreed=target.begin,
        )
    except BaseException as exc:
        if target.begun:
            _say_so(exc)
        raise
    for problem in target.problems:
        on_problem(problem)
    word: bytes | BaseException = b""
    try:
        fill(state, loaded.values, strict=strict)
    except BaseException as exc:  # noqa: BLE001 - raised on every rank by the exchange
        word = exc
    coordinator.exchange("filled", word, lambda words: words, patient=True)
    return loaded


def _say_so(error: BaseException) -> None:
    if isinstance(error, CloudCkptError) and error.args:
        text = str(error.args[0]).replace("; nothing was changed:", ":")
        error.args = (f"{text}. {_PARTLY}", *error.args[1:])
    else:
        error.add_note(_PARTLY)


def _load(store: ManifestStore, chosen: Checkpoint, request: LoadRequest, find_homes: FindHomes | None) -> Loaded:
    checkpoint = placed(chosen, store.storage.url)
    index = read_index(store.storage, checkpoint)
    components = _components(index, request, checkpoint)
    shapes_only = request.device is not None and request.device.type == "meta"
    outline = Outline(checkpoint, index, shapes_only=shapes_only)
    values: dict[str, Any]
    structure = {c: index.structure[c] for c in components}
    if request.names is None:
        values = _values(structure, outline, request)
    else:
        _check_names(index, components, request.names, checkpoint)
        names = frozenset(request.names)
        asked = {c: [n for n in index.tensors.get(c, {}) if n in names] for c in components}
        values = {c: {n: outline.tensor(c, n) for n in own} for c, own in asked.items()}
    if find_homes is not None:
        homes = find_homes(outline, values)
    else:
        homes = Homes(devices=dict.fromkeys(outline.entries, request.device) if request.device is not None else {})
    if homes.parts:
        # What the state holds a part of is a distributed tensor from here on.
        values = _values(structure, outline, request, homes)
        take_out(values, homes.left_out, outline.forget)
    done = map_files(_folder(store), outline, store.settings, verify=request.verify) if request.mmap else set()
    meter = request.meter or Meter(f"loading {checkpoint.name}", rank=request.rank)
    with watched(meter, request.listener or Listeners(), store.settings):
        fetch(store.storage, outline, homes, store.settings, done=done, meter=meter)
    return Loaded(checkpoint=checkpoint, index=index, values=values)


def _values(
    structure: Mapping[str, Any], outline: Outline, request: LoadRequest, homes: Homes | None = None
) -> dict[str, Any]:
    def tensor(component: str, name: str) -> torch.Tensor:
        found = outline.tensor(component, name)
        place = outline.place_of(found)
        part = homes.parts.get(place) if homes is not None and place is not None else None
        return found if part is None else part.value

    return unflatten(structure, tensor, outline.array, allow_pickle=request.allow_pickle, per_rank=request.per_rank)


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
