"""A folder of files as one component: what a host library wrote, stored as tensors are and given back as files.

Nothing in the format is new. The component ``folder`` has the structure ``{"folder": 1, "files": {path: tensor}}``, and
each file is a row of bytes (uint8) in a payload object like any other tensor's: with its sums, split over the ranks,
verified, retired and deleted by the same rules. Whoever reads format 1 reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeVar

from cloudckpt.core.model import Index, TensorEntry
from cloudckpt.errors import FormatError

__all__ = ["COMPONENT", "files_in", "folder_value", "path_problem", "stored_files"]

_Bytes = TypeVar("_Bytes")

#: The component that a folder is saved as.
COMPONENT: Final = "folder"

#: What tells a folder of files from a mapping of the same name that somebody saved.
_KIND: Final = 1


def folder_value(files: Mapping[str, _Bytes]) -> dict[str, Any]:
    """The component's value.

    Args:
        files: path inside of the folder, parts joined with ``/`` -> the file's bytes.
    """
    return {"folder": _KIND, "files": dict(files)}


def path_problem(path: str) -> str | None:
    """Why no file inside of a folder can have this path; None if one can.

    A path comes from a store that others may be able to write to: none may lead out of the folder it is given back to.
    """
    if any(part in {"", ".", ".."} for part in path.split("/")):
        return "it is empty, absolute, or goes through '.', '..' or an empty name"
    if "\\" in path or not path.isprintable():
        return "it has a backslash or a character that cannot be printed"
    return None


def files_in(value: Any, where: str) -> dict[str, Any]:
    """The files of a component's value: path -> whatever stands for its bytes.

    Args:
        value: as ``folder_value`` made it; None for no such component.
        where: the checkpoint, for messages.

    Raises:
        FormatError: it is no folder of files, or one with paths that cannot be.
    """
    if not _is_folder(value):
        raise FormatError(f"{where} was not saved from a folder of files: restore() or load() reads it")
    files: dict[str, Any] = value["files"]
    for path in files:
        problem = path_problem(path) if isinstance(path, str) else "it is no text"
        if problem is not None:
            raise FormatError(f"{where}: a file cannot be given back as {path!r}: {problem}")
        for end in (n for n, character in enumerate(path) if character == "/"):
            if path[:end] in files:
                raise FormatError(f"{where}: {path[:end]!r} is a file and the folder of {path!r}")
    return files


def stored_files(index: Index, where: str) -> dict[str, TensorEntry] | None:
    """What the index says of each file of a folder, without torch; None if the checkpoint was not saved from one.

    Args:
        where: the checkpoint, for messages.

    Raises:
        FormatError: the paths cannot be, or a file has no bytes.
    """
    node: Any = index.structure.get(COMPONENT)
    if not _is_folder(node):
        return None
    entries = index.tensors.get(COMPONENT, {})
    try:
        # As the codec spells a mapping: names that begin with a dollar sign stand in a list of pairs.
        pairs = node["files"].get("$dict") or node["files"].items()
        found = {path: entries[reference["$tensor"]] for path, reference in pairs}
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise FormatError(f"{where}: a file of the folder has no bytes in the index: {exc!r}") from exc
    return files_in(folder_value(found), where)


def _is_folder(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"folder", "files"}
        and type(value["folder"]) is int
        and value["folder"] == _KIND
        and isinstance(value["files"], dict)
    )
