"""What an editor may change beside a running writer: labels, late metrics, letting go by hand.

Each is one transact under the epoch it finds; the running writer notices only that its next write reads once
more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import SupportsFloat

from cloudckpt.core import edits
from cloudckpt.core.arguments import checked_label, checked_labels, checked_metrics
from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.selection import Selector, parse_selector, select
from cloudckpt.errors import CheckpointNotFoundError
from cloudckpt.storage import ManifestStore
from cloudckpt.view import RunView, placed

__all__ = ["find", "mark", "pin", "release", "remove", "report_metrics", "tag"]

Change = Callable[[Manifest, str], Manifest]


def _edit(store: ManifestStore, selector: str | int, change: Change) -> Checkpoint:
    parsed = parse_selector(selector)
    chosen: list[str] = []

    def changed(current: Manifest, _: None) -> Manifest:
        # Chosen again for each manifest it is tried on: a prune in between may have taken the first choice.
        chosen[:] = [entry.id for entry in _resolve(current, parsed)]
        for save_id in chosen:
            current = change(current, save_id)
        return current

    after = store.transact(changed, prepare=lambda _: None)
    entry = after.find(chosen[-1])
    if entry is None:
        raise CheckpointNotFoundError(f"{selector!r} was retired and deleted while it was being changed")
    return placed(entry, store.storage.url)


def _resolve(manifest: Manifest, selector: Selector) -> list[Checkpoint]:
    """What a selector means to an editor, oldest first: a save in flight as well as what is committed.

    A save of a step that is committed already may never land; a pin of the step holds for both.
    """
    pending = [
        entry
        for entry in manifest.in_state(State.PENDING)
        if (selector.step is not None and entry.step == selector.step)
        or (selector.id is not None and entry.id.startswith(selector.id))
    ]
    try:
        return [select(manifest, selector), *pending]
    except CheckpointNotFoundError:
        if not pending:
            raise
        return pending


def find(store: ManifestStore, selector: str | int) -> Checkpoint:
    """What an edit would change, as it is now.

    Raises:
        CheckpointNotFoundError: the selector means nothing, or there is no run.
    """
    return placed(_resolve(RunView(store).manifest(), parse_selector(selector))[-1], store.storage.url)


def pin(store: ManifestStore, selector: str | int, *, pinned: bool = True) -> Checkpoint:
    """Exempt a checkpoint from every rule, or no longer.

    Raises:
        CheckpointNotFoundError: the selector means nothing.
    """
    return _edit(store, selector, lambda m, save_id: edits.pin(m, save_id, pinned=pinned, at=store.clock()))


def release(store: ManifestStore, selector: str | int) -> Checkpoint:
    """Release a checkpoint that ``repair`` admitted and held: rules may retire it from now on.

    Raises:
        CheckpointNotFoundError: the selector means nothing.
    """
    return _edit(store, selector, lambda m, save_id: edits.hold(m, save_id, held=False, at=store.clock()))


def tag(
    store: ManifestStore, selector: str | int, *, add: Iterable[str] = (), remove: Iterable[str] = ()
) -> Checkpoint:
    """Give a checkpoint further tags, or take some away.

    Raises:
        CheckpointNotFoundError: the selector means nothing.
        ConfigError: a tag is not 1 to 200 printable characters.
    """
    more, fewer = checked_labels(add, "a tag"), checked_labels(remove, "a tag")
    return _edit(store, selector, lambda m, save_id: edits.tag(m, save_id, add=more, remove=fewer, at=store.clock()))


def mark(store: ManifestStore, selector: str | int, label: str | None) -> Checkpoint:
    """Mark a checkpoint, for example as "diverged"; None takes its marks away.

    A marked one counts in no rule but pinned, and is only loaded by name.

    Raises:
        CheckpointNotFoundError: the selector means nothing.
    """
    checked = None if label is None else checked_label(label, "a mark")
    return _edit(store, selector, lambda m, save_id: edits.mark(m, save_id, checked, at=store.clock()))


def report_metrics(store: ManifestStore, selector: str | int, metrics: Mapping[str, SupportsFloat]) -> bool:
    """Add metrics to a save that was made earlier. Pending: they count at its commit; committed: at once.

    Returns:
        False if the checkpoint was already retired, or is not there at all: nothing was changed.

    Raises:
        ConfigError: a metric is not a number, or the selector is none of the spellings.
    """
    checked = checked_metrics(metrics)
    try:
        _edit(store, selector, lambda m, save_id: edits.report_metrics(m, save_id, checked, at=store.clock()))
    except CheckpointNotFoundError:
        return False
    return True


def remove(
    store: ManifestStore, selectors: Iterable[str | int], *, reason: str = "removed by hand"
) -> list[Checkpoint]:
    """Retire checkpoints by hand, whatever the rules say; ``sweep`` deletes their bytes.

    Raises:
        CheckpointNotFoundError: a selector means nothing; then none is retired.
    """
    parsed = [parse_selector(selector) for selector in selectors]
    chosen: list[Checkpoint] = []

    def change(current: Manifest, _: None) -> Manifest:
        chosen[:] = [select(current, selector) for selector in parsed]
        return edits.retire(current, [c.id for c in chosen], reason, at=store.clock())

    store.transact(change, prepare=lambda _: None)
    return [placed(checkpoint, store.storage.url) for checkpoint in chosen]
