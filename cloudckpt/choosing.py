"""Which checkpoint is loaded: chosen once for all ranks, by rank zero, and changed only by what any of them proves."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cloudckpt.coordination import Coordinator
from cloudckpt.core.manifest_json import entry_to_bytes
from cloudckpt.core.model import Checkpoint, Manifest, State
from cloudckpt.core.selection import Selector, select
from cloudckpt.errors import CheckpointNotFoundError, CorruptCheckpointError
from cloudckpt.storage import ManifestStore
from cloudckpt.tensors.fit import in_common
from cloudckpt.tensors.outline import Outline
from cloudckpt.tensors.targets import Homes
from cloudckpt.view import placed

__all__ = ["AGAIN", "DONE", "Chooser", "FindHomes", "Fitting", "FoundDamaged", "OnAgreed"]

#: What rank zero answers once everybody has read what was chosen; and if another one is to be chosen.
DONE, AGAIN = b"done", b"again"


class Chooser:
    """Chooses, once for all ranks: rank zero's part of a load.

    Args:
        manifest: what is chosen from; on rank zero only.
    """

    def __init__(
        self,
        store: ManifestStore,
        manifest: Manifest | None,
        selector: Selector,
        on_damage: Callable[[Checkpoint, CorruptCheckpointError], None],
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._selector = selector
        self._on_damage = on_damage
        self._damaged: set[str] = set()
        self._last: CorruptCheckpointError | None = None
        self._own: CorruptCheckpointError | None = None
        self._chosen: Checkpoint | None = None

    def note(self, error: CorruptCheckpointError) -> None:
        """What this process found wrong itself, with all that it knows."""
        self._own = error

    def choose(self, words: Sequence[bytes]) -> list[bytes]:
        """The checkpoint to read, for every rank."""
        assert self._manifest is not None
        self._own = None
        try:
            self._chosen = select(_without(self._manifest, self._damaged), self._selector)
        except CheckpointNotFoundError as exc:
            raise (self._last or exc) from exc
        return [entry_to_bytes(self._chosen)] * len(words)

    def judge(self, words: Sequence[bytes]) -> list[bytes]:
        """What becomes of the load, now that every rank has read, or found damage.

        Raises:
            CorruptCheckpointError: the named checkpoint is damaged, or too many are.
            CheckpointNotFoundError: the named checkpoint was retired meanwhile.
        """
        chosen = self._chosen
        assert chosen is not None
        found = next(((rank, word.decode()) for rank, word in enumerate(words) if word), None)
        if found is None:
            return [DONE] * len(words)
        rank, text = found
        error = self._own or CorruptCheckpointError(f"{text} (found by rank {rank})", checkpoint_id=chosen.id)
        self._manifest = self._store.read() or self._manifest
        now = self._manifest.find(chosen.id) if self._manifest else None
        if now is None or now.state is not State.COMMITTED:
            # Retired while it was being read: choose again, unless this very one was asked for.
            if self._selector.named:
                raise CheckpointNotFoundError(
                    f"{placed(chosen, self._store.storage.url).url} was retired while it was being read"
                ) from error
            return [AGAIN] * len(words)
        if now.index_digest != chosen.index_digest:
            # The manifest came otherwise before than it is: what was read was held against a digest that nobody sealed.
            return [AGAIN] * len(words)
        self._on_damage(placed(now, self._store.storage.url), error)
        if self._selector.named or len(self._damaged) + 1 >= self._store.settings.max_fallbacks:
            raise error
        self._damaged.add(chosen.id)
        self._last = error
        return [AGAIN] * len(words)


FindHomes = Callable[[Outline, Mapping[str, Any]], Homes]
#: Told that every rank has found its homes, and for which stored names none of them has a use, by place in the state.
OnAgreed = Callable[[Homes, Mapping[str, Sequence[str]]], None]


class FoundDamaged(Exception):  # noqa: N818 - nothing is wrong here
    """Another rank has found the checkpoint damaged: nobody needs to read it."""


class Fitting:
    """No rank reads a byte before the state of every rank fits.

    Args:
        find_homes: where this rank's bytes go; None if they go into fresh memory, where everything fits.
        on_agreed: from here on bytes are read into the homes, unless it raises.
    """

    def __init__(
        self, find_homes: FindHomes | None, on_agreed: OnAgreed, coordinator: Coordinator, attempt: int
    ) -> None:
        self._find_homes = find_homes
        self._on_agreed = on_agreed
        self._coordinator = coordinator
        self._topic = f"fits-{attempt}"
        self._is_due = find_homes is not None

    def find_homes(self, outline: Outline, values: Mapping[str, Any]) -> Homes:
        """This rank's homes, once all ranks have theirs.

        Raises:
            FoundDamaged: a rank stands by, and will say why.
        """
        assert self._find_homes is not None
        word: bytes | BaseException = b""
        homes = Homes()
        try:
            homes = self._find_homes(outline, values)
            word = homes.word
        except BaseException as exc:  # noqa: BLE001 - raised on every rank by the exchange
            word = exc
        answer = self._exchange(word)
        if not answer:
            raise FoundDamaged
        self._on_agreed(homes, json.loads(answer))
        return homes

    def stand_by(self, error: BaseException | None) -> BaseException | None:
        """This rank has come to its end, perhaps before it could be asked whether its state fits: the others ask.

        Args:
            error: why none of them is to go on; None if that is told later, as damage is.

        Returns:
            what all ranks are told instead, if anything.
        """
        if self._is_due:
            try:
                self._exchange(b"" if error is None else error)
            except BaseException as exc:  # noqa: BLE001 - the caller's to tell
                return exc
        return None

    def _exchange(self, word: bytes | BaseException) -> bytes:
        self._is_due = False
        return self._coordinator.exchange(self._topic, word, _useless, patient=True)


def _useless(words: Sequence[bytes]) -> list[bytes]:
    return [json.dumps(in_common(words)).encode() if all(words) else b""] * len(words)


def _without(manifest: Manifest, ids: Collection[str]) -> Manifest:
    return replace(manifest, entries=tuple(e for e in manifest.entries if e.id not in ids)) if ids else manifest
