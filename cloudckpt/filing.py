"""Files that somebody else's library writes: taken in as one component of a save, and given back as a folder.

It is a save and a load like any other: announced before the first byte, split over the ranks, verified, retired and
deleted by the same rules. What is particular is where the bytes are: in files, whose pages are mapped instead of read.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cloudckpt.coordination import Coordinator
from cloudckpt.core.folder import COMPONENT, files_in, folder_value
from cloudckpt.core.model import Checkpoint, Manifest, TensorEntry
from cloudckpt.core.selection import Selector
from cloudckpt.errors import ConfigError, CorruptCheckpointError, FormatError, SaveError, StorageError
from cloudckpt.events import Listener, Warned
from cloudckpt.loading import Loaded, LoadRequest, load_chosen
from cloudckpt.own_folder import OwnFolder
from cloudckpt.storage import ManifestStore
from cloudckpt.tensors.files import Stamp, flush_files, folder_holds, make_files, map_files_of, stamp_of
from cloudckpt.tensors.fit import Findings
from cloudckpt.tensors.outline import Outline, Place
from cloudckpt.tensors.targets import Homes

__all__ = ["FolderState", "checked_folder", "give_back", "staging_folder"]

_STAGING = "cloudckpt-staging-"
_PULLING = ".cloudckpt-pulling-"
_TOKEN_DIGITS = 16
#: So many names stand in an error.
_NAMED = 5


def checked_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder of this machine.

    Raises:
        ConfigError: it is a URL, or no path.
    """
    text = os.fspath(folder)
    if not isinstance(text, str) or not text or "://" in text:
        raise ConfigError(f"{folder!r} is no folder of this machine: write a path such as ./out")
    return Path(text).expanduser()


class FolderState:
    """A folder as the value of a component. Every rank looks for its files itself, when the save is planned.

    Args:
        folder: the folder.
        needed: whether this rank must have files. Of several machines only one may have written any.
    """

    def __init__(self, folder: Path, *, needed: bool = True) -> None:
        self._folder = folder
        self._needed = needed
        self._stamps: dict[str, Stamp | None] = {}

    def state_dict(self) -> dict[str, Any]:
        """Its files, as rows of bytes over their own pages.

        Raises:
            ConfigError: there is none, or something that is no file.
            StorageError: something cannot be opened.
        """
        files = map_files_of(self._folder) if self._needed or self._folder.is_dir() else {}
        if self._needed and not files:
            raise ConfigError(f"{self._folder} has no files: write the checkpoint into it before it is saved")
        for name in files:
            self._stamps.setdefault(name, stamp_of(self._folder / name))
        return folder_value(files)

    def confirm(self) -> None:
        """Look whether a file was written to since it was mapped. One that was removed or replaced stays what it was.

        Raises:
            SaveError: some were; names them.
        """
        now = {name: stamp_of(self._folder / name) for name in self._stamps}
        changed = [name for name, before in self._stamps.items() if before and before.was_written(now[name])]
        if changed:
            more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
            raise SaveError(
                f"{self._folder}: {', '.join(changed[:_NAMED])}{more} changed while being saved. Nothing of this save "
                "is kept: save once nobody writes to the folder any more"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Files are given back by ``restore_folder`` and ``load_folder``, which ask where to."""
        raise TypeError(f"{self._folder}: restore_folder() gives files back; this has {len(state_dict)} fields")


def staging_folder(coordinator: Coordinator, within: Path) -> OwnFolder:
    """An empty folder for a host library to write into, the same for all ranks of one machine. Collective.

    Raises:
        StorageError: it cannot be made, on any rank.
    """
    token = coordinator.exchange("staging-token", b"", lambda words: [_token()] * len(words))
    word: bytes | BaseException = b""
    made: OwnFolder | None = None
    try:
        made = OwnFolder(within, _STAGING, token.decode(), private=True)
    except Exception as exc:  # noqa: BLE001 - raised on every rank by the exchange
        word = exc
    try:
        coordinator.exchange("staging", word, lambda words: words, patient=True)
    except BaseException:
        if made is not None:
            made.remove()
        raise
    assert made is not None
    return made


def _token() -> bytes:
    return secrets.token_hex(_TOKEN_DIGITS // 2).encode()


def give_back(
    store: ManifestStore,
    manifest: Manifest | None,
    selector: Selector,
    into: Path,
    *,
    coordinator: Coordinator,
    on_damage: Callable[[Checkpoint, CorruptCheckpointError], None],
    listener: Listener,
) -> tuple[Loaded, Path]:
    """The files of the selected checkpoint as the folder ``checkpoint-<step>`` in ``into``. Collective.

    One rank of each machine reads, straight into the files; the folder appears when all of them are proven. What is
    there already with the very same files is used as it is; with others it is moved aside.

    Args:
        listener: told what a person should know, and how far it is, where it takes long.

    Returns:
        the checkpoint, and the folder on this machine.

    Raises:
        FormatError: the checkpoint was not saved from a folder.
        StorageError: the store or the disk refused.
        CloudCkptError: as for ``load_chosen``.
    """
    pull = _Pull(into, lambda text: listener(Warned(message=text)), leads=_leads(coordinator, into))
    request = LoadRequest(selector=selector, optional=(COMPONENT,), listener=listener, rank=coordinator.rank)
    try:
        loaded = load_chosen(
            store, manifest, request, coordinator=coordinator, on_damage=on_damage, find_homes=pull.find_homes
        )
        word: bytes | BaseException = b""
        try:
            pull.finish()
        except Exception as exc:  # noqa: BLE001 - raised on every rank by the exchange
            word = exc
        coordinator.exchange("restore-folder", word, lambda words: words, patient=True)
    finally:
        pull.discard()
    return loaded, pull.target


def _leads(coordinator: Coordinator, into: Path) -> bool:
    """Whether this rank reads: the first of those that see the same folder."""
    word: bytes | BaseException
    try:
        into.mkdir(parents=True, exist_ok=True)
        info = into.stat()
        word = json.dumps([socket.gethostname(), _boot(), info.st_dev, info.st_ino]).encode()
    except OSError as exc:
        word = StorageError(f"{into} cannot be used: {exc.strerror or exc}")
    return coordinator.exchange("places", word, _first_of_each) == b"1"


def _boot() -> str:
    """What tells machines of one name apart, where the system says it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _first_of_each(words: Sequence[bytes]) -> list[bytes]:
    return [b"1" if words.index(word) == rank else b"0" for rank, word in enumerate(words)]


class _Pull:
    """Where the files of the checkpoint at hand go.

    Args:
        into: the folder's parent.
        tell: told what a person should know.
        leads: whether this rank reads.
    """

    def __init__(self, into: Path, tell: Callable[[str], None], *, leads: bool) -> None:
        self.target = into
        self._into = into
        self._tell = tell
        self._leads = leads
        self._part: OwnFolder | None = None
        self._entries: Mapping[str, TensorEntry] = {}

    def find_homes(self, outline: Outline, values: Mapping[str, Any]) -> Homes:
        """Every file gets its memory: its own pages, made now, in a folder that nobody looks for.

        Raises:
            FormatError: these are no files, or their paths cannot be.
            StorageError: the disk has no room, or refuses.
        """
        checkpoint = outline.checkpoint
        self.discard()  # of a checkpoint that was found damaged
        files = files_in(values.get(COMPONENT), checkpoint.url)
        places = {path: _place(outline, path, row) for path, row in files.items()}
        if len({*places.values()}) != len(places):
            raise FormatError(f"{checkpoint.url}: two files of the folder share their bytes")
        self.target = self._into / f"checkpoint-{checkpoint.step}"
        self._entries = {path: outline.entries[place] for path, place in places.items()}
        word = Findings().to_bytes()
        if not self._leads or folder_holds(self.target, self._entries):
            for row in files.values():
                outline.forget(row)
            return Homes(word=word)
        self._part = OwnFolder(self._into, _PULLING, _token().decode())
        rows = make_files(self._part.path, {path: entry.shape[0] for path, entry in self._entries.items()})
        return Homes(targets={place: rows[path] for path, place in places.items()}, word=word)

    def finish(self) -> None:
        """Everything is proven: let the folder appear.

        Raises:
            StorageError: the disk refuses.
        """
        part = self._part
        if part is None:
            return
        flush_files(part.path)
        try:
            if self.target.exists():
                # On a disk that several machines share, another one may have been quicker.
                if folder_holds(self.target, self._entries):
                    return
                aside = self._into / f".replaced-{self.target.name}-{_token().decode()}"
                self.target.rename(aside)
                self._tell(f"{self.target} had other files than the checkpoint: they are in {aside} now")
            part.keep(self.target)
        except OSError as exc:
            # Or it was between that look and now.
            if not folder_holds(self.target, self._entries):
                raise StorageError(f"{self.target} cannot be put in place: {exc.strerror or exc}") from exc

    def discard(self) -> None:
        """Remove what did not appear."""
        part, self._part = self._part, None
        if part is not None:
            part.remove()


def _place(outline: Outline, path: str, row: object) -> Place:
    place = outline.place_of(row) if isinstance(row, torch.Tensor) else None
    if place is not None:
        entry = outline.entries[place]
        if entry.dtype == "uint8" and len(entry.shape) == 1:
            return place
    raise FormatError(f"{outline.checkpoint.url}: {path!r} is no row of bytes")
